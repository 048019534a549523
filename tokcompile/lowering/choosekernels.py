"""Choose for each `tokred::` operator of a graph its Triton kernel or its reference, before Inductor sees the graph.

A kernel is chosen where it can run (device, dtypes, shapes) and where it was measured to win: `kernels/measured.json`
says for each device, operator and dtype from how many bytes on. What has no row there takes what that file says of
`unmeasured`. TOKRED_KERNELS=off leaves all references, TOKRED_KERNELS=on takes every kernel that can run, whatever was
measured.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from tokcompile import kernels
from tokcompile.errors import LowerError, known
from tokcompile.kernels import _triton
from tokcompile.lowering.fuseattends import fuse_attends
from tokcompile.lowering.fusemarks import fuse_marks
from tokcompile.lowering.fusevotes import fuse_votes
from tokcompile.lowering.groupgathers import group_gathers
from tokcompile.lowering.sharesums import KERNEL, kernel_arguments, share_sums, sharings

SETTING = "TOKRED_KERNELS"
SETTINGS = ("auto", "off", "on")
TABLE = "TOKRED_KERNELS_TABLE"
"""Environment variable: another file like `kernels/measured.json`, such as `tokred bench --kernels --table` writes."""


@dataclass(frozen=True)
class Choice:
    """What runs one operator of a graph.

    Attributes:
        node, op: name of the node, and of the operator without its namespace. `attend_with_sums` stands at an attention
            of the model, which stays as it is without the kernel.
        kernel: whether its Triton kernel runs it, and not its reference.
        reason: why.
    """

    node: str
    op: str
    kernel: bool
    reason: str


@dataclass(frozen=True)
class Measured:
    """From how many bytes on kernels win.

    Attributes:
        unmeasured: what a device, operator or dtype without a row takes: `kernel` or `reference`.
        devices: by the device's name, the operator and the dtype of its largest tensor: bytes of its tensors from which
            on the kernel is chosen; None where it never won.
    """

    unmeasured: str = "reference"
    devices: dict[str, dict[str, dict[str, int | None]]] = field(default_factory=dict)


def setting() -> str:
    """What TOKRED_KERNELS says: `auto` (also where it is not set), `off` or `on`.

    Raises:
        LowerError: it says something else.
    """
    value = os.environ.get(SETTING, "") or "auto"
    if value not in SETTINGS:
        raise LowerError(
            f"{SETTING} is none of its settings", found=f"{SETTING}={value}", remedy=known(value, SETTINGS)
        )
    return value


def measured() -> Measured:
    """The table of what was measured: that of the package, or the one that TOKRED_KERNELS_TABLE names.

    Raises:
        LowerError: the file cannot be read, or holds no such table.
    """
    path = Path(os.environ.get(TABLE) or Path(kernels.__file__).with_name("measured.json"))
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LowerError(
            "the table of measured kernels cannot be read",
            where=[str(path)],
            found=str(error),
            remedy=f"let `tokred bench --kernels --table FILE` write it, or unset {TABLE}",
        ) from error


def _parsed(data: Any) -> Measured:
    table = Measured(**data)
    if table.unmeasured not in ("kernel", "reference"):
        raise ValueError(f"unmeasured is 'kernel' or 'reference', not {table.unmeasured!r}")
    rows = [row for ops in table.devices.values() for dtypes in ops.values() for row in dtypes.values()]
    if not all(row is None or isinstance(row, int) for row in rows):
        raise ValueError("a row is a number of bytes or null")
    return table


def tag() -> str:
    """What compiled code depends on beside the sources of operators: for the keys of compile caches."""
    return f"{setting()}-{'interpreted' if _triton.interpreted() else 'compiled'}"


def choose_kernels(gm: GraphModule, how: str | None = None) -> list[Choice]:
    """Swap `tokred::NAME` for `tokred_triton::NAME` where the kernel is chosen; gathers by one index for one launch.

    Args:
        gm: a rewritten graph with fake values, changed in place.
        how: one of SETTINGS; None: what `setting` says.

    Returns:
        What was chosen for each `tokred::` operator of the graph, in its order; then for attentions of the model that
        could hand on the sums of their rows.

    Raises:
        LowerError: as for `setting` and `measured`.
    """
    choices = choices_of(gm, how)
    chosen = {choice.node for choice in choices if choice.kernel}
    nodes = [node for node in _operators(gm) if node.name in chosen]
    if not nodes:
        return choices
    fuse_attends(gm.graph, nodes)
    fuse_votes(gm.graph, [node for node in nodes if not node._erased])
    fuse_marks(gm.graph, [node for node in nodes if not node._erased])
    share_sums(gm.graph, [node for node in nodes if not node._erased], chosen)
    nodes = [node for node in nodes if not node._erased]
    group_gathers(gm.graph, nodes)
    for node in nodes:
        if not node._erased:
            node.target = kernels.kernel_op(_name(node))
    gm.graph.lint()
    gm.recompile()
    return choices


def choices_of(gm: GraphModule, how: str | None = None) -> list[Choice]:
    """What `choose_kernels` would choose, and why; the graph stays as it is."""
    how, table = how or setting(), measured()
    own = {node: Choice(node.name, _name(node), *_decide(node, how, table)) for node in _operators(gm)}
    found = sharings(gm.graph, [node for node, choice in own.items() if choice.kernel])
    attentions = dict.fromkeys(each.attention for each in found if not each.flash)
    return [*own.values(), *(Choice(each.name, KERNEL, *_decide_attention(each, how, table)) for each in attentions)]


def _operators(gm: GraphModule) -> Iterator[Node]:
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "tokred":
            yield node


def _name(node: Node) -> str:
    return node.target._schema.name.partition("::")[2]


def _decide(node: Node, how: str, table: Measured) -> tuple[bool, str]:
    name = _name(node)
    if how == "off":
        return False, f"{SETTING}=off"
    if name not in kernels.kernel_names():
        return False, "the operator has no kernel"
    return _decide_call(name, node.args, _results(node), how, table)


def _decide_attention(node: Node, how: str, table: Measured) -> tuple[bool, str]:
    return _decide_call(KERNEL, kernel_arguments(node), _results(node), how, table)


def _decide_call(
    name: str, given: tuple[Any, ...], results: list[torch.Tensor], how: str, table: Measured
) -> tuple[bool, str]:
    args = map_arg(given, lambda n: n.meta.get("val"))
    fault = _device_fault(_tensors(args), how) or _fault(name, args)
    if fault:
        return False, fault
    if how == "on":
        return True, f"{SETTING}=on"
    return _by_table(name, weighed(name, args, results), table)


APART = {KERNEL: 3}
"""Which argument does not count where kernels are chosen by bytes: a mask that can outgrow what it hides."""


def weighed(name: str, args: Sequence[Any], results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of a call by whose bytes, and by the dtype of whose largest, its kernel is chosen."""
    return _tensors([*(each for at, each in enumerate(args) if at != APART.get(name)), *results])


