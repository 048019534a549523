"""lint: frequencies in captured graphs against the formulas of their papers, tables against loops, wasted work."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from typer.testing import CliRunner

from tokcompile import lint, modelsource
from tokcompile.capturing.buffers import Values
from tokcompile.capturing.capture import capture
from tokcompile.cli import app
from tokcompile.errors import TokredError
from tokcompile.models import catalogue
from tokcompile.rope import ropesimilarity
from tokcompile.rulefile import load_rule
from tokcompile.sites import find_sites
from tokcompile.sites.frequencies import find_curves

RUN = CliRunner()
D, LAYERS = 8, 3
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
pytestmark = pytest.mark.usefixtures("one_thread")


def slowest(base: float, d: int = D) -> float:
    return base ** (-(d - 2) / d)


def yarn(base: float, factor: float, original: int) -> float:
    """The slowest frequency by the paper: a ramp between dimensions that turn 32 times and once in the old context."""

    def dimension(turns: float) -> float:
        return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), D - 1)
    ramp = min(max((D / 2 - 1 - low) / max(high - low, 1e-3), 0), 1)
    return slowest(base) * (ramp / factor + 1 - ramp)


def llama3(base: float, factor: float, low: float, high: float, original: int) -> float:
    turns = original * slowest(base) / (2 * math.pi)
    if turns < low:
        return slowest(base) / factor
    smooth = min((turns - low) / (high - low), 1.0)
    return slowest(base) * ((1 - smooth) / factor + smooth)


def dynamic(base: float, factor: float, trained: int, length: int) -> float:
    length = max(length, trained)
    return slowest(base * ((factor * length / trained) - (factor - 1)) ** (D / (D - 2)))


SCALINGS: dict[str, tuple[dict[str, Any], float]] = {
    "default": ({"rope_theta": 1e4}, slowest(1e4)),
    "linear": ({"rope_theta": 1e4, "factor": 4.0}, slowest(1e4) / 4),
    "yarn": (
        {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 1024},
        yarn(100.0, 4.0, 1024),
    ),
    "llama3": (
        {
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        llama3(1e4, 8.0, 1.0, 4.0, 32),
    ),
}


def of_config(
    scaling: dict[str, Any], *, weights: bool = False, context: float | None = None, **more: Any
) -> lint.Lint:
    config = LlamaConfig(**TEXT, rope_parameters=scaling)
    source = modelsource.from_config(config, "model", weights=weights)
    return lint.lint(source, lint.Lengths(context), **more)


def only(found: lint.Lint) -> tuple[lint.CurveReport, lint.SectionReport]:
    (curve,) = found.curves
    (section,) = curve.sections
    return curve, section


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_base_of_scaled_frequencies(kind: str) -> None:
    scaling, wanted = SCALINGS[kind]
    curve, section = only(of_config({"rope_type": kind, **scaling}, context=4096))
    assert section.section.slowest == pytest.approx(wanted, rel=1e-5)
    assert section.base == pytest.approx(wanted ** (-D / (D - 2)), rel=1e-5)
    assert (curve.curve.width, curve.curve.blocks, curve.curve.dtype) == (D, (0, 1, 2), "float32")
    assert section.verdict.base == section.base and section.length == 4096


def test_weights_change_nothing() -> None:
    scaling = {"rope_type": "llama3", **SCALINGS["llama3"][0]}
    bare, real = (only(of_config(scaling, weights=weights))[1] for weights in (False, True))
    assert bare == real and bare.length == TEXT["max_position_embeddings"]


@pytest.mark.parametrize("length", [64, 1000])
def test_frequencies_that_depend_on_the_length(length: int) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    found = of_config(scaling, context=length, tables=False)
    assert found.graphs == 1
    assert only(found)[1].section.slowest == pytest.approx(dynamic(1e4, 4.0, 64, length), rel=1e-5)


@pytest.mark.parametrize(("length", "factor"), [(32, 1.0), (33, 2.0)])
def test_two_sets_of_frequencies(length: int, factor: float) -> None:
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    found = only(of_config(scaling, context=length, tables=False))[1]
    assert found.section.slowest == pytest.approx(slowest(1e4) / factor, rel=1e-5)


def test_the_model_keeps_its_frequencies() -> None:
    config = LlamaConfig(**TEXT, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    source = modelsource.from_config(config, "model", weights=True)
    rotary = source.model.model.rotary_emb
    before = rotary.inv_freq.clone()
    lint.lint(source, lint.Lengths(4096))
    assert torch.equal(rotary.inv_freq, before) and rotary.rope_type == "dynamic"


def test_a_graph_that_chooses_its_frequencies_by_the_largest_position() -> None:
    """The exponents of the frequencies are counted by an arange, too: positions are those of tokens."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    source = modelsource.from_config(LlamaConfig(**TEXT, rope_parameters=scaling), "model", weights=True)
    program, *others = capture(source.model, source.inputs)
    if others:
        pytest.skip("this version of transformers chooses in Python")
    sites = find_sites(program)
    (rotary,) = sites.rotary["decoder"]
    assert 16 in rotary.positions.meta["val"].shape
    for length, factor in ((32, 1.0), (33, 2.0)):
        (curve,) = find_curves(program, sites, Values(source.model, source.inputs), {"decoder": length})
        assert curve.sections[0].slowest == pytest.approx(slowest(1e4) / factor, rel=1e-5)


