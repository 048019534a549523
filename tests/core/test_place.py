"""The verb place: positions in fractions, numbered anew, and several for each merged token."""

from __future__ import annotations

import copy
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import fleet
import naive
import pytest
import torch
from harness import difference, greedy, prune, refusal
from torch import Tensor
from transformers import DynamicCache
from turned import at, text_of, turned, variable
from turntoys import AXIS, LAYOUTS, ROWS, TOKENS, by_angles, captured, context, edit, inputs, model

import tokcompile
from tokcompile import EditError, RuleError, TokredError
from tokcompile.capturing import imagesizes
from tokcompile.capturing.capture import capture
from tokcompile.decoding.carried import Carried
from tokcompile.models import catalogue
from tokcompile.passes import PASSES
from tokcompile.passes.density_peaks import Members
from tokcompile.passes.merge import METHODS
from tokcompile.passes.merging import Merging
from tokcompile.passes.turned import rotary_sites
from tokcompile.pipeline import apply_rules
from tokcompile.rope.tables import Tables, angles_of, inverse_of, rows_of
from tokcompile.rulefile import LIBRARY, load_rule, parse_rules
from tokcompile.sites import find_sites
from tokcompile.steps import Merge, Place

STEPS = 4
FLAT = [layout for layout in LAYOUTS if layout not in AXIS]
QUARTER = [Fraction(1, 4)]


def _images(ids: Tensor) -> list[list[bool]]:
    return (ids == fleet.IMAGE).tolist()


@pytest.mark.parametrize("name", ["llava", "llava-siglip-qwen2"])
def test_steps_go_on_by_one_from_the_last_position(name: str) -> None:
    """Left-padded rows, against a run by hand of all tokens at once: the positions of new tokens are whole steps."""
    model = fleet.build(name)
    given = fleet.example(model, 2, (2, 0))
    tokcompile.compile(model, rule="v2pe", target="eager")
    out = model.generate(**given, **greedy(STEPS))
    tokcompile.restore(model)
    for step, logits in enumerate(out.logits):
        ids = out.sequences[:, : given["input_ids"].shape[1] + step]
        mask = torch.cat([given["attention_mask"], torch.ones(2, step, dtype=torch.long)], 1)
        images = _images(given["input_ids"])
        positions = variable([row + [False] * step for row in images], QUARTER)
        whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": given["pixel_values"]}
        with torch.no_grad(), turned(model, at(positions)):
            expected = model(**whole, use_cache=False).logits[:, -1]
        assert difference(logits, expected) <= 2e-5


def test_a_pace_of_one_is_the_model_to_the_last_bit() -> None:
    model = fleet.shared("llava")
    given = fleet.example(model, 2, (2, 0))
    pruned = prune(model, rule="v2pe", delta="1")
    with torch.no_grad():
        assert difference(pruned(**given).logits, model(**given).logits) == 0
    assert pruned.report.graphs[0][0].steps[0]["note"] == "all tokens advance by 1: no edit"


def test_whole_parts_keep_every_bit() -> None:
    """Positions counted in parts of 1/256 that are all whole give the tables of whole positions, bit for bit."""
    program = captured("half")
    given = inputs("half")
    ctx = context(program)
    (each,) = rotary_sites(ctx, "decoder", "decoder.rotary")
    with ctx.editor.before(each.turns[0].node):
        units = ctx.editor.call(torch.ops.aten.mul.Tensor, rows_of(ctx.editor, each), 256)
        finer = ctx.editor.call(torch.ops.aten.div.Tensor, inverse_of(ctx.editor, each), 256.0)
        angles = angles_of(ctx.editor, units, finer)
    Tables(ctx.editor, angles).give(each.turns)
    program.gm.recompile()
    assert difference(program.gm(*given), model("half")(*given)) == 0


