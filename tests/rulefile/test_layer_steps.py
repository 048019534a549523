"""The fields of a layer step: what is wrong is refused with file, line and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokcompile.errors import RuleError
from tokcompile.rulefile import load_rule

ATTENTION = {"by": "attention", "name": "own", "at": "decoder.*.middle", "of": "t"}
GATED = {"by": "gated", "name": "own", "at": "projector.input"}


def _load(folder: Path, layer: dict[str, Any], first: str = "insert") -> Any:
    steps = {
        "insert": "{name: t, at: decoder.0.input, where: front, count: 2}",
        "score": "{name: t, by: norm, at: projector.output}",
    }
    path = folder / "mine.yaml"
    path.write_text(
        f"rule: mine\nabout: Bring a layer.\nsteps:\n  - {first}: {steps[first]}\n  - layer: {json.dumps(layer)}\n"
    )
    return load_rule(path)


@pytest.mark.parametrize(
    "layer",
    [
        ATTENTION,
        {**ATTENTION, "at": "decoder.2.middle", "blocks": 0, "norm": "rms", "std": 0},
        {**ATTENTION, "at": "vision.*.middle", "blocks": "${vision.depth // 2}"},
        GATED,
        {**GATED, "mlp": "keep", "norm": "none", "width": 12, "bias": True},
    ],
)
def test_good_steps_load(layer: dict[str, Any], tmp_path: Path) -> None:
    rule = _load(tmp_path, layer)
    assert rule.warnings == ()
    assert rule.steps[1].given() == layer


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no tokens": ({k: v for k, v in ATTENTION.items() if k != "of"}, "needs 'of'", "inserted tokens"),
    "tokens of nobody": ({**ATTENTION, "of": "s"}, "names no set of tokens", "t"),
    "no name": ({k: v for k, v in ATTENTION.items() if k != "name"}, "'name' is missing", "add name"),
    "a name twice": ({**ATTENTION, "name": "t"}, "two steps are named 't'", "rename"),
    "an unknown kind": ({**GATED, "by": "gate"}, "no way to layer is called 'gate'", "gated"),
    "no middle": ({**ATTENTION, "at": "decoder.*.input"}, "not a place for an attention", "decoder.*.middle"),
    "no block": ({**ATTENTION, "at": "projector.input"}, "not a place for an attention", "decoder.*.middle"),
    "no projector": ({**GATED, "at": "projector.output"}, "not a place for a projector", "projector.input"),
    "tokens of a projector": ({**GATED, "of": "t"}, "does not use 'of'", "attention"),
    "a width of an attention": ({**ATTENTION, "width": 4}, "does not use 'width'", "gated"),
    "fewer than no blocks": ({**ATTENTION, "blocks": -1}, "too small", "0 or more"),
    "no width": ({**GATED, "width": 0}, "too small", "1 or more"),
    "a negative deviation": ({**GATED, "std": -1}, "too small", "0 or more"),
    "an unknown norm": ({**GATED, "norm": "batch"}, "'batch'", "layer"),
    "an unknown projector": ({**GATED, "mlp": "swiglu"}, "'swiglu'", "gated"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_names_line_and_remedy(kind: str, tmp_path: Path) -> None:
    layer, cause, remedy = BAD[kind]
    with pytest.raises(RuleError) as caught:
        _load(tmp_path, layer)
    assert caught.value.where[0] == f"{tmp_path / 'mine.yaml'}:5"
    assert cause in caught.value.cause and remedy in caught.value.remedy, str(caught.value)


def test_a_score_is_no_set_of_tokens(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="takes a set of tokens"):
        _load(tmp_path, ATTENTION, "score")