def zoo(name: str, *context: str, **more: Any) -> lint.Lint:
    return lint.lint(modelsource.load_source(f"zoo:{name}"), lint.Lengths.parse(context), **more)


FAMILIES = {
    "phi": [(8, (0, 1, 2, 3), [1e4])],  # half of a head of 16
    "gpt_neox": [(4, (0, 1, 2, 3), [1e4])],  # a quarter
    "gemma3_text": [(16, (0, 2), [1e4]), (16, (1, 3), [1e6])],  # local and global layers
    "smollm3": [(16, (0, 1, 3), [2e6])],  # a layer without positions
    "glm4": [(8, (0, 1, 2, 3), [1e4])],
    "gpt2": [],
    "bert": [],
    "t5": [],
}


USUAL = ("phi", "gemma3_text", "smollm3", "gpt2")  # the others are slow tests


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_families(name: str) -> None:
    found = [
        (each.curve.width, each.curve.blocks, [pytest.approx(s.base, rel=1e-4) for s in each.sections])
        for each in zoo(name, "4096").curves
    ]
    assert found == FAMILIES[name]


def test_coordinates_are_judged_apart() -> None:
    """Sections of 2, 3 and 3 of 8 frequencies: the slowest of each are theta_1, theta_4 and theta_7."""
    vision, text = zoo("qwen2_5_vl", "4096", "vision=64", "decoder.1=128").curves
    assert [(s.section.coordinate, s.length) for s in vision.sections] == [(0, 64), (1, 64)]
    assert [s.base for s in vision.sections] == [pytest.approx(1e4, rel=1e-4)] * 2 and vision.curve.width == 8
    assert [(s.section.coordinate, s.length) for s in text.sections] == [(0, 4096), (1, 128), (2, 4096)]
    wanted = [1e4 ** (-i / 8) for i in (1, 4, 7)]
    assert [s.section.slowest for s in text.sections] == pytest.approx(wanted, rel=1e-5)
    assert [len(s.section.frequencies) for s in text.sections] == [2, 3, 3]
    assert text.sections[2].base == pytest.approx(1e4, rel=1e-4)


def test_coordinates_that_take_turns() -> None:
    """Frequencies 1 and 4 belong to height, 2 and 5 to width, the others to time: written in place in the graph."""
    text = next(each for each in zoo("qwen3_vl", "4096").curves if each.curve.stack == "decoder")
    ladder = [1e4 ** (-i / 8) for i in range(8)]
    wanted = [[ladder[i] for i in each] for each in ((0, 3, 6, 7), (1, 4), (2, 5))]
    assert [list(s.section.frequencies) for s in text.sections] == [pytest.approx(each, rel=1e-5) for each in wanted]


def test_the_example_says_how_large_an_image_is() -> None:
    vision = zoo("qwen2_5_vl").curves[0]
    grid = catalogue.family("qwen2_5_vl").options["grids"][0]
    assert {s.length for s in vision.sections} == {max(grid[1:]) - 1}


