"""What evictions keep, by hand: queries and keys as a model's attention gets them, and naive choices of keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tokcompile.kernels import _hash

NAME = "observed"
Heads = list[list[float]]
"""For each cached head a number for each of a row's real tokens."""


@dataclass
class Seen:
    """One call of an attention: [B, H, T, D] queries, [B, Hkv, T, D] keys, and its probabilities, [B, H, Tq, Tk].

    Values are those of the cached heads too.
    """

    query: Tensor
    key: Tensor
    weights: Tensor
    value: Tensor | None = None


Sight = Callable[[int, Tensor, Tensor], Tensor]
"""What queries see: given the number of a call, queries and keys, bool [B, H, T, T]."""


@contextmanager
def observed(
    model: nn.Module, stay: Sequence[Tensor] = (), prompt: int = 0, sight: Sight | None = None
) -> Iterator[list[Seen]]:
    """Let a model's text attend to itself by attention that remembers what it was given, in order of the layers.

    Args:
        stay: for each layer the prompt's keys that later queries see, bool [B, Hkv, prompt].
        prompt: how many of the tokens are the prompt's.
        sight: what each query sees, beside all that; None: everything.
    """
    calls: list[Seen] = []

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        logits = query.float() @ keys.float().transpose(2, 3) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if attention_mask is not None:
            logits = logits + attention_mask[..., : keys.shape[2]]
        own = query.shape[2] == key.shape[2]
        if stay and own:
            seen = stay[len(calls)].repeat_interleave(groups, 1)[:, :, None]
            logits[:, :, prompt:, :prompt] = logits[:, :, prompt:, :prompt].masked_fill(~seen, -torch.inf)
        if sight is not None and own:
            logits = logits.masked_fill(~sight(len(calls), query, key), -torch.inf)
        if s_aux is not None:
            sink = s_aux.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        if own:
            calls.append(Seen(query, key, weights, value))
        return (weights.to(values.dtype) @ values).transpose(1, 2).contiguous(), weights

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    config = model.config.get_text_config()
    text: Any = next(m for m in model.modules() if getattr(m, "config", None) is config)
    before = config._attn_implementation
    text.set_attn_implementation(NAME)
    try:
        yield calls
    finally:
        text.set_attn_implementation(before)


def votes(seen: Seen, row: int, places: list[int], window: int, kernel: int = 1, pool: str = "avg") -> Heads:
    """SnapKV (Li et al. 2024): attention of a row's last queries to its earlier keys, the mean, pooled.

    Args:
        places: where the row's real tokens stand.

    Returns:
        for each cached head a number for each real token; the window's own are 0.
    """
    last, heads = places[-window:], []
    for of_group in groups(seen, row):
        raw = [0.0 if j in last else float(of_group[:, last, j].mean(1).mean(0)) for j in places]
        heads.append([_pooled(raw, j, kernel, pool) for j in range(len(places))])
    return heads


def mass(seen: Seen, row: int, places: list[int], reduce: str, window: int = 0) -> Heads:
    """H2O (Zhang et al. 2023): attention from all queries, its sum or its mean over the queries that see the key.

    Args:
        window: how many last queries count; 0: all.
    """
    heads, voters = [], places[-window:]
    for of_group in groups(seen, row):
        each = []
        for j in places:
            got = of_group[:, voters, j]
            # Those that give it any attention: in some models images are seen by what stands before them, too.
            viewers = int((got > 0).any(0).sum()) if reduce == "seen" else 1
            each.append(float(got.sum(1).mean(0)) / viewers)
        heads.append(each)
    return heads


def ahead(seen: Seen, row: int, places: list[int], count: int, kernel: int = 1) -> Heads:
    """DapQ (2026): attention from the tokens behind a prompt, so many, the sum, pooled."""
    heads = []
    for of_group in groups(seen, row):
        got = of_group[:, -count:].sum(1).mean(0)
        own = [float(got[j]) for j in places]
        heads.append([_pooled(own, order, kernel, "avg") for order in range(len(own))])
    return heads


def age(seen: Seen, row: int, places: list[int]) -> Heads:
    """StreamingLLM (Xiao et al. 2024): the last tokens stay."""
    return [[float(j) for j in places] for _ in range(seen.key.shape[1])]


