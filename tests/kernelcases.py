"""One call of each Triton kernel, small enough for the interpreter: for what holds of all kernels alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from drawn import made

from tokcompile import kernels


def bools(*shape: int) -> torch.Tensor:
    return made(sum(shape), *shape) > 0


def places(most: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(most))


# One line an operator; the names of tensors that gradients flow to are those of floats, where the reference has any.
CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "attend": lambda: (
        made(0, 2, 4, 1, 8),
        made(1, 2, 2, 20, 8),
        made(2, 2, 2, 20, 8),
        bools(2, 1, 1, 20),
        0.5,
        0.0,
        None,
    ),
    "attend_chosen": lambda: (
        *(made(0, 2, 4, 1, 8), made(1, 2, 2, 20, 8), made(2, 2, 2, 20, 8), bools(2, 1, 1, 20), places(20, 2, 2, 7)),
        *(0.5, 0.0, None),
    ),
    "attend_with_sums": lambda: (
        *(made(0, 2, 4, 20, 8), made(1, 2, 2, 20, 8), made(2, 2, 2, 20, 12), bools(2, 1, 20, 20)),
        *(0.5, True, 2.0, made(2, 4)),
    ),
    "attention_received": lambda: (
        *(made(0, 2, 4, 20, 8), made(1, 2, 2, 20, 8), bools(2, 1, 1, 20), bools(2, 20)),
        *(0.5, True, 0.0, "mean", "mean", made(2, 4)),
    ),
    "attention_row": lambda: (
        *(made(0, 2, 4, 20, 8), made(1, 2, 2, 20, 8), bools(2, 1, 20, 20), places(20, 2), 0.5, False, 2.0, "max", None),
    ),
    "farthest_mask": lambda: (made(0, 2, 12, 12).abs(), made(1, 2, 12), bools(2, 12), 5),
    "fill_mask": lambda: ([bools(2, 12), bools(2, 12).flip(1)], made(0, 2, 12), bools(2, 12), 5),
    "gather_keys": lambda: (made(0, 2, 3, 9, 4), places(9, 2, 3, 5)),
    "gather_many": lambda: (
        [made(0, 2, 9, 4), made(1, 1, 1, 9, 3), places(50, 2, 9)],
        places(9, 2, 5),
        [0, 1, 0, 0, 2, 0, 0, 1, 0],
    ),
    "gather_mask": lambda: (bools(2, 1, 3, 9), places(9, 2, 3, 5)),
    "gather_pairs": lambda: (made(0, 2, 3, 9, 4), places(27, 2, 3, 5)),
    "gather_tokens": lambda: (made(0, 2, 9, 4), places(9, 2, 5), 1, 0),
    "keep_keys": lambda: (made(0, 2, 3, 12), bools(2, 12), bools(2, 12).flip(1), 1, 2, 5),
    "kept_indices": lambda: (bools(2, 12), 5),
    "key_attention": lambda: (
        *(made(0, 2, 4, 20, 8), made(1, 2, 2, 20, 8), bools(2, 1, 1, 20), bools(2, 20), 5, 2),
        *(0.5, True, 0.0, "mean", "seen", None),
    ),
    "key_viewers": lambda: (made(0, 2, 4, 20, 8), made(1, 2, 2, 20, 8), bools(2, 1, 20, 20), bools(2, 20), 0, True),
    "key_votes": lambda: (made(0, 2, 4, 8), made(1, 2, 2, 20, 8), bools(2, 20), 1, 2),
    "mark_pack": lambda: (made(0, 2, 40, 20), bools(2, 40), 40, None, True),
    "mark_slots": lambda: (bools(2, 12), 11),
    "mark_tokens": lambda: (made(0, 2, 9, 4), places(9, 2, 5) - 4, made(1, 2, 4)),
    "match_pairs": lambda: (made(0, 2, 20, 8), 6, 1),
    "merge_keys": lambda: (
        *(made(0, 2, 3, 12, 8), places(12, 2, 3, 5), places(6, 2, 3, 12), made(1, 2, 3, 12)),
        *(made(2, 2, 3, 12, 8), made(3, 1, 1, 12, 6).cos(), made(3, 1, 1, 12, 6).sin(), True),
    ),
    "merge_pairs": lambda: (
        *(made(0, 2, 20, 8), made(1, 2, 20).abs(), places(20, 2, 14), places(20, 2, 6), places(14, 2, 6), True),
    ),
    "pair_scores": lambda: (made(0, 2, 4, 8), made(1, 2, 2, 20, 8), places(3, 2, 1), bools(2, 20), 1, 3, False),
    "received_by_sums": lambda: (
        *(made(0, 2, 4, 20, 8), made(1, 2, 2, 20, 8), made(2, 2, 4, 20).abs() + 3, bools(2, 20)),
        *(0.5, True, "mean", "mean", bools(2, 1, 1, 20), 2.0, made(3, 2, 4, 20).abs()),
    ),
    "topk_mask": lambda: (made(0, 2, 12), bools(2, 12), 5),
    "turn_pairs": lambda: (made(0, 2, 3, 9, 8), places(9, 2, 9), places(8, 2, 9), made(2, 3).abs(), 1, False),
    "turned_votes": lambda: (
        *(made(0, 2, 4, 8), made(1, 2, 2, 20, 8), places(50, 2, 20), places(30, 1, 20), made(2, 3).abs(), 1, False),
        *(None, bools(2, 20), 2, 3),
    ),
    "unturn_keys": lambda: (made(0, 2, 3, 9, 8), made(1, 1, 1, 9, 6).cos(), made(1, 1, 1, 9, 6).sin() + 2, True),
    "window_topk_mask": lambda: (made(0, 2, 24), 4, 6, 2, 3, 2),
}

SECTIONS = [0] * 16 + [1] * 24 + [2] * 24
"""Time, height and width of heads of 128 numbers."""
OTHER_CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "fill_mask": lambda: ([bools(2, 16400)], made(0, 2, 16400), None, 5),
    "keep_keys": lambda: (made(0, 2, 2, 16400), bools(2, 16400), None, 1, 2, 5),
    "topk_mask": lambda: (made(0, 2, 16400), None, 5),
    "turn_pairs": lambda: (
        *(made(0, 2, 3, 9, 128), places(9, 2, 1, 9, 3), places(8, 2, 9), made(2, 64).abs(), 0, False, SECTIONS),
    ),
    "turned_votes": lambda: (
        *(made(0, 2, 4, 128), made(1, 2, 2, 20, 128), places(50, 2, 1, 20, 3), places(30, 1, 1, 20, 3)),
        *(made(2, 64).abs(), 0, False, SECTIONS, bools(2, 20), 2, 3),
    ),
}
"""Arguments for which other kernels run: rows that are longer than one program holds, tokens of several positions."""


def all_names() -> set[str]:
    """The operators with kernels, and the kernels of several."""
    return {*kernels.kernel_names(), *kernels.joint_names()}