class Turned(nn.Module):
    """One block whose queries and keys are turned by angles that are computed in a given float format."""

    def __init__(self, dtype: torch.dtype, base: float = 1e4) -> None:
        super().__init__()
        self.dtype, self.qkv, self.out = dtype, nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("inv_freq", base ** (-torch.arange(0, 16, 2) / 16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        place = torch.arange(x.shape[1]).to(self.dtype)
        angle = torch.cat([place[:, None] * self.inv_freq.to(self.dtype)] * 2, -1)
        cos, sin = angle.cos().float(), angle.sin().float()

        def turn(u: Tensor) -> Tensor:
            return u * cos + torch.cat([-u[..., 8:], u[..., :8]], -1) * sin

        heads = nn.functional.scaled_dot_product_attention(turn(q), turn(k), v)
        return x + self.out(heads.transpose(1, 2).flatten(2))


def of_module(model: nn.Module, length: float) -> lint.Lint:
    x = torch.randn(1, 20, 32)
    return lint.lint(modelsource.Source("turned", model, {"x": x}, "zoo"), lint.Lengths(length))


def rows_by_loop(dtype: torch.dtype, length: int, base: float = 1e4) -> tuple[int, int | None, int, float]:
    """Duplicate rows, first pair, neighbours of one fastest angle, and largest error, row by row."""
    exact = (base ** (-torch.arange(0, 16, 2) / 16)).to(dtype)
    rows, angles, worst = [], [], 0.0
    for place in range(length):
        angle = torch.tensor(place).to(dtype) * exact
        angles.append(angle[0].item())
        rows.append((*angle.cos().tolist(), *angle.sin().tolist()))
        worst = max(worst, (angle.double() - place * exact.double()).abs().max().item())
    pair = next((i for i in range(length - 1) if rows[i] == rows[i + 1]), None)
    same = sum(one == two for one, two in zip(angles, angles[1:], strict=False))
    return length - len(set(rows)), pair, same, worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tables_row_by_row(dtype: torch.dtype) -> None:
    curve, _ = only(of_module(Turned(dtype), 1024))
    wanted = rows_by_loop(dtype, 1024)
    check = curve.table
    assert (check.duplicates, check.first_pair, check.same_angle) == wanted[:3]
    assert check.worst == pytest.approx(wanted[3], rel=1e-6)
    assert curve.curve.dtype == str(dtype).removeprefix("torch.")
    assert check.same_angle > 500 if dtype is torch.bfloat16 else check.same_angle == 0


@pytest.mark.parametrize(("dtype", "word"), [(torch.bfloat16, "wall"), (torch.float32, "below_dc")], ids=str)
def test_the_format_of_the_angles_decides(dtype: torch.dtype, word: str) -> None:
    _, section = only(of_module(Turned(dtype), 8192))
    assert section.verdict.word == word
    assert section.verdict.bounds["precision"] == {torch.bfloat16: 128, torch.float32: 2**23}[dtype]


def test_exact_bounds() -> None:
    paper, exact = (only(of_config({"rope_type": "default", "rope_theta": 1e4}, exact_d=e))[1] for e in (False, True))
    assert exact.verdict.bounds["dc"] == pytest.approx(paper.verdict.bounds["dc"] ** (D / (D - 2)))


@pytest.mark.parametrize("words", [["x"], ["0"], ["vision="], ["=5"], ["vision=2", "vision=3"], ["5", "6"], ["-1"]])
def test_contexts_that_are_none(words: list[str]) -> None:
    with pytest.raises(TokredError, match="is no context"):
        lint.Lengths.parse(words)


def test_a_model_that_says_no_length() -> None:
    """The largest position of the example stands in."""
    x = torch.randn(1, 20, 32)
    found = lint.lint(modelsource.Source("turned", Turned(torch.float32), {"x": x}, "zoo"))
    (section,) = found.curves[0].sections
    assert section.length == 19


TWICE = """
rule: twice
about: Score the same twice.
params:
  keep: {type: ratio_or_count, default: 4, about: image tokens kept}
steps:
  - score:  {name: one, by: attention_received, at: decoder.0.attention, queries: all, heads: mean, reduce: mean}
  - score:  {name: two, by: attention_received, at: decoder.0.attention, queries: all, heads: mean, reduce: mean}
  - select: {name: first, by: topk, scores: one, among: image, keep: 2}
  - select: {name: kept, by: fill, first: [first], scores: two, among: image, keep: "${keep}"}
  - drop:   {at: decoder.3.input, keep: kept, positions: keep}
"""


def kinds(found: lint.Lint) -> set[str]:
    return {waste.kind for each in found.balances for waste in each.findings}


@pytest.mark.parametrize(
    ("rule", "options", "wanted"),
    [
        ("hiprune", {"keep": 4}, set()),
        ("fastv", {"keep": 4}, set()),
        ("random", {"keep": "100%"}, {"keeps_everything", "costs_more"}),
        ("fastv", {"layer": 9}, {"refused"}),
        ("twice", {"keep": 4}, {"same_score"}),
        ("twice", {"keep": 16}, {"keeps_everything", "costs_more"}),
        ("twice", {"keep": 15}, {"same_score", "costs_more"}),
    ],
)
def test_wasted_work(rule: str, options: dict[str, Any], wanted: set[str], tmp_path: Path) -> None:
    source = tmp_path / "twice.yaml"
    source.write_text(TWICE)
    loaded = load_rule(source if rule == "twice" else rule).bind(**options)
    found = zoo("llava-tiny", rules=[loaded], tables=False)
    assert kinds(found) == wanted
    (balance,) = found.balances
    assert (balance.saved > balance.cost) == (not wanted & {"costs_more", "refused"})


def as_json(*words: str) -> Any:
    result = RUN.invoke(app, [*words, "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_the_command_as_json() -> None:
    code, data = as_json("lint", "zoo:llava-tiny", "hiprune", "keep=1/4", "--context", "4096", "--eps", "0.9")
    assert code == 0 and data["graphs"] == 1 and data["eps"] == 0.9
    (curve,) = data["rotary"]
    (section,) = curve["sections"]
    assert section["verdict"] == "below_depth" and section["length"] == 4096 and curve["layers"] == 4
    assert [bound["name"] for bound in section["bounds"]] == ["aliasing", "dc", "depth", "precision"]
    assert all(bound["formula"] and bound["source"] and bound["caveat"] for bound in section["bounds"])
    assert section["bounds"][1]["base"] == pytest.approx(4096 / math.acos(0.9))
    assert curve["table"]["positions"] == 4096 and curve["table"]["duplicates"] == 0
    assert data["rules"] == ["hiprune"] and data["wasted"][0]["findings"] == []


def test_the_command_for_people() -> None:
    result = RUN.invoke(app, ["lint", "zoo:llava-tiny", "fastv", "keep=16", "--context", "4096"])
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    for text in ("base >= L / arccos(0.95)", "arXiv 2602.10959", "readers contest", "keeps_everything", "below_dc"):
        assert text in words
    assert "\x1b" not in result.stdout


def test_a_second_opinion() -> None:
    _, section = only(
        of_config({"rope_type": "default", "rope_theta": 1e4}, context=512, tables=False, similarity=True)
    )
    held, least = section.similarity
    turns = [1e4 ** (-2 * i / D) for i in range(D // 2)]
    sums = [math.fsum(math.cos(m * t) for t in turns) for m in range(513)]
    assert held == next((m for m, total in enumerate(sums) if total < 0), 513) - 1
    assert least == ropesimilarity.least_base(512, D)
    assert all(s.similarity is None for s in zoo("qwen2_5_vl", "64", similarity=True).curves[1].sections)
    result = RUN.invoke(app, ["lint", "zoo:llava-tiny", "--context", "512", "--similarity"])
    assert result.exit_code == 0 and "arXiv 2405.14591" in result.stdout
    assert "second opinion" not in RUN.invoke(app, ["lint", "zoo:llava-tiny", "--no-tables"]).stdout


def test_a_model_without_rotary_tables() -> None:
    result = RUN.invoke(app, ["lint", "zoo:gpt2"])
    assert result.exit_code == 0 and "nothing to report" in result.stdout
    assert as_json("lint", "zoo:gpt2")[1]["rotary"] == []


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--eps", "1"], "eps is a coherence between 0 and 1, both excluded"),
        (["--context", "many"], "'many' is no context, or one too many"),
        (["nothing"], "there is no rule 'nothing'"),
    ],
)
def test_errors(words: list[str], cause: str) -> None:
    code, data = as_json("lint", "zoo:llava-tiny", *words)
    assert code == 1 and data["error"]["cause"] == cause and data["error"]["remedy"]
