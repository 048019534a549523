"""A patch grid in cells of one size, and the eight neighbours of each cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 9
_SMALLEST = 1e-12  # as in the released model; too small for float16


class Cells:
    """How a grid of patches is cut into cells; patches that fill the last ones up stand right and below, and are 0.

    Attributes:
        rows, columns: how many cells stand above and beside each other.

    Raises:
        ValueError: a side that is less than 1.
    """

    def __init__(self, height: int, width: int, cell_height: int, cell_width: int) -> None:
        if min(height, width, cell_height, cell_width) < 1:
            raise ValueError(
                f"cells of {cell_height} x {cell_width} on a grid of {height} x {width}: a side is below 1"
            )
        self.height, self.width, self.high, self.wide = height, width, cell_height, cell_width
        self.rows, self.columns = -(-height // cell_height), -(-width // cell_width)

    def check(self, x: Tensor) -> None:
        """Refuse a value that is not [B, height * width, C]. Raises ValueError."""
        if x.dim() != 3 or x.shape[1] != self.height * self.width:
            raise ValueError(f"x must be [B, {self.height}*{self.width}, C], not {list(x.shape)}")

    def check_affinity(self, affinity: Tensor) -> None:
        """Refuse an affinity that is not of these cells. Raises ValueError."""
        shape = (self.rows * self.columns, self.high * self.wide, NEIGHBOURS)
        if affinity.dim() != 4 or tuple(affinity.shape[1:]) != shape:
            raise ValueError(f"affinity must be [B, {', '.join(map(str, shape))}], not {list(affinity.shape)}")

    def cut(self, x: Tensor) -> Tensor:
        """Patches [B, height * width, C] by cell: float32 [B, rows * columns, patches of a cell, C]."""
        below, right = self.rows * self.high - self.height, self.columns * self.wide - self.width
        plane = x.to(torch.float32).unflatten(1, (self.height, self.width))
        plane = F.pad(plane, (0, 0, 0, right, 0, below))
        plane = plane.unflatten(2, (self.columns, self.wide)).unflatten(1, (self.rows, self.high))
        return plane.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)

    def join(self, cells: Tensor) -> Tensor:
        """The inverse of `cut`, without the patches that filled up."""
        plane = cells.unflatten(2, (self.high, self.wide)).unflatten(1, (self.rows, self.columns))
        plane = plane.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        return plane[:, : self.height, : self.width].flatten(1, 2)

    def around(self, values: Tensor) -> Tensor:
        """Of values [B, rows * columns, C] the nine around each cell: [B, rows * columns, 9, C]; 0 off the grid."""
        plane = F.pad(values.unflatten(1, (self.rows, self.columns)), (0, 0, 1, 1, 1, 1))
        return torch.stack([self._seen(plane, k) for k in range(NEIGHBOURS)], 3).flatten(1, 2)

    def gathered(self, values: Tensor) -> Tensor:
        """The sum of what the nine around a cell have for it: from [B, rows * columns, 9, C], as `around` numbers them.

        Each cell reads its neighbours, none writes to another: sums are in one order on every device.
        """
        plane = F.pad(values.unflatten(1, (self.rows, self.columns)), (0, 0, 0, 0, 1, 1, 1, 1))
        total = self._seen(plane[..., NEIGHBOURS - 1, :], 0)
        for k in range(1, NEIGHBOURS):
            total = total + self._seen(plane[..., NEIGHBOURS - 1 - k, :], k)
        return total.flatten(1, 2)

    def _seen(self, plane: Tensor, k: int) -> Tensor:
        """What each cell sees of a padded plane in direction k = 3 * ky + kx, ky - 1 down and kx - 1 to the right."""
        return plane[:, k // 3 : k // 3 + self.rows, k % 3 : k % 3 + self.columns]


def pooled(cells: Cells, patches: Tensor, affinity: Tensor) -> Tensor:
    """Super tokens float32 [B, cells, C] of patches by cell [B, cells, patches of a cell, C]."""
    total = cells.gathered(affinity.transpose(2, 3) @ patches)
    mass = cells.gathered(affinity.sum(2).unsqueeze(3))
    return total / (mass + _SMALLEST)
