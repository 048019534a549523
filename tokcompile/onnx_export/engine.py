"""Build TensorRT engines of rewritten models, on machines with and without a GPU, and say what became of each layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tokcompile.errors import LowerError, known
from tokcompile.onnx_export import ranges as open_ranges
from tokcompile.onnx_export.enginelog import Layer, Log, layers_in
from tokcompile.onnx_export.export import Exported, export_onnx
from tokcompile.onnx_export.tensorrt_library import library
from tokcompile.weights import Weights

OPSET = 23
"""The first opset with an operator for attention, which TensorRT takes for one that it must not take apart."""


@dataclass(frozen=True)
class Engine:
    """An engine that was written.

    Attributes:
        onnx: the ONNX file that it was built from, which lies beside it.
        report: a JSON file beside it that holds all of this.
        archs: GPU architectures that it was built for; none given means all that TensorRT for RTX builds for by itself.
        layers: what runs, in order.
        attention: for each attention of the model by name, the fused kernel that computes it; None where TensorRT has
            none, so that scores go through memory.
        reason: why such kernels are missing, in TensorRT's words.
        decode: the engine for the steps after a prompt, if one was asked for.
    """

    path: Path
    onnx: Exported
    report: Path
    version: str
    archs: list[str]
    size: int
    layers: list[Layer]
    attention: dict[str, str | None]
    reason: str = ""
    decode: Engine | None = None


def export_tensorrt(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    path: str | Path,
    rule: str | Path | None = None,
    *,
    rules: Sequence[Any] | None = None,
    arch: str | Sequence[str] = (),
    decode: str | Path | None = None,
    dynamic: bool | Mapping[str, Mapping[int, str]] = False,
    ranges: Mapping[str, tuple[int, int, int]] | None = None,
    weights: Weights | None = None,
    **params: Any,
) -> Engine:
    """Export a model, rewrite it by rules, and build a TensorRT engine of it. No GPU is needed for named architectures.

    Engines have the types of the model: fused attention needs `model.half()` or `model.bfloat16()`, and floating-point
    inputs of that type. Beside PATH lie the ONNX file (`.onnx`) and a report of what runs (`.json`).

    Args:
        model, inputs, rule, rules, decode, dynamic, weights, params: as for `export_onnx`, but that sizes are fixed
            unless asked for.
        path: the engine's file.
        arch: GPU architectures such as `sm89`. Without any, the `tensorrt` for data centres builds for this machine's
            GPU where it is installed, and TensorRT for RTX for all of Ampere and later else.
        ranges: least, usual and greatest size of each open dimension, by its name in the ONNX file.

    Raises:
        LowerError: TensorRT cannot be loaded or refuses the model, with the operator and the step of the rule that
            brought it; an unknown architecture; an open dimension without a range.
        TokredError: as `export_onnx`.
    """
    wanted = [arch] if isinstance(arch, str) else list(arch)
    trt = library(ahead=bool(wanted))
    capabilities = [_capability(trt, name) for name in wanted]
    paths = [Path(path)] + ([Path(decode)] if decode is not None else [])
    onnx = [each.with_suffix(".onnx") for each in paths]
    file = export_onnx(
        model,
        inputs,
        onnx[0],
        rule,
        rules=rules,
        decode=onnx[1] if decode is not None else None,
        dynamic=dynamic,
        opset=OPSET,
        target="tensorrt",
        weights=weights,
        **params,
    )
    files = [file] if file.decode is None else [file, file.decode]
    built = [
        _engine(trt, each, out, capabilities, wanted, ranges or {}) for each, out in zip(files, paths, strict=True)
    ]
    return built[0] if len(built) == 1 else replace(built[0], decode=built[1])


def _capability(trt: Any, name: str) -> Any:
    members = {key: value for key, value in trt.ComputeCapability.__members__.items() if key.startswith("SM")}
    if name.upper() not in members:
        raise LowerError(
            f"TensorRT {trt.__version__} knows no architecture '{name}'",
            remedy=known(name.lower(), [key.lower() for key in members]),
        )
    return members[name.upper()]


def _engine(
    trt: Any, file: Exported, path: Path, capabilities: list[Any], archs: list[str], ranges: Mapping[str, Any]
) -> Engine:
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(0)
    _parse(trt, network, log, file)
    config = _config(trt, builder, capabilities)
    if any(isinstance(size, str) for shape in file.inputs.values() for size in shape):
        config.add_optimization_profile(open_ranges.profile(builder, file, ranges))
    built, reason = _build(trt, builder, network, config, log, file)
    path.write_bytes(built)
    layers = layers_in(log.lines, _steps(file))
    names = list(_attentions(trt, network))
    report = path.with_suffix(".json")
    engine = Engine(
        path, file, report, trt.__version__, archs, path.stat().st_size, layers, _fused(layers, names), reason
    )
    report.write_text(json.dumps(asdict(engine), indent=1, default=str) + "\n")
    return engine


def _parse(trt: Any, network: Any, log: Log, file: Exported) -> None:
    parser = trt.OnnxParser(network, log.logger)
    if parser.parse_from_file(str(file.path)):
        return
    error = parser.get_error(0)
    raise LowerError(
        f"TensorRT {trt.__version__} cannot read operator {error.node_operator() or 'of this model'}",
        where=_origin(file, error.node_name()),
        found=error.desc(),
        remedy="another rule or option, or report it with the rule and the model",
    )


def _config(trt: Any, builder: Any, capabilities: list[Any]) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for place, capability in enumerate(capabilities):
            config.set_compute_capability(capability, place)
    return config


def _build(trt: Any, builder: Any, network: Any, config: Any, log: Log, file: Exported) -> tuple[Any, str]:
    """An engine whose attention is fused; where TensorRT refuses that, one that may take it apart, and why."""
    built, reason = builder.build_serialized_network(network, config), ""
    attentions = _attentions(trt, network)
    if built is None and attentions and log.speaks_of_attention():
        reason = log.last_error()
        log.lines.clear()
        for layer in attentions.values():
            layer.attention.decomposable = True
        built = builder.build_serialized_network(network, config)
    if built is None:
        said = log.last_error()
        named = next((name for name in _node_names(file) if name in said), "")
        raise LowerError(
            f"TensorRT {trt.__version__} cannot build this model",
            where=_origin(file, named),
            found=said,
            remedy="another rule or option, or report it with the rule and the model",
        )
    return built, reason


def _attentions(trt: Any, network: Any) -> dict[str, Any]:
    found = {}
    for layer in (network.get_layer(place) for place in range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer  # as TensorRT's interface has it: it hands out plain layers
            found[layer.name.removesuffix("_AttentionOutput")] = layer
    return found


def _fused(layers: Sequence[Layer], names: Sequence[str]) -> dict[str, str | None]:
    """The kernel that computes all of an attention: TensorRT calls such ones `mha`."""
    fused = {source: layer.name for layer in layers if "mha" in layer.name for source in layer.sources}
    return {name: fused.get(name) for name in names}


def _model(file: Exported) -> Any:
    import onnx

    return onnx.load(str(file.path), load_external_data=False)


def _node_names(file: Exported) -> list[str]:
    return sorted((node.name for node in _model(file).graph.node if node.name), key=len, reverse=True)


def _steps(file: Exported) -> dict[str, str]:
    """The step of a rule that each operator of a file was made for."""
    held = {node.name: {p.key: p.value for p in node.metadata_props} for node in _model(file).graph.node}
    return {name: found["tokred.step"] for name, found in held.items() if "tokred.step" in found}


def _origin(file: Exported, name: str) -> list[str]:
    """Where an operator of a file comes from."""
    node = next((node for node in _model(file).graph.node if node.name == name), None)
    if node is None:
        return [str(file.path)]
    held = {entry.key: entry.value for entry in node.metadata_props}
    scopes = held.get("pkg.torch.onnx.name_scopes", "")
    brought = [held[key] for key in ("tokred.step", "tokred.operator") if key in held]
    return [*brought, f"operator {node.op_type} '{name}' of {file.path.name}, in {scopes}"]
