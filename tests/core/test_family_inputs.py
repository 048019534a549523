"""Vision-language families on what they take beyond one image: several images, text alone, videos.

One graph is captured; keeping every token of it keeps every bit; random tokens dropped before the decoder's second
block leave what the model run by hand on the others says. Where there are images or videos, their tokens are dropped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
from harness import refusal

from tokcompile.models import catalogue

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS: dict[str, dict[str, int]] = {
    "two images": {"images": 2},
    "text": {"images": 0},
    "video": {"images": 0, "videos": 1},
}
"""Arguments of `Family.example`."""
REFUSED: dict[tuple[str, str], str] = {}
"""Why a family's inputs of a kind cannot be pruned, as a pattern of the error; none are."""
VLMS = {name: family for name, family in catalogue.families().items() if family.kind == "vlm"}
CELLS = [(name, kind) for name, family in VLMS.items() for kind in KINDS if kind != "video" or family.videos]
USUAL = {("llava", "text"), ("molmo2", "video"), ("smolvlm", "two images")}


def _marked(cells: list[tuple[str, str]]) -> list[Any]:
    marks = {cell: () if cell in USUAL else (pytest.mark.slow,) for cell in cells}
    return [pytest.param(*cell, marks=marks[cell], id="-".join(cell)) for cell in cells]


@pytest.mark.parametrize(("name", "kind"), _marked(CELLS))
def test_a_drop_from_other_inputs_equals_the_run_by_hand_or_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    if (name, kind) in REFUSED:
        with pytest.raises(Exception, match=REFUSED[name, kind]) as caught:
            families.check_drop(families.subject(VLMS[name], **KINDS[kind]), tmp_path)
        assert refusal(caught.value).where
        return
    families.check_drop(families.subject(VLMS[name], **KINDS[kind]), tmp_path)
