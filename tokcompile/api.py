"""The Python API: compile a model with rules, take it back, rewrite an exported program."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokcompile.binding import RuleInstance
from tokcompile.capturing import attention, imagesizes, oldertorch
from tokcompile.capturing.batchwise import whole_batches
from tokcompile.capturing.capture import from_export
from tokcompile.capturing.dynamo import install_hooks, know_caches, prepare
from tokcompile.decoding import seen, slidingcache, staticcache
from tokcompile.decoding.carried import Carried, check_compiled
from tokcompile.decoding.fixedslots import check_rules
from tokcompile.errors import RuleError
from tokcompile.pipeline import apply_rules
from tokcompile.program import Program
from tokcompile.rulefile import parse_rules
from tokcompile.steps import Evict, Merge
from tokcompile.weights import Weights

_BEFORE = "_tokcompile_attention_before"
_WEIGHTS = "tokred"
_COUNTED = {"drop", "merge", "mark", "insert", "evict", "place", "rotate", "route"}
"""Verbs after whose prompt a cache alone does not say how many there were, where they stood, or which were read."""


def compile(
    model: torch.nn.Module,
    rule: str | Path | None = None,
    *,
    rules: Sequence[Any] | None = None,
    target: str = "inductor",
    dynamic: bool | None = None,
    weights: Weights | None = None,
    **params: Any,
) -> torch.nn.Module:
    """Compile a model in place under rules, ready for `model(...)` and `model.generate(...)`.

    The same as `model.compile(backend="tokred", options=...)`, and in addition a transformers model with full attention
    gets an attention implementation whose mask fits layers with caches of different lengths, as a drop in the middle of
    the decoder makes them. What a model computes in Python from the sizes of its images is computed before each call
    (`precompute`), so that it is one graph all the same. `restore` takes all of it back.

    Args:
        model: an unmodified model.
        rule: name of a library rule or path of a rule file; its parameters follow as keywords.
        rules: several rules, in order, each a name or a mapping with `rule` and its parameters.
        target: `inductor`, `eager` or `aot_eager`.
        dynamic: as for torch.compile.
        weights: parameters that rules bring; made where none are given. They become the model's own, as its submodule
            `tokred`, and so are trained and saved with it.

    Returns:
        The model itself.

    Raises:
        RuleError: the rule or an option is wrong.
    """
    if (rule is None) == (rules is None):
        raise RuleError("compile needs one of 'rule' and 'rules'", remedy="tokcompile.compile(model, rule=NAME)")
    options: dict[str, Any] = {"rule": str(rule)} if rule is not None else {"rules": list(rules or ())}
    options |= params
    parsed = parse_rules(options, reserved=("record", "replay", "report"))
    prepare()
    restore(model)
    before = attention.install(model)
    if before is not None:
        setattr(model, _BEFORE, before)
    weights = Weights() if weights is None else weights
    model.add_module(_WEIGHTS, weights)
    carried = Carried()
    kept = {"target": target, "weights": weights, "carried": carried, "masks": before is not None}
    model.compile(backend="tokred", dynamic=dynamic, options={**options, **kept})
    imagesizes.install(model)
    staticcache.install(model)
    steps = [step for instance in parsed for step in instance.rule.steps]
    evicts = any(isinstance(s, Evict) or (isinstance(s, Merge) and s.of_caches) for s in steps)
    later = any(isinstance(s, Evict) and s.when != "prefill" for s in steps)
    counted = any(step.verb in _COUNTED for step in steps)
    if counted or imagesizes.reads_sizes(model) or slidingcache.has_windows(model):
        model._compiled_call_impl = _Around(model, model._compiled_call_impl, carried, evicts, later, parsed)
    return model


class _Around:
    """A compiled call: inputs are prepared before it, tokens and caches counted, and what it carries is kept."""

    def __init__(
        self,
        model: torch.nn.Module,
        compiled: Any,
        carried: Carried,
        evicts: bool,
        later: bool,
        rules: Sequence[RuleInstance],
    ) -> None:
        self.model, self.compiled, self.carried, self.evicts, self.later = model, compiled, carried, evicts, later
        self.rules, self.spare = rules, 0
        self.names = list(inspect.signature(model.forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self.names, args, strict=False))
        given = imagesizes.precompute(self.model, named | kwargs)
        past = given.get("past_key_values")
        if staticcache.is_static(past):
            return self._fill(past, given) if staticcache.begins(past) else self._go_on(past, given)
        seen.check(past, given)
        before, changed = seen.seen_before(past), seen.is_changed(past)
        self.carried.before(past)
        out = self.compiled(**given)
        if changed:
            check_compiled(self.carried.ran)
        cache = getattr(out, "past_key_values", None)
        self.carried.after(cache)
        slidingcache.recount(cache)
        seen.note(cache, given, before, self.evicts, self.later)
        return out

    def _fill(self, cache: Any, given: dict[str, Any]) -> Any:
        """Run a prompt with a cache that grows, and fill a static one with what it leaves."""
        check_rules(self.rules, slidingcache.has_windows(self.model))
        held = staticcache.stand_in(self.model, cache, given)
        self.carried.before(None)
        out = self.compiled(**{**given, "past_key_values": held})
        told, self.spare = staticcache.fill(cache, held, given, seen.tokens_of(given) or 0, self.spare)
        self.carried.values |= told
        self.carried.after(cache)
        return staticcache.hand_back(out, held, cache)

    def _go_on(self, cache: Any, given: dict[str, Any]) -> Any:
        """Run a step on the buffers of a static cache."""
        tokens = seen.tokens_of(given)
        given = staticcache.continued(cache, given, tokens)
        self.carried.before(cache)
        out = self.compiled(**given)
        check_compiled(self.carried.taken)
        self.carried.after(cache)
        staticcache.count(cache, tokens or 0)
        return out


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `compile`: the model runs as before."""
    before = model.__dict__.pop(_BEFORE, None)
    if before is not None:
        attention.restore(model, before)
    imagesizes.restore(model)
    staticcache.restore(model)
    model._modules.pop(_WEIGHTS, None)
    model.__dict__.pop("_compiled_call_impl", None)
    return model


