"""`tokred bench --end-to-end`: what it measures of a model under a rule, on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tokcompile.bench import endbench
from tokcompile.capturing.dynamo import prepare, without_flags
from tokcompile.cli import app
from tokcompile.models import catalogue, zoo
from tokcompile.modelsource import from_config, load_source

RUN = CliRunner()
pytestmark = pytest.mark.usefixtures("one_thread")


def measured(model: str, rule: str, **options: object) -> endbench.Ends:
    sizes = {"words": 20, "steps": 2, "rounds": 1, "target": "eager"}
    return endbench.bench_ends(load_source(model), rule, options, device="cpu", dtype=torch.float32, **sizes)


def test_dropped_tokens_have_an_ideal_with_the_same_choices() -> None:
    found = measured("zoo:llava-tiny", "fastv", layer=2, keep=4)
    image, words = 16, found.prompt - 16
    assert [way.name for way in found.ways] == ["eager", "full", "ruled", "ideal"]
    assert found.ideal == "replayed"
    assert found.way("full").kept == (image + words,) * 2
    assert found.way("ruled").kept == found.way("ideal").kept == (4 + words, image + words)
    assert all(way.prefill > 0 and way.decode > 0 and way.peak is None for way in found.ways)


def test_a_model_of_shapes_alone_gets_weights_and_an_image() -> None:
    """As a configuration of billions of parameters is given."""
    shapes = from_config(zoo.load("llava-tiny").model.config, "a configuration")
    assert shapes.weights == "none"
    sizes = {"words": 4, "steps": 1, "rounds": 1, "target": "eager"}
    found = endbench.bench_ends(shapes, "divprune", {"keep": 3}, device="cpu", dtype=torch.float32, **sizes)
    assert found.ideal == "replayed"
    assert [way.kept for way in found.ways] == [(n, n) for n in (found.prompt, found.prompt, *[found.prompt - 13] * 2)]


def test_a_model_that_takes_any_image_is_given_one_of_a_size() -> None:
    config = catalogue.family("qwen2_5_vl").build().config
    sizes = {"words": 4, "steps": 1, "rounds": 1, "target": "eager"}
    shapes = from_config(config, "a configuration", image=(40, 48))
    found = endbench.bench_ends(shapes, "fastv", {"layer": 1, "keep": 10}, device="cpu", dtype=torch.float32, **sizes)
    assert found.prompt == 17 + 30 + 4 and found.ideal == "replayed"
    assert found.way("ruled").kept == (found.prompt - 20, found.prompt)


def test_a_model_without_a_rule_is_compiled_as_pytorch_compiles_it() -> None:
    """Also after a rule: its flags let PyTorch trace reads of values, on which some models then fail."""
    prepare()
    with without_flags():
        assert not torch._dynamo.config.capture_scalar_outputs
    assert torch._dynamo.config.capture_scalar_outputs


def test_evicted_keys_have_an_ideal_that_never_had_them() -> None:
    found = measured("zoo:llama-tiny", "knorm", budget=7)
    assert found.ideal == "short"
    assert [way.kept for way in found.ways] == [(found.prompt,) * 2, (found.prompt,) * 2, (7, 7), (7, 7)]
    assert json.loads(json.dumps(found.to_dict()))["ways"][2]["kept"] == [7, 7]


def test_chosen_keys_have_an_ideal_that_has_no_others() -> None:
    found = measured("zoo:llama-tiny", "tokenselect", middle=4, first=2, last=3)
    assert found.ideal == "short"
    assert [way.kept for way in found.ways] == [(found.prompt,) * 2] * 3 + [(9, 9)]


@pytest.mark.skipif(torch.__version__ < "2.12", reason="Inductor 2.11 fails on CPUs on the model's own mask")
def test_the_command_prints_ratios() -> None:
    words = ["--device", "cpu", "--dtype", "float32", "--prompt", "8", "--new", "1", "--rounds", "1"]
    ran = RUN.invoke(app, ["bench", "--end-to-end", *words, "zoo:llama-tiny", "knorm", "budget=5"])
    assert ran.exit_code == 0, ran.stderr
    lines = {line.split()[0]: line.split() for line in ran.stdout.splitlines() if line.strip()}
    assert lines["ruled"][-1] == "5" and lines["ruled"][2] == "1.00x"
    assert float(lines["full"][2].removesuffix("x")) > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--end-to-end"], "a model and a rule are needed"),
        (["--end-to-end", "--kernels"], "two things to time were named"),
        (["--end-to-end", "zoo:llama-tiny", "knorm", "--dtype", "float8"], "no weights are of 'float8'"),
        (["--end-to-end", "zoo:llama-tiny", "knorm", "budget=x", "--device", "cpu"], "budget"),
        (["--end-to-end", "zoo:vit-tiny", "tome", "--device", "cpu"], "the model takes no text"),
    ],
)
def test_what_cannot_be_measured_is_said(words: list[str], said: str) -> None:
    ran = RUN.invoke(app, ["bench", *words])
    assert ran.exit_code == 1 and said in ran.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_estimated() -> None:
    ran = RUN.invoke(app, ["bench", "--end-to-end", "zoo:llama-tiny", "knorm"])
    assert ran.exit_code == 1 and "there is none here" in ran.stderr
