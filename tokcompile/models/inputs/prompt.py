"""What images and videos in a text share: token numbers with runs of tokens for them, and random pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokcompile.models.inputs import text

AFTER = 4
"""Tokens of text after the last run; more than `text.pad` shifts, so that no token of a run falls off the end."""

Pair = tuple[int, int] | list[int]


def windows(grid: Tensor, pool: Pair) -> Tensor:
    """Windows of a grid of numbers, [rows, columns, numbers of a window], -1 around the grid where it doesn't fit."""
    height, width = pool
    down, right = -grid.shape[0] % height, -grid.shape[1] % width
    grid = F.pad(grid, (right // 2, right - right // 2, down // 2, down - down // 2), value=-1)
    rows, columns = grid.shape[0] // height, grid.shape[1] // width
    return grid.view(rows, height, columns, width).transpose(1, 2).reshape(rows, columns, height * width)


def prompt(
    model: nn.Module,
    batch: int,
    padded: bool,
    length: int,
    seed: int,
    runs: list[int],
    *,
    leading: int = 3,
    between: int = 1,
    types: str = "",
    mark: int = 1,
    token: str = "image_token_id",
) -> dict[str, Tensor]:
    """Text with runs of one token in it: input_ids and attention_mask, int64 [batch, total].

    Args:
        model: its configuration says the token's number.
        batch: rows.
        padded: rows are padded on the left, as `text.text` says.
        length: tokens of text, beside the runs.
        seed: of the text.
        runs: their lengths; at least one.
        leading: tokens of text before the first run.
        between: tokens of text between two runs.
        types: a further input that tells the runs from text, int64 [batch, total]; left out if empty.
        mark: its value at a token of a run; it is 0 elsewhere.
        token: where the configuration says which token stands in the runs.
    """
    first = leading + between * (len(runs) - 1)
    if length < first + AFTER:
        raise ValueError(f"{len(runs)} runs of tokens need a text of {first + AFTER} tokens, not {length}")
    words = text.text(model, batch, False, length, seed)["input_ids"]
    number = getattr(model.config, token)
    parts = [words[:, :leading]]
    for index, run in enumerate(runs):
        here = leading + between * index
        parts += [torch.full((batch, run), number), words[:, here : here + between if index + 1 < len(runs) else None]]
    ids = torch.cat(parts, dim=1)
    inputs = text.pad(ids) if padded else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, types: (inputs["input_ids"] == number).long() * mark} if types else inputs


def noise(model: nn.Module, seed: int, *shape: int) -> Tensor:
    """Random pixels of a normal distribution, in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
