"""`tokred bench --targets`: what is timed does what it says, and what is said of the times."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from launched import DEVICE
from rich.console import Console
from typer.testing import CliRunner

from tokcompile.bench import kerneltargets
from tokcompile.bench.kernelrivals import _weights as weights_of
from tokcompile.bench.kerneltargets import DECODER, Figure, Figures, Heads
from tokcompile.bench.kernelworkloads import WORKLOADS, Maker
from tokcompile.cli import app

RUN = CliRunner()
SMALL = Heads(4, 2, 16, True)
TINY = {"tokens": (64,), "sizes": (1 << 13, 1 << 14), "patches": 64, "context": 256, "kept": 32}


def tensors(heads: Heads, queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    return heads.tensors(Maker(torch.device(DEVICE), torch.float32, 0), queries, keys)


def counted(run: Callable[[], object]) -> float:
    """A clock for which all calls take as long."""
    assert run() is not None
    return 2.0


@pytest.fixture(scope="module")
def figures() -> Figures:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: function)
        patch.setattr(kerneltargets, "DECODER", SMALL)
        patch.setattr(kerneltargets, "TOWER", Heads(2, 2, 16, False))
        return kerneltargets.measure(kerneltargets.targets(**TINY), counted, DEVICE, "a clock")


def test_every_target_can_be_measured(figures: Figures) -> None:
    assert [each.why for each in figures.figures if each.why] == []
    alike = [each for each in figures.figures if not each.name.startswith("bandwidth")]
    assert all(each.ratio == 1 for each in alike) and len(alike) == 8
    assert [each.holds for each in alike] == [True] * 3 + [False] * 3 + [True] * 2
    assert not figures.hold


def test_every_kernel_that_bytes_bound_has_a_target(figures: Figures) -> None:
    cases = [each.case for each in figures.figures if each.name.startswith("bandwidth")]
    assert cases == [op for op, load in WORKLOADS.items() if load.bound == "bytes"]
    assert {"gather_many", "topk_mask", "turn_pairs"} <= set(cases)


def test_targets_are_those_of_the_sizes_that_are_asked_for() -> None:
    cases = [each.case for each in kerneltargets.targets()]
    assert f"65,536 tokens, {DECODER}" in cases and any("4,096 of 131,072 keys" in case for case in cases)


def test_what_keys_receive_comes_with_the_attention() -> None:
    given = tensors(SMALL, 64, 64)
    out, mass = kerneltargets.received(SMALL, *given)()
    torch.testing.assert_close(out, kerneltargets.flash(SMALL, *given)(), rtol=1e-4, atol=1e-5)
    wanted = weights_of(given[0], given[1], 16**-0.5, True).mean((1, 2))
    torch.testing.assert_close(mass, wanted, rtol=1e-4, atol=1e-5)


def test_what_keys_receive_takes_the_sums_of_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    lowered = kerneltargets.lowered
    monkeypatch.setattr(kerneltargets, "lowered", lambda *args: made.append(lowered(*args)) or made[0])
    kerneltargets.received(SMALL, *tensors(SMALL, 64, 64))
    names = {str(node.target) for node in made[0].graph.nodes if node.op == "call_function"}
    assert (
        "tokred_triton.received_by_sums.default" in names and "aten.scaled_dot_product_attention.default" not in names
    )


def test_a_window_is_of_the_last_queries() -> None:
    given = tensors(SMALL, 128, 128)
    _, mass = kerneltargets.windowed(SMALL, *given)()
    weights = weights_of(given[0], given[1], 16**-0.5, True)[:, :, -kerneltargets.WINDOW :]
    torch.testing.assert_close(mass, weights.mean(2).reshape(1, 2, 2, -1).mean(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [kerneltargets.chosen, kerneltargets.voted, kerneltargets.ranked])
def test_a_step_attends_to_chosen_keys_where_they_lie(make: Callable[..., Callable[[], torch.Tensor]]) -> None:
    """With as many chosen as there are, it is attention to all."""
    heads = Heads(4, 2, 16, False)
    given = tensors(heads, 1, 64)
    wanted = kerneltargets.flash(heads, *given)()
    torch.testing.assert_close(make(heads, 64, *given)(), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(make(heads, 32, *given)(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "limit", "at_most", "holds"),
    [(1.8, 1.8, True, True), (1.9, 1.8, True, False), (0.75, 0.75, False, True), (0.7, 0.75, False, False)],
)
def test_a_limit_holds_on_its_side(ratio: float, limit: float, at_most: bool, holds: bool) -> None:
    assert Figure("a", "b", limit, at_most, ratio).holds is holds
    assert kerneltargets.cells(Figure("a", "b", limit, at_most, ratio))[2] == ("yes" if holds else "no")


def test_what_fails_is_missed_and_says_why() -> None:
    def spent(*_: object) -> tuple[float, float]:
        raise RuntimeError("out of memory\nand more")

    target = kerneltargets.Target("a", "b", 2.0, True, spent)
    found = kerneltargets.measure([target], counted, DEVICE, "a clock")
    assert not found.hold and found.to_dict()["targets"][0]["why"] == "out of memory"
    console = Console(width=120)
    with console.capture() as shown:
        console.print(kerneltargets.render(found, True))
    assert "at most 2" in shown.get() and "out of memory" in shown.get()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_without_a_gpu_nothing_is_measured(more: list[str]) -> None:
    ran = RUN.invoke(app, ["bench", "--targets", *more])
    assert ran.exit_code == 1 and "there is none here" in ran.stdout + ran.stderr
    if more:
        assert json.loads(ran.stdout)["ok"] is False


def test_two_things_are_not_timed_at_once() -> None:
    ran = RUN.invoke(app, ["bench", "--targets", "--kernels"])
    assert ran.exit_code == 1 and "two things to time were named" in ran.stderr
