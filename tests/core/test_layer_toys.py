"""The verb layer, by attention, on one attention at every layout of rotary tables, against its dense form in loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import layered
import pytest
import torch
from graphs import calls, traced
from harness import difference
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from turntoys import CHANNELS, HEADS, LAYOUTS, TOKENS, context, inputs, model

from tokcompile import EditError
from tokcompile.passes import PASSES, Context
from tokcompile.passes.insertplaces import Slots
from tokcompile.program import Program
from tokcompile.sites import find_sites
from tokcompile.steps import STEPS

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
ROWS = torch.tensor([[False, True, True, False, False, True], [True, False, False, True, False, False]])
"""Other places in each row, and in the second one fewer than there is room for."""
ALL = torch.ones_like(ROWS)


def toy(layout: str) -> Callable[..., Tensor]:
    """The model of a layout, in which flags say which tokens are others."""
    run = model(layout)
    return lambda x, positions, inverse, weight, flags: run(
        torch.where(flags[..., None], -x, x), positions, inverse, weight
    )


def program(layout: str, flags: Tensor = ROWS, dtype: torch.dtype = torch.float32) -> Program:
    return traced(toy(layout), *inputs(layout, dtype), flags)


def put(made: Program, count: int = 3, **fields: Any) -> Context:
    """Give flagged tokens a layer `t`."""
    ctx = context(made)
    flags = next(n for n in made.graph.nodes if n.op == "placeholder" and n.meta["val"].dtype == torch.bool)
    ctx.values["t"] = Slots(flags, TOKENS, count)
    step = {"by": "attention", "name": "t", "at": "decoder.*.middle", "of": "t", "std": 0.3, **fields}
    PASSES["layer"](ctx, STEPS["layer"].model_validate(step))
    made.gm.recompile()
    return ctx


def ran(made: Program, layout: str, flags: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return made.gm(*inputs(layout, dtype), flags)


def turner(layout: str, positions: Tensor, inverse: Tensor) -> Callable[[Tensor], Tensor]:
    """What turns [B, H, T, D] of all tokens."""
    _, table, turn = LAYOUTS[layout]
    tables = table(positions.unsqueeze(-1).to(inverse.dtype) * inverse)
    return lambda x: turn(x, tables.cos().unsqueeze(1), tables.sin().unsqueeze(1))


def near(got: Tensor, expected: Tensor) -> bool:
    return difference(got, expected) <= 1e-5 * expected.abs().max().item()


def held(made: Program) -> dict[str, Tensor]:
    return layered.parts(made.weights, "mine", "t", 0)


def by_hand(made: Program, layout: str, flags: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The stream before the layer, and behind it."""
    x, positions, inverse, weight = inputs(layout, dtype)
    before = toy(layout)(x, positions, inverse, weight, flags)
    return before, layered.attend(before, flags, held(made), HEADS, turner(layout, positions, inverse))


@each_layout
@pytest.mark.parametrize("flags", [ROWS, ALL], ids=["some", "all"])
def test_the_compact_form_equals_the_dense_one(layout: str, flags: Tensor) -> None:
    """All others get exactly nothing."""
    made = program(layout)
    put(made, count=int(flags.sum(1).max()))
    layered.train(made.weights)
    got, (before, expected) = ran(made, layout, flags), by_hand(made, layout, flags)
    assert near(got, expected)
    assert difference(got, before) > 0.01
    assert torch.equal(got[~flags], before[~flags])


def test_all_tokens_flagged_is_plain_causal_attention() -> None:
    """Against the fused attention of torch."""
    made = program("half")
    put(made, count=TOKENS)
    layered.train(made.weights)
    x, positions, inverse, weight = inputs("half")
    before = toy("half")(x, positions, inverse, weight, ALL)
    own = held(made)
    rows = layered.normed(before, own)
    q, k, v = ((rows @ own[p].T).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in layered.PARTS[:3])
    turn = turner("half", positions, inverse)
    out = torch.nn.functional.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
    expected = before + out.transpose(1, 2).flatten(2) @ own["output"].T
    assert near(ran(made, "half", ALL), expected)


@each_layout
def test_in_bfloat16_others_are_the_same_to_the_last_bit(layout: str) -> None:
    """No NaN, B = 2, other places in each row."""
    made = program(layout, dtype=torch.bfloat16)
    put(made)
    layered.train(made.weights)
    got = ran(made, layout, ROWS, torch.bfloat16)
    before, expected = by_hand(made, layout, ROWS, torch.bfloat16)
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    assert torch.equal(got[~ROWS], before[~ROWS])
    assert difference(got, expected) <= 0.02 * expected.abs().max().item()
    assert all(value.dtype == torch.bfloat16 for value in held(made).values())


