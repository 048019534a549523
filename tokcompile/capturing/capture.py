"""Capture: from a Dynamo graph, an exported program, or a model with example inputs, to a `Program`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.traceback import preserve_node_meta

from tokcompile.capturing.canonical import canonicalise
from tokcompile.capturing.dynamo import prepare
from tokcompile.capturing.imagesizes import packed, precompute
from tokcompile.capturing.inline import inline_regions
from tokcompile.capturing.vmaps import broadcast_maps
from tokcompile.errors import CaptureError, TokredError
from tokcompile.program import Program, place


def from_dynamo(gm: GraphModule, example_inputs: Sequence[Any] = ()) -> Program:
    """Bring a Dynamo graph (torch level) to the pre-dispatch ATen dialect that torch.export speaks.

    Args:
        gm: the graph that a Dynamo backend receives.
        example_inputs: its example inputs; unused when the placeholders carry fake values, as Dynamo's do.

    Raises:
        CaptureError: the graph holds no tensor input, or an operator that cannot be traced.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders]
    mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    if mode is None:
        raise CaptureError("the captured graph has no tensor input", remedy="compile the whole model, not a helper")
    interpreter = Interpreter(broadcast_maps(gm))
    with mode, preserve_node_meta():
        try:
            traced = make_fx(lambda *args: interpreter.run(*args), pre_dispatch=True)(*fakes)
        except GuardOnDataDependentSymNode as error:
            raise _undecided(error) from error
    program = Program(traced, mode, origin="dynamo")
    _name_inputs(program, placeholders)
    return _finish(program)


def _undecided(error: Exception) -> CaptureError:
    return CaptureError(
        "the model decides by a size that is known only when it runs",
        where=_causes(error),
        found=str(error).splitlines()[0],
        remedy="give the size as an input, or compile the parts of the model apart; see docs/capture.md",
    )


def _refused(error: Exception) -> TokredError:
    """The error of ours that says why tracing a model failed: the one behind Dynamo's, or one made of Dynamo's."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, TokredError):
        return inner
    if isinstance(error, GuardOnDataDependentSymNode):
        return _undecided(error)
    return CaptureError(
        "the model does not capture as one graph"
        if isinstance(error, torch._dynamo.exc.Unsupported)
        else "PyTorch could not trace the model",
        where=_lines(error),
        found=str(error).splitlines()[0],
        remedy="see the capture notes in docs/capture.md",
    )


def _lines(error: Exception) -> list[str]:
    """The innermost line of the model's source that a trace stood at."""
    frames = getattr(error, "real_stack", None) or []
    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in list(frames)[-1:]]


def _causes(error: Exception) -> list[str]:
    return [
        line.partition("# ")[2] for line in str(error).splitlines() if line.startswith("Caused by") and "# " in line
    ]


def _name_inputs(program: Program, placeholders: Sequence[Node]) -> None:
    traced = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node, old in zip(traced, placeholders, strict=True):
        fake = old.meta.get("example_value", old.meta.get("val"))
        node.meta.setdefault("val", fake)
        program.kinds[node] = _kind(old, fake)
        node.meta["trained"] = isinstance(fake, torch.nn.Parameter)
        node.meta["source"] = _source(old)
        node._rename(old.name)
        node.target = node.name


def _source(old: Node) -> str:
    """The expression by which Dynamo finds an input: `L['self']._modules['norm']._parameters['weight']`."""
    source = getattr(old.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _kind(old: Node, fake: Any) -> str:
    if not isinstance(fake, torch.Tensor):
        return "size"
    if isinstance(fake, torch.nn.Parameter) or old.name.startswith(
        ("l_self_modules", "l_self_parameters", "l_self_buffers", "p_", "b_", "c_")
    ):
        return "parameter"
    return "input"


def from_export(exported: torch.export.ExportedProgram) -> Program:
    """Read an exported program. Its graph module is copied, so the caller's program stays as it is."""
    kinds = torch.export.graph_signature.InputKind
    gm = copy.deepcopy(exported.graph_module)
    inline_regions(gm)
    gm = broadcast_maps(gm)
    fakes = [n.meta.get("val") for n in gm.graph.nodes]
    mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None) or FakeTensorMode()
    program = Program(gm, mode, origin="export")
    specs = {spec.arg.name: spec.kind for spec in exported.graph_signature.input_specs}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            program.kinds[node] = "input" if specs.get(node.name) == kinds.USER_INPUT else "parameter"
            node.meta["trained"] = specs.get(node.name) == kinds.PARAMETER
    return _finish(program)


