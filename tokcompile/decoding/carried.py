"""Numbers that the graph of a prompt hands to the graphs of its later steps, beside the cache of keys and values.

A position in fractions, or a phase that grows with what tokens say, cannot be told from a cache: it belongs to the
conversation. So it is kept on the conversation's cache, which also reorders it when beams are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from tokcompile.errors import CaptureError, TokredError
from tokcompile.program import Program

_KEPT = "_tokcompile_carried"
SPARE, LEFT, SHORT = "static_spare", "static_left", "static_short"
"""Under which names steps that go on from buffers of a fixed size are told of padding there, and of what is missing."""
REMEDY = "compile with tokcompile.compile(model, rule=...), which keeps it on the cache"


class Carried:
    """What one compiled model's graphs have handed on in the call that runs.

    Attributes:
        values: by name; rows of the batch come first.
        ran: whether a graph that rules rewrote is part of the call.
        taken: whether one has taken any of the values.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.ran = self.taken = False

    def before(self, cache: Any) -> None:
        """Take from a cache what its conversation has handed on; None is a new one."""
        self.values = dict(getattr(cache, _KEPT, None) or {})
        self.ran = self.taken = False

    def after(self, cache: Any) -> None:
        """Keep on a cache what the call has handed on; None is a call without one."""
        if cache is not None and self.values:
            if getattr(cache, _KEPT, None) is None:
                _follow(cache)
            setattr(cache, _KEPT, dict(self.values))
        self.values = {}


def check_compiled(ran: bool) -> None:
    """Refuse the result of a step that Dynamo ran without a graph: the model alone takes a cache for what it was.

    Args:
        ran: whether a graph of ours was part of it.
    """
    if not ran:
        raise TokredError(
            "this step on a cache that rules changed was not compiled",
            found="a model that Dynamo ran as it is, as it does at its limit of graphs",
            remedy="a higher torch._dynamo.config.recompile_limit, or fewer shapes; TORCH_LOGS=recompiles says why",
        )


def _follow(cache: Any) -> None:
    """Let a cache do to the numbers what it does to its rows, and refuse to forget tokens.

    These are methods of the one cache, so that a copy of it has them for itself.
    """
    for name, method in _METHODS.items():
        if hasattr(cache, name):
            setattr(cache, name, MethodType(method, cache))


def _rows(cache: Any, choose: Callable[[Tensor], Tensor]) -> None:
    setattr(cache, _KEPT, {name: choose(value) for name, value in getattr(cache, _KEPT).items()})


def _reorder_cache(cache: Any, beams: Tensor) -> Any:
    _rows(cache, lambda value: value.index_select(0, beams.to(value.device)))
    return type(cache).reorder_cache(cache, beams)


def _batch_select_indices(cache: Any, indices: Tensor) -> Any:
    _rows(cache, lambda value: value[indices.to(value.device)])
    return type(cache).batch_select_indices(cache, indices)


def _batch_repeat_interleave(cache: Any, repeats: int) -> Any:
    _rows(cache, lambda value: value.repeat_interleave(repeats, 0))
    return type(cache).batch_repeat_interleave(cache, repeats)


def _crop(cache: Any, max_length: int) -> Any:
    del cache
    raise TokredError(
        "a cache whose tokens have positions of their own cannot be cropped",
        found=f"crop({max_length})",
        remedy="generate without an assistant, or start from a copy of the cache as it was",
    )


_METHODS = {
    "reorder_cache": _reorder_cache,
    "batch_select_indices": _batch_select_indices,
    "batch_repeat_interleave": _batch_repeat_interleave,
    "crop": _crop,
}


def padding_name(block: int) -> str:
    """Under which name it is handed on how much padding the cache of a decoder block holds, int64 [B]."""
    return f"padding_{block}"


def evicted_name(block: int) -> str:
    """Under which name it is handed on how many keys the cache of a decoder block lost, int64 [B]."""
    return f"evicted_{block}"


def owners_name(block: int) -> str:
    """Under which name it is handed on whose keys the cache of a decoder block holds, int64 [B, H, T]."""
    return f"owners_{block}"


def given_name(rule: str, tokens: str) -> str:
    """Under which name it is handed on how many tokens of an insert step each row was given later, int64 [B]."""
    return f"given_{rule}_{tokens}"


def hand_on(program: Program, name: str, value: Node) -> None:
    """Let a graph hand a value [B, ...] on to the steps that follow, where its caller can keep it."""
    if program.carried is not None:
        program.handed[name] = value


def take(program: Program, name: str, like: torch.Tensor, what: str) -> Node:
    """A value that an earlier graph of the conversation handed on.

    Args:
        like: a fake tensor of its shape and dtype.
        what: what it is, for the message.

    Raises:
        CaptureError: nobody keeps it between calls.
    """
    if name in program.taken:
        return program.taken[name]
    if program.carried is None:
        raise CaptureError(f"this step needs {what}, which its inputs do not tell", remedy=REMEDY)
    last = [n for n in program.graph.nodes if n.op == "placeholder"][-1]
    with program.graph.inserting_after(last):
        node = program.graph.placeholder(f"tokred_carried_{name}")
    node.meta["val"] = like
    program.kinds[node] = "carried"
    program.taken[name] = node
    return node


def length_of_call(program: Program) -> torch.SymInt:
    """A size, 2 or more, of values that are taken: each call has its own, and the graph may assume nothing of it."""
    shapes = program.fake_mode.shape_env
    assert shapes is not None
    with shapes.ignore_fresh_unbacked_symbols():
        length = shapes.create_unbacked_symint()
    torch._check(length >= 2)
    return length


def return_handed(program: Program) -> None:
    """Let a graph return what it hands on, after its own outputs."""
    if program.handed:
        own = list(program.output.args[0])
        program.output.args = ((*own, *program.handed.values()),)


def carry(program: Program) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what turns a compiled graph that hands numbers on, or takes them, into one like the model's.

    It also notes that the graph has run.
    """
    carried, handed, taken = program.carried, list(program.handed), list(program.taken)
    if carried is None:
        return lambda compiled: compiled
    own = len(program.output.args[0]) - len(handed)

    def wrap(compiled: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Sequence[Any]:
            missing = [name for name in taken if name not in carried.values]
            if missing:
                raise TokredError(
                    "this step goes on from a cache that no prompt of this compiled model has filled",
                    found=f"no {', '.join(missing)}",
                    remedy="run the prompt through the compiled model, and pass the cache that it returns",
                )
            carried.ran, carried.taken = True, carried.taken or bool(taken)
            results = list(compiled(*args, *(carried.values[name] for name in taken)))
            carried.values.update(zip(handed, (value.detach() for value in results[own:]), strict=True))
            return tuple(results[:own])

        return run

    return wrap
