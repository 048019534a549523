"""Masks that a model maps over positions: they reach the graph as broadcasts of its inputs, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import refusal
from torch import Tensor, nn

from tokcompile.capturing.capture import capture, from_export

ROWS, TOKENS = 2, 5


class Mapped(nn.Module):
    """A mask [B, Q, K] from a function of three numbers and the caller's padding."""

    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, padding: Tensor) -> Tensor:
        def one(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.rule(padding, row, query, key)

        mapped = torch.vmap(torch.vmap(torch.vmap(one, (None, None, 0)), (None, 0, None)), (0, None, None))
        mask = mapped(torch.arange(ROWS), torch.arange(TOKENS), torch.arange(TOKENS))
        return mask & padding.any()  # so that every graph has an input


RULES = {
    "causal": lambda padding, row, query, key: key <= query,
    "window": lambda padding, row, query, key: (key <= query) & (key > query - 2),
    "padding": lambda padding, row, query, key: torch.ops.aten.index(padding, [row, key]) & (key <= query),
    "ones": lambda padding, row, query, key: query.new_ones((), dtype=torch.bool) & (key != query),
}


@pytest.mark.parametrize("name", RULES)
def test_a_mapped_mask_follows_its_inputs(name: str) -> None:
    model = Mapped(RULES[name])
    padding = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    (program,) = capture(model, {"padding": padding})
    other = padding.clone()
    other[1, :2] = False
    for given in (padding, other):
        (out,) = program.gm(given)
        assert torch.equal(out, model(given))


@pytest.mark.parametrize("name", RULES)
def test_a_mapped_mask_of_an_exported_program_follows_its_inputs(name: str) -> None:
    model = Mapped(RULES[name])
    padding = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    exported = torch.export.export(model, (padding,), strict=False)
    program = from_export(exported)
    assert not any("batch_dim" in str(n.target) for n in program.graph.nodes)
    other = padding.clone()
    other[1, :2] = False
    for given in (padding, other):
        (out,) = program.gm(given)
        assert torch.equal(out, model(given))
        assert out.shape == program.output.args[0][0].meta["val"].shape


def test_what_is_no_broadcast_is_refused() -> None:
    model = Mapped(lambda padding, row, query, key: padding.sum(0).sort().values.sum() + key.cumsum(0))
    with pytest.raises(Exception, match="no broadcast") as caught:
        capture(model, {"padding": torch.ones(ROWS, TOKENS, dtype=torch.int64)})
    error = refusal(caught.value)
    assert "cumsum" in error.found and "test_vmaps.py" in str(error)
