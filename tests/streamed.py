"""Evictions at every step, by hand: written-out attention in which each query sees what is left when it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from attending import attending
from cached import Heads, kept
from torch import Tensor, nn


@dataclass
class Key:
    """One key of one cached head: its place, the attention that it got, how many queries gave it, and itself."""

    place: int
    sum: float
    count: int
    key: Tensor


@dataclass
class Layer:
    """What one layer's cache holds in the end: keys and values of all tokens [B, Hkv, T, D], and places that stay."""

    key: Tensor
    value: Tensor
    stay: list[list[list[int]]]


WAVES = torch.tensor([10000.0 ** (-i / 8) for i in range(8)], dtype=torch.float64)
"""Frequencies of heads 16 wide."""
Score = Callable[[list[Key], Tensor], list[float]]
"""Numbers of keys, from these and the newest query's attention to them, float64 [heads, keys]."""
Choose = Callable[[list[Key], list[float], int], tuple[list[Key], int]]
"""Which keys stay, ascending, of their scores and the number evicted before; and how many go."""


@dataclass
class Policy:
    """What a rule does, on lists.

    Attributes:
        window: last queries of the prompt that count; 0: all.
        shared: whether all cached heads of a block choose together.
        prompt, later: whether caches are shortened after the prompt, and at later steps.
        waves: rotary frequencies, where later queries see keys at the distances of their ranks; None: they do not.
        positions: where each token stands for each frequency, [B, T, P]; None: tokens count one by one.
    """

    score: Score
    choose: Choose
    window: int = 0
    shared: bool = False
    prompt: bool = True
    later: bool = True
    waves: Tensor | None = None
    positions: Tensor | None = None


def age(keys: list[Key], newest: Tensor) -> list[float]:
    return [float(key.place) for key in keys]


def smallness(keys: list[Key], newest: Tensor) -> list[float]:
    return [-float(key.key.float().norm()) for key in keys]


def unlike_mean(keys: list[Key], newest: Tensor) -> list[float]:
    units = [key.key.double() / key.key.double().norm() for key in keys]
    middle = torch.stack(units).mean(0)
    return [-float(unit @ middle / middle.norm()) for unit in units]


def newest_alone(keys: list[Key], newest: Tensor) -> list[float]:
    return newest.mean(0).tolist()


def total(keys: list[Key], newest: Tensor) -> list[float]:
    return [key.sum for key in keys]


def mean(keys: list[Key], newest: Tensor) -> list[float]:
    return [key.sum / max(key.count, 1) for key in keys]


def best(budget: int, sinks: int = 0, recent: int = 0) -> Choose:
    def choose(keys: list[Key], scores: list[float], gone: int) -> tuple[list[Key], int]:
        stay = kept(scores, budget, sinks, recent)
        return [keys[i] for i in stay], len(keys) - len(stay)

    return choose


def by_turns(budget: int, sinks: int = 0, recent: int = 0) -> Choose:
    """TreeKV (He et al. 2025), Algorithm 1, on a list; idx is what the paper calls so, from 1."""

    def choose(keys: list[Key], scores: list[float], gone: int) -> tuple[list[Key], int]:
        both = list(zip(keys, scores, strict=True))
        size, before = budget - sinks - recent, len(both)
        while len(both) > budget:
            idx = gone % size + 1
            left, right = sinks + idx - 1, sinks + idx
            del both[right if both[left][1] > both[right][1] else left]
            gone += 1
        return [key for key, _ in both], before - len(both)

    return choose


class Turns:
    """Keys of neighbouring pairs go, one pair after the other, where lists of scores are all that is known."""

    def kept(self, heads: Heads, budget: int, sinks: int = 0, recent: int = 0) -> list[list[int]]:
        """Of each head the keys that stay, ascending."""
        choose, stay = by_turns(budget, sinks, recent), []
        for scores in heads:
            keys = [Key(place, 0.0, 0, torch.empty(0)) for place in range(len(scores))]
            stay.append([key.place for key in choose(keys, scores, 0)[0]])
        return stay