def test_positions_in_half_precision_would_be_others() -> None:
    """A guard against casts: bfloat16 cannot hold 300 + 1/4, and the logits would show it."""
    model = fleet.build("llava")
    given = fleet.example(model)
    positions = variable(_images(given["input_ids"]), QUARTER, [300])
    rounded = torch.tensor([[float(p) for p in row] for row in positions]).bfloat16().tolist()
    start = 300 + torch.arange(given["input_ids"].shape[1])[None]
    out = prune(model, rule="v2pe")(**given, position_ids=start, use_cache=False).logits
    for placed, low, high in ((positions, 0, 0), (rounded, 1e-4, 100)):
        with torch.no_grad(), turned(model, at(placed)):
            assert low <= difference(out, model(**given, use_cache=False).logits) <= high


def test_masks_and_caches_do_not_see_positions_in_fractions() -> None:
    model = fleet.build("llava")
    given = fleet.example(model, 2, (2, 0))
    (program,) = capture(model, given)
    apply_rules(program, parse_rules({"rule": "v2pe"}))
    sites = find_sites(program)
    (made,) = [n for n in program.graph.nodes if n.target is torch.ops.tokred.variable_positions.default]
    for block in sites.stacks["decoder"].blocks:
        assert sites.reach.above(made, block.attention.query)
        assert block.attention.mask is not None and not sites.reach.above(made, block.attention.mask)


