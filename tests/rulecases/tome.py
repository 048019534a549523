"""Token Merging on the models of the fleet, by loops over pairs of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fleet
import naive
import torch
from torch import Tensor, nn

from rulecases import RuleCase


def pairs(metric: Tensor, count: int, leading: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens [T, D] that stay, in the method's order, and (merged token, token that it is merged into) of each pair."""
    if not count:
        return list(range(len(metric))), []
    unit = metric.float() / metric.float().norm(dim=-1, keepdim=True)
    alike = unit[::2] @ unit[1::2].T
    tokens = len(metric)
    best = {}
    for even in range(leading + leading % 2, tokens, 2):
        odd = max((j for j in range(1, tokens, 2) if j >= leading), key=lambda j: (alike[even // 2, j // 2].item(), -j))
        best[even] = (alike[even // 2, odd // 2].item(), odd)
    ranked = sorted(best, key=lambda i: (-best[i][0], i))
    merged, rest = ranked[:count], ranked[count:]
    evens = sorted(rest) if leading else rest
    odds = [j for j in range(1, tokens, 2) if j >= leading]
    return [*range(leading), *evens, *odds], [(i, best[i][1]) for i in merged]


def packed(stays: list[int], merged: list[tuple[int, int]]) -> list[int]:
    """Tokens that stay, tokens that are merged, and where in the first list these went."""
    return [*stays, *(i for i, _ in merged), *(stays.index(into) for _, into in merged)]


def merge(x: Tensor, size: Tensor, stays: list[int], merged: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Tokens [T, C] and sizes [T] after a merge."""
    values, sizes = [], []
    for token in stays:
        group = [token, *(i for i, into in merged if into == token)]
        sizes.append(sum(size[i] for i in group))
        values.append(sum(x[i].float() * size[i] for i in group) / sizes[-1])
    return torch.stack(values).to(x.dtype), torch.stack(sizes)


@dataclass
class Tower:
    """A CLIP or ViT tower that merges between attention and feed-forward of each layer, by hand."""

    layers: Any
    counts: list[int]
    leading: int
    stays: list[list[list[int]]] = field(default_factory=list)
    merged: list[list[list[tuple[int, int]]]] = field(default_factory=list)

    @torch.no_grad()
    def run(self, hidden: Tensor) -> list[Tensor]:
        """The stream before each layer, and after the last."""
        states, sizes = [hidden], torch.ones(hidden.shape[:2])
        for layer, count in zip(self.layers, self.counts, strict=True):
            states.append(self._layer(layer, states[-1], sizes, count))
            if count:
                sizes = self.sizes
        return states

    @property
    def packed(self) -> list[list[list[int]]]:
        """Of each layer and row the tokens that stay, those merged, and where in the first list they went."""
        return [
            [packed(*each) for each in zip(stays, merged, strict=True)]
            for stays, merged in zip(self.stays, self.merged, strict=True)
        ]

    def _layer(self, layer: nn.Module, x: Tensor, sizes: Tensor, count: int) -> Tensor:
        clip = hasattr(layer, "layer_norm1")
        attention = layer.self_attn if clip else layer.attention
        normed = (layer.layer_norm1 if clip else layer.layernorm_before)(x)
        heads = attention.config.num_attention_heads
        q, k, v = (
            getattr(attention, f"{name}_proj")(normed).unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv"
        )
        bias = sizes.log()[:, None, None].to(x.dtype) if self.stays else None
        out = nn.functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        x = x + (attention.out_proj if clip else attention.o_proj)(out)
        if count:
            x, sizes = self._merged(x, sizes, k.mean(1), count)
        return x + layer.mlp((layer.layer_norm2 if clip else layer.layernorm_after)(x))

    def _merged(self, x: Tensor, sizes: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
        rows, stays, pairs_ = [], [], []
        for row in range(len(x)):
            chosen, merged = pairs(metric[row], count, self.leading)
            rows.append(merge(x[row], sizes[row], chosen, merged))
            stays.append(chosen)
            pairs_.append(merged)
        self.stays.append(stays)
        self.merged.append(pairs_)
        self.sizes = torch.stack([size for _, size in rows])
        return torch.stack([value for value, _ in rows]), self.sizes


def counts(keep: Any, layers: int, tokens: int, leading: int) -> list[int]:
    """Pairs that each layer merges for what the matrix calls a budget."""
    wanted, out = asked(keep), []
    for _ in range(layers):
        out.append(min(wanted, (tokens - leading) // 2))
        tokens -= out[-1]
    return out


def asked(keep: Any) -> int:
    """Pairs in each layer: none for everything, all there are for one, else a few."""
    return 0 if keep == 1.0 and isinstance(keep, float) else 99 if keep == 1 else 3 if isinstance(keep, str) else 2


def run(model: nn.Module, inputs: dict[str, Tensor], keep: Any, cuts: Sequence[naive.Cut] = ()) -> naive.Ran:
    """A LLaVA run with merged pairs in its tower, and drops in its decoder; the text is numbered anew."""
    vision = model.model.vision_tower
    leading = naive.class_tokens(model)
    tower = getattr(vision, "vision_model", vision)
    layers = list(tower.encoder.layers)
    used = len(layers) + 1 + model.config.vision_feature_layer if model.config.vision_feature_layer < 0 else None
    start = vision(inputs["pixel_values"], output_hidden_states=True).hidden_states[0]
    by_hand = Tower(layers[:used], counts(keep, len(layers[:used]), start.shape[1], leading), leading)
    features = by_hand.run(start)[-1]
    cls = model.config.vision_feature_select_strategy == "default"
    features = features[:, 1:] if cls else features
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    image = ids == model.config.image_token_index
    texts: list[naive.Kept] = []
    for stays in by_hand.stays:
        chosen = [[i - cls for i in row if i >= cls] for row in stays]
        text = [naive.stay(row, chosen[b]) for b, row in enumerate(image.tolist())]
        texts.append(text)
        ids, valid, image = (naive._take(t, text) for t in (ids, valid, image))
    features = model.model.multi_modal_projector(features)
    hidden = model.get_input_embeddings()(ids).masked_scatter(image[..., None], features)
    logits, kept, lengths = naive._decoder(model, naive.State(hidden, valid, image), cuts)
    return naive.Ran(logits, [*by_hand.packed, *texts, *kept], lengths)


CASE = RuleCase(
    models=fleet.VLMS,
    options=lambda model, keep: {"pairs": asked(keep), "positions": "compact"},
    run=run,
    tolerance=1e-5,
    coarse=0.1,
    drops=False,
)
