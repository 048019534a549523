"""Marks: a marker in place of each run of image tokens, against runs by hand of each row alone without padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import marking
import naive
import pytest
import torch
from harness import difference, greedy, prune, refusal
from rulecases.pospad import by_attention
from torch import Tensor, nn

import tokcompile
from tokcompile import EditError, Weights
from tokcompile.budget import Budget
from tokcompile.models import catalogue

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4
PADS = (2, 0, 1)
MARK = """
rule: mine
about: Put markers in place of runs of random tokens.
params:
  keep: {type: ratio_or_count, default: 5, about: image tokens kept}
  layer: {type: int, default: 0, min: 0, about: decoder layer before which markers are put}
  content: {type: str, default: run_mean, about: what a marker holds}
  row: {type: int, default: -1, about: token whose embedding is the marker}
  min_run: {type: int, default: 1, about: tokens of the shortest run}
  spans: {type: int, default: 0, about: stretches of image tokens}
  among: {type: str, default: image, about: tokens that may be chosen}
steps:
  - score: {name: luck, by: random, at: "decoder.${layer}.input", seed: 3}
  - select: {name: kept, by: topk, scores: luck, among: "${among}", keep: "${keep}", allow_zero: true, per: row}
  - mark:
      at: decoder.${layer}.input
      keep: kept
      content: ${content}
      row: ${row}
      min_run: ${min_run}
      spans: ${spans}
"""
TIED = """
rule: tied
about: Put markers in place of runs of tokens that are all alike.
params:
  keep: {type: ratio_or_count, default: 5, about: image tokens kept}
steps:
  - score: {name: size, by: norm, at: projector.output}
  - select: {name: kept, by: topk, scores: size, keep: "${keep}"}
  - mark: {at: decoder.0.input, keep: kept}
