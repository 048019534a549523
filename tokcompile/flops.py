"""What each node of a graph costs: floating point operations, by torch's own counter, on values without memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tokcompile.program import tensor

aten = torch.ops.aten
BIG = 256
"""Two equal token dimensions count as an attention matrix beyond this: heads are not wider."""


def _fused(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch's registry knows the fused attention of GPUs alone, and would count that of a CPU as nothing.
_ALSO = {aten._scaled_dot_product_flash_attention_for_cpu: _fused}


@dataclass(frozen=True)
class Cost:
    """What one node costs.

    Attributes:
        flops: floating point operations (a multiplication and an addition are two).
        matrices: shapes of the values [.., H, N, N] with more than one head that it makes, itself or on the way.
    """

    flops: int = 0
    matrices: tuple[tuple[int, ...], ...] = ()


class _Watch(TorchDispatchMode):
    """Notes every attention matrix that an operator makes, inside operators made of others too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and is_attention_matrix(tuple(value.shape)):
                self.seen.append(tuple(value.shape))
        return result


def is_attention_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a shape is [B, H, N, N] with more than one head and N beyond 256."""
    return len(shape) >= 4 and shape[-3] > 1 and shape[-1] == shape[-2] > BIG


@dataclass
class Counter:
    """Counts nodes; equal calls on equal shapes, as the layers of a model make them, are run once.

    Attributes:
        unknown: operators that could not be run on values without memory, and so count as nothing.
    """

    known: dict[Any, Cost] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    def cost(self, node: Node) -> Cost:
        """Cost of one node, by the sizes that capture saw."""
        if node.op != "call_function" or not any(tensor(n) for n in node.all_input_nodes):
            return Cost()
        key = self._key(node)
        if key not in self.known:
            self.known[key] = self._run(node)
        return self.known[key]

    def _key(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _signature(n.meta.get("val")))
        return node.target, repr(args), repr(kwargs)

    def _run(self, node: Node) -> Cost:
        # Values of a graph may belong to its own fake mode and carry symbols: new ones, of the sizes that were seen.
        with self.mode, torch.no_grad():
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: _copy(n.meta.get("val")))
            with _Watch() as watch, FlopCounterMode(display=False, custom_mapping=_ALSO) as counter:
                try:
                    node.target(*args, **kwargs)
                except Exception:
                    self.unknown.add(str(node.target))
        return Cost(counter.get_total_flops(), tuple(watch.seen))


def concrete(size: Any) -> int:
    """The size that capture saw; 1 for one that no value is known of."""
    if isinstance(size, int):
        return size
    return 1 if size.node.hint is None else int(size.node.hint)


def _signature(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{[concrete(n) for n in value.shape]}{[concrete(n) for n in value.stride()]}"
    return f"{concrete(value)}" if isinstance(value, torch.SymInt) else repr(value)


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        shape, stride = ([concrete(n) for n in part] for part in (value.shape, value.stride()))
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    if isinstance(value, (tuple, list)):
        return type(value)(map(_copy, value))
    return concrete(value) if isinstance(value, torch.SymInt) else value