def _tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def _device_fault(tensors: list[torch.Tensor], how: str) -> str | None:
    if torch.version.hip:
        return "kernels are written for NVIDIA's GPUs, and this build of torch is for AMD's"
    found = sorted({each.device.type for each in tensors})
    if found == ["cuda"] or (how == "on" and found == ["cpu"] and _triton.interpreted()):
        return None
    return f"its tensors are on {' and '.join(found) or 'no device'}; kernels run on cuda"


def _fault(name: str, args: tuple[Any, ...]) -> str | None:
    try:
        return kernels.kernel_fault(name, args)
    except GuardOnDataDependentSymNode:
        return "a size that depends on data decides how the kernel runs"


def _results(node: Node) -> list[torch.Tensor]:
    return _tensors(node.meta.get("val"))


def _by_table(name: str, tensors: list[torch.Tensor], table: Measured) -> tuple[bool, str]:
    device, size = _device_name(tensors[0].device), sum(map(_bytes, tensors))
    dtype = str(max(tensors, key=_bytes).dtype).removeprefix("torch.")
    rows = table.devices.get(device, {}).get(name, {})
    if dtype not in rows:
        return table.unmeasured == "kernel", f"not measured on {device} in {dtype}: {table.unmeasured} by default"
    least = rows[dtype]
    if least is None:
        return False, f"measured on {device} in {dtype}: the reference is faster"
    return size >= least, f"measured on {device} in {dtype}: the kernel is faster from {least} bytes on; here {size}"


def _bytes(value: torch.Tensor) -> int:
    """Of a size that is a symbol, what it is in the example."""
    return value.dtype.itemsize * prod(n if isinstance(n, int) else _hint(n) for n in value.shape)


def _hint(size: Any) -> int:
    found = size.node.hint
    return int(found) if found is not None else 1


@functools.cache
def _device_name(device: torch.device) -> str:
    usable = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if usable else f"{device.type}, which is not here"
