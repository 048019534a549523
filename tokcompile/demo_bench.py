"""One capture of a model in which every variant of its graph runs, so that only the graphs differ in what is timed."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule

from tokcompile.capturing.capture import from_dynamo
from tokcompile.capturing.dynamo import prepare
from tokcompile.errors import CaptureError
from tokcompile.lowering.lower import lower
from tokcompile.program import Program
from tokcompile.recording import Recording, record, replay

Call = Callable[[Mapping[str, Tensor]], Tensor]
"""Takes arguments of forward and returns the logits [B, V] of the last position."""


def last_logits(model: Callable[..., Any]) -> Call:
    """Call a model for the logits of the last position, which name the first token that it would generate."""
    return lambda inputs: model(**inputs, logits_to_keep=1).logits[:, -1]


class Bench:
    """A model captured once, by torch.compile, with a backend that runs whichever graph is current.

    Dynamo keeps its results per code object, so twenty variants that are each compiled with torch.compile would be
    twenty entries on one forward, traced twenty times, and found by going through a list. Here the trace, the guards
    and the code around the graph are one, and the same for all; what each variant runs is what its backend would have
    returned, made by the same functions.
    """

    def __init__(self, model: torch.nn.Module, example: Mapping[str, Tensor], target: str) -> None:
        self.target = target
        self._current: Callable[..., Any] | None = None
        self._captured: list[tuple[GraphModule, Program, TracingContext]] = []
        prepare()
        self._call = last_logits(torch.compile(model, backend=self._backend, dynamic=False))
        self._call(example)
        if len(self._captured) != 1:
            raise CaptureError("the model is not one graph", found=f"{len(self._captured)} graphs")

    def _backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self._captured.append((gm, from_dynamo(gm, example_inputs), TracingContext.get()))
        self._current = gm.forward
        return lambda *args: self._current(*args)

    @property
    def program(self) -> Program:
        """The captured program; copy it before an edit."""
        return self._captured[0][1]

    def plain(self) -> Call:
        """The unpruned graph as the target compiles it, straight from Dynamo."""
        return self._variant(self._lower(self._captured[0][0], self.target))

    def rewritten(self, program: Program) -> Call:
        """A rewritten program as the target compiles it; it is not changed."""
        return self._variant(self._lower(program.copy().gm, self.target))

    def recorded(self, program: Program, target: str, recording: Recording) -> Call:
        """A rewritten program, compiled; each call records its selections."""
        program = program.copy()
        wrap = record(program, recording)
        return self._variant(wrap(self._lower(program.gm, target)))

    def ideal(self, program: Program, target: str, recording: Recording) -> Call:
        """A rewritten program, compiled with the selections of a recording as constants."""
        program, frozen = program.copy(), Recording()
        frozen.maps = dict(recording.maps)
        replay(program, frozen)
        return self._variant(self._lower(program.gm, target))

    def _lower(self, gm: GraphModule, target: str) -> Callable[..., Any]:
        """Compile a graph as if within the capture: the scalars that the model reads have their symbols there."""
        _, program, context = self._captured[0]
        fakes = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
        with tracing(context):
            return lower(gm, fakes, target)

    def _variant(self, run: Callable[..., Any]) -> Call:
        def call(inputs: Mapping[str, Tensor]) -> Tensor:
            self._current = run
            return self._call(inputs)

        return call


def time_interleaved(
    calls: Mapping[Any, Call], inputs: Mapping[str, Tensor], rounds: int, warmup: int, say: Callable[[str], None]
) -> dict[Any, list[float]]:
    """Milliseconds of every call in every round; each round makes all calls, in another order."""
    spent: dict[Any, list[float]] = {key: [] for key in calls}
    order, shuffle = list(calls), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + rounds):
            say(f"timing, round {number + 1} of {warmup + rounds}")
            shuffle.shuffle(order)
            for key in order:
                start = time.perf_counter()
                calls[key](inputs)
                if number >= warmup:
                    spent[key].append((time.perf_counter() - start) * 1e3)
    finally:
        gc.enable()
    return spent
