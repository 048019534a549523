"""The merging of the frames of a clip by loops over tokens, in float64.

Which tokens of a frame stay is decided as the released code does it: by the linearly interpolated quantile of how well
each fits, and not by a count.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def fits(keyframe: Tensor, frame: Tensor, later: int, spread: float, temperature: float, steps: int) -> Tensor:
    """How each token of a frame [m, C] is shared out among those of the keyframe [n, C]: [m, n], rows sum to 1."""
    cost = torch.zeros(len(frame), len(keyframe), dtype=torch.float64)
    for i, s in enumerate(frame.double()):
        for k, y in enumerate(keyframe.double()):
            cosine = float(s @ y) / max(float(s.norm() * y.norm()), 1e-300)
            cost[i, k] = 1 - min(max(cosine, -1 + 1e-6), 1 - 1e-6)
    cost = (cost - cost.min()) * (1 - math.exp(-(later**2) / (2 * spread**2 + 1e-9)))
    kernel = (-cost / temperature).exp()
    c = torch.ones(len(keyframe), dtype=torch.float64)
    for _ in range(steps):
        r = (1 / len(frame)) / (kernel @ c)
        c = (1 / len(keyframe)) / (kernel.T @ r)
    plan = r[:, None] * kernel * c
    return plan / plan.sum(1, keepdim=True)


def below(values: list[float], ratio: Fraction) -> list[int]:
    """The values strictly below their quantile, interpolated linearly."""
    position = ratio * (len(values) - 1)
    ordered, low = sorted(values), math.floor(position)
    tau = ordered[low]
    if position > low:
        tau += (ordered[low + 1] - ordered[low]) * float(position - low)
    return [i for i, value in enumerate(values) if value < tau]


def merged(
    clip: Tensor, ratio: Fraction, spread: float = 1.5, temperature: float = 0.1, steps: int = 2
) -> tuple[Tensor, list[list[int]], float]:
    """One clip, [L, m, C].

    Returns:
        What it becomes, [n, C] in float64; the tokens that stay of each frame but the first; and the smallest gap
        between any two values by which they are chosen, infinite without any.
    """
    keyframe = clip[0].double()
    out, stays, gap = [keyframe], [], math.inf
    for later, frame in enumerate(clip[1:].double(), 1):
        shares = fits(keyframe, frame, later, spread, temperature, steps)
        values = shares.max(1).values.tolist()
        ordered = sorted(values)
        gap = min([gap, *(b - a for a, b in zip(ordered, ordered[1:], strict=False))])
        stays.append(below(values, ratio))
        new = []
        for k, y in enumerate(keyframe):
            poured = [(shares[i, k], s) for i, s in enumerate(frame) if i not in stays[-1]]
            new.append((y + sum(share * s for share, s in poured)) / (1 + sum(share for share, _ in poured)))
        keyframe = torch.stack(new)
        out.append(frame[stays[-1]])
    return torch.cat([*out, keyframe] if len(clip) > 1 else out), stays, gap


def cut(frames: int, clip: int) -> list[list[int]]:
    """The frames of each clip; those left over are the last one's."""
    return [list(range(start, min(start + clip, frames))) for start in range(0, frames, clip)]


def places(chosen: list[list[int]], stays: list[list[int]], cells: int) -> list[int]:
    """Tokens of a clip's frames that stand for what it becomes: the last that are free for the merged keyframe."""
    out = list(chosen[0])
    for later, kept in enumerate(stays, 1):
        out += [later * cells + chosen[later][i] for i in kept]
    if len(chosen) == 1:
        return out
    free = [i for i in range(len(chosen) * cells) if i not in out]
    return out + free[len(free) - len(chosen[0]) :]