def _two_images(model: Any) -> dict[str, Tensor]:
    """One row with two images, between which a token of text stands."""
    one = fleet.example(model, 1)
    ids = torch.cat([one["input_ids"], one["input_ids"]], 1)
    pixels = torch.cat([one["pixel_values"], one["pixel_values"].flip(-1)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_each_image_has_its_own_pace() -> None:
    model = fleet.build("llava")
    given = _two_images(model)
    out = prune(model, rule="v2pe", delta="1/8, 1/2")(**given).logits
    positions = variable(_images(given["input_ids"]), [Fraction(1, 8), Fraction(1, 2)])
    with torch.no_grad(), turned(model, at(positions)):
        assert difference(out, model(**given).logits) == 0


def test_moving_all_positions_changes_nothing() -> None:
    model = fleet.shared("llava")
    given = fleet.example(model)
    pruned = prune(model, rule="v2pe")
    start = torch.arange(given["input_ids"].shape[1])[None]
    near, far = (pruned(**given, position_ids=start + more, use_cache=False).logits for more in (0, 300))
    assert difference(near, far) <= 1e-4


LUCK = {"rule": "random", "keep": 6, "seed": 3}


@pytest.mark.parametrize("order", ["drop-first", "place-first"])
def test_kept_tokens_keep_their_fractions(order: str) -> None:
    """Positions are gathered with the tokens that stay, not counted again."""
    model = fleet.shared("llava")
    given = fleet.example(model, 2, (2, 0))
    rules = [LUCK | {"positions": "keep"}, "v2pe"]
    pruned = prune(model, rules=rules if order == "drop-first" else rules[::-1])
    out = pruned(**given)
    (kept,) = pruned.kept
    every = variable(_images(given["input_ids"]), QUARTER)
    _check_kept(model, given, out.logits, kept, [[row[i] for i in here] for row, here in zip(every, kept, strict=True)])


def test_tokens_that_are_numbered_anew_are_placed_among_those_that_stay() -> None:
    model = fleet.shared("llava")
    given = fleet.example(model, 2, (2, 0))
    pruned = prune(model, rules=[LUCK | {"positions": "compact"}, "v2pe"])
    out = pruned(**given)
    (kept,) = pruned.kept
    images = _images(given["input_ids"])
    left = [[row[i] for i in here] for row, here in zip(images, kept, strict=True)]
    _check_kept(model, given, out.logits, kept, variable(left, QUARTER))


def _check_kept(model: Any, given: dict[str, Tensor], logits: Tensor, kept: list[list[int]], positions: Any) -> None:
    """The model's own text on the embeddings of the tokens that stay."""
    with torch.no_grad():
        image = given["input_ids"] == fleet.IMAGE
        features = model.model.multi_modal_projector(naive.vision_features(model, given["pixel_values"]))
        stream = model.get_input_embeddings()(given["input_ids"]).masked_scatter(image[..., None], features)
        rows = torch.tensor(kept)
        stream = torch.stack([t[r] for t, r in zip(stream, rows, strict=True)])
        mask = given["attention_mask"].gather(1, rows)
        with turned(model, at(positions)):
            hidden = text_of(model)(inputs_embeds=stream, attention_mask=mask, use_cache=False).last_hidden_state
        expected = model.lm_head(hidden)
    real = mask.bool()
    assert difference(logits[real], expected[real]) <= 2e-5


def test_features_that_are_dropped_early_leave_their_fractions() -> None:
    """A drop before the splice: the text's positions of all features count, those of dropped ones too."""
    model = fleet.shared("llava")
    given = fleet.example(model, 2, (2, 0))
    pruned = prune(model, rules=[{"rule": "hiprune", "keep": 10, "alpha": 1.0, "positions": "keep"}, "v2pe"])
    out = pruned(**given)
    kept = pruned.kept[-1]
    every = variable(_images(given["input_ids"]), QUARTER)
    _check_kept(model, given, out.logits, kept, [[row[i] for i in here] for row, here in zip(every, kept, strict=True)])


def test_fractions_are_not_numbered_anew() -> None:
    pruned = prune(fleet.shared("llava"), rules=["v2pe", LUCK | {"positions": "compact"}])
    with pytest.raises(Exception, match="positions cannot be compacted") as caught:
        pruned(**fleet.example(fleet.shared("llava")))
    assert "positions: keep" in refusal(caught.value).remedy


COMPACT = """
rule: numbered
about: Number tokens anew.
steps:
  - place: {at: decoder.rotary, by: compact}
"""


def test_numbering_anew_is_what_a_drop_that_compacts_does(tmp_path: Path) -> None:
    path = tmp_path / "numbered.yaml"
    path.write_text(COMPACT)
    model = fleet.shared("llava")
    given = fleet.example(model, 2, (2, 0))
    apart = prune(model, rules=[LUCK | {"positions": "keep"}, str(path)])(**given).logits
    torch._dynamo.reset()
    together = prune(model, rules=[LUCK | {"positions": "compact"}])(**given).logits
    real = given["attention_mask"].bool()
    kept = torch.stack([row[-together.shape[1] :] for row in real])
    assert difference(apart[kept], together[kept]) <= 2e-5


PER_IMAGE = COMPACT.replace("compact", "per_image")


def _closed(images: list[bool], kept: list[int]) -> list[int]:
    """Positions of the tokens kept, by a walk: those of an image count on from where it began."""
    starts = [i for i, image in enumerate(images) if image and not (i and images[i - 1])]
    seen = dict.fromkeys(starts, 0)
    out = []
    for i in kept:
        out.append(i)
        if images[i]:
            start = max(s for s in starts if s <= i)
            out[-1] = start + seen[start]
            seen[start] += 1
    return out


@pytest.mark.parametrize("later", [False, True], ids=["alone", "and-a-drop-in-the-stack"])
def test_what_is_left_of_an_image_counts_on_from_its_start(later: bool, tmp_path: Path) -> None:
    path = tmp_path / "numbered.yaml"
    path.write_text(PER_IMAGE)
    model = fleet.shared("llava")
    given = fleet.example(model, 2, (2, 0))
    first = prune(model, rules=[LUCK | {"positions": "keep"}, str(path)])
    logits = first(**given).logits
    (kept,) = first.kept
    positions = [_closed(row, here) for row, here in zip(_images(given["input_ids"]), kept, strict=True)]
    assert any(p != k for row, here in zip(positions, kept, strict=True) for p, k in zip(row, here, strict=True))
    _check_kept(model, given, logits, kept, positions)
    if later:  # layers behind the drop hold fewer tokens, and count them by themselves
        torch._dynamo.reset()
        drop = {"rule": "fastv", "keep": 4, "layer": 2}
        both = prune(model, rules=[LUCK | {"positions": "keep"}, drop, str(path)])
        out = both(**given).logits
        left = torch.tensor(both.kept[0]).gather(1, torch.tensor(both.kept[1]))
        real = given["attention_mask"].gather(1, left).bool()
        assert difference(out[real], _in_two_parts(model, given, *both.kept)[real]) <= 2e-5


@torch.no_grad()
def _in_two_parts(model: Any, given: dict[str, Tensor], first: list[list[int]], later: list[list[int]]) -> Tensor:
    """Logits by hand: two layers on the tokens of a first drop, the others on those of a later one."""
    images, text = _images(given["input_ids"]), text_of(model)
    rows, again = torch.tensor(first), torch.tensor(later)
    features = model.model.multi_modal_projector(naive.vision_features(model, given["pixel_values"]))
    visual = (given["input_ids"] == fleet.IMAGE)[..., None]
    hidden = model.get_input_embeddings()(given["input_ids"]).masked_scatter(visual, features)
    hidden = hidden[torch.arange(len(rows))[:, None], rows]
    for part, layers in ((rows, text.layers[:2]), (rows.gather(1, again), text.layers[2:])):
        if part is not rows:
            hidden = hidden[torch.arange(len(again))[:, None], again]
        positions = torch.tensor([_closed(row, here) for row, here in zip(images, part.tolist(), strict=True)])
        tables = text.rotary_emb(hidden, positions)
        real = given["attention_mask"].gather(1, part).bool()
        seen = torch.ones(part.shape[1], part.shape[1], dtype=torch.bool).tril() & real[:, None, None, :]
        mask = torch.where(seen, 0.0, torch.finfo(hidden.dtype).min)
        for layer in layers:
            out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=tables)
            hidden = out[0] if isinstance(out, tuple) else out
    return model.lm_head(text.norm(hidden))


def test_steps_after_gaps_that_closed_have_their_usual_positions(tmp_path: Path) -> None:
    path = tmp_path / "numbered.yaml"
    path.write_text(PER_IMAGE)
    model = fleet.build("llava")
    given = fleet.example(model, 2, (2, 0))
    rules = [LUCK | {"positions": "keep"}, str(path)]
    tokcompile.compile(model, rules=rules, target="eager")
    out = model.generate(**given, **greedy(2))
    tokcompile.restore(model)
    ids, ones = out.sequences[:, :-1], torch.ones(2, 1, dtype=torch.long)
    mask = torch.cat([given["attention_mask"], ones], 1)
    torch._dynamo.reset()
    pruned = prune(model, rules=rules)
    # The first row's padding counts for no position: neither in generate nor here.
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    whole = pruned(input_ids=ids, attention_mask=mask, pixel_values=given["pixel_values"], position_ids=counted)
    assert difference(out.logits[1], whole.logits[:, -1]) <= 2e-5


@pytest.mark.parametrize("layout", list(AXIS))
def test_several_coordinates_have_no_fractions(layout: str) -> None:
    with pytest.raises(EditError, match="several coordinates"):
        edit(captured(layout), "place", by="variable", delta="1/4")


def test_without_images_there_is_nothing_to_place() -> None:
    pruned = prune(fleet.shared("llama"), rule="v2pe")
    with pytest.raises(Exception, match="no image tokens in this graph"):
        pruned(**fleet.example(fleet.shared("llama")))


def test_a_model_without_rotary_tables_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "numbered.yaml"
    path.write_text(COMPACT)
    pruned = prune(fleet.shared("gpt2"), rule=str(path))
    with pytest.raises(Exception, match="has no rotary tables") as caught:
        pruned(**fleet.example(fleet.shared("gpt2")))
    assert "decoder.0..2.input" in refusal(caught.value).found


@pytest.mark.parametrize("delta", ["0.3", "1/3", "3/2", "-1/4", "quick", ""])
def test_a_pace_that_is_no_whole_number_of_parts_is_refused(delta: str) -> None:
    with pytest.raises(RuleError, match="no multiple of 1/256|no fraction from 0 to 1") as caught:
        load_rule("v2pe").bind(delta=delta).resolve({})
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"by": "anywhere"}, "no way to place is called"),
        ({"by": "compact", "delta": "1/4"}, "does not use 'delta'"),
        ({"by": "slots"}, "needs 'of'"),
        ({"by": "variable", "delta": "3/10"}, "no multiple of 1/256"),
        ({"by": "variable", "delta": "1/4", "denominator": 0}, "below 1"),
        ({"by": "compact", "at": "decoder.0.input"}, "not a place for positions"),
    ],
)
def test_wrong_steps(fields: dict[str, Any], cause: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"rule: mine\nabout: A test.\nsteps:\n  - place: {json.dumps(fields)}\n")
    with pytest.raises(RuleError, match=cause):
        load_rule(path)


