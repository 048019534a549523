"""Models that are known by their configuration alone: what they are given to read, and what can be said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import unloaded
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from typer.testing import CliRunner

from tokcompile.cli import app
from tokcompile.errors import TokredError
from tokcompile.exampleinputs import example_inputs, longer
from tokcompile.models import catalogue, zoo
from tokcompile.modelsource import capture_source, load_source
from tokcompile.sites import find_sites

RUN = CliRunner()
pytestmark = pytest.mark.usefixtures("one_thread")
VLMS = [name for name, family in catalogue.families().items() if family.kind == "vlm"]
ANY_SIZE = [name for name in VLMS if {"sizes", "grids"} & catalogue.family(name).options.keys()]
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE = (40, 48)


def built(name: str) -> nn.Module:
    """A family's small model."""
    if why := unloaded.missing(catalogue.family(name).needs):
        pytest.skip(why)
    return catalogue.family(name).build()


def saved(name: str, path: Path) -> str:
    """A folder with the configuration of a family's small model."""
    built(name).config.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", VLMS)
def test_a_configuration_is_enough_for_every_family(name: str, tmp_path: Path) -> None:
    """Shapes alone are captured as one graph, with the image in it."""
    image = IMAGE if name in ANY_SIZE else None
    source = load_source(saved(name, tmp_path), image=image)
    assert all(isinstance(p, FakeTensor) for p in source.model.parameters())
    tried, (program,) = capture_source(source)
    assert "pixel_values" in source.inputs and tried.weights == "none"
    inputs = {node.name for node, kind in program.kinds.items() if kind == "input"}
    assert not [each for each in inputs if "module" in each or "parameter" in each]
    assert {"l_input_ids_", "l_pixel_values_"} <= {each.replace("kwargs_", "") for each in inputs}
    assert find_sites(program).stacks.keys() >= {"vision", "decoder"}


@pytest.mark.parametrize("name", PACKED)
def test_the_size_of_the_image_says_how_many_tokens_it_has(name: str, tmp_path: Path) -> None:
    """8 pixels a token in each direction: 5 x 6 tokens."""
    ran = RUN.invoke(app, ["explain", saved(name, tmp_path), "pospad", "keep=10", "--image", "40x48", "--json"])
    assert ran.exit_code == 0, ran.stdout
    found = json.loads(ran.stdout)
    tokens = found["inputs"]["input_ids"][1]
    (mark,) = [step for step in found["parts"][0]["applied"][0]["steps"] if step["verb"] == "mark"]
    # Everything else, the ten, and a run before each of them and after the last.
    assert tokens == 17 + 30 and (mark["from"], mark["to"]) == (str(tokens), str(17 + 10 + 11))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["zoo:qwen2_5_vl", "fastv", "--image", "44x48"], "multiples of 8, such as 48 x 48"),
        (["zoo:qwen2_5_vl", "fastv", "--image", "48"], "HEIGHTxWIDTH in pixels"),
        (["zoo:qwen2_5_vl", "fastv", "--image", "0x8"], "HEIGHTxWIDTH in pixels"),
        (["zoo:llava-tiny", "fastv", "--image", "28x28"], "its configuration states image_size 28"),
        (["zoo:llama-tiny", "knorm", "--image", "28x28"], "it takes no images"),
        (["zoo:llava", "fastv", "--image", "28x28"], "images of one size alone"),
    ],
)
def test_a_size_that_cannot_be_is_refused(words: list[str], said: str) -> None:
    ran = RUN.invoke(app, ["explain", *words])
    assert ran.exit_code == 1
    assert said in " ".join(ran.stderr.split())


@pytest.mark.parametrize("name", VLMS)
def test_words_after_a_prompt_change_nothing_before_them(name: str) -> None:
    model = built(name)
    inputs = example_inputs(model, 1)
    more = longer(inputs, 3, 60)
    assert more["input_ids"].shape[1] == inputs["input_ids"].shape[1] + 3
    with torch.no_grad():
        one, other = (model(**each).logits for each in (inputs, more))
    if name != "paligemma":  # whose prompt attends to itself in both directions
        torch.testing.assert_close(other[:, :-3], one, rtol=1e-3, atol=1e-4)


def test_a_model_of_real_size_has_an_image_of_thousands_of_tokens() -> None:
    source = load_source("zoo:qwen2.5-vl-7b")
    ids: Any = source.inputs["input_ids"]
    assert (ids == source.model.config.image_token_id).sum() == 68 * 69 == 4692
    given = zoo.load("qwen2.5-vl-7b").example(text_length=16)
    assert {name: value.shape for name, value in given.items()} == {
        name: value.shape for name, value in source.inputs.items()
    }


def test_a_configuration_of_no_known_inputs_says_so() -> None:
    model = catalogue.family("qwen2_5_vl").build()
    model.config.model_type = "another"
    with pytest.raises(TokredError, match="not known"):
        example_inputs(model, 1)
