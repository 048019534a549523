"""Slots of a marked sequence and the tokens in them: when they are one kernel, and when they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fleet
import harness
import oncuda
import pytest
import torch
from drawn import made
from torch import Tensor

pytestmark = pytest.mark.usefixtures("kernels_unmeasured")
ops = torch.ops.tokred
VALUES = (made(0, 2, 20, 8), made(1, 2, 20) > -0.5, made(2, 8))
Step = Callable[[Tensor, Tensor, Tensor], Any]


def means(x: Tensor, runs: Tensor, content: Tensor) -> Any:
    slots = ops.mark_slots(runs, 20)
    return ops.mark_tokens(x, slots, ops.slot_means(x, slots)), ops.slot_source(slots, runs)


def given(x: Tensor, runs: Tensor, content: Tensor) -> Any:
    slots = ops.mark_slots(runs, 20)
    return ops.mark_tokens(x, slots, content)


def nothing(x: Tensor, runs: Tensor, content: Tensor) -> Any:
    slots = ops.mark_slots(runs, 20)
    return ops.slot_source(slots, runs), ops.mark_tokens(x, slots, None)


@pytest.mark.parametrize("step", [means, given, nothing])
def test_slots_and_tokens_are_one_launch(step: Step) -> None:
    called = oncuda.lowered(step, VALUES)
    assert called.count("tokred_triton::mark_pack") == 1
    assert not [name for name in called if name.endswith(("mark_slots", "mark_tokens", "slot_means"))]


@pytest.mark.parametrize("content", ["run_mean", "zero", "mean"])
def test_a_rule_that_marks_is_one_launch(content: str) -> None:
    model = fleet.shared("llava")
    with oncuda.lowered_as_on_cuda() as seen:
        harness.prune(model, rule="pospad", keep=4, content=content)(**fleet.example(model, 2, (1, 0)))
    called = [str(node.target) for gm, _ in seen for node in gm.graph.nodes]
    assert called.count("tokred_triton.mark_pack.default") == 1
    assert not [name for name in called if "mark_slots" in name or "slot_means" in name]


def means_are_read_again(x: Tensor, runs: Tensor, content: Tensor) -> Any:
    slots = ops.mark_slots(runs, 20)
    held = ops.slot_means(x, slots)
    return ops.mark_tokens(x, slots, held), held.sum()


def means_of_others(x: Tensor, runs: Tensor, content: Tensor) -> Any:
    slots = ops.mark_slots(runs, 20)
    return ops.mark_tokens(x, slots, ops.slot_means(x.flip(1), slots))


def tokens_come_later(x: Tensor, runs: Tensor, content: Tensor) -> Any:
    slots = ops.mark_slots(runs, 20)
    return ops.mark_tokens(x * 2, slots, content)


def two_sequences(x: Tensor, runs: Tensor, content: Tensor) -> Any:
    slots = ops.mark_slots(runs, 20)
    return ops.mark_tokens(x, slots, content), ops.mark_tokens(x, slots, None)


def tokens_are_changed(x: Tensor, runs: Tensor, content: Tensor) -> Any:
    slots = ops.mark_slots(runs, 20)
    torch.ops.aten.add_.Tensor(x, 1)
    return ops.mark_tokens(x, slots, content)


APART = [means_are_read_again, means_of_others, tokens_come_later, two_sequences, tokens_are_changed]


@pytest.mark.parametrize("step", APART)
def test_what_else_is_made_of_them_keeps_them_apart(step: Step) -> None:
    called = oncuda.lowered(step, VALUES)
    assert "tokred_triton::mark_slots" in called and "tokred_triton::mark_tokens" in called
    assert "tokred_triton::mark_pack" not in called