def test_another_denominator_takes_other_fractions() -> None:
    step = Place.model_validate({"by": "variable", "delta": "3/10", "denominator": 10})
    assert step.delta == (Fraction(3, 10),)


# Several positions for each merged token.


def _merged(layout: str, clusters: list[list[int]], slots: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A toy whose tokens are merged by hand at its input, and placed at several positions each."""
    program = captured(layout)
    ctx = context(program)
    aten = torch.ops.aten

    def call(*args: Any) -> Any:
        return ctx.editor.call(*args)

    def repeated(values: list[int]) -> Any:
        """int64 [B, n] in the graph."""
        parts = [call(aten.full.default, [ROWS, 1], value) for value in values]
        return call(aten.cat.default, parts, 1)

    def hand(ctx: Any, step: Any, place: Any, sequence: Any) -> Merging:
        def content(source: Any) -> Any:
            width = max(len(c) for c in clusters)
            table = [c[i % len(c)] for c in clusters for i in range(max(slots, width))]
            wide = call(aten.view.default, repeated(table), [ROWS, len(clusters), -1])
            ctx.values["clusters"] = Members(wide, sequence.axis)
            means = []
            for cluster in clusters:
                parts = [call(aten.slice.Tensor, place.node, 1, i, i + 1) for i in cluster]
                means.append(call(aten.mean.dim, call(aten.cat.default, parts, 1), [1], True))
            return call(aten.cat.default, means, 1)

        return Merging(repeated([c[0] for c in clusters]), len(clusters), content)

    monkeypatch.setitem(METHODS, "hand", hand)
    PASSES["merge"](ctx, Merge.model_construct(by="hand", at="decoder.0.input", positions="keep", restore=False))
    PASSES["place"](ctx, Place.model_validate({"by": "slots", "of": "clusters", "slots": slots}))
    program.gm.recompile()
    return program


CLUSTERS = [[1, 0], [2], [4, 3, 5]]


def _by_slots(layout: str, clusters: list[list[int]], slots: int) -> Tensor:
    """The method by loops: merged tokens, and for each frequency the position of one member."""
    x, positions, inverse, weight = inputs(layout)
    pairs = len(inverse)
    axes = AXIS.get(layout, [0] * pairs)
    rows = positions if layout in AXIS else positions[None]
    angles = torch.zeros(ROWS, 1, len(clusters), pairs)
    for b in range(ROWS):
        for t, cluster in enumerate(clusters):
            for j in range(pairs):
                share = [i for i in range(pairs) if axes[i] == axes[j]]
                slot = share.index(j) // (len(share) // slots)
                angles[b, 0, t, j] = rows[axes[j], b, cluster[slot % len(cluster)]] * inverse[j]
    merged = torch.stack([x[:, c].mean(1) for c in clusters], 1)
    return by_angles(layout, merged, angles, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slots", [1, 2])
def test_each_slot_turns_its_share_of_frequencies(layout: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program = _merged(layout, CLUSTERS, slots, monkeypatch)
    assert difference(program.gm(*inputs(layout)), _by_slots(layout, CLUSTERS, slots)) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clusters_of_one_are_the_model_to_the_last_bit(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = _merged(layout, [[i] for i in range(TOKENS)], 2, monkeypatch)
    assert difference(program.gm(*inputs(layout)), model(layout)(*inputs(layout))) == 0


@pytest.mark.parametrize(("layout", "slots"), [("half", 5), ("sections", 3), ("woven", 8), ("partial", 4)])
def test_slots_that_do_not_divide_the_frequencies_are_refused(
    layout: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuleError, match=f"{slots} slots do not divide"):
        _merged(layout, CLUSTERS, slots, monkeypatch)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_one_slot_is_the_position_of_the_centre(name: str, tmp_path: Path, one_thread: None) -> None:
    """Of models that count in time, height and width: a merge alone gives each cluster its centre's position.

    The tables of one are made of sections in turn, of the other of sections in each other.
    """
    family = catalogue.family(name)
    model = family.build()
    given = {**family.example(model, batch=1), "use_cache": False}
    imagesizes.install(model)
    given = tokcompile.precompute(model, given)
    text = (LIBRARY / "ppe.yaml").read_text()
    both, alone = tmp_path / "both.yaml", tmp_path / "alone.yaml"
    both.write_text(text)
    alone.write_text(text[: text.index("  # A cluster of fewer")])
    placed, plain = [], []
    for rule, out in ((str(both), placed), (str(alone), plain)):
        torch._dynamo.reset()
        out.append(prune(model, rule=rule, slots=1, keep=0.5)(**given).logits)
    assert difference(placed[0], plain[0]) <= 1e-5
    torch._dynamo.reset()
    with pytest.raises(Exception, match="8 slots do not divide"):
        prune(model, rule=str(both), slots=8)(**given)


def test_text_alone_goes_on_after_merged_tokens() -> None:
    """Steps after a prompt whose image was merged have the positions that they would have had."""
    model = fleet.build("llava")
    given = fleet.example(model, 2, (2, 0))
    tokcompile.compile(model, rule="ppe", target="eager", keep=5, slots=4)
    out = model.generate(**given, **greedy(3))
    tokcompile.restore(model)
    pruned = prune(model, rule="ppe", keep=5, slots=4)
    with torch.no_grad():
        counted = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        whole = pruned(**given, position_ids=counted, use_cache=True)
        assert difference(out.logits[0], whole.logits[:, -1]) <= 1e-5
        start = given["input_ids"].shape[1]
        mask = torch.cat([given["attention_mask"].gather(1, torch.tensor(pruned.kept[-1])), torch.ones(2, 1).long()], 1)
        places = torch.tensor([[start - 3], [start - 1]]) + 1
        step = text_of(model)(
            input_ids=out.sequences[:, start : start + 1], past_key_values=whole.past_key_values,
            attention_mask=mask, position_ids=places,
        )  # fmt: skip
        assert difference(out.logits[1], model.lm_head(step.last_hidden_state[:, -1])) <= 2e-5


# What a prompt hands on.


class _Cache(DynamicCache):
    """A cache with rows enough to be reordered."""


def _filled() -> tuple[Carried, DynamicCache]:
    cache = _Cache()
    cache.update(torch.zeros(3, 1, 2, 4), torch.zeros(3, 1, 2, 4), 0)
    carried = Carried()
    carried.values["units"] = torch.tensor([[1], [2], [3]])
    carried.after(cache)
    assert not carried.values
    return carried, cache


def _rows(carried: Carried, cache: Any) -> list[int]:
    carried.before(cache)
    return carried.values["units"].flatten().tolist()


def test_what_is_handed_on_goes_where_rows_go() -> None:
    carried, cache = _filled()
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert _rows(carried, cache) == [3, 3, 1]
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert _rows(carried, cache) == [3, 1] and cache.layers[0].keys.shape[0] == 2
    cache.batch_repeat_interleave(2)
    assert _rows(carried, cache) == [3, 3, 1, 1]


def test_a_copy_of_a_cache_has_its_own() -> None:
    carried, cache = _filled()
    twin = copy.deepcopy(cache)
    twin.reorder_cache(torch.tensor([2, 1, 0]))
    assert _rows(carried, twin) == [3, 2, 1]
    assert _rows(carried, cache) == [1, 2, 3]


def test_a_cache_with_positions_of_its_own_is_not_cropped() -> None:
    _, cache = _filled()
    with pytest.raises(TokredError, match="cannot be cropped"):
        cache.crop(1)


def test_a_new_conversation_takes_nothing() -> None:
    carried, _ = _filled()
    carried.before(None)
    assert carried.values == {}
