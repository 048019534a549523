"""Clusters around density peaks in the place of image tokens: means, order, positions and members, by loops."""

from __future__ import annotations

from pathlib import Path

import fleet
import naive
import pytest
import torch
from clustering_naive import decode, labels_by_loops, means, peaks_by_loops, slots_by_loops
from harness import difference, prune, refusal
from torch import Tensor, nn

from tokcompile.passes import PASSES
from tokcompile.passes.merge import merge

RULE = """
rule: dense
about: Merge image tokens around density peaks.
params:
  keep: {type: ratio_or_count, default: 0.45, round: ceil, about: clusters of each image}
  order: {type: choice, default: score, choices: [score, raster], about: order of the clusters}
  positions: {type: choice, default: keep, choices: [keep, compact], about: rotary positions}
steps:
  - merge:
      {by: density_peaks, name: members, at: %s, tokens: "${keep}", slots: 8, order: "${order}",
       positions: "${positions}"}
"""
PLACES = ("projector.output", "decoder.0.input")
COUNT = 8  # 0.45 of 16 patches are 7.2


def rule(folder: Path, at: str) -> str:
    path = folder / "dense.yaml"
    path.write_text(RULE % at)
    return str(path)


@torch.no_grad()
def features_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.model.multi_modal_projector(naive.vision_features(model, inputs["pixel_values"]))


def clustered(x: Tensor, order: str) -> tuple[list[int], list[int]]:
    """Centres and labels of one image's tokens [T, C]."""
    centres = peaks_by_loops(x.float(), COUNT, 5)[0]
    centres = sorted(centres) if order == "raster" else centres
    return centres, labels_by_loops(x.float(), centres)


@torch.no_grad()
def by_hand(model: nn.Module, inputs: dict[str, Tensor], order: str, positions: str) -> tuple[Tensor, list[list[int]]]:
    """Logits, and the centres of each row: clusters stand where the image stood, each at the position of its centre."""
    embed, ids = model.get_input_embeddings(), inputs["input_ids"]
    rows, centres = [], []
    for b, x in enumerate(features_of(model, inputs)):
        middle, labels = clustered(x, order)
        centres.append(middle)
        places = [i for i, token in enumerate(ids[b].tolist()) if token == fleet.IMAGE]
        start, end = places[0], places[-1] + 1
        text = embed(ids[b])
        hidden = torch.cat([text[:start], means(x, labels, COUNT), text[end:]])
        where = torch.tensor([*range(start), *(places[c] for c in middle), *range(end, ids.shape[1])])
        valid = inputs["attention_mask"][b].bool()
        rows.append((hidden, torch.cat([valid[:start], torch.ones(COUNT, dtype=torch.bool), valid[end:]]), where))
    hidden, valid, where = (torch.stack(each) for each in zip(*rows, strict=True))
    if positions == "compact":
        where = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
    return decode(model, hidden, valid, where), centres


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("order", ["score", "raster"])
@pytest.mark.parametrize("at", PLACES)
def test_clusters_equal_the_run_by_hand(at: str, order: str, positions: str, tmp_path: Path) -> None:
    """One member a cluster is a plain rotary position: that of the centre, as the method has it for K = 1."""
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, (2, 0, 1))
    pruned = prune(model, rule=rule(tmp_path, at), order=order, positions=positions)
    out = pruned(**inputs)
    logits, centres = by_hand(model, inputs, order, positions)
    if at == "projector.output":
        assert pruned.kept[0] == centres
    assert difference(out.logits, logits) <= 1e-5


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize(("name", "dtype", "attention"), [("llava-siglip-qwen2", torch.bfloat16, "eager")])
def test_half_precision_is_clustered_in_single_precision(
    name: str, dtype: torch.dtype, attention: str, at: str, tmp_path: Path
) -> None:
    model = fleet.shared(name, dtype, attention)
    inputs = fleet.example(model, 2)
    out = prune(model, rule=rule(tmp_path, at))(**inputs)
    logits, _ = by_hand(model, inputs, "score", "keep")
    assert difference(out.logits, logits) <= 0.1


@pytest.mark.parametrize("at", PLACES)
def test_as_many_clusters_as_tokens_leave_the_model_as_it_is(at: str, tmp_path: Path) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, (2, 0, 1))
    with torch.no_grad():
        expected = model(**inputs).logits
    assert difference(prune(model, rule=rule(tmp_path, at), keep=1.0)(**inputs).logits, expected) == 0


@pytest.mark.parametrize("order", ["score", "raster"])
@pytest.mark.parametrize("at", PLACES)
def test_members_are_left_under_the_name_of_the_step(
    at: str, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table that a later step finds: eight members of each cluster, nearest to the centre first."""

    def seen(ctx, step):
        merge(ctx, step)
        table = ctx.values["members"].node
        table.meta["token_map"] = "members"
        with ctx.editor.after([table]):  # nobody else reads it here
            ctx.editor.require(ctx.editor.call(torch.ops.aten.ge.Scalar, table, 0), "members are tokens")

    monkeypatch.setitem(PASSES, "merge", seen)
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, (2, 0, 1))
    pruned = prune(model, rule=rule(tmp_path, at), order=order)
    pruned(**inputs)
    for b, x in enumerate(features_of(model, inputs)):
        centres, labels = clustered(x, order)
        table = slots_by_loops(x, centres, labels, 8)
        if at == "decoder.0.input":
            first = inputs["input_ids"][b].tolist().index(fleet.IMAGE)
            table = [[first + member for member in row] for row in table]
        assert pruned.recording.maps["members"][b].tolist() == table


def test_rows_do_not_see_each_other(tmp_path: Path) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, (2, 0, 1))
    together = prune(model, rule=rule(tmp_path, "projector.output"))(**inputs).logits
    alone = prune(model, rule=rule(tmp_path, "projector.output"))
    for number, pad in enumerate((2, 0, 1)):
        got = alone(**fleet.row(inputs, number, pad)).logits
        assert difference(got, together[number : number + 1, pad:]) <= 1e-5


def test_text_alone_has_nothing_to_cluster(tmp_path: Path) -> None:
    model = fleet.shared("llama")
    with pytest.raises(Exception, match="no image tokens in this graph") as caught:
        prune(model, rule=rule(tmp_path, "decoder.0.input"))(**fleet.example(model))
    assert refusal(caught.value).remedy
