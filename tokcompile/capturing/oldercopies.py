"""Copies of configurations while older PyTorch traces, which newer PyTorch traces and older does not.

Models of an encoder and a decoder make the configuration of their cache while they run, from a copy of their own with
its numbers renamed, and the graph would be split there. The copy is made at trace time, as a value of the graph.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import GlobalSource
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.builtin import BuiltinVariable

_COMPOSITE = ("decoder", "generator", "text_config", "text_encoder")
"""Attributes that hold the configuration of a text where one has its own, and none is copied."""


def copy_while_tracing(configuration: type) -> None:
    """Let Dynamo copy a configuration of a class, and take what it says of its decoder for a value; once.

    Args:
        configuration: the base class, `PreTrainedConfig`.
    """
    if getattr(configuration.get_text_config, "_tokcompile", False):
        return
    _copy_by(configuration)
    _ask_flat_ones(configuration)


def _copy_by(configuration: type) -> None:
    split = BuiltinVariable.call_deepcopy

    @functools.wraps(split)
    def call_deepcopy(self: Any, tx: Any, copied: Any) -> Any:
        if not isinstance(getattr(copied, "value", None), configuration):
            return split(self, tx, copied)
        return _held(tx, _as_it_stands(tx, copied))

    BuiltinVariable.call_deepcopy = call_deepcopy


def _ask_flat_ones(configuration: Any) -> None:
    """Let a configuration of an encoder and a decoder in one be asked for either as a whole, not line by line."""
    ask, functions = configuration.get_text_config, torch._dynamo.variables.functions
    call = functions.invoke_and_store_as_constant

    def ask_flat(config: Any, decoder: Any, encoder: Any) -> Any:
        return ask(config, decoder, encoder)

    ask_flat._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def invoke(tx: Any, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        if function is not ask_flat:
            return call(tx, function, name, args, kwargs)
        config, *which = args
        return _held(tx, ask_flat(_as_it_stands(tx, config), *(each.as_python_constant() for each in which)))

    @functools.wraps(ask)
    def get_text_config(self: Any, decoder: Any = None, encoder: Any = None) -> Any:
        if self.is_encoder_decoder and decoder != encoder and _is_flat(self):
            return ask_flat(self, decoder, encoder)
        return ask(self, decoder, encoder)

    get_text_config._tokcompile = True  # type: ignore[attr-defined]
    functions.invoke_and_store_as_constant = invoke
    configuration.get_text_config = get_text_config


def _is_flat(config: Any) -> bool:
    for name in _COMPOSITE:  # a loop: Dynamo traces it
        if getattr(config, name, None) is not None:
            return False
    return True


def _as_it_stands(tx: Any, variable: Any) -> Any:
    """A copy of the object that a variable of Dynamo stands for, with what the traced code has set on it so far."""
    install_guard(variable.source.make_guard(GuardBuilder.ID_MATCH))
    made = copy.deepcopy(variable.value)
    for name, value in tx.output.side_effects.store_attr_mutations.get(variable, {}).items():
        setattr(made, name, value.as_python_constant())
    return made


def _held(tx: Any, value: Any) -> Any:
    """Dynamo's variable of an object that the compiled code keeps."""
    return VariableBuilder(tx, GlobalSource(tx.output.install_global_by_id("tokcompile_config", value)))(value)
