"""Attention on super tokens, wrapped around that of towers: patches come back, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import naive
import pytest
import torch
from harness import difference, prune, refusal
from rulecases.svit_sta import wrapped
from torch import Tensor, nn

RULE = """
rule: mine
about: Attention on super tokens in blocks of a test.
params: {}
steps:
  - merge: {by: super_tokens, at: "%s", %s}
"""


def rule(folder: Path, at: str, fields: str = "cell: 2") -> str:
    path = folder / "mine.yaml"
    path.write_text(RULE % (at, fields))
    return str(path)


def by_hand(model: nn.Module, pixels: Tensor, blocks: list[int], cell: tuple[int, int], **options: Any) -> Any:
    layers = naive._layers(model)
    attentions = [layers[i].self_attn if hasattr(layers[i], "self_attn") else layers[i].attention for i in blocks]
    side = model.config.image_size // model.config.patch_size
    with torch.no_grad(), wrapped(attentions, side, cell, leading=1, **options):
        return model(pixel_values=pixels)


def read(out: Any) -> list[Tensor]:
    return [out.logits] if hasattr(out, "logits") else [out.last_hidden_state, out.pooler_output]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", fleet.TOWERS)
def test_a_tower_equals_the_run_by_hand(name: str, attention: str) -> None:
    model = fleet.shared(name, attention=attention)
    inputs = fleet.example(model, 3)
    out = prune(model, rule="svit_sta", blocks=2)(**inputs)
    for got, expected in zip(read(out), read(by_hand(model, inputs["pixel_values"], [0, 1], (2, 2))), strict=True):
        assert difference(got, expected) <= 1e-5
    if hasattr(out, "last_hidden_state"):
        assert out.last_hidden_state.shape == (3, 17, 32)


@pytest.mark.parametrize(
    ("at", "blocks", "fields", "cell", "iterations"),
    [
        ("vision.1.attention", [1], "cell: [4, 2]", (4, 2), 1),
        ("vision.*.attention", [0, 1, 2], "cell: [1, 3], iterations: 3", (1, 3), 3),
        ("vision.-1.attention", [2], "cell: [9, 9]", (9, 9), 1),
    ],
    ids=["one block", "every block, filled up", "one cell wider than the image"],
)
def test_cells_of_any_shape(
    at: str, blocks: list[int], fields: str, cell: tuple[int, int], iterations: int, tmp_path: Path
) -> None:
    model = fleet.shared("vit")
    inputs = fleet.example(model, 2)
    if "iterations" not in fields:
        fields += ", iterations: 1"
    out = prune(model, rule=rule(tmp_path, at, fields))(**inputs)
    expected = by_hand(model, inputs["pixel_values"], blocks, cell, iterations=iterations)
    assert difference(out.logits, expected.logits) <= 1e-5


def test_a_row_alone_gives_what_it_gives_in_a_batch() -> None:
    model = fleet.shared("clip")
    inputs = fleet.example(model, 3)
    pruned = prune(model, rule="svit_sta")
    together = pruned(**inputs).last_hidden_state
    for row in range(3):
        alone = pruned(pixel_values=inputs["pixel_values"][row : row + 1]).last_hidden_state
        assert difference(alone, together[row : row + 1]) <= 1e-5


def test_ghosts_that_are_masked_change_the_result() -> None:
    """The option reaches the operator, whose own tests say what it does there."""
    model = fleet.shared("clip")
    inputs = fleet.example(model, 1)
    plain, masked = (prune(model, rule="svit_sta", mask_ghosts=m)(**inputs).last_hidden_state for m in (False, True))
    assert difference(plain, masked) > 1e-4


@pytest.mark.parametrize("cell", [1, 2])
def test_cells_of_one_patch_leave_attention_as_it_is(cell: int) -> None:
    model = fleet.shared("clip")
    inputs = fleet.example(model, 2)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    got = prune(model, rule="svit_sta", cell=cell)(**inputs).last_hidden_state
    assert (difference(got, expected) == 0) == (cell == 1)


def test_attention_by_places_is_refused(tmp_path: Path) -> None:
    model = fleet.shared("llama")
    pruned = prune(model, rule=rule(tmp_path, "decoder.0.attention"))
    with pytest.raises(Exception, match="no place in this attention") as caught:
        pruned(**fleet.example(model))
    assert "rotary positions" in refusal(caught.value).found and "ViT" in refusal(caught.value).remedy


def test_attention_weights_cannot_be_read_from_outside() -> None:
    model = fleet.shared("clip", attention="eager")
    pruned = prune(model, rule="svit_sta")
    with pytest.raises(Exception, match="read from outside of it") as caught:
        pruned(**fleet.example(model), output_attentions=True)
    assert "attention weights" in refusal(caught.value).remedy


@pytest.mark.parametrize(
    ("at", "fields", "cause"),
    [
        ("vision.0.input", "cell: 2", "is not a place for by: super_tokens"),
        ("vision.0.attention", "cell: 0", "is no cell of patches"),
        ("vision.0.attention", "cell: [1, 2, 3]", "is no cell of patches"),
        ("vision.0.attention", "cell: 2, hard: 0.1", "does not use 'hard'"),
    ],
)
def test_what_a_rule_file_cannot_say(at: str, fields: str, cause: str, tmp_path: Path) -> None:
    model = fleet.shared("vit")
    with pytest.raises(Exception, match="mine.yaml") as caught:
        prune(model, rule=rule(tmp_path, at, fields))(**fleet.example(model))
    assert cause in str(refusal(caught.value))
