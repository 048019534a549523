"""What the demo asks: test images with one question each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcompile.models import digits

SEED = 7_000_000
"""The questions that are asked unless others are wanted."""
_PIECE = 64


@dataclass(frozen=True)
class Questions:
    """n images, a question about each, and the token that answers it.

    Attributes:
        input_ids: int64 [n, T].
        pixel_values: float32 [n, 3, height, width].
        answers: int64 [n], token ids.
        words: text of each token id; empty when there is none.
    """

    input_ids: Tensor
    pixel_values: Tensor
    answers: Tensor
    words: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.answers)

    def rows(self, start: int, size: int) -> dict[str, Tensor]:
        """`size` rows from `start` on as arguments of forward; past the end it starts over, to fill a fixed batch."""
        rows = torch.arange(start, start + size) % len(self)
        return {"input_ids": self.input_ids[rows], "pixel_values": self.pixel_values[rows]}

    def word(self, token: int) -> str:
        """Text of a token."""
        return self.words[token] if token < len(self.words) else str(token)


def digit_questions(count: int, seed: int = SEED) -> Questions:
    """Canvases of the test split, made of scans that training never saw; the same for the same count and seed."""
    parts = [digits.canvases("test", min(_PIECE, count - start), seed + start) for start in range(0, count, _PIECE)]
    return Questions(
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.pixel_values for part in parts]),
        torch.cat([part.answers for part in parts]) + digits.TOKEN["0"],
        digits.VOCABULARY,
    )