def _finish(program: Program) -> Program:
    for node in program.graph.nodes:
        if node.op == "get_attr" and getattr(node.meta.get("val"), "fake_mode", None) is not program.fake_mode:
            attribute = getattr(program.gm, node.target, None)
            if isinstance(attribute, FakeTensor):
                raise CaptureError(
                    "a value of the model escaped the tracer and would be a constant",
                    where=[place(node)],
                    remedy="see the capture notes in docs/capture.md",
                )
            if isinstance(attribute, torch.Tensor):  # make_fx gives constants a fake value of another mode
                node.meta["val"] = program.fake_mode.from_tensor(attribute, static_shapes=True)
    canonicalise(program.graph)
    program.gm.recompile()
    return program


class _Captured(Exception):
    """Ends a call once its graph is known."""


def unloaded(model: torch.nn.Module) -> torch.nn.Parameter | None:
    """The first parameter without memory, on the meta device or fake; None where all have values."""
    return next((p for p in model.parameters() if p.is_meta or isinstance(p, FakeTensor)), None)


def _emptied(value: Any, like: torch.Tensor) -> Any:
    """A value without memory, as a parameter has none."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return value
    return like.fake_mode.from_tensor(value) if isinstance(like, FakeTensor) else value.to(like.device)


def capture(model: torch.nn.Module, inputs: Mapping[str, Any], *, dynamic: bool | None = None) -> list[Program]:
    """Capture a model with Dynamo on example inputs.

    Args:
        model: any module. One without memory for weights, on the meta device or made under a FakeTensorMode, is not
            run; it must then be one graph.
        inputs: keyword arguments of its forward; what the model computes in Python from sizes of images is added, for
            which those have to be values, whatever the model is.
        dynamic: as for torch.compile.

    Returns:
        One program per graph; a model that captures whole gives one.

    Raises:
        CaptureError: nothing was captured, or a model on the meta device splits.
    """
    prepare()
    empty = unloaded(model)
    mode = empty.fake_mode if isinstance(empty, FakeTensor) else nullcontext()
    try:
        with torch.no_grad(), packed(model):
            inputs = precompute(model, inputs)
            if empty is None:
                found = _graphs(model, inputs, dynamic)
            else:
                inputs = {name: _emptied(value, empty) for name, value in inputs.items()}
                with mode:
                    found = _one_graph(model, inputs, dynamic)
    except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode) as error:
        raise _refused(error) from error
    if not found:
        raise CaptureError(
            "nothing was captured",
            found="Dynamo handed over no graph",
            remedy="check that the model is not itself under torch.compiler.disable",
        )
    return found


def _one_graph(model: torch.nn.Module, inputs: Mapping[str, Any], dynamic: bool | None) -> list[Program]:
    """The graph of a model without memory, which must be one.

    Dynamo refuses some models in wrappers around their forward, which change the caller's dict of arguments; what is
    inside of them is a graph. With memory it finds that out while the model runs.
    """
    try:
        return _graphs(model, inputs, dynamic, whole=True)
    except torch._dynamo.exc.Unsupported as refused:
        # `self` by name: parameters are then called as in the graph of a module.
        bound = {"self": model, **inputs}
        try:
            return _graphs(inspect.unwrap(type(model).forward), bound, dynamic, whole=True)
        except torch._dynamo.exc.TorchDynamoException:
            raise refused from None


def _graphs(
    call: Callable[..., Any], inputs: Mapping[str, Any], dynamic: bool | None, whole: bool = False
) -> list[Program]:
    """What Dynamo hands over while a model runs; `whole`: the first graph, which must be all, without a run."""
    found: list[Program] = []

    def stop(*args: Any) -> Any:
        raise _Captured

    def keep(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(from_dynamo(gm, example_inputs))
        return stop if whole else gm.forward

    torch._dynamo.reset()
    try:
        with suppress(_Captured):  # which `stop` raises: the graph is all that was wanted
            torch.compile(call, backend=keep, dynamic=dynamic, fullgraph=whole)(**inputs)
    finally:
        torch._dynamo.reset()
    return found
