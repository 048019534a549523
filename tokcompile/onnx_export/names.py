"""What the inputs and outputs of an ONNX model are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from tokcompile.errors import LowerError

_CACHED = {"key_cache": "key", "value_cache": "value"}


def input_names(program: ExportedProgram) -> list[str]:
    """Names of the tensors that a program takes: the arguments', `past.N.key` and `past.N.value` for a cache."""
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    positional, keywords = program.call_spec.in_spec.children()
    paths = [*_paths(positional, ()), *_paths(keywords, ())]
    return _tensors("input", specs, paths, "past")


def output_names(program: ExportedProgram) -> list[str]:
    """Names of the tensors that a program returns: the results', `present.N.key` and `present.N.value` for a cache."""
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    return _tensors("output", specs, list(_paths(program.call_spec.out_spec, ())), "present")


def _tensors(kind: str, specs: list[Any], paths: list[tuple[Any, ...]], cache: str) -> list[str]:
    names = []
    for spec, path in zip(specs, paths, strict=True):
        if isinstance(spec.arg, TensorArgument):
            unnamed = all(isinstance(part, int) for part in path)
            names.append(spec.arg.name if unnamed and kind == "input" else _name(kind, path, cache))
        elif not isinstance(spec.arg, ConstantArgument):
            raise LowerError(
                f"an ONNX model takes and returns tensors, and {kind} '{_name(kind, path, cache)}' is none",
                found=type(spec.arg).__name__,
                remedy="export a module that has tensors there",
            )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise LowerError(f"two {kind}s of the model have one name", found=", ".join(twice), remedy="rename one")
    return names


def _name(kind: str, path: tuple[Any, ...], cache: str) -> str:
    if len(path) >= 2 and path[-2] in _CACHED:
        return f"{cache}.{path[-1]}.{_CACHED[path[-2]]}"
    if all(isinstance(part, int) for part in path):
        return ".".join([kind, *map(str, path)])
    return ".".join(map(str, path))


def _paths(spec: pytree.TreeSpec, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Where each leaf stands: keys of mappings, results and caches, else numbers."""
    if spec.is_leaf():
        yield path
        return
    for key, child in zip(_keys(spec), spec.children(), strict=True):
        yield from _paths(child, (*path, key))


def _keys(spec: pytree.TreeSpec) -> list[Any]:
    count = spec.num_children
    contexts = [spec.context, *(spec.context if isinstance(spec.context, (list, tuple)) else ())]  # caches nest theirs
    for found in contexts:
        if isinstance(found, (list, tuple)) and len(found) == count and all(isinstance(key, str) for key in found):
            return list(found)
    return list(range(count))
