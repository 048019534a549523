"""An exported program that takes and returns tensors one after the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

aten = torch.ops.aten
CHECKS = {
    aten._assert_async.default: None,
    aten._assert_async.msg: 1,  # the others speak of symbols
    aten._assert_scalar.default: None,
    aten._assert_tensor_metadata.default: None,
    aten.sym_constrain_range.default: None,
    aten.sym_constrain_range_for_size.default: None,
}
"""Operators that only check, and which argument says what for people."""


def checks(program: ExportedProgram) -> list[str]:
    """What a program checks when it runs, in the words of who checks it."""
    said = (node.args[CHECKS[node.target]] for node in program.graph.nodes if CHECKS.get(node.target) is not None)
    return list(dict.fromkeys(str(text) for text in said))


def flatten(program: ExportedProgram) -> ExportedProgram:
    """The same program without the classes that its arguments and results are packed in, and without its checks.

    torch decomposes a program by running it through these classes once more. A cache made that way starts with empty
    tensors, which end up as constants that the decomposed program does not know.
    """
    signature = program.graph_signature
    inputs = [spec.arg for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
    outputs = [spec.arg for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    call = ModuleCallSignature(inputs, outputs, _spec(inputs, {}), pytree.tree_structure(tuple(range(len(outputs)))))
    module = copy.deepcopy(program.graph_module)
    _drop_checks(module)
    example = (tuple(pytree.tree_leaves(program.example_inputs)), {}) if program.example_inputs else None
    flat = ExportedProgram(
        module,
        module.graph,
        copy.deepcopy(signature),
        program.state_dict,
        program.range_constraints,
        [ModuleCallEntry("", call)],
        example,
        program.constants,
        verifiers=program.verifiers,
    )
    if hasattr(flat, "_guards_code"):
        flat._guards_code = []  # they speak of the arguments by the names that these had
    return flat


def forget_pending(program: ExportedProgram) -> None:
    """Forget sizes that torch made up while it wrote a program, and bound to no value.

    Programs of one export share their symbols: the next one that is written would be refused for what is left of this.
    """
    values = (node.meta.get("val") for node in program.graph.nodes)
    fake = next((value for value in values if isinstance(value, FakeTensor)), None)
    if fake is not None and fake.fake_mode.shape_env is not None:
        fake.fake_mode.shape_env.pending_fresh_unbacked_symbols.clear()


def _drop_checks(module: torch.fx.GraphModule) -> None:
    """Take out checks, which ONNX has no operators for, with what is computed for them alone, and what does nothing."""
    for node in reversed(module.graph.nodes):
        if node.target is aten.detach_.default:  # on constants; decompositions take no operator that changes a value
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target in CHECKS:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _spec(inputs: Sequence[Any], named: dict[str, Any]) -> pytree.TreeSpec:
    return pytree.tree_structure((tuple(range(len(inputs))), named))
