"""The commands on models: a folder with a configuration is enough, errors say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, PretrainedConfig
from typer.testing import CliRunner

from tokcompile.cli import app
from tokcompile.models import families

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
