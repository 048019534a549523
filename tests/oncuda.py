"""Lower graphs as they would be lowered on a GPU, on machines without one, and run them there all the same.

Kernels are chosen by the fake values of a graph. These are put on `cuda`; the graph is then run on the CPU that it was
captured on, with what was chosen under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import graphs
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

import tokcompile.backend
from tokcompile.lowering.choosekernels import Choice, choose_kernels


def to_cuda(value: Any) -> Any:
    """A fake value of the same kind on `cuda`; anything else as it is."""
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")


def put_on_cuda(gm: GraphModule) -> None:
    """Put the fake values of a graph on `cuda`."""
    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(to_cuda, node.meta["val"])


@contextmanager
def lowered_as_on_cuda() -> Iterator[list[tuple[GraphModule, list[Choice]]]]:
    """The backend `tokred` chooses kernels as on a GPU while this holds, and runs graphs eagerly; yields these."""
    seen: list[tuple[GraphModule, list[Choice]]] = []

    def lower(
        gm: GraphModule, example_inputs: Sequence[Any], target: str, choices: list[Choice] | None = None
    ) -> Callable[..., Any]:
        del example_inputs, target, choices
        put_on_cuda(gm)
        seen.append((gm, choose_kernels(gm)))
        return gm.forward

    with mock.patch.object(tokcompile.backend, "lower", lower):
        yield seen


def lowered(step: Callable[..., Any], values: Sequence[Tensor]) -> list[str]:
    """The operators of a step as on a GPU, which must give what the references give; arguments may be changed."""
    found = graphs.traced(step, *(each.clone() for each in values))
    put_on_cuda(found.gm)
    choose_kernels(found.gm)
    got, want = (run(*(each.clone() for each in values)) for run in (found.gm, step))
    for one, other in zip(*map(tensors, (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    return [node.target._schema.name for node in found.gm.graph.nodes if hasattr(node.target, "_schema")]


def tensors(values: Any) -> list[Tensor]:
    """The tensors of some outputs of a model, in order."""
    return [each for each in torch.utils._pytree.tree_leaves(values) if isinstance(each, Tensor)]
