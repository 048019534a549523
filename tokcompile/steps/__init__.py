"""The steps of a rule file, one model and one file a verb. Their fields are the keys that a rule file may use."""

from __future__ import annotations

from tokcompile.steps.base import Model, Step
from tokcompile.steps.drop import Drop
from tokcompile.steps.evict import Evict
from tokcompile.steps.insert import Insert
from tokcompile.steps.layer import Layer
from tokcompile.steps.mark import Mark
from tokcompile.steps.merge import Merge
from tokcompile.steps.place import Place
from tokcompile.steps.rotate import Rotate
from tokcompile.steps.route import Route
from tokcompile.steps.score import QUERIES, REFERENCES, Score
from tokcompile.steps.select import Select
from tokcompile.steps.tap import Tap

STEPS: dict[str, type[Step]] = {
    step.verb: step for step in (Tap, Score, Select, Drop, Merge, Mark, Insert, Layer, Place, Rotate, Evict, Route)
}
PLANNED = ("draft",)
"""Verbs that belong to the language and are not carried out by this version."""

__all__ = [
    "PLANNED",
    "QUERIES",
    "REFERENCES",
    "STEPS",
    "Drop",
    "Evict",
    "Insert",
    "Layer",
    "Mark",
    "Merge",
    "Model",
    "Place",
    "Rotate",
    "Route",
    "Score",
    "Select",
    "Step",
    "Tap",
]
