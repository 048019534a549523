"""The Python API: compile a model with rules, take it back, rewrite an exported program."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokcompile import attention, imagesizes, slidingcache
from tokcompile.capture import from_export
from tokcompile.dynamo import install_hooks, prepare
from tokcompile.errors import RuleError
from tokcompile.pipeline import apply_rules
from tokcompile.program import Program
from tokcompile.rulefile import parse_rules

_BEFORE = "_tokcompile_attention_before"


def compile(
    model: torch.nn.Module,
    rule: str | Path | None = None,
    *,
    rules: Sequence[Any] | None = None,
    target: str = "inductor",
    dynamic: bool | None = None,
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

    Returns:
        The model itself.

    Raises:
        RuleError: the rule or an option is wrong.
    """
    if (rule is None) == (rules is None):
        raise RuleError("compile needs one of 'rule' and 'rules'", remedy="tokcompile.compile(model, rule=NAME)")
    options: dict[str, Any] = {"rule": str(rule)} if rule is not None else {"rules": list(rules or ())}
    options |= params
    parse_rules(options, reserved=("record", "replay", "report"))
    prepare()
    before = attention.install(model)
    if before is not None:
        setattr(model, _BEFORE, before)
    model.compile(backend="tokred", dynamic=dynamic, options={**options, "target": target})
    imagesizes.install(model)
    if imagesizes.reads_sizes(model) or slidingcache.has_windows(model):
        model._compiled_call_impl = _Around(model, model._compiled_call_impl)
    return model


class _Around:
    """A compiled call, with the inputs prepared before it and the cache counted after it."""

    def __init__(self, model: torch.nn.Module, compiled: Any) -> None:
        self.model, self.compiled = model, compiled
        self.names = list(inspect.signature(model.forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self.names, args, strict=False))
        out = self.compiled(**imagesizes.precompute(self.model, named | kwargs))
        slidingcache.recount(getattr(out, "past_key_values", None))
        return out


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `compile`: the model runs as before."""
    before = model.__dict__.pop(_BEFORE, None)
    if before is not None:
        attention.restore(model, before)
    imagesizes.restore(model)
    model._compiled_call_impl = None
    return model


def export(
    model: torch.nn.Module, inputs: Mapping[str, Any], *, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """Export a model that `rewrite` takes, also one whose own code cannot be exported because of its images' sizes.

    Args:
        model: an unmodified model in eval mode; it stays as it is.
        inputs: keyword arguments of its forward. The program takes `precompute(model, inputs)`.
        dynamic_shapes: as for torch.export.export, for those.
    """
    install_hooks(model.modules())
    with torch.no_grad(), imagesizes.packed(model):
        given = imagesizes.precompute(model, inputs)
        return torch.export.export(model, (), given, dynamic_shapes=dynamic_shapes, strict=False)


def rewrite(
    exported: torch.export.ExportedProgram,
    rule: str | Path | None = None,
    *,
    rules: Sequence[Any] | None = None,
    **params: Any,
) -> torch.export.ExportedProgram:
    """Rewrite an exported program by rules; the result is a valid exported program, the given one stays as it is.

    Args:
        exported: from `torch.export.export`.
        rule, rules, params: as for `compile`.

    Raises:
        TokredError: the rule is wrong, or its edit cannot be done soundly on this graph.
    """
    options: dict[str, Any] = {"rule": str(rule)} if rule is not None else {"rules": list(rules or ())}
    program = from_export(exported)
    apply_rules(program, parse_rules({**options, **params}))
    return exported._update(program.gm, _signature(exported.graph_signature, program))


def _signature(old: torch.export.ExportGraphSignature, program: Program) -> torch.export.ExportGraphSignature:
    """The signature with the names that the outputs have now; what they are, and their order, stays."""
    outputs = [
        replace(spec, arg=replace(spec.arg, name=node.name)) if isinstance(node, torch.fx.Node) else spec
        for spec, node in zip(old.output_specs, program.output.args[0], strict=True)
    ]
    return torch.export.ExportGraphSignature(old.input_specs, outputs)
