"""Text: token numbers and a padding mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PAD, BOS = 0, 1


def text(model: nn.Module, batch: int, padded: bool, length: int, seed: int) -> dict[str, Tensor]:
    """input_ids and attention_mask, int64 [batch, length]; row i is padded on the left by 0, 3, 1, 0, 3... places."""
    rng = torch.Generator().manual_seed(seed)
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(5, words, (batch, length), generator=rng)
    ids[:, 0] = BOS
    return pad(ids) if padded else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pad(ids: Tensor) -> dict[str, Tensor]:
    """Shift rows to the right by 3, 0, 1, 3... places; what falls off at the end is lost."""
    mask = torch.ones_like(ids)
    for row, places in zip(range(len(ids)), (3, 0, 1) * len(ids), strict=False):
        if places:
            ids[row] = torch.cat([torch.full((places,), PAD), ids[row, :-places]])
            mask[row, :places] = 0
    return {"input_ids": ids, "attention_mask": mask}