def export(
    model: torch.nn.Module, inputs: Mapping[str, Any], *, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """Export a model that `rewrite` takes, also one whose own code cannot be exported because of its images' sizes.

    What it hands back as a cache may be a DynamicCache, which transformers is asked to make known to torch.export.

    Args:
        model: an unmodified model in eval mode; it stays as it is.
        inputs: keyword arguments of its forward. The program takes `precompute(model, inputs)`.
        dynamic_shapes: as for torch.export.export, for those.
    """
    oldertorch.mend()
    install_hooks(model.modules())
    know_caches(model)
    rows = nullcontext() if dynamic_shapes is None else whole_batches()
    with torch.no_grad(), imagesizes.packed(model), rows:
        given = imagesizes.precompute(model, inputs)
        return torch.export.export(model, (), given, dynamic_shapes=dynamic_shapes, strict=False)


def rewrite(
    exported: torch.export.ExportedProgram,
    rule: str | Path | None = None,
    *,
    rules: Sequence[Any] | None = None,
    weights: Weights | None = None,
    **params: Any,
) -> torch.export.ExportedProgram:
    """Rewrite an exported program by rules; the result is a valid exported program, the given one stays as it is.

    Args:
        exported: from `torch.export.export`.
        rule, rules, weights, params: as for `compile`; parameters that a rule brings are `tokred.RULE.NAME` of the
            program's state.

    Raises:
        TokredError: the rule is wrong, or its edit cannot be done soundly on this graph.
    """
    options: dict[str, Any] = {"rule": str(rule)} if rule is not None else {"rules": list(rules or ())}
    program = from_export(exported)
    if weights is not None:
        program.weights = weights
    apply_rules(program, parse_rules({**options, **params}))
    added = _lift(program)
    signature = _signature(exported.graph_signature, program, added)
    state = {**exported.state_dict, **{name: value for _, name, value in added}}
    return exported._update(program.gm, signature, state_dict=state)


def _lift(program: Program) -> list[tuple[str, str, torch.nn.Parameter]]:
    """Make the parameters that rules brought inputs of the graph, as those of an exported program are.

    Returns:
        For each the name of its input, its name in the state, and its value.
    """
    added = []
    held = [n for n in program.graph.nodes if n.op == "get_attr" and "weight" in n.meta]
    first = next(n for n in program.graph.nodes if n not in held)
    for node in held:
        value = program.gm.get_parameter(str(node.target))
        name = f"p_{node.target}"
        with program.graph.inserting_before(first):
            lifted = program.graph.placeholder(name)
        lifted.meta.update(node.meta)
        node.replace_all_uses_with(lifted)
        program.graph.erase_node(node)
        delattr(program.gm, str(node.target))
        added.append((lifted.name, f"tokred.{node.meta['weight']}", value))
    program.gm.recompile()
    return added


def _signature(
    old: torch.export.ExportGraphSignature, program: Program, added: Sequence[tuple[str, str, torch.nn.Parameter]]
) -> torch.export.ExportGraphSignature:
    """The signature with the names that the outputs have now; what they are, and their order, stays."""
    inputs = [
        torch.export.graph_signature.InputSpec(
            torch.export.graph_signature.InputKind.PARAMETER, torch.export.graph_signature.TensorArgument(name), target
        )
        for name, target, _ in added
    ]
    outputs = [
        replace(spec, arg=replace(spec.arg, name=node.name)) if isinstance(node, torch.fx.Node) else spec
        for spec, node in zip(old.output_specs, program.output.args[0], strict=True)
    ]
    return torch.export.ExportGraphSignature([*inputs, *old.input_specs], outputs)
