"""Exports of models that take a batch apart and put it together at once, for any number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tokcompile
from tokcompile.capturing.batchwise import whole_batches
from tokcompile.errors import CaptureError


class Listed(nn.Module):
    """What LLaVA does with the features of its images."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(x.sin()), dim=0)


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(x), dim=1)


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    shapes = {"x": {0: torch.export.Dim("rows")}}
    return tokcompile.export(model, {"x": torch.rand(3, 4, 2)}, dynamic_shapes=shapes)


def test_a_list_of_rows_that_is_concatenated() -> None:
    run = exported(Listed()).module()
    for rows in (2, 5):
        x = torch.rand(rows, 4, 2)
        assert torch.equal(run(x=x), Listed()(x))


def test_rows_side_by_side_are_refused() -> None:
    with pytest.raises(CaptureError, match="rows one by one"):
        exported(Turned())


def test_tensors_are_as_before_afterwards() -> None:
    with pytest.raises(ZeroDivisionError), whole_batches():
        raise ZeroDivisionError
    assert len(torch.zeros(3, 2)) == 3
    assert [row.tolist() for row in torch.ones(2, 1)] == [[1.0], [1.0]]