def newest(seen: Seen, row: int, places: list[int]) -> Heads:
    """TOVA (Oren et al. 2024): attention of the last query, the mean over all heads, which choose together."""
    middle = seen.weights[row, :, places[-1]].double().mean(0)
    return [[float(middle[j]) for j in places] for _ in range(seen.key.shape[1])]


def smallness(seen: Seen, row: int, places: list[int]) -> Heads:
    """Devoto et al. (2024): keys of small norm stay."""
    return [[-float(key[j].float().norm()) for j in places] for key in seen.key[row]]


def difference_to_mean(seen: Seen, row: int, places: list[int]) -> Heads:
    """KeyDiff (Park et al. 2025): keys unlike the mean of all directions stay."""
    heads = []
    for key in seen.key[row].double():
        units = [key[j] / key[j].norm() for j in places]
        middle = torch.stack(units).mean(0)
        heads.append([-float(unit @ middle / middle.norm()) for unit in units])
    return heads


def luck(seen: Seen, row: int, places: list[int], seed: int, block: int) -> Heads:
    """Numbers that depend on the seed, the block, the head and which real token of its row a key is of."""
    heads = range(seen.key.shape[1])
    return [
        [_hash.hashed((order << 8) + head, seed + (block << 32)) >> 8 for order in range(len(places))] for head in heads
    ]


def groups(seen: Seen, row: int) -> Iterator[Tensor]:
    """Probabilities of the query heads that share a cached head, float64 [heads, Tq, Tk], one cached head at a time."""
    size = seen.query.shape[1] // seen.key.shape[1]
    for cached in range(seen.key.shape[1]):
        yield seen.weights[row, cached * size : (cached + 1) * size].double()


