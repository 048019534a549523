"""Parameters that rules bring to a model, such as learned tokens: trained, saved and loaded beside its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokcompile.errors import RuleError


class Weights(nn.Module):
    """Parameters by rule and name: `weights.state_dict()` holds them as `RULE.NAME`.

    They are made when a graph is first rewritten, of the sizes that the model has there, and shared by all graphs that
    are compiled with this object. Call the model once before an optimiser is given `weights.parameters()`, or load them
    from a file.
    """

    def of(self, rule: str, name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> nn.Parameter:
        """Return a parameter, made by `make` where there is none yet.

        Raises:
            RuleError: there is one of another shape, or the rule's name is one that a module needs for itself.
        """
        if rule not in self._modules:
            try:
                self.add_module(rule, nn.ParameterDict())
            except KeyError:
                cause = f"a rule named '{rule}' cannot bring parameters"
                raise RuleError(cause, remedy="give the rule another name") from None
        held = self._modules[rule]
        assert isinstance(held, nn.ParameterDict)
        if name not in held:
            value = make()
            held[name] = nn.Parameter(value, requires_grad=value.is_floating_point())
        if tuple(held[name].shape) != tuple(shape):
            raise RuleError(
                f"the parameter '{name}' of rule '{rule}' does not fit this model",
                found=f"{tuple(held[name].shape)} where the model needs {tuple(shape)}",
                remedy="load weights that were trained with this rule, these options and this model",
            )
        return held[name]

    def held(self, rule: str, name: str) -> nn.Parameter | None:
        """Return a parameter; None where there is none yet."""
        return dict(self.named_parameters()).get(f"{rule}.{name}")

    def token(self, name: str, rows: int = 1) -> Tensor:
        """The learned tokens of an insert step, to be given to a step after the prompt as its `inputs_embeds`.

        Args:
            name: `RULE.NAME`, of a rule and its insert step.
            rows: of the batch.

        Returns:
            [rows, M, C], without gradients; M is 1 where one vector is shared by all places.

        Raises:
            RuleError: there are none, or they are no tokens.
        """
        rule, _, part = name.partition(".")
        found = self.held(rule, part)
        if found is None or found.ndim != 2:
            known = ", ".join(key for key, value in self.named_parameters() if value.ndim == 2) or "nothing yet"
            raise RuleError(
                f"'{name}' names no learned tokens",
                found=f"weights that hold {known}",
                remedy="RULE.NAME of an insert step with content: learned; run a prompt first, or load weights",
            )
        return found.detach().expand(rows, *found.shape)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        save_file({key: value.detach().contiguous().cpu() for key, value in self.state_dict().items()}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> Weights:
        """Read a safetensors file; such a file holds numbers alone and runs no code.

        Raises:
            RuleError: it is no safetensors file, or holds something else than parameters of rules.
        """
        try:
            held = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise RuleError(
                "weights of rules cannot be read", where=[str(path)], found=str(error), remedy="a .safetensors file"
            ) from error
        weights = cls()
        weights.load_state_dict(held)
        return weights

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Make what a state holds and this does not, before modules below load theirs."""
        for key, value in state_dict.items():
            if not key.startswith(prefix) or not isinstance(value, torch.Tensor):
                continue
            rule, dot, name = key.removeprefix(prefix).partition(".")
            if not dot or "." in name:
                raise RuleError(f"'{key}' names no parameter of a rule", remedy="RULE.NAME, such as registers.tokens")
            self.of(rule, name, tuple(value.shape), lambda value=value: value.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args)
