"""The tables themselves, in the model's own dtypes: positions whose rows are alike, and how far angles are off.

What the bounds on a base say of a model, this counts: every position is run through the captured graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokcompile.sites.frequencies import Curve, Runner, Unknown

_BLOCK = 4096
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TableCheck:
    """What was found on positions 0 to `positions` - 1.

    Attributes:
        duplicates: positions whose rows of the tables, as the queries read them, stand earlier already.
        first_pair: the first position whose row equals that of the next one; None for none.
        same_angle: neighbouring positions to which the fastest frequency gives the same angle.
        worst: largest difference of an angle to the product of position and frequency in float64, in radians.
    """

    positions: int
    duplicates: int
    first_pair: int | None
    same_angle: int
    worst: float


def check_tables(curve: Curve, positions: int) -> TableCheck:
    """Build the tables of a curve for as many positions; every coordinate of a token has the same one.

    Raises:
        Unknown: something that the tables depend on is not known outside of a call.
    """
    rows, fastest, worst = [], [], 0.0
    exact = _exact(curve.runner)
    column = int(exact.argmax())
    for start, angles, tables in _blocks(curve.runner, positions):
        rows.append(torch.stack([_hash(table) for table in tables]).sum(0))
        fastest.append(angles[:, column])
        wanted = torch.arange(start, start + len(angles), dtype=torch.float64)[:, None] * exact
        worst = max(worst, float((angles.double() - wanted).abs().max()))
    row, angle = torch.cat(rows), torch.cat(fastest)
    pairs = (row[1:] == row[:-1]).nonzero()
    return TableCheck(
        positions,
        positions - len(row.unique()),
        int(pairs[0]) if len(pairs) else None,
        int((angle[1:] == angle[:-1]).sum()),
        worst,
    )


def _exact(runner: Runner) -> Tensor:
    """float64 [M]: what each column of the angles turns by from one position to the next."""
    zero, one = (_by_token(runner, runner.angles(_filled(runner, torch.full((1,), p)))) for p in (0, 1))
    return one[0].double() - zero[0].double()


def _blocks(runner: Runner, positions: int) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """First position, angles [n, M] and tables [n, D] of all positions, block by block.

    Blocks are long where the graph has no number of tokens written into it, else as long as the example.
    """
    size, start = _BLOCK, 0
    while start < positions:
        count = min(size, positions - start)
        try:
            angles, tables = _run(runner, torch.arange(start, start + count))
        except RuntimeError:
            if size == runner.shape[runner.tokens]:
                raise
            size = runner.shape[runner.tokens]
            continue
        yield start, angles[:count], [table[:count] for table in tables]
        start += count


def _run(runner: Runner, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
    count, whole = len(positions), runner.shape[runner.tokens]
    if count < whole:  # the last block: to the length that the graph may insist on
        positions = torch.cat([positions, positions[-1:].expand(whole - count)])
    angles = runner.angles(_filled(runner, positions))
    tables = [_rows(table, len(positions)) for table in runner.used(angles)]
    return _by_token(runner, angles), tables


def _filled(runner: Runner, positions: Tensor) -> Tensor:
    """Positions in the shape that the graph has them in, along its tokens."""
    shape = list(runner.shape)
    shape[runner.tokens] = len(positions)
    view = [1] * len(shape)
    view[runner.tokens] = len(positions)
    return positions.view(view).expand(shape).to(runner.positions.meta["val"].dtype).clone()


def _by_token(runner: Runner, angles: Tensor) -> Tensor:
    """Angles of the first row and coordinate, [n, M]: positions are the same in all."""
    moved = angles.movedim(runner.angle_tokens, -2)
    return moved.reshape(-1, *moved.shape[-2:])[0]


def _rows(table: Tensor, count: int) -> Tensor:
    """A table as the queries read it, [n, D]: its tokens stand next to its columns, or before heads of size 1."""
    flat = table.reshape(-1, table.shape[-1])
    if len(flat) % count:
        raise Unknown(f"a table {tuple(table.shape)} has no rows for {count} tokens")
    return flat[:count]


def _hash(table: Tensor) -> Tensor:
    """int64 [n]: a hash of the bits of each row; zeros of either sign are alike."""
    bits = (table + 0.0).contiguous().view(_BITS[table.dtype.itemsize]).long()
    draw = torch.Generator().manual_seed(table.shape[-1])
    odd = torch.randint(-(2**62), 2**62, (bits.shape[-1],), generator=draw) * 2 + 1
    return (bits * odd).sum(-1)
