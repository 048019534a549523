"""The commands on models: a folder with a configuration is enough, errors say what to do."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import unloaded
from transformers import LlamaConfig, PretrainedConfig
from typer.testing import CliRunner

from tokcompile.cli import app
from tokcompile.models import catalogue, families, zoo
from tokcompile.pages.sitepages import spans

RUN = CliRunner()
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(families.llava_config(VISION, TEXT, image_token_index=4), tmp_path_factory.mktemp("llava"))


def saved(config: PretrainedConfig, path: Path) -> str:
    config.save_pretrained(path)
    return str(path)


def as_json(*words: str) -> dict:
    result = RUN.invoke(app, [*words, "--json"])
    return json.loads(result.stdout)


def test_sites(folder: str) -> None:
    (graph,) = as_json("sites", folder)["graphs"]
    vision, decoder = graph["stacks"]
    assert (vision["stack"], vision["blocks"], vision["features"], vision["tokens"]) == ("vision", 3, 1, 17)
    assert (decoder["stack"], decoder["blocks"], decoder["heads"], decoder["kv_heads"]) == ("decoder", 3, 4, 2)
    assert decoder["head_size"] == 8 and decoder["caches"] == 3 and decoder["positions"][0].startswith("rotary")
    assert "projector.input" in graph["addresses"] and graph["sites"]["projector"]["input"] == [1, 16, 32]


def test_sites_for_people(folder: str) -> None:
    result = RUN.invoke(app, ["sites", folder])
    assert result.exit_code == 0
    assert "3 (output from 1)" in result.stdout and "decoder.0..2.attention" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


def test_sites_of_a_language_model(tmp_path: Path) -> None:
    (graph,) = as_json("sites", saved(LlamaConfig(**TEXT), tmp_path))["graphs"]
    assert [stack["stack"] for stack in graph["stacks"]] == ["decoder"]
    assert "projector" not in graph["sites"]


def test_explain_with_a_page(folder: str, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "explain.html"
    result = RUN.invoke(app, ["explain", folder, "hiprune", "keep=1/4", "alpha=0.2", "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert "decoder.2" in result.stdout and f"wrote {page}" in result.stdout.replace("\n", "")
    assert page.read_text().startswith("<!doctype html>")


def test_explain_as_json(folder: str) -> None:
    data = as_json("explain", folder, "fastv", "keep=4", "layer=1", "--batch", "2")
    assert data["rules"] == [{"rule": "fastv", "layer": 1, "keep": 4}]
    tokens = [row["tokens"] for row in data["parts"][0]["after"]["rows"] if row["stack"] == "decoder"]
    assert tokens == [tokens[0], tokens[0] - 12, tokens[0] - 12]


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["explain", "FOLDER", "fastv", "keep"], "'keep' is not an option of a rule"),
        (["explain", "FOLDER", "fastv", "keep=2", "keep=3"], "option 'keep' is given twice"),
        (["explain", "FOLDER", "fastv", "kept=2"], "rule 'fastv' has no option 'kept'"),
        (["explain", "FOLDER", "fast", "keep=2"], "there is no rule 'fast'"),
        (["sites", "/nowhere/at/all"], "model '/nowhere/at/all' cannot be loaded: no folder or model of that name"),
        (["sites", "zoo:nothing"], "the zoo has no model 'nothing'"),
    ],
)
def test_errors(words: list[str], cause: str, folder: str) -> None:
    words = [folder if word == "FOLDER" else word for word in words]
    result = RUN.invoke(app, words)
    assert result.exit_code == 1
    assert cause in result.stderr and "try: " in result.stderr
    error = as_json(*words)["error"]
    assert error["cause"] == cause and error["remedy"]


def test_an_empty_folder(tmp_path: Path) -> None:
    error = as_json("sites", str(tmp_path))["error"]
    assert "this folder holds no readable config.json" in error["cause"]


def test_a_zoo_model() -> None:
    (graph,) = as_json("sites", "zoo:llava-tiny")["graphs"]
    assert [stack["stack"] for stack in graph["stacks"]] == ["vision", "decoder"]


SITES: dict[str, dict[str, Any]] = {
    "gemma2": {
        "heads": (4, 2),
        "positions": ["rotary [1, 17, 1]"],
        "windows": {"0, 2": 12, "1, 3": None},
        "caches": {"0, 2": [[1, 2, 11, 16]] * 2, "1, 3": [[1, 2, 17, 16]] * 2},
    },
    "gemma3_text": {"positions": ["rotary [1, 17, 1] (blocks 0, 2)", "rotary [1, 17, 1] (blocks 1, 3)"]},
    "smollm3": {"positions": ["rotary [1, 17, 1] (blocks 0..1, 3)"], "windows": {"0..3": None}},
    "mistral": {"heads": (4, 2), "windows": {"0..3": 12}},
    "deepseek_v3": {"heads": (4, 4), "caches": {"0..3": [[1, 1, 17, 8], [1, 1, 17, 16]]}},
    "bert": {"positions": ["learned"], "caches": {}},
    "modernbert": {"windows": {"0, 3": None, "1..2": 9}},
    "t5": {"positions": ["bias"], "path": "decoder.block.0..2", "cross": ([0, 1, 2], 17)},
    "dit": {"positions": ["fixed"], "parts": "4×4"},
    "beit": {"positions": ["bias"], "parts": "1 + 4×4"},
    "internvl": {"heads": (4, 2), "caches": {"0..3": [[1, 2, 42, 16]] * 2}},
}


USUAL = ("gemma2", "gemma3_text", "deepseek_v3", "bert", "t5", "dit")  # the others are slow tests


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in SITES])
def test_sites_of_a_family(name: str) -> None:
    """Heads, positions, windows and caches of its last stack."""
    (graph,) = as_json("sites", f"zoo:{name}")["graphs"]
    stack = graph["stacks"][-1]
    found = {
        "heads": (stack["heads"], stack["kv_heads"]),
        # transformers 5.17 makes the angles by a product of matrices, with tokens last.
        "positions": [text.replace("[1, 1, 17]", "[1, 17, 1]") for text in stack["positions"]],
        "windows": {spans(each["blocks"]): each["window"] for each in stack["sees"]},
        "caches": {spans(each["blocks"]): each["shapes"] for each in stack["cache_shapes"]},
        "path": stack["path"],
        "parts": stack["token_parts"],
        "cross": (stack["cross_attention"]["blocks"], stack["cross_attention"]["keys"]),
    }
    wanted = SITES[name]
    assert {key: found[key] for key in wanted} == wanted
    assert f"{stack['stack']}.0..{stack['blocks'] - 1}.attention" in graph["addresses"]
    assert graph["numbers"][f"{stack['stack']}.depth"] == stack["blocks"]


@pytest.mark.usefixtures("one_thread")
def test_pieces_are_shown_with_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was when a product of sizes by NumPy was no number."""
    monkeypatch.setattr("tokcompile.capturing.dynamo._numbers", lambda variable: None)
    result = RUN.invoke(app, ["sites", "zoo:llava_next"])
    assert result.exit_code == 0, result.output
    words = result.stdout.split()
    assert result.stdout.count("addresses: ") == 2 and {"vision.0..2.attention,", "decoder.0..3.attention,"} <= {*words}
    assert "3 graphs without transformer blocks" in result.stdout


