"""The Dynamo backend `tokred`: `torch.compile(model, backend="tokred", options={"rule": NAME, "keep": 192})`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from tokcompile.applied import Applied
from tokcompile.capturing.capture import from_dynamo
from tokcompile.capturing.dynamo import prepare
from tokcompile.decoding.carried import carry
from tokcompile.errors import EditError, RuleError, TokredError
from tokcompile.lowering.choosekernels import Choice
from tokcompile.lowering.lower import TARGETS, lower
from tokcompile.pieces import pieces_of, rules_here
from tokcompile.pipeline import apply_rules
from tokcompile.program import Program, place
from tokcompile.recording import Recording, record, replay
from tokcompile.rulefile import parse_rules, rule_names
from tokcompile.sites import find_sites, window_of
from tokcompile.weights import Weights

RESERVED = ("target", "record", "replay", "report", "weights", "carried", "masks")
"""Options that are not a rule's parameters."""

# torch.compile imports this module when it looks the backend up, which is before it traces anything.
prepare()


class Report:
    """Collects what was done to each graph: give one as `options={"report": report}`.

    Attributes:
        graphs: for each graph what each rule did.
        kernels: for each graph what runs each `tokred::` operator, and why; empty for targets that choose no kernels.
    """

    def __init__(self) -> None:
        self.graphs: list[list[Applied]] = []
        self.kernels: list[list[Choice]] = []


def tokred(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Rewrite a Dynamo graph by rules and compile it.

    Args:
        gm: graph from Dynamo.
        example_inputs: its example inputs.
        options: `rule` with its parameters, or `rules`; `target` (`inductor`, `eager`, `aot_eager`); `record` and
            `replay` (a `Recording`); `report` (a `Report`); `weights` (`Weights`, or a safetensors file of them);
            `carried` and `masks` (a `Carried` that `tokcompile.compile` keeps on caches, and whether it brought masks).
        mode: not used; torch.compile passes it on.

    Raises:
        TokredError: the rule or its options are wrong, or the edit cannot be done soundly on this graph.
    """
    del mode
    pieces = pieces_of(options)
    options = dict(options or {})
    if "rule" not in options and "rules" not in options:
        raise RuleError(
            "backend 'tokred' needs a rule",
            found=f"options {sorted(options)}",
            remedy=f'options={{"rule": NAME}} with NAME one of {", ".join(rule_names())}, or a rule file',
        )
    rules = parse_rules(options, reserved=RESERVED)
    pieces.note(gm)
    program = from_dynamo(gm, example_inputs)
    program.weights = _weights(options.get("weights"))
    program.carried = options.get("carried")
    rules = rules_here(rules, find_sites(program), pieces)
    if not rules:
        return lower(program.gm, example_inputs, options.get("target", "inductor"))
    try:
        applied = apply_rules(program, rules)
    except TokredError as error:
        raise error.inside(pieces.explain()) if pieces.split else error from None
    _check_masks(program, applied, options.get("masks"))
    choices: list[Choice] = []
    if options.get("report") is not None:
        options["report"].graphs.append(applied)
        options["report"].kernels.append(choices)
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda compiled: compiled  # noqa: E731
    outer = carry(program)
    if isinstance(options.get("replay"), Recording) and applied[0].phase == "prefill":
        replay(program, options["replay"])
    if isinstance(options.get("record"), Recording) and applied[0].phase == "prefill":
        wrap = record(program, options["record"])
    example_inputs = [*example_inputs, *(node.meta["val"] for node in program.taken.values())]
    return outer(wrap(lower(program.gm, example_inputs, options.get("target", "inductor"), choices)))


def _weights(given: Any) -> Weights:
    if given is None:
        return Weights()
    if isinstance(given, str | Path):
        return Weights.load(given)
    if not isinstance(given, Weights):
        raise RuleError(
            "option 'weights' holds no weights",
            found=repr(given)[:80],
            remedy="tokcompile.Weights, or a .safetensors file",
        )
    return given


def _check_masks(program: Program, applied: Sequence[Applied], brought: bool | None) -> None:
    """Say before `generate` fails in Dynamo that its one mask will not fit all layers.

    Args:
        brought: whether `tokcompile.compile` brought masks that fit; None when it was not called.

    Raises:
        EditError: caches that an eviction left, for nothing but later steps, and which no call of ours would fit.
    """
    if applied[0].phase != "prefill" or brought:
        return
    sites = find_sites(program)
    own = {b: c.key for b, c in sites.caches.items() if sites.reach.above(b.input, c.key)}
    # Blocks that attend in a window have a mask of their own.
    whole = {b: key for b, key in own.items() if window_of(b.attention, sites.reach) is None}
    lengths = {str(key.meta["val"].shape[2]) for key in (whole or own).values()}
    if len(lengths) < 2 or all(block.attention.mask is None for block in sites.caches):
        return
    left = f"caches of {' and '.join(sorted(lengths))} tokens"
    evicted = any(step["verb"] == "evict" for rule in applied for step in rule.steps)
    if brought is False and evicted:
        block = next(iter(own))
        raise EditError(
            "the caches of this model cannot differ in length: it makes one mask for all of its layers",
            where=[place(block.attention.node)],
            found=left,
            remedy="give all blocks the same budget, or use attn_implementation='sdpa' where the model has it",
        )
    warnings.warn(
        f"rule '{applied[0].rule}' leaves layers with {left} under a "
        "padding mask. One forward is right; to go on from these caches (generate), compile with "
        "tokcompile.compile(model, rule=...), which brings a mask that fits every layer",
        stacklevel=2,
    )


__all__ = ["RESERVED", "TARGETS", "Report", "tokred"]