@contextmanager
def streamed(model: nn.Module, policy: Policy, prompt: int, real: Tensor, chunk: int = 1) -> Iterator[list[Layer]]:
    """Let a model attend so; one call holds the prompt and all later tokens.

    Args:
        prompt: how many tokens are the prompt's.
        real: bool [B, T], what is no padding.
        chunk: how many tokens a later step has.

    Yields:
        the layers, each with the keys that are left in the end for each row and cached head; filled by the call.
    """
    left: list[Layer] = []

    def change(layer: int, scale: float, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        group = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
        rows = []
        for row, places in enumerate(valid.nonzero()[:, 0].tolist() for valid in real):
            of_row = (query[row] * scale, keys[row], values[row])
            stand = torch.arange(query.shape[2])[:, None] if policy.positions is None else policy.positions[row]
            rows.append(_row(policy, *of_row, places, stand, prompt, group, out[row], chunk))
        left.append(Layer(key, value, rows))

    with attending(model, change):
        yield left


def _row(
    policy: Policy,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    places: list[int],
    stand: Tensor,
    prompt: int,
    group: int,
    out: Tensor,
    chunk: int,
) -> list[list[int]]:
    """One row of one layer: query, keys and values are [H, T, D]; later rows of `out` [H, T, D] are set."""
    first = [j for j in places if j < prompt]
    heads = range(query.shape[0] // group)
    logits = query.double() @ keys.double().transpose(1, 2)
    state = [[Key(j, 0.0, 0, keys[g * group, j]) for j in first] for g in heads]
    gone = [0 for _ in heads]
    voters = first[-policy.window :] if policy.window else first
    newest = []
    for g in heads:
        for i in first:
            seen = [j for j in first if j <= i]
            newest_here = logits[g * group : (g + 1) * group, i][:, seen].softmax(-1)
            if i in voters:
                _count(state[g], seen, newest_here)
        newest.append(newest_here)
    if policy.prompt:
        _evict(policy, state, newest, gone)
    for t in (j for j in places if j >= prompt):
        newest = []
        for g in heads:
            state[g].append(Key(t, 0.0, 0, keys[g * group, t]))
            seen, own = [key.place for key in state[g]], slice(g * group, (g + 1) * group)
            near = keys[own][:, seen].double()
            if policy.waves is not None:
                near = _at_ranks(near, stand[seen], policy.waves)
            weights = (query[own, t].double()[:, None] @ near.transpose(1, 2))[:, 0].softmax(-1)
            out[own, t] = (weights[:, None] @ values[own][:, seen].double())[:, 0].float()
            _count(state[g], seen, weights)
            newest.append(weights)
        if policy.later and (t - prompt + 1) % chunk == 0:
            _evict(policy, state, newest, gone)
    return [[key.place for key in of_head] for of_head in state]


def _at_ranks(keys: Tensor, positions: Tensor, waves: Tensor) -> Tensor:
    """Keys [H, T, D] at positions [T, P or 1], turned half by half, as far from the last as they stand in the list."""
    half = keys.shape[-1] // 2
    ahead = positions - torch.arange(len(positions))[:, None]
    turn = torch.polar(torch.ones(1, dtype=torch.float64), (ahead[-1] - ahead) * waves)
    turned = torch.complex(keys[..., :half], keys[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def _count(state: list[Key], seen: list[int], weights: Tensor) -> None:
    got = dict(zip(seen, weights.mean(0).tolist(), strict=True))
    for key in state:
        if key.place in got:
            key.sum += got[key.place]
            key.count += 1


def _evict(policy: Policy, state: list[list[Key]], newest: list[Tensor], gone: list[int]) -> None:
    scores = [policy.score(keys, new) for keys, new in zip(state, newest, strict=True)]
    if policy.shared:
        middle = torch.tensor(scores, dtype=torch.float64).mean(0).tolist()
        scores = [middle for _ in scores]
    for head, keys in enumerate(state):
        state[head], more = policy.choose(keys, scores[head], gone[head])
        gone[head] += more
