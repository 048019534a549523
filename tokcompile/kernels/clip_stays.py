"""tokred::clip_stays: which tokens of the frames of a clip stay, because they fit its first frame badly."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _clips, _library
from .topk_mask import reference as best


def reference(x: Tensor, clip: int, count: int, spread: float, temperature: float, iterations: int) -> Tensor:
    """Choose `count` tokens of each frame but the first of a clip, those that pour worst into the merged first frame.

    AOT (TyroneLi/AOT at 88455ee, `llava_arch.py`), the transport between frames, in its form of fixed shapes: of the
    shares of a token in the tokens of the keyframe, scaled to sum to 1, the largest says how well it fits. The released
    code keeps those below the quantile `ratio` of these; with no two alike these are ceil(ratio * (m - 1)) tokens.

    Args:
        x: float [N, F, m, C], the chosen tokens of the frames of N videos; compared as float32.
        clip: frames of a clip; the last clip has those that are left over.
        count: from 0 to m.
        spread: in frames, as `transport_cost_over_time` has it.
        temperature, iterations: of `transport_plan`.

    Returns:
        bool [N, F, m]: all True for the first frame of a clip, `count` True for each other; the lowest index wins ties.

    Raises:
        ValueError: x of another form, or no clips. RuntimeError: count out of range.
    """
    _clips.check(x)

    def worst(fit: Tensor, later: int) -> Tensor:
        return best(-fit, None, count)

    made = []
    for part in _clips.cut(x.shape[1], clip):
        frames = _clips.apart(x, *part)
        _, kept = _clips.scan(frames, worst, spread, temperature, iterations)
        first = torch.ones_like(frames[:, 0, :, 0], dtype=torch.bool)
        made.append(torch.stack([first, *kept], 1).reshape(-1, part[1] * part[2], x.shape[2]))
    return torch.cat(made, 1)


clip_stays = _library.define(
    "clip_stays(Tensor x, int clip, int count, float spread, float temperature, int iterations) -> Tensor", reference
)