def _pooled(raw: list[float], middle: int, kernel: int, pool: str) -> float:
    reach = range(middle - kernel // 2, middle + kernel // 2 + 1)
    near = [raw[j] if 0 <= j < len(raw) else 0.0 for j in reach]
    return max(near) if pool == "max" else sum(near) / kernel


def kept(scores: list[float], budget: int, sinks: int = 0, recent: int = 0) -> list[int]:
    """The first and last tokens and then the best, lowest index first among equals; ascending."""
    count = len(scores)
    forced = {j for j in range(count) if j < sinks or j >= count - recent}
    others = sorted((j for j in range(count) if j not in forced), key=lambda j: (-scores[j], j))
    return sorted([*forced, *others[: max(budget - len(forced), 0)]])[:count]


def pyramid(budget: int, window: int, beta: int, blocks: int, tokens: int) -> list[int]:
    """PyramidKV (Cai et al. 2024): budgets of the blocks with the window, largest first; their sum is exact."""
    base = budget - window
    low = Fraction(base, beta)
    high = 2 * base - low
    if high > tokens - window:
        high = Fraction(max(tokens - window, base))
        low = 2 * base - high
    exact = [high - (high - low) * block / max(blocks - 1, 1) for block in range(blocks)]
    out = [math.floor(value) for value in exact]
    while sum(out) < base * blocks:
        behind = max(range(blocks), key=lambda block: (exact[block] - out[block], -block))
        out[behind] += 1
    return [count + window for count in out]


@dataclass(frozen=True)
class Joint:
    """Ada-KV (Feng et al. 2024): how heads share a budget."""

    floor: Fraction = Fraction(1, 5)
    floor_by: str = "blend"

    def kept(self, heads: Heads, budget: int, sinks: int = 0, recent: int = 0) -> list[list[int]]:
        """Of each head the keys that stay, ascending; of all heads together so many times the budget."""
        count, budget = len(heads[0]), min(budget, len(heads[0]))
        forced = {j for j in range(count) if j < sinks or j >= count - recent}
        own = [sorted(range(count), key=lambda j, s=scores: (j not in forced, -s[j], j)) for scores in heads]
        first = {(h, j) for h in range(len(heads)) for j in forced}
        if self.floor_by == "reserve":
            sure = max(math.floor(self.floor * budget), 1)
            first |= {(h, j) for h, places in enumerate(own) for j in places[:sure]}
        pairs = [(h, j) for h in range(len(heads)) for j in range(count)]
        pairs.sort(key=lambda pair: (pair not in first, -heads[pair[0]][pair[1]], pair[1], pair[0]))
        won = [[j for h, j in pairs[: budget * len(heads)] if h == head] for head in range(len(heads))]
        if self.floor_by == "reserve":
            return [sorted(places) for places in won]
        exact = [len(places) * (1 - self.floor) + budget * self.floor for places in won]
        counts = [math.floor(value) for value in exact]
        while sum(counts) < budget * len(heads):
            behind = max(range(len(heads)), key=lambda h: (exact[h] - counts[h], -h))
            counts[behind] += 1
        return [sorted(places[:n]) for places, n in zip(own, counts, strict=True)]


def check_held(layer: Any, keys: Tensor, values: Tensor, rows: list[list[list[int]]], shared: bool = False) -> None:
    """Check that a layer of a cache holds what stays of whole keys and values, and padding in front of short rows.

    Args:
        rows: for each row and cached head the places that stay.
        shared: whether heads share a budget: slots are then of any head.
    """
    length = layer.keys.shape[2]
    for row, heads in enumerate(rows):
        if shared:
            own, places = zip(*flattened(heads), strict=True)
            held, want = layer.keys[row].flatten(0, 1), keys[row, list(own), list(places)]
            found = torch.arange(len(held))  # two heads may hold the same keys
            if len(held) > len(want):  # padding stands before the tokens of each head
                found = (held[None] == want[:, None]).all(-1).int().argmax(1)
            assert found.tolist() == sorted({*found.tolist()})
            assert torch.equal(held[found], want)
            assert torch.equal(layer.values[row].flatten(0, 1)[found], values[row, list(own), list(places)])
            continue
        for head, places in enumerate(heads):
            start = length - len(places)
            assert torch.equal(layer.keys[row, head, start:], keys[row, head, places])
            assert torch.equal(layer.values[row, head, start:], values[row, head, places])


def flattened(heads: list[list[int]]) -> list[tuple[int, int]]:
    """Slots of a row's cache in order, where heads share a budget: which place of which head each holds."""
    return [(head, place) for head, places in enumerate(heads) for place in places]


Score = Callable[[Seen, int, list[int]], Heads]


class Choice(Protocol):
    """How the keys of a row's heads are chosen by their scores."""

    def kept(self, heads: Heads, budget: int, sinks: int = 0, recent: int = 0) -> list[list[int]]:
        """Of each head the keys that stay, ascending."""
        ...


def choices(
    calls: Sequence[Seen],
    real: list[list[bool]],
    score: Callable[[int], Score],
    budgets: Sequence[int],
    joint: Choice | None = None,
    **ends: int,
) -> list[list[list[list[int]]]]:
    """Which keys stay: for each layer, row and cached head their places, ascending."""
    out = []
    for block, seen in enumerate(calls):
        rows = []
        for row, valid in enumerate(real):
            places = [i for i, here in enumerate(valid) if here]
            heads = score(block)(seen, row, places)
            if joint is None:
                stay = [kept(each, budgets[block], **ends) for each in heads]
            else:
                stay = joint.kept(heads, budgets[block], **ends)
            rows.append([[places[j] for j in each] for each in stay])
        out.append(rows)
    return out


def masks(chosen: list[list[list[list[int]]]], tokens: int) -> list[Tensor]:
    """The same as bool [B, Hkv, tokens] for each layer."""
    found = []
    for rows in chosen:
        mask = torch.zeros(len(rows), len(rows[0]), tokens, dtype=torch.bool)
        for row, heads in enumerate(rows):
            for head, places in enumerate(heads):
                mask[row, head, places] = True
        found.append(mask)
    return found


def continued(inputs: Mapping[str, Tensor], more: Tensor) -> dict[str, Tensor]:
    """Inputs with further tokens [B, N], and positions as `generate` counts them."""
    ids = torch.cat([inputs["input_ids"], more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {**inputs, "input_ids": ids, "attention_mask": mask, "position_ids": positions}
