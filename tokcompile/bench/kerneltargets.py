"""What kernels have to reach on a GPU: times over those of something else, measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import RenderableType
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, symbolic_trace
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_leaves

from tokcompile import kernels
from tokcompile.bench.kernelbench import Clock, copy_rate
from tokcompile.bench.kernelworkloads import WORKLOADS, Maker
from tokcompile.lowering.choosekernels import choose_kernels
from tokcompile.report import versions

aten = torch.ops.aten
tokred = torch.ops.tokred
HALF = torch.bfloat16


@dataclass(frozen=True)
class Heads:
    """Of an attention: how many query heads share how many of keys, of what width, and whether it is causal."""

    query: int
    key: int
    width: int
    causal: bool

    def tensors(self, maker: Maker, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [1, H, queries, D], keys and values [1, Hkv, keys, D]."""
        key = maker.floats(1, self.key, keys, self.width)
        return maker.floats(1, self.query, queries, self.width), key, key.flip(2)

    def __str__(self) -> str:
        how = "causal" if self.causal else "all keys"
        return f"{self.query} heads of {self.width} over {self.key}, {how}"


DECODER = Heads(32, 8, 128, True)
"""Of Llama-3.1-8B."""
TOWER = Heads(16, 16, 64, False)
"""Of CLIP ViT-L."""
WINDOW = 64
"""Queries of a window."""


@dataclass(frozen=True)
class Target:
    """One ratio of two times.

    Attributes:
        name: what is timed, and over what.
        case: of which sizes.
        limit: what the ratio may be at most, or has to be at least; None: it is shown beside the others.
        at_most: whether less is better.
        spent: gives, on a device and with a clock, the two numbers whose ratio it is.
    """

    name: str
    case: str
    limit: float | None
    at_most: bool
    spent: Callable[[torch.device, Clock], tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    """What was measured of a target.

    Attributes:
        ratio: None where it could not be measured.
        why: why not; "" otherwise.
    """

    name: str
    case: str
    limit: float | None
    at_most: bool
    ratio: float | None
    why: str = ""

    @property
    def holds(self) -> bool:
        """Whether the limit is kept; of a figure without one, whether it was measured."""
        if self.ratio is None or self.limit is None:
            return self.ratio is not None
        return self.ratio <= self.limit if self.at_most else self.ratio >= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "holds": self.holds}


@dataclass(frozen=True)
class Figures:
    """What was measured of all targets on a device."""

    device: str
    figures: list[Figure]

    @property
    def hold(self) -> bool:
        """Whether all limits are kept."""
        return all(each.holds for each in self.figures)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"device": self.device, "targets": [each.to_dict() for each in self.figures], "versions": versions()}


def lowered(call: Callable[..., Any], *args: Tensor) -> GraphModule:
    """Operators of a function with every kernel in the place of its reference, and fused as in a rewritten model.

    Args:
        call: calls operators of torch.ops alone.
        args: what it will be called with.
    """
    gm = symbolic_trace(call)
    with torch.no_grad():
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*args)
        choose_kernels(gm, "on")
    return gm


def targets(
    tokens: Sequence[int] = (4096, 16384, 65536),
    sizes: Sequence[int] = (),
    patches: int = 4096,
    context: int = 131072,
    kept: int = 4096,
) -> list[Target]:
    """All targets.

    Args:
        tokens: of attentions.
        sizes: bytes that kernels which bytes bound are to move.
        patches: tokens that are merged.
        context: keys of a step, of which `kept` are attended to.
    """
    return [*_received(tokens), *_bandwidths(sizes), *_matched(patches), *_steps(context, kept)]