@pytest.mark.usefixtures("one_thread")
def test_explain_a_family() -> None:
    data = as_json("explain", "zoo:paligemma", "random", "keep=4")
    before, after = (data["parts"][0][when]["rows"][-1]["tokens"] for when in ("before", "after"))
    assert before - after == 25 - 4


def test_a_family_that_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was without what is computed before the graph."""
    monkeypatch.setattr("tokcompile.capturing.capture.precompute", lambda model, inputs: dict(inputs))
    monkeypatch.setattr("tokcompile.capturing.capture.packed", nullcontext)
    error = as_json("sites", "zoo:qwen2_vl")["error"]
    assert error["cause"] == "the model decides by a size that is known only when it runs"
    assert "modeling_qwen2_vl.py" in error["where"][0]


def test_models_are_listed() -> None:
    found = {line["name"]: line for line in as_json("models")}
    assert {*catalogue.families(), *zoo.ZOO} == {*found}
    assert found["whisper"]["kind"] == "encoder-decoder" and found["dit"]["source"] == "local"
    lines = RUN.invoke(app, ["models"]).stdout.splitlines()
    assert len(lines) == 1 + len(found) and lines[0].split() == ["name", "kind", "source", "about"]


def test_a_name_that_is_nearly_right() -> None:
    remedy = as_json("sites", "zoo:qwen3_mo")["error"]["remedy"]
    assert remedy == "did you mean 'qwen3_moe'? `tokred models` lists them all"


def test_a_family_whose_module_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = catalogue.family("bert").model_copy(update={"needs": "no_such_module"})
    monkeypatch.setitem(catalogue.families(), "bert", lacking)
    error = as_json("sites", "zoo:bert")["error"]
    assert error["cause"] == "the family 'bert' needs no_such_module, which cannot be imported"


@pytest.mark.slow
@pytest.mark.parametrize("name", catalogue.families())
def test_every_family_shows_its_sites_or_says_why_not(name: str) -> None:
    if why := unloaded.missing(catalogue.family(name).needs):
        pytest.skip(why)
    result = RUN.invoke(app, ["sites", f"zoo:{name}"])
    assert "addresses: " in result.stdout or "known only when it runs" in result.stderr, result.output
