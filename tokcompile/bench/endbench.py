"""Time whole models: as they are, under a rule, and as the rule's ideal, in prompts and in later steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from rich.console import RenderableType
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

import tokcompile
from tokcompile.capturing.dynamo import without_flags
from tokcompile.errors import CaptureError
from tokcompile.exampleinputs import longer
from tokcompile.modelsource import Source, from_config
from tokcompile.recording import Recording
from tokcompile.report import versions
from tokcompile.rulefile import load_rule
from tokcompile.steps import Route

WARM = 4
"""Tokens of the call that compiles: a step, and one that is longer by a token."""


@dataclass(frozen=True)
class Way:
    """One way to run a model.

    Attributes:
        prefill: milliseconds to the first token, the best of all rounds.
        decode: milliseconds of a token after it, the median of all rounds.
        peak: bytes beside those of the model, at the most; None where the device does not say.
        kept: tokens in the caches after the prompt, the least and the most of all layers.
    """

    name: str
    prefill: float
    decode: float
    peak: int | None
    kept: tuple[int, int]


@dataclass(frozen=True)
class Ends:
    """All that was measured of a model under a rule.

    Attributes:
        ideal: what the last way is: `replayed`, the rewritten graph with its choices as constants; or `short`, the
            plain model on a prompt that is as long as the caches that the rule leaves, or as the keys that its steps
            attend to: only its steps compare.
    """

    model: str
    rule: str
    options: dict[str, Any]
    device: str
    dtype: str
    prompt: int
    ideal: str
    ways: list[Way]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "versions": versions()}

    def way(self, name: str) -> Way:
        """What was measured of one way."""
        return next(each for each in self.ways if each.name == name)


class Clock:
    """A stopping criterion that stops nothing, and notes when each token was there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Note the time."""
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ready(source: Source, device: str, dtype: torch.dtype) -> Source:
    """A source with its model on a device; one of shapes alone gets random weights and real inputs."""
    if source.weights == "none":
        source = from_config(source.model.config, source.name, weights=True, image=source.image, device=device)
    source.model.to(device=device, dtype=dtype)
    return source


def prompt(source: Source, words: int) -> dict[str, Tensor]:
    """The example inputs of a source, with so many random words after them.

    Raises:
        CaptureError: the model takes no text, so that it generates none.
    """
    if "input_ids" not in source.inputs:
        raise CaptureError(
            "the model takes no text",
            where=[source.name],
            found=", ".join(source.inputs),
            remedy="a model that generates",
        )
    model = source.model
    made = longer(source.inputs, words, min(model.config.get_text_config().vocab_size, 32000))
    dtypes = {name: model.dtype if value.is_floating_point() else value.dtype for name, value in made.items()}
    return {name: value.to(model.device, dtypes[name]) for name, value in made.items()}


def bench_ends(
    source: Source,
    rule: str,
    options: Mapping[str, Any],
    *,
    device: str,
    dtype: torch.dtype,
    words: int,
    steps: int,
    rounds: int,
    target: str = "inductor",
    bar: Progress | None = None,
) -> Ends:
    """Measure a model as it is in eager mode and compiled, under a rule, and as the rule's ideal.

    Args:
        source: as `modelsource.load_source` returns it.
        words: tokens that the prompt is longer by than the source's example.
        steps: tokens that are generated after the first one.
        target: of the compiler.

    Raises:
        TokredError: the rule does not fit the model; or the model does not generate.
    """
    source = ready(source, device, dtype)
    model, inputs = source.model, prompt(source, words)
    task = bar.add_task("eager", total=4) if bar is not None else None
    ways: list[Way] = []

    def plain() -> None:
        model.compile(backend=target)

    def measured(name: str, inputs: Mapping[str, Tensor], compiles: Callable[[], Any]) -> Way:
        if bar is not None:
            bar.update(task, description=name, advance=1)
        tokcompile.restore(model)
        torch._dynamo.reset()
        compiles()
        with without_flags() if compiles is plain else nullcontext():
            ways.append(_way(name, model, inputs, steps, rounds))
        return ways[-1]

    try:
        measured("eager", inputs, lambda: None)
        measured("full", inputs, plain)
        ruled = measured("ruled", inputs, lambda: tokcompile.compile(model, rule, target=target, **options))
        recording = _recorded(model, rule, options, inputs)
        if recording.maps:
            replayed = {**options, "target": target, "replay": recording}
            measured("ideal", inputs, lambda: tokcompile.compile(model, rule, **replayed))
        else:
            length = _attended(rule, options, ruled.kept[1])
            short = torch.full((len(inputs["input_ids"]), length), 5, device=model.device)
            measured("ideal", {"input_ids": short}, plain)
    finally:
        tokcompile.restore(model)
    kind = "replayed" if recording.maps else "short"
    name = torch.cuda.get_device_name(device) if model.device.type == "cuda" else device
    length = inputs["input_ids"].shape[1]
    return Ends(source.name, rule, dict(options), name, str(dtype).removeprefix("torch."), length, kind, ways)


def _attended(rule: str, options: Mapping[str, Any], kept: int) -> int:
    """Keys that a later step attends to: all in the caches, or those that it chooses."""
    instance = load_rule(rule).bind(**options)
    routes = instance.resolve_only([step for step in instance.rule.steps if isinstance(step, Route)], {})
    return min([kept, *(int(step.keep) for step in routes)])


def _recorded(model: torch.nn.Module, rule: str, options: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> Recording:
    """What a rule chooses in a prompt."""
    recording = Recording()
    torch._dynamo.reset()
    tokcompile.compile(model, rule, target="eager", record=recording, **options)
    with torch.no_grad():
        model(**inputs, use_cache=True, logits_to_keep=1)
    return recording


def _way(name: str, model: torch.nn.Module, inputs: Mapping[str, Tensor], steps: int, rounds: int) -> Way:
    def run(tokens: int) -> tuple[float, list[float], DynamicCache]:
        cache, clock = DynamicCache(), Clock(model.device)
        synchronize(model.device)
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                **inputs,
                past_key_values=cache,
                stopping_criteria=[clock],
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return clock.times[0] - start, [after - before for before, after in pairwise(clock.times)], cache

    run(WARM)
    prompts, each = [], []
    for _ in range(rounds):
        first, later, _ = run(1 + steps)
        prompts.append(first)
        each += later
    before = _allocated(model.device)
    *_, cache = run(1)
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    peak = None if before is None else torch.cuda.max_memory_allocated(model.device) - before
    return Way(name, 1e3 * min(prompts), 1e3 * median(each), peak, (min(lengths), max(lengths)))


def _allocated(device: torch.device) -> int | None:
    """Bytes that are held now, from which on the peak counts; None where the device does not say."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def render(found: Ends, plain: bool) -> RenderableType:
    """A table for a terminal; a plain one has no frame."""
    title = f"{found.model}, {found.rule}, {found.prompt} tokens, {found.dtype}, {found.device}"
    table = Table(title=title, box=None if plain else Table().box)
    for name in ("way", "prefill ms", "ruled takes", "decode ms", "ruled takes", "peak MB", "tokens in caches"):
        table.add_column(name, justify="left" if name == "way" else "right")
    ruled = found.way("ruled")
    for way in found.ways:
        alone = way.name == "ideal" and found.ideal == "short"
        prefill = ("", "") if alone else (f"{way.prefill:.1f}", f"{ruled.prefill / way.prefill:.2f}x")
        decode = f"{way.decode:.2f}", f"{ruled.decode / way.decode:.2f}x"
        peak = "" if way.peak is None else f"{way.peak / 1e6:.0f}"
        least, most = way.kept
        table.add_row(way.name, *prefill, *decode, peak, f"{least}" if least == most else f"{least} to {most}")
    return table
