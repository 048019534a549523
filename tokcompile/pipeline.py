"""Apply rules to a program: resolve addresses, run the passes in order, verify."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import tokcompile.kernels  # noqa: F401  registers the operators that passes insert
from tokcompile.applied import Applied
from tokcompile.axes import product
from tokcompile.binding import ResolvedRule, RuleInstance
from tokcompile.decoding.carried import return_handed
from tokcompile.decoding.crosscache import check_lengths, masked_lengths
from tokcompile.decoding.decode import adapt_decode
from tokcompile.decoding.giventokens import follow_given
from tokcompile.dump import dump
from tokcompile.editing.edit import Editor
from tokcompile.errors import CaptureError, EditError, TokredError
from tokcompile.passes import PASSES, Context
from tokcompile.passes.context import class_tokens
from tokcompile.passes.insertplaces import Slots
from tokcompile.passes.jointheads import attend_to_owned, check_joints, is_joint
from tokcompile.passes.keyranks import PLACES, read_by_rank
from tokcompile.passes.route import check_routes
from tokcompile.program import Program, place
from tokcompile.sites import Sites, find_sites
from tokcompile.sites.cache import first_shortened
from tokcompile.sites.features import features, images_per_row
from tokcompile.sites.grid import patch_grid
from tokcompile.steps import Evict, Layer, Place, Rotate, Route, Score, Select, Step
from tokcompile.verify import verify


def apply_rules(program: Program, rules: Sequence[RuleInstance], *, check: bool = True) -> list[Applied]:
    """Rewrite a program by rules, one after the other on the same graph.

    Args:
        program: changed in place.
        rules: a later rule sees the axes that the earlier ones left.
        check: run the verifier on the result.

    Raises:
        TokredError: with the rule file and line, and the place in the model.
    """
    dump(program, "captured")
    check_routes(rules)
    check_joints(rules)
    done: list[Applied] = []
    sites = find_sites(program)
    phase = sites.phase
    if phase == "prefill":
        _check_beginning(sites)
    for instance in rules:
        start = time.perf_counter()
        applied = Applied(instance.name, phase=phase)
        if phase == "prefill":
            _run(program, find_sites(program), instance, applied, [d.rule for d in done])
        applied.milliseconds = (time.perf_counter() - start) * 1e3
        dump(program, f"after-{len(done)}-{instance.name}")
        done.append(applied)
    if phase == "decode":
        known = facts(program, find_sites(program))
        adapt_decode(program, rules, known, done)
        given = follow_given(program, rules, known, done)
        shortened = any(step.verb in ("drop", "merge", "evict") for instance in rules for step in instance.rule.steps)
        for instance, applied, own in zip(rules, done, given, strict=True):
            on = [step for step in instance.rule.steps if _goes_on(step, own)]
            _turn_decode(program, instance, on, known, applied, shortened, own)
            _evict_again(program, instance, known, applied)
        for instance, applied in zip(rules, done, strict=True):  # keys are chosen by what all rules make of them
            routes = [step for step in instance.rule.steps if isinstance(step, Route)]
            _turn_decode(program, instance, routes, known, applied, shortened, {})
            _read_joint(program, instance, known, applied)
    return_handed(program)
    program.graph.eliminate_dead_code()
    program.changed()
    if check:
        verify(program)
    program.gm.recompile()
    dump(program, "rewritten")
    return done


def _check_beginning(sites: Sites) -> None:
    """Refuse a step that goes on from a cache which was not recognised: rules would prune it like a prompt."""
    for block in sites.stacks["decoder"].blocks if "decoder" in sites.stacks else ():
        queries, keys = (n.meta["val"].shape[2] for n in (block.attention.query, block.attention.key))
        own = sites.reach.above(block.input, block.attention.key)
        if own and isinstance(queries, int) and isinstance(keys, int) and queries < keys:
            raise CaptureError(
                "this graph continues a sequence from a cache that is not known",
                where=[place(block.attention.node)],
                found=f"{queries} queries and {keys} keys",
                remedy="call the model without a cache, or with transformers' DynamicCache; after "
                "tokcompile.compile(model, rule=...) also with a StaticCache",
            )


def _run(program: Program, sites: Sites, instance: RuleInstance, applied: Applied, earlier: list[str]) -> None:
    editor = Editor(program, instance.name, applied.counts)
    try:
        resolved = instance.resolve(facts(program, sites))
        ctx = Context(program, editor, sites, resolved, counts=applied.counts)
        read = masked_lengths(program, sites)
        for step in resolved.steps:
            with _inside(ctx, instance, step):
                _check_order(program, step)
                PASSES[step.verb](ctx, step)
                if read:
                    check_lengths(program, ctx.sites, read)
    except TokredError as error:
        if earlier:
            raise error.inside(f"rule '{instance.name}', after {', '.join(earlier)}") from error
        raise
    applied.steps = ctx.log


def _check_order(program: Program, step: Step) -> None:
    """Refuse to change a sequence, or what its keys are, after keys were chosen."""
    if step.makes or step.verb == "evict":
        return
    evicted = first_shortened(program.output)
    if evicted is not None:
        raise EditError(
            "the tokens of a prompt cannot be changed after its keys were evicted",
            where=[place(evicted)],
            found=f"'{step.verb}' after an eviction",
            remedy="evict last: put the rule that evicts behind all others",
        )


def _turn_decode(
    program: Program,
    instance: RuleInstance,
    steps: Sequence[Step],
    known: dict[str, int],
    applied: Applied,
    shortened: bool,
    given: Mapping[str, Slots],
) -> None:
    """Carry out those steps of a rule that have something to do in each later step.

    Args:
        given: tokens that the rule puts into prompts, and that the caller puts into this step.
    """
    if not steps:
        return
    editor = Editor(program, instance.name, applied.counts)
    ctx = Context(program, editor, find_sites(program), instance, dict(given), counts=applied.counts)
    ctx.shortened = shortened
    for step in instance.resolve_only(steps, known):
        with _inside(ctx, instance, step):
            PASSES[step.verb](ctx, step)
    applied.steps += ctx.log


@contextmanager
def _inside(ctx: Context, instance: RuleInstance, step: Step) -> Iterator[None]:
    """Say in errors, and in the nodes that are made, which step of which rule file they are of."""
    where = f"{instance.rule.path}:{step.line} ({step.verb})"
    ctx.editor.step = where
    try:
        yield
    except TokredError as error:
        raise error.inside(where) from error


def _evict_again(program: Program, instance: RuleInstance, known: dict[str, int], applied: Applied) -> None:
    """Evict in a later step what a rule evicts at each."""
    evicting = instance.resolve_only([s for s in instance.rule.steps if isinstance(s, Evict)], known)
    evicting = [step for step in evicting if step.when != "prefill"]
    if not evicting:
        return
    chosen = {step.keep for step in evicting}
    choices = [s for s in instance.rule.steps if isinstance(s, Select) and s.name in chosen]
    scores = [s for s in instance.rule.steps if isinstance(s, Score) and s.name in {c.scores for c in choices}]
    steps = [*instance.resolve_only([*scores, *choices], known), *evicting]
    editor = Editor(program, instance.name, applied.counts)
    resolved = ResolvedRule(instance, tuple(steps), instance.params, known)
    ctx = Context(program, editor, find_sites(program), resolved, counts=applied.counts)
    for step in evicting:
        if step.positions == "rank":
            with _inside(ctx, instance, step):
                ctx.values.setdefault(PLACES, {}).update(read_by_rank(ctx, step.at))
    for step in steps:
        with _inside(ctx, instance, step):
            PASSES[step.verb](ctx, step)
    applied.steps += ctx.log


def _read_joint(program: Program, instance: RuleInstance, known: dict[str, int], applied: Applied) -> None:
    """Let a later step attend to caches that all heads of a block chose together."""
    for step in instance.rule.steps:
        if isinstance(step, Evict) and is_joint(instance.rule, step, dict(instance.params) | known):
            editor = Editor(program, instance.name, applied.counts)
            ctx = Context(program, editor, find_sites(program), instance, counts=applied.counts)
            (resolved,) = instance.resolve_only([step], known)
            with _inside(ctx, instance, step):
                attend_to_owned(ctx, resolved)
            applied.steps += ctx.log


def _goes_on(step: Step, given: Mapping[str, Slots]) -> bool:
    """Whether a step has something to do after a prompt: layers of inserted tokens have where the caller gives some."""
    attends = isinstance(step, Layer) and step.by == "attention"
    return step.of in given if attends else isinstance(step, Place | Rotate | Layer)


def _patches(program: Program, sites: Sites, others: int) -> int | None:
    """How many patches the tower of a model without a decoder ends with, where that is known."""
    stack = sites.stacks["vision"]
    tokens = stack.blocks[stack.features].output.meta["val"].shape[1]
    return tokens - others if isinstance(tokens, int) else None


def facts(program: Program, sites: Sites) -> dict[str, int]:
    """What rule files may compute with: depths, the numbers of class and image tokens, and the patch grid."""
    found = {f"{name}.depth": len(stack.blocks) for name, stack in sites.stacks.items()}
    if "vision" in sites.stacks:
        found["vision.used"] = sum(block.live for block in sites.stacks["vision"].blocks)
    others = class_tokens(program, sites)
    if others is not None:
        found["vision.class_tokens"] = others
        if sites.projector is None and (patches := _patches(program, sites, others)):
            found["image.tokens"] = patches
    made = features(program, sites) if sites.projector is not None else None
    if made is None or (made.packed and images_per_row(program, sites, made) != 1):
        return found
    total = product(made.axis)
    if isinstance(total, int):
        found["image.tokens"] = total
    grid = patch_grid(program, made.axis)
    if grid is not None:
        found["grid.height"], found["grid.width"] = grid
    return found