def measure(every: Sequence[Target], clock: Clock, device: str, name: str, bar: Progress | None = None) -> Figures:
    """Measure targets.

    Args:
        clock: what times a call.
        device: where tensors are made.
        name: of the device, for the report.
        bar: shows what is being measured.
    """
    task = bar.add_task("", total=len(every)) if bar is not None else None
    found = []
    for target in every:
        if bar is not None:
            bar.update(task, description=target.name, advance=1)
        about = target.name, target.case, target.limit, target.at_most
        try:
            with torch.no_grad():
                ours, other = target.spent(torch.device(device), clock)
            found.append(Figure(*about, ours / other))
        except (RuntimeError, NotImplementedError) as error:
            found.append(Figure(*about, None, str(error).partition("\n")[0] or type(error).__name__))
    return Figures(name, found)


def flash(heads: Heads, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """PyTorch's flash attention."""

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=heads.causal, enable_gqa=True)

    return call


def received(heads: Heads, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """An attention, and what each key receives from all queries, as a rule makes it."""
    scale, gqa = heads.width**-0.5, {"enable_gqa": heads.query != heads.key}

    def both(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = aten.scaled_dot_product_attention.default(query, key, value, None, 0.0, heads.causal, **gqa)
        how = (scale, heads.causal, 0.0, "mean", "mean", None)
        return out, tokred.attention_received.default(query, key, None, None, *how)

    made = lowered(both, query, key, value)
    return lambda: made(query, key, value)


def windowed(heads: Heads, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """An attention, and what each head's keys receive from the last queries."""
    attend = flash(heads, query, key, value)
    how = (WINDOW, heads.key, heads.width**-0.5, heads.causal, 0.0, "mean", "mean", None)
    return lambda: (attend(), kernels.kernel_op("key_attention")(query, key, None, None, *how))


def _received(tokens: Sequence[int]) -> Iterator[Target]:
    def over_flash(make: Callable[..., Any], heads: Heads, count: int) -> Callable[..., tuple[float, float]]:
        def spent(device: torch.device, clock: Clock) -> tuple[float, float]:
            given = heads.tensors(Maker(device, HALF, 0), count, count)
            return clock(make(heads, *given)), clock(flash(heads, *given))

        return spent

    for heads in (DECODER, TOWER):
        for count in tokens:
            name = "attention with what keys receive from all queries / flash attention"
            yield Target(name, f"{count:,} tokens, {heads}", 1.8, True, over_flash(received, heads, count))
    for count in tokens:
        name = f"attention with what keys receive from {WINDOW} queries / flash attention"
        yield Target(name, f"{count:,} tokens, {DECODER}", 1.15, True, over_flash(windowed, DECODER, count))


def _bandwidths(sizes: Sequence[int]) -> Iterator[Target]:
    """The least share of a copy's bandwidth, over all dtypes and sizes."""

    def of_copy(op: str) -> Callable[..., tuple[float, float]]:
        def spent(device: torch.device, clock: Clock) -> tuple[float, float]:
            makers = (Maker(device, dtype, size) for dtype in WORKLOADS[op].dtypes for size in sizes)
            return min((_rate(op, maker, clock) for maker in makers), key=lambda both: both[0] / both[1])

        return spent

    for op in (op for op, load in WORKLOADS.items() if load.bound == "bytes" and sizes):
        yield Target("bandwidth / that of a copy", op, 0.75, False, of_copy(op))


def _rate(op: str, maker: Maker, clock: Clock) -> tuple[float, float]:
    """Bytes a millisecond of a kernel, and of a copy."""
    load = WORKLOADS[op]
    args = load.make(maker)
    fault = kernels.kernel_fault(op, args)
    if fault:
        raise RuntimeError(fault)
    run = kernels.kernel_op(op)
    made = [each for each in tree_leaves(run(*args)) if isinstance(each, Tensor)]
    return load.moved(args, made) / clock(lambda: run(*args)), copy_rate(maker.size, clock, str(maker.device))


def _matched(patches: int) -> Iterator[Target]:
    def over_kernel(images: int) -> Callable[..., tuple[float, float]]:
        def spent(device: torch.device, clock: Clock) -> tuple[float, float]:
            metric = Maker(device, HALF, 0).floats(images, patches, 64)
            torch._dynamo.reset()
            plain, kernel = torch.compile(tokred.match_pairs, dynamic=False), kernels.kernel_op("match_pairs")
            return tuple(clock(lambda run=run: run(metric, patches // 4, 0)) for run in (plain, kernel))

        return spent

    for images in (1, 8):
        name = "match of pairs: its reference under Inductor / the kernel"
        yield Target(name, f"{patches:,} tokens of 64, batch of {images}", 3, False, over_kernel(images))


def chosen(heads: Heads, kept: int, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """A step that attends to keys that are listed, as where the last choice serves again."""
    every = torch.arange(kept, device=key.device) * (key.shape[2] // kept)
    index = every.expand(1, heads.key, kept).contiguous()
    call = kernels.kernel_op("attend_chosen")
    return lambda: call(query, key, value, None, index, heads.width**-0.5, 0.0, None)


def voted(heads: Heads, kept: int, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """A step that lets all heads vote for keys, and attends to those of most votes."""

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        votes = tokred.key_votes.default(tokred.mean_query.default(query, None), key, None, kept // 32, kept // 8)
        return _attended(
            heads, tokred.keep_keys.default(votes, None, None, kept // 32, kept // 8, kept), query, key, value
        )

    made = lowered(step, query, key, value)
    return lambda: made(query, key, value)


def ranked(heads: Heads, kept: int, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """A step that scores keys by a quarter of each head's frequencies, and attends to the best."""
    half = heads.width // 2
    pairs = torch.arange(half // 4, device=key.device).expand(heads.key, -1).contiguous()

    def step(query: Tensor, key: Tensor, value: Tensor, pairs: Tensor) -> Tensor:
        own = tokred.mean_query.default(query, None)
        scores = tokred.pair_scores.default(own, key, pairs, None, 0, half, False)
        return _attended(heads, tokred.keep_keys.default(scores, None, None, 0, 1, kept), query, key, value)

    made = lowered(step, query, key, value, pairs)
    return lambda: made(query, key, value, pairs)


def _attended(heads: Heads, index: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    held = (tokred.gather_keys.default(each, index) for each in (key, value))
    return tokred.attend.default(query, *held, None, heads.width**-0.5, 0.0, None)


def _steps(context: int, kept: int) -> Iterator[Target]:
    heads = Heads(DECODER.query, DECODER.key, DECODER.width, False)
    case = f"{kept:,} of {context:,} keys, {heads}"

    def flash_over(make: Callable[..., Any]) -> Callable[..., tuple[float, float]]:
        def spent(device: torch.device, clock: Clock) -> tuple[float, float]:
            given = heads.tensors(Maker(device, HALF, 0), 1, context)
            return clock(flash(heads, *given)), clock(make(heads, kept, *given))

        return spent

    yield Target("flash attention to all keys / attention to chosen ones", case, 8, False, flash_over(chosen))
    # No limit of 8 here: votes read all keys, half of what attention to all reads, and frequencies read parts of all.
    yield Target("flash attention to all keys / votes, choice and attention", case, None, False, flash_over(voted))
    yield Target(
        "flash attention to all keys / scores by frequencies, choice and attention",
        case,
        None,
        False,
        flash_over(ranked),
    )


def render(found: Figures, plain: bool) -> RenderableType:
    """A table for a terminal; a plain one has no frame."""
    table = Table(title=None if plain else found.device, box=None if plain else Table().box)
    for title in ("target", "case", "limit", "here", "holds"):
        table.add_column(title, justify="right" if title in ("limit", "here") else "left")
    for each in found.figures:
        table.add_row(each.name, each.case, *cells(each))
    return table


def cells(figure: Figure) -> tuple[str, str, str]:
    """In words: the limit, what was measured, and whether it holds."""
    limit = "" if figure.limit is None else f"{'at most' if figure.at_most else 'at least'} {figure.limit:g}"
    here = figure.why if figure.ratio is None else f"{figure.ratio:.2f}"
    return limit, here, "" if figure.limit is None else ("yes" if figure.holds else "no")