"""


@pytest.fixture
def rule(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(MARK)
    return str(path)


def by_luck(keep: int, inputs: dict[str, Tensor]) -> Any:
    """The luckiest image tokens of each row, by their places in the padded batch."""

    def choose(model: nn.Module, pixels: Tensor) -> naive.Kept:
        del pixels
        out = []
        for row in (inputs["input_ids"] == model.config.image_token_index).tolist():
            places = [i for i, yes in enumerate(row) if yes]
            chosen = naive.best(torch.tensor(naive.lucky(len(row), 3)), places, keep)
            out.append([places.index(i) for i in chosen])
        return out

    return choose


def _same(out: Any, ran: naive.Ran, tolerance: float = 1e-5) -> None:
    assert out.logits.isfinite().all()
    assert difference(out.logits[ran.filled], ran.logits[ran.filled]) <= tolerance


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("options", "marks"),
    [
        ({"content": "zero"}, {"content": "zero"}),
        ({"content": "mean", "layer": 1}, {"content": "mean", "layer": 1}),
        ({"content": "row", "row": 9, "min_run": 2}, {"shortest": 2}),
    ],
    ids=["zeros", "mean-at-a-layer", "a-row-for-long-runs"],
)
def test_what_a_marker_holds(options: dict[str, Any], marks: dict[str, Any], attention: str, rule: str) -> None:
    model = fleet.shared("llava", attention=attention)
    inputs = fleet.example(model, 3, PADS)
    if "row" in options:
        marks = marks | {"content": model.get_input_embeddings().weight[options["row"]].detach()}
    ran = marking.run(model, inputs, marking.Marks(by_luck(5, inputs), **marks))
    pruned = prune(model, rule=rule, keep=5, **options)
    out = pruned(**inputs, use_cache=True)
    assert pruned.kept == ran.kept
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == ran.lengths
    _same(out, ran)


def test_a_marker_that_is_learned(rule: str) -> None:
    """A parameter that begins as zeros, gets a gradient, and is read from weights."""
    model = fleet.build("llava")
    inputs = fleet.example(model, 3, PADS)
    weights = Weights()
    tokcompile.compile(model, rule=rule, content="vector", weights=weights, target="eager")
    _same(model(**inputs), marking.run(model, inputs, marking.Marks(by_luck(5, inputs), "zero")))
    marker = weights.state_dict()["mine.marker"]
    assert marker.shape == (64,) and not marker.any()
    model(**inputs).logits[:, -1].sum().backward()
    (held,) = weights.parameters()
    assert held.grad.abs().sum() > 0
    vector = torch.linspace(-1, 1, 64)
    with torch.no_grad():
        held.copy_(vector)
    ran = marking.run(model, inputs, marking.Marks(by_luck(5, inputs), vector))
    _same(model(**inputs), ran)


def test_text_before_the_first_dropped_token_is_as_it_was(rule: str) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS)
    pruned = prune(model, rule=rule, keep=5)
    out = pruned(**inputs).logits
    with torch.no_grad():
        whole = model(**inputs).logits
    for row, slots in enumerate(pruned.kept[0]):
        first = next(i for i, slot in enumerate(slots) if slot < -1)
        early = [i for i in range(first) if slots[i] >= PADS[row]]
        assert early
        assert difference(out[row, early], whole[row, [slots[i] for i in early]]) <= 1e-5


@pytest.mark.parametrize(("keep", "slots"), [("1/100", 9), (15, 24)], ids=["none-kept", "all-but-one"])
def test_few_and_many_kept(keep: Any, slots: int, rule: str) -> None:
    """One marker at the last image token; as many tokens as before, one of them a marker."""
    model = fleet.shared("llava")
    inputs = fleet.example(model, 2, (1, 0))
    pruned = prune(model, rule=rule, keep=keep)
    out = pruned(**inputs)
    count = 0 if slots == 9 else keep
    _same(out, marking.run(model, inputs, marking.Marks(by_luck(count, inputs))))
    assert out.logits.shape[1] == slots
    for row, pad in zip(pruned.kept[0], (1, 0), strict=True):
        markers = [-2 - slot for slot in row if slot < -1]
        assert -1 not in row and len(markers) == 1
        assert slots > 9 or markers == [16 + pad]


def test_tied_scores_keep_the_first_tokens_and_make_one_run(tmp_path: Path) -> None:
    path = tmp_path / "tied.yaml"
    path.write_text(TIED)
    model = fleet.build("llava")
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        nn.init.zeros_(linear.weight)
    pruned = prune(model, rule=str(path))
    pruned(**fleet.example(model, 1))
    assert pruned.kept == [[[*[-1] * 5, 0, 1, 2, 3, 4, 5, -18, *range(17, 24)]]]


@pytest.mark.parametrize(("tokens", "share", "exact", "floats"), [
    (100, "0.8", 20, 19),
    (100, "0.9", 10, 9),
    (576, "0.5", 288, 288),
    (576, "0.8", 115, 115),
])  # fmt: skip
def test_budgets_are_exact_where_the_released_code_is_not(tokens: int, share: str, exact: int, floats: int) -> None:
    """For the same tokens as that code has, its count is given."""
    kept = {"0.8": "0.2", "0.9": "0.1", "0.5": "0.5"}[share]
    assert Budget.parse(kept).count(tokens, "floor", True) == exact
    assert int(tokens * (1.0 - float(share))) == floats
    assert Budget.parse(floats).count(tokens, "floor", True) == floats


def _generated(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    out = model.generate(**inputs, **greedy(STEPS))
    return torch.stack(out.logits, 1), out.past_key_values


@pytest.mark.parametrize("plain", [False, True], ids=["compile", "model.compile"])
@pytest.mark.parametrize(("name", "content"), [("llava", "zero"), ("llava-siglip-qwen2", "run_mean")])
def test_generate_equals_a_run_by_hand(name: str, content: str, plain: bool) -> None:
    """Zeros have keys of zeros in a model without biases: a cache still tells them from an empty slot."""
    model = fleet.build(name)
    inputs = fleet.example(model, 3, PADS)
    expected = marking.generate(model, inputs, STEPS, marking.Marks(by_attention(5), content))
    options = {"rule": "pospad", "keep": 5, "content": content}
    if plain:
        model.compile(backend="tokred", options=options | {"target": "eager"})
    else:
        tokcompile.compile(model, **options, target="eager")
    logits, cache = _generated(model, inputs)
    assert difference(logits, expected) <= 1e-4
    slots = marking.capacity(inputs["input_ids"].shape[1], 16, 5)
    assert [layer.keys.shape[2] for layer in cache.layers] == [slots + STEPS - 1] * 3


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_after_marks_at_a_layer(batch: int, rule: str) -> None:
    model = fleet.build("llava")
    inputs = fleet.example(model, batch, PADS[:batch] if batch > 1 else ())
    marks = marking.Marks(by_luck(5, inputs), layer=1, shortest=2)
    expected = marking.generate(model, inputs, STEPS, marks)
    tokcompile.compile(model, rule=rule, layer=1, min_run=2, target="eager")
    assert difference(_generated(model, inputs)[0], expected) <= 1e-4


@pytest.mark.slow
def test_generate_on_inductor(rule: str) -> None:
    model = fleet.build("llava")
    inputs = fleet.example(model, 3, PADS)
    expected = marking.generate(model, inputs, STEPS, marking.Marks(by_luck(5, inputs)))
    tokcompile.compile(model, rule=rule)
    assert difference(_generated(model, inputs)[0], expected) <= 1e-4


def test_a_drop_after_marks_takes_no_marker_and_no_empty_slot() -> None:
    """What the last token looks at least among the image tokens that are left, then each step of a continuation."""
    model = fleet.build("llava")
    inputs = fleet.example(model, 3, PADS)
    marks = marking.Marks(by_attention(6), then=naive.fastv(2, 3))
    expected = marking.generate(model, inputs, STEPS, marks)
    rules = [{"rule": "pospad", "keep": 6}, {"rule": "fastv", "layer": 2, "keep": 3}]
    pruned = prune(model, rules=rules)
    assert difference(pruned(**inputs).logits[:, -1], expected[:, 0]) <= 1e-5
    tokcompile.compile(model, rules=rules, target="eager")
    logits, cache = _generated(model, inputs)
    assert difference(logits, expected) <= 1e-4
    slots = marking.capacity(inputs["input_ids"].shape[1], 16, 6)
    assert [layer.keys.shape[2] for layer in cache.layers] == [n + STEPS - 1 for n in (slots, slots, slots - 3)]


def in_stretches(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two tokens of text within the image, after its fourth token and its eighth."""
    ids = inputs["input_ids"].clone()
    ids[:, 18:] = 7
    image = [i for i in range(1, 19) if i not in (5, 10)]
    ids[:, 1:19] = 8
    ids[:, image] = model.config.image_token_index
    return inputs | {"input_ids": ids}


