"""What the matrix of invariants knows of each rule of the library: one module a rule, with a `CASE`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import naive
from torch import Tensor, nn

import tokcompile

RULES = sorted(p.stem for p in (Path(tokcompile.__file__).parent / "rules").glob("*.yaml"))


@dataclass(frozen=True)
class RuleCase:
    """A rule of the library under test.

    Attributes:
        models: names of the models of `fleet` that it fits.
        options: the rule's options for a budget on a model; a budget of 1.0 must leave the model as it is.
        run: the rule with a budget run by hand on inputs, written from the method's description.
        tolerance: largest difference of logits to the hand-run in float32; above 0 only for sums in another order.
        coarse: the same in bfloat16.
        drops: whether the last token map lists the tokens of the text that stay.
        chooses: whether tokens are chosen, so that there are token maps.
        slots: whether it lists slots instead, of which the first may be empty.
    """

    models: tuple[str, ...]
    options: Callable[[nn.Module, Any], dict[str, Any]]
    run: Callable[[nn.Module, dict[str, Tensor], Any], naive.Ran]
    tolerance: float = 0
    coarse: float = 0
    drops: bool = True
    chooses: bool = True
    slots: bool = False


CASES: dict[str, RuleCase] = {rule: importlib.import_module(f"rulecases.{rule}").CASE for rule in RULES}
IN_TEXT = tuple(rule for rule in RULES if "llava" in CASES[rule].models)
"""Rules that fit a vision-language model."""
