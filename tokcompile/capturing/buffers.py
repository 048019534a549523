"""Values of buffers and inputs by the placeholders of a captured graph, also of a model that was built as shapes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Node

_ATTRIBUTE = re.compile(r"\._(?:modules|buffers|parameters)\['([^']+)'\]")
_INPUT = re.compile(r"\['([^']+)'\]$")
_BY_LENGTH = ("dynamic", "longrope")
"""In the names of scalings whose frequencies depend on the length of a sequence."""


class Values:
    """Looks values up.

    Args:
        model: the model that was captured.
        inputs: keyword arguments that it was captured with.
        fixed: values by path that stand in for the model's own.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], fixed: Mapping[str, Tensor] | None = None) -> None:
        self.model, self.inputs, self.fixed = model, inputs, dict(fixed or {})

    def __call__(self, node: Node) -> Tensor | None:
        """The value of a placeholder; None where it is not known, as of weights that have only a shape."""
        source = node.meta.get("source", "")
        path = _ATTRIBUTE.findall(source)
        if not path:
            named = _INPUT.search(source)
            return _real(self.inputs.get(named[1])) if named else None
        name = ".".join(path)
        if name in self.fixed:
            return self.fixed[name]
        owner = self.model.get_submodule(".".join(path[:-1]))
        value = getattr(owner, path[-1])
        known = _real(value)
        return known if known is not None else _made_again(self.model, path[:-1], path[-1], value)


def _real(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta else None


def _made_again(model: nn.Module, path: list[str], name: str, value: Tensor) -> Tensor | None:
    """A buffer that a model computes from its configuration, as transformers fills it in after loading weights.

    None for parameters, and for buffers that no model of those around the module knows how to fill.
    """
    owners = [model.get_submodule(".".join(path[:end])) for end in range(len(path) + 1)]
    module = owners[-1]
    if any(True for _ in module.parameters()):
        return None
    for owner in reversed(owners):
        fill = getattr(owner, "_init_weights", None)
        if fill is None:
            continue
        twin = copy.copy(module)
        twin._buffers = {
            key: torch.full(buffer.shape, torch.nan, dtype=buffer.dtype)
            for key, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        }
        with torch.no_grad():
            fill(twin)
        made = twin._buffers.get(name)
        if made is not None and not made.isnan().any():
            return made.to(value.dtype)
    return None


@contextmanager
def fixed_length(model: nn.Module, length: int) -> Iterator[dict[str, Tensor]]:
    """Let rotary modules that compute frequencies anew for each length (dynamic NTK, longrope) use those of one.

    Most decide by the positions in Python, which splits the graph. Within this context they take their buffer as
    it is; the values that it is to have are given by path.

    Args:
        length: tokens of the sequence that frequencies are computed for.
    """
    given: dict[str, Tensor] = {}
    changed: list[tuple[nn.Module, Any]] = []
    for path, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        each = kinds if isinstance(kinds, Mapping) else {None: kinds}
        dynamic = [
            layer for layer, kind in each.items() if isinstance(kind, str) and any(word in kind for word in _BY_LENGTH)
        ]
        if not dynamic:
            continue
        for layer in dynamic:
            prefix = "" if layer is None else f"{layer}_"
            name = f"{path}.{prefix}inv_freq" if path else f"{prefix}inv_freq"
            given[name] = _frequencies(module, each[layer], length, layer)
        changed.append((module, kinds))
        module.rope_type = "default" if None in each else {**each, **dict.fromkeys(dynamic, "default")}
    try:
        yield given
    finally:
        for module, kinds in changed:
            module.rope_type = kinds


def _frequencies(module: nn.Module, kind: str, length: int, layer: str | None) -> Tensor:
    maker = import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[kind]
    more = {} if layer is None else {"layer_type": layer}
    return maker(module.config, torch.device("cpu"), seq_len=length, **more)[0]