def test_an_image_in_stretches_needs_to_be_said(rule: str) -> None:
    model = fleet.shared("llava")
    inputs = in_stretches(model, fleet.example(model, 2, text=9))
    with pytest.raises(RuntimeError, match="more stretches between text.*give it `spans`"):
        prune(model, rule=rule, keep=1)(**inputs)
    torch._dynamo.reset()
    pruned = prune(model, rule=rule, keep=1, spans=3)
    out = pruned(**inputs)
    kept = by_luck(1, inputs)(model, inputs["pixel_values"])
    image = inputs["input_ids"] == model.config.image_token_index
    for row, slots in enumerate(pruned.kept[0]):
        walked = marking.walk(marking.dropped(image[row].tolist(), kept[row]))
        assert slots == marking.listed(walked, marking.capacity(len(image[row]), 16, 1, 3))
    assert out.logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"among": "all"}, "among others too"),
        ({"among": "text"}, "among others too"),
        ({"content": "row", "row": 64}, "embedding of token 64 cannot be a marker"),
    ],
)
def test_what_cannot_be_marked(options: dict[str, Any], said: str, rule: str) -> None:
    model = fleet.shared("llava")
    with pytest.raises(Exception, match=said) as caught:
        prune(model, rule=rule, keep=5, **options)(**fleet.example(model))
    assert isinstance(refusal(caught.value), EditError)


def test_a_text_without_images_has_nothing_to_mark(rule: str) -> None:
    model = fleet.shared("llama")
    with pytest.raises(Exception, match="no image tokens in this graph"):
        prune(model, rule=rule)(**fleet.example(model, text=12))


def test_a_second_mark_is_refused(rule: str) -> None:
    model = fleet.shared("llava")
    with pytest.raises(Exception, match="an earlier mark has put markers") as caught:
        prune(model, rules=[{"rule": rule, "keep": 8}, {"rule": rule, "keep": 3}])(**fleet.example(model))
    assert "after mine" in str(refusal(caught.value))


def test_rows_with_different_numbers_of_images_fail_when_run(rule: str) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 2, text=23)
    inputs["input_ids"][0, 17:33] = fleet.IMAGE
    inputs["input_ids"][1, 1:17] = 7
    with pytest.raises(RuntimeError, match="different numbers of image tokens"):
        prune(model, rule=rule, keep=5)(**inputs)


def test_windows_are_refused(rule: str) -> None:
    family = catalogue.family("gemma3")
    model = family.build()
    pruned = prune(model, rule=rule, keep=5)
    with pytest.raises(Exception, match="where attention has a window") as caught:
        pruned(**family.example(model, batch=1), use_cache=False)
    assert "a window of 12 tokens" in refusal(caught.value).found


def test_positions_are_not_compacted_beside_marks(rule: str) -> None:
    model = fleet.build("llava")
    rules = [{"rule": "hiprune", "keep": 12, "alpha": 1.0}, {"rule": rule, "keep": 4}]
    tokcompile.compile(model, rules=rules, target="eager")
    with pytest.raises(Exception, match="cannot be compacted after a mark") as caught:
        model.generate(**fleet.example(model, 3, PADS), **greedy(2))
    assert "positions: keep" in refusal(caught.value).remedy
