"""ONNX forms of ATen operators: against NumPy's bits, and loops over values."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnxed
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tokcompile.onnx_export.export import write


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def session(function: Any, example: Tensor, folder: Path, *open_: int) -> Any:
    """ONNX Runtime for a function of a tensor with open dimensions."""
    shapes = (dict.fromkeys(open_, Dim.AUTO),)
    program = torch.export.export(Function(function), (example,), dynamic_shapes=shapes)
    return onnxed.session(write(program, folder / "f.onnx").path)


def test_bits_are_those_of_ieee(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    edges = [0.0, -0.0, np.inf, -np.inf, 1.0, -1.0, 1e-45, -1e-45, 2**-126, 2**-126 * (1 - 2**-23), 2**-149, 1.5]
    edges += [np.finfo(np.float32).max, np.finfo(np.float32).min, 1 + 2**-23, 1 - 2**-24, 2.0**127, 3.0, np.pi]
    any_bits = rng.integers(0, 1 << 32, 4000, dtype=np.uint32).view(np.float32)
    numbers = any_bits[~np.isnan(any_bits)]
    values = np.concatenate([np.array(edges, np.float32), numbers]).astype(np.float32)
    run = session(lambda x: x.view(torch.int32), torch.zeros(7), tmp_path, 0)
    (found,) = run.run(None, {"x": values})
    np.testing.assert_array_equal(found, values.view(np.int32))
    (found,) = run.run(None, {"x": np.array([np.nan, -np.nan], np.float32)})
    assert found.tolist() == [0x7FC00000, 0x7FC00000]


@pytest.mark.parametrize("axis", [0, 1])
def test_running_maxima_and_where_they_were_met(axis: int, tmp_path: Path) -> None:
    run = session(lambda x: x.cummax(axis), torch.zeros(6, 5, dtype=torch.int64), tmp_path, 0, 1)
    rng = np.random.default_rng(axis)
    for shape in ((1, 1), (9, 3), (3, 70)):
        values = rng.integers(-3, 4, shape)
        best, where = run.run(None, {"x": values})
        along = values if axis == 1 else values.T
        for row, maxima, places in zip(along, *((x if axis == 1 else x.T) for x in (best, where)), strict=True):
            assert maxima.tolist() == list(itertools.accumulate(row.tolist(), max))
            assert places.tolist() == [max(i for i in range(n + 1) if row[i] == maxima[n]) for n in range(len(row))]


@pytest.mark.parametrize("descending", [False, True])
def test_a_stable_sort_keeps_the_order_of_equals(descending: bool, tmp_path: Path) -> None:
    run = session(lambda x: x.sort(dim=1, descending=descending, stable=True), torch.zeros(2, 9), tmp_path, 0, 1)
    values = np.random.default_rng(1).integers(0, 4, (3, 300)).astype(np.float32)
    ordered, index = run.run(None, {"x": values})
    for row, found, places in zip(values.tolist(), ordered.tolist(), index.tolist(), strict=True):
        expected = sorted(range(len(row)), key=lambda i: -row[i] if descending else row[i])
        assert places == expected
        assert found == [row[i] for i in expected]


def test_the_best_third_of_any_length_is_in_order(tmp_path: Path) -> None:
    run = session(lambda x: x.topk(x.shape[1] // 3, dim=1, sorted=False), torch.zeros(2, 9), tmp_path, 1)
    values = np.random.default_rng(2).permuted(np.arange(60, dtype=np.float32).reshape(2, 30), axis=1)
    best, index = run.run(None, {"x": values})
    assert best.tolist() == [sorted(row, reverse=True)[:10] for row in values.tolist()]
    assert np.take_along_axis(values, index, 1).tolist() == best.tolist()


@pytest.mark.parametrize("rows", [True, False])
def test_values_where_a_mask_holds(rows: bool, tmp_path: Path) -> None:
    """A mask of whole rows, spread, and one of single values: no operator whose size depends on data."""
    source = torch.arange(60.0).reshape(5, 4, 3)

    def put(x: Tensor) -> Tensor:
        mask = x > 0
        return x.masked_scatter(mask[..., :1].expand_as(x) if rows else mask, source)

    run = session(put, torch.zeros(2, 4, 3), tmp_path, 0)
    assert "NonZero" not in {node.op_type for node in onnxed.onnx.load(tmp_path / "f.onnx").graph.node}
    for seed, batch in ((0, 1), (1, 5)):
        values = np.random.default_rng(seed).normal(size=(batch, 4, 3)).astype(np.float32)
        (found,) = run.run(None, {"x": values})
        np.testing.assert_array_equal(found, put(torch.from_numpy(values)).numpy())


def test_distances(tmp_path: Path) -> None:
    mode = "donot_use_mm_for_euclid_dist"
    run = session(lambda x: torch.cdist(x, x.flip(1)[:, :2], compute_mode=mode), torch.zeros(2, 6, 3), tmp_path, 0)
    x = np.random.default_rng(3).normal(size=(3, 6, 3)).astype(np.float32)
    (found,) = run.run(None, {"x": x})
    other = x[:, ::-1][:, :2]
    expected = [
        [[float(np.sqrt(((a - b) ** 2).sum())) for b in two] for a in one] for one, two in zip(x, other, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_remainders_by_a_size_and_by_a_number(dtype: Any, tmp_path: Path) -> None:
    example = torch.zeros(2, 9, dtype=torch.from_numpy(np.zeros(1, dtype)).dtype)
    run = session(lambda x: (x % x.shape[1], x % -4), example, tmp_path, 1)
    x = np.arange(-35, 35).reshape(2, 35).astype(dtype)[:, :7]
    for found, divisor in zip(run.run(None, {"x": x}), (7, -4), strict=True):
        assert found.tolist() == [[value % divisor for value in row] for row in x.tolist()]
