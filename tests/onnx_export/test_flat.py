"""Programs that change values in place, or pick rows by what they hold, become files as any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxed
import torch
from torch import Tensor, nn

from tokcompile.onnx_export.export import write


class Real(nn.Module):
    """Rows that are not all zero, the first one in any case: what a model does with images that only fill a batch."""

    def forward(self, x: Tensor) -> Tensor:
        real = (x == 0).sum(1) != x.shape[1]
        real[0] |= ~real.any()
        return x[real].reshape(-1, 2) * 2


def test_rows_that_are_picked_by_a_mask_changed_in_place(tmp_path: Path) -> None:
    """Twice from one export: what is left of writing the first file is nothing to the second."""
    program = torch.export.export(Real(), (torch.rand(3, 4),), strict=False)
    for name in ("first", "second"):
        session = onnxed.session(write(program, tmp_path / f"{name}.onnx").path)
        for rows in ([1, 0, 2], [0, 0, 0], [0, 3, 0]):
            x = torch.tensor(rows, dtype=torch.float32)[:, None].expand(3, 4)
            (found,) = session.run(None, {"x": x.numpy()})
            np.testing.assert_array_equal(found, Real()(x).numpy())
