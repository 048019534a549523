"""The record of what applying a rule did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Applied:
    """What applying one rule did.

    Attributes:
        rule: its name.
        steps: one record per step.
        counts: nodes inserted, rewired and repaired.
        milliseconds: time spent.
        phase: `prefill` or `decode`.
    """

    rule: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    milliseconds: float = 0.0
    phase: str = "prefill"