@pytest.mark.parametrize("count", [1, 3, TOKENS])
def test_rows_without_flags_and_an_untrained_layer_change_no_bit(count: int) -> None:
    made = program("half")
    put(made, count=count)
    expected = toy("half")(*inputs("half"), ROWS)
    assert torch.equal(ran(made, "half", ROWS), expected)
    layered.train(made.weights)
    none = torch.zeros_like(ROWS)
    assert torch.equal(ran(made, "half", none), toy("half")(*inputs("half"), none))


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_norms(norm: str) -> None:
    made = program("half")
    ctx = put(made, norm=norm)
    layered.train(made.weights)
    assert near(ran(made, "half", ROWS), by_hand(made, "half", ROWS)[1])
    own = held(made)
    assert {"norm", "norm_bias"} & set(own) == {"layer": {"norm", "norm_bias"}, "rms": {"norm"}, "none": set()}[norm]
    assert ctx.log[-1]["parameters"] == sum(value.numel() for value in own.values())
    assert all(own[part].shape == (CHANNELS, CHANNELS) for part in layered.PARTS)


@pytest.mark.parametrize("layout", ["half", "partial", "pairs"])
def test_gradients_match_finite_differences(layout: str) -> None:
    made = program(layout, dtype=torch.float64)
    put(made, norm="layer")
    layered.train(made.weights)
    named = {n: v for n, v in made.gm.named_parameters() if n.startswith("tokred_")}
    names, values = list(named), [v.detach()[..., :].clone() for v in named.values()]
    x, *rest = inputs(layout, torch.float64)
    # Maps have thousands of numbers: the checks go along one direction of each, and of the stream.
    ways = [
        torch.randn(v.shape, generator=torch.Generator().manual_seed(i)).double() for i, v in enumerate([x, *values])
    ]

    def along(*steps: Tensor) -> Tensor:
        y, *moved = (v + s * w for v, s, w in zip([x, *values], steps, ways, strict=True))
        return functional_call(made.gm, dict(zip(names, moved, strict=True)), (y, *rest, ROWS)).square().sum()

    zeros = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in ways]
    assert len(names) == 6
    assert gradcheck(along, zeros)
    assert all(step.abs() > 1e-6 for step in torch.autograd.grad(along(*zeros), zeros))


def test_tables_of_an_earlier_rotation_turn_the_layer_too() -> None:
    made = program("half")
    ctx = context(made)
    PASSES["rotate"](ctx, STEPS["rotate"].model_validate({"by": "base", "base": 50}))
    put(made)
    layered.train(made.weights)
    x, positions, inverse, weight = inputs("half")
    other = 50.0 ** (-torch.arange(len(inverse)) / len(inverse))
    before = toy("half")(x, positions, other, weight, ROWS)
    expected = layered.attend(before, ROWS, held(made), HEADS, turner("half", positions, other))
    assert near(ran(made, "half", ROWS), expected)


def test_a_rotation_behind_a_layer_is_refused() -> None:
    made = program("half")
    put(made)
    with pytest.raises(EditError, match="a layer of a rule reads the rotary tables") as caught:
        PASSES["rotate"](context(made), STEPS["rotate"].model_validate({"by": "base", "base": 50}))
    assert "first" in caught.value.remedy


def test_two_layers_stand_one_after_the_other() -> None:
    made = program("half")
    put(made)
    put(made, name="u")
    layered.train(made.weights)
    x, positions, inverse, weight = inputs("half")
    turn = turner("half", positions, inverse)
    expected = toy("half")(x, positions, inverse, weight, ROWS)
    for name in ("t", "u"):
        expected = layered.attend(expected, ROWS, layered.parts(made.weights, "mine", name, 0), HEADS, turn)
    assert near(ran(made, "half", ROWS), expected)


def test_the_block_stays_the_block_and_no_square_of_tokens_is_made() -> None:
    made = program("half")
    put(made)
    sites = find_sites(made)
    (block,) = sites.stacks["decoder"].blocks
    assert block.middle.target is torch.ops.tokred.add_tokens.default
    own = calls(made, torch.ops.aten.scaled_dot_product_attention.default)[1:]
    assert [tuple(n.meta["val"].shape) for n in own] == [(2, HEADS, 3, 24)]
    assert own[0].args[3] is None
