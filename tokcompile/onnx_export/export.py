"""Write a model, rewritten by rules, as an ONNX file."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from tokcompile import api
from tokcompile.binding import RuleInstance
from tokcompile.capturing.dynamo import know_caches
from tokcompile.errors import CaptureError, LowerError, RuleError, known
from tokcompile.kernels._order import by_ranks
from tokcompile.onnx_export import dynamic as dynamics
from tokcompile.onnx_export import legality, steps
from tokcompile.onnx_export.extra import NEEDED, needs
from tokcompile.onnx_export.flat import checks, flatten, forget_pending
from tokcompile.onnx_export.names import input_names, output_names
from tokcompile.params import plain
from tokcompile.rulefile import parse_rules
from tokcompile.weights import Weights

LOWEST, USUAL = 18, 18
"""Opsets: the lowest with all operators that are used, and the one that is written unless another is asked for."""
LARGE = 1 << 30
"""Bytes of weights above which they go to a file of their own; a protobuf holds two gibibytes at most."""

Shape = list[int | str]


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        inputs, outputs: shapes by name; an open dimension has a name or an expression of names.
        operators: how often each ONNX operator stands in it.
        unchecked: what the rewritten graph checks when it runs and an ONNX model cannot: nobody says if it is broken.
        decode: the file that goes on from the caches, if one was asked for.
    """

    path: Path
    opset: int
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    operators: dict[str, int]
    unchecked: list[str]
    decode: Exported | None = None


def export_onnx(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    path: str | Path,
    rule: str | Path | None = None,
    *,
    rules: Sequence[Any] | None = None,
    decode: str | Path | None = None,
    dynamic: bool | Mapping[str, Mapping[int, str]] = True,
    opset: int = USUAL,
    target: str = "onnx",
    external_data: bool | None = None,
    weights: Weights | None = None,
    **params: Any,
) -> Exported:
    """Export a model, rewrite it by rules, and write it as an ONNX file of standard operators.

    Inputs have the names of the model's arguments and outputs those of its results; a cache is `past.N.key` and
    `past.N.value`, `present.N.key` and `present.N.value`, float [B, heads, T, width], of each layer N. The file's
    metadata hold rules and versions (`tokred.rules`, `tokcompile`, `torch`, `transformers`).

    Args:
        model: an unmodified model in eval mode; it stays as it is.
        inputs: keyword arguments of its forward, as an example.
        path: the file.
        rule, rules, weights, params: as for `compile`; without a rule the model as it is.
        decode: another file, for the steps after the prompt: it takes one token [B, 1], the padding mask of all
            tokens so far and its own, its position, and the caches that the prompt's file, or the step before,
            returned. The prompt's file then takes `position_ids` [B, T], too.
        dynamic: which dimensions stay open: `{"input_ids": {0: "batch", 1: "length"}}`, one name for one size; True for
            the batch and the length of texts and caches; False for none.
        opset: of the default domain, 18 or later.
        target: what the file is for; see `legality.TARGETS`.
        external_data: whether weights go to `PATH.data`; None for those of more than a gibibyte.

    Raises:
        LowerError: a package is missing (`pip install 'tokcompile[export]'`), or an operator has no form in ONNX; with
            the rule's step that brought it.
        TokredError: as `export` and `rewrite`; a dimension cannot be open in this model.
    """
    needs(*NEEDED)
    _check_options(opset, target)
    ruled = rule is not None or rules is not None
    options: dict[str, Any] = {"rule": str(rule)} if rule is not None else {"rules": list(rules or ())}
    weights = Weights() if weights is None else weights
    if params and not ruled:
        raise RuleError("options of a rule without a rule", found=", ".join(params), remedy="export_onnx(…, rule=NAME)")
    instances = parse_rules({**options, **params}) if ruled else []
    inputs = dict(inputs) if decode is None else steps.prompt_inputs(model, inputs)
    axes = dynamics.axes_of(model, inputs, dynamic)

    def made(inputs: Mapping[str, Any], axes: Mapping[str, dynamics.Axes], path: str | Path) -> tuple[Any, Exported]:
        program = _exported(model, inputs, axes)
        if ruled:
            program = api.rewrite(program, rule, rules=rules, weights=weights, **params)
        named = dynamics.named(inputs, axes)
        return program, write(program, path, instances, named, opset=opset, target=target, external_data=external_data)

    program, file = made(inputs, axes, path)
    if decode is None:
        return file
    step = steps.step_inputs(program, inputs)
    with steps.masks_that_fit(model, step["past_key_values"]):
        return replace(file, decode=made(step, steps.step_axes(step, axes), decode)[1])


def _check_options(opset: int, target: str) -> None:
    if opset < LOWEST:
        raise LowerError(f"opset {opset} lacks operators that are needed", remedy=f"opset {LOWEST} or later")
    if target not in legality.TARGETS:
        raise LowerError(f"unknown target '{target}'", remedy=known(target, legality.TARGETS))


