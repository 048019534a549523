"""AOT on a LLaVA-OneVision with a video, by loops: anchors, transport within frames, pooling, and merging of clips."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import clips_naive
import naive
import torch
from torch import Tensor, nn

from rulecases import RuleCase, aot


def pooled_shares(model: nn.Module, anchors: naive.Kept, side: int) -> Tensor:
    """What the model's own pooling makes of masks of patches: [frames, cells]."""
    masks = torch.zeros(len(anchors), side * side, 1)
    for mask, kept in zip(masks, anchors, strict=True):
        mask[kept] = 1
    return model.model.apply_pooling(masks)[..., 0]


def features(model: nn.Module, pixels: Tensor, keep: Any, windows: int) -> tuple[Tensor, Tensor, list[naive.Kept]]:
    """The first stage of frames [N, 3, H, W].

    Returns:
        Pooled features [N, cells, C] with anchors merged before, the pooled mask of anchors [N, cells], and the
        anchors, which are nobody's choice where all patches are.
    """
    config = model.config.vision_config
    depth, side = config.num_hidden_layers, config.image_size // config.patch_size
    early, deep = (naive.vision_attention(model, pixels, layer) for layer in (depth * 5 // 26, max(depth - 2, 0)))
    budget = naive.count(keep, side * side)
    anchors = [aot.anchors(early[f], deep[f], side, windows, budget) for f in range(len(pixels))]
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    patches = model.model.multi_modal_projector(states[model.config.vision_feature_layer])
    shares = pooled_shares(model, anchors, side)
    if budget == side * side:
        return model.model.apply_pooling(patches), shares, []
    for frame, kept in zip(patches, anchors, strict=True):
        frame[kept] = aot.poured(frame.clone(), kept, side)
    return model.model.apply_pooling(patches), shares, [anchors]


def clipped(frames: Tensor, chosen: list[list[int]], clip: int, ratio: Fraction) -> tuple[Tensor, list[int], list[int]]:
    """The second stage of one video, [F, cells, C].

    Returns:
        What it becomes, [n, C]; which of its chosen tokens stay; and the tokens that stand for what it becomes.
    """
    cells, each = frames.shape[1], len(chosen[0])
    out, stays, spots = [], [], []
    for part in clips_naive.cut(len(frames), clip):
        made, kept, gap = clips_naive.merged(torch.stack([frames[f][chosen[f]] for f in part]), ratio)
        assert gap > 1e-5, "values that float32 may order otherwise"
        out.append(made.to(frames.dtype))
        for f, one in zip(part, [list(range(each)), *kept], strict=True):
            stays += [f * each + i for i in one]
        spots += [part[0] * cells + i for i in clips_naive.places([chosen[f] for f in part], kept, cells)]
    return torch.cat(out), stays, spots


@torch.no_grad()
def run(
    model: nn.Module,
    inputs: dict[str, Tensor],
    anchors: Any,
    windows: int = 1,
    cells: Any = 3,
    clip: int = 4,
    ratio: Fraction = Fraction(3, 10),
    generated: int = 0,
    positions: str = "compact",
) -> naive.Ran:
    """Both stages, and the decoder on the tokens that are left. A line's end stands after each video."""
    pixels, ids = inputs["pixel_values_videos"], inputs["input_ids"]
    pooled, shares, merged = features(model, pixels.flatten(0, 1), anchors, windows)
    each, count = pooled.shape[1], naive.count(cells, pooled.shape[1])
    chosen = [naive.best(one, range(each), count) for one in shares]
    per, rows = pixels.shape[1], len(ids)
    held = per * each + 1
    parts = [
        clipped(pooled[v * per : v * per + per], chosen[v * per : v * per + per], clip, ratio)
        for v in range(len(pixels))
    ]
    videos = len(pixels) // rows
    source = [[n * held + i for n in range(videos) for i in [*parts[b * videos + n][2], held - 1]] for b in range(rows)]
    video = ids == model.config.video_token_id
    video[:, ids.shape[1] - generated :] = False
    text = [naive.stay(row, sorted(source[b])) for b, row in enumerate(video.tolist())]
    stood = _stood(video, text, source) if positions == "keep" else None
    valid = inputs["attention_mask"].bool()
    ids, valid, video = (naive._take(t, text) for t in (ids, valid, video))
    newline = model.model.image_newline[None]
    spliced = torch.cat([torch.cat([made, newline]) for made, _, _ in parts])
    hidden = model.get_input_embeddings()(ids).masked_scatter(video[..., None], spliced)
    kept = [*merged, chosen, [stays for _, stays, _ in parts], source, text]
    if stood is not None:
        return naive.Ran(_at(model, hidden, valid, stood), kept, [hidden.shape[1]] * len(_layers(model)))
    logits, more, lengths = naive._decoder(model, naive.State(hidden, valid, video), ())
    return naive.Ran(logits, [*kept, *more], lengths)


def _layers(model: nn.Module) -> nn.ModuleList:
    return model.model.language_model.layers


def _stood(video: Tensor, text: naive.Kept, source: naive.Kept) -> Tensor:
    """Where the tokens of a text stood before: features in their own order, which need not be that of their places."""
    rows = []
    for row, left, features in zip(video.tolist(), text, source, strict=True):
        places = [i for i, is_video in enumerate(row) if is_video]
        own = iter(features)
        rows.append([places[next(own)] if row[i] else i for i in left])
    return torch.tensor(rows)


def _at(model: nn.Module, hidden: Tensor, valid: Tensor, positions: Tensor) -> Tensor:
    """Logits of tokens at given rotary positions, each of which sees those that stand before it in the sequence."""
    tokens = hidden.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & valid[:, None, None, :]
    out = model.model.language_model(inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False)
    return model.lm_head(out.last_hidden_state)


# No model of the matrix takes videos: tests/core/test_clip_rule.py has one of the catalogue that does.
CASE = RuleCase(models=(), options=lambda model, keep: {"anchors": keep}, run=run, tolerance=1e-5)