def _exported(model: torch.nn.Module, inputs: Mapping[str, Any], axes: Mapping[str, Any]) -> ExportedProgram:
    know_caches(model)
    shapes = dynamics.dynamic_shapes(inputs, axes)
    try:
        return api.export(model, inputs, dynamic_shapes=shapes)
    except torch._dynamo.exc.UserError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        raise CaptureError(
            "the model cannot be exported with these open dimensions",
            found=" ".join(lines[:2]),
            remedy="dynamic={INPUT: {DIMENSION: NAME}} with the others, or dynamic=False",
        ) from error


def write(
    program: ExportedProgram,
    path: str | Path,
    rules: Sequence[RuleInstance] = (),
    axes: Mapping[str, Mapping[int, str]] | None = None,
    *,
    opset: int = USUAL,
    target: str = "onnx",
    external_data: bool | None = None,
) -> Exported:
    """Write an exported program that `rewrite` made; see `export_onnx`.

    Args:
        rules: those that it was rewritten by, for the metadata.
        axes: names of open dimensions, by name of the input in the file.
    """
    onnx, _ = needs(*NEEDED)
    from tokcompile.onnx_export.portable import spell_out

    path = Path(path)
    taken, returned = input_names(program), output_names(program)
    flat = flatten(program)
    called = dynamics.symbols(flat, axes or {}, taken)
    made = _translated(flat, taken, returned, opset)
    legality.check(made.exported_program, flat, legality.TARGETS[target])
    unchecked = checks(program)
    _tell_origins(made.model, made.exported_program, flat)
    spell_out(made.model)
    made.model.metadata_props.update(_metadata(rules, unchecked))
    _rename(made.model, called)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(value.const_value.nbytes for value in made.model.graph.initializers.values() if value.const_value)
    made.save(path, external_data=size > LARGE if external_data is None else external_data)
    return _checked(onnx, path, unchecked)


def _translated(flat: ExportedProgram, taken: list[str], returned: list[str], opset: int) -> Any:
    from tokcompile.onnx_export.translations import TRANSLATIONS

    with _quiet(), by_ranks():
        try:
            return torch.onnx.export(
                flat,
                dynamo=True,
                input_names=taken,
                output_names=returned,
                opset_version=opset,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise legality.untranslated(error, flat) from error
        finally:
            forget_pending(flat)


def _tell_origins(model: Any, decomposed: ExportedProgram, flat: ExportedProgram) -> None:
    """Note on each operator which step of a rule, and which operator of tokred, it was made for.

    What torch notes of Python's stack is taken out: it holds folders of the machine that wrote the file.
    """
    made, known = legality.calls(decomposed), legality.calls(flat)
    for node in model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        call = re.match(r"%(\w+)", node.metadata_props.get("pkg.torch.onnx.fx_node", ""))
        source = made.get(call[1]) if call else None
        if source is not None:
            found = legality.brought_by(source, legality.origin_of(source, known))
            node.metadata_props.update({f"tokred.{key}": text for key, text in found.items()})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter logs about packages that it looks for."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _metadata(rules: Sequence[RuleInstance], unchecked: Sequence[str]) -> dict[str, str]:
    from tokcompile.report import versions

    listed = [{"rule": r.name, "params": {name: plain(value) for name, value in r.params.items()}} for r in rules]
    found = {"tokred.rules": json.dumps(listed), **versions()}
    return found | ({"tokred.unchecked": json.dumps(list(unchecked))} if unchecked else {})


def _rename(model: Any, symbols: Mapping[str, str]) -> None:
    """Call open dimensions by their names, wherever a shape mentions them."""
    import onnx_ir as ir

    if not symbols:
        return
    word = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    ir.SymbolicDim(word.sub(lambda m: symbols[m[0]], str(d.value))) if _is_open(d) else d
                    for d in value.shape
                ]
            )


def _is_open(size: Any) -> bool:
    return not isinstance(size, int) and size.value is not None


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _checked(onnx: Any, path: Path, unchecked: list[str]) -> Exported:
    """Check a written file and say what is in it.

    Raises:
        LowerError: it is no valid model, or holds operators that are not ONNX's own.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LowerError(
            "the file that was written is no valid ONNX model",
            where=[str(path)],
            found=str(error),
            remedy="another opset, or report it with the rule and the model",
        ) from error
    model = onnx.load(str(path), load_external_data=False)
    foreign = {node.domain for node in model.graph.node} | {f.domain for f in model.functions}
    if foreign - {""}:
        raise LowerError(
            "the file holds operators that are not ONNX's own",
            where=[str(path)],
            found=", ".join(sorted(foreign - {""})),
            remedy="a translation for what they are made from, in tokcompile/onnx_export/translations.py",
        )
    return Exported(
        path,
        model.opset_import[0].version,
        {value.name: _shape(value) for value in model.graph.input},
        {value.name: _shape(value) for value in model.graph.output},
        dict(Counter(node.op_type for node in model.graph.node).most_common()),
        unchecked,
    )


def _shape(value: Any) -> Shape:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
