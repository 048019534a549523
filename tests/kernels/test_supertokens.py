"""Super tokens: against loops over cells, patches and neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred


def by_loops(x: Tensor, height: int, width: int, high: int, wide: int, iterations: int, masked: bool):
    """Affinity [B, m, hw, 9] and super tokens [B, m, C] of x [B, N, C], in float64, with ghosts and padding."""
    batch, _, channels = x.shape
    rows, columns = math.ceil(height / high), math.ceil(width / wide)
    plane = torch.zeros(batch, rows * high, columns * wide, channels, dtype=torch.float64)
    plane[:, :height, :width] = x.double().reshape(batch, height, width, channels)
    affinity = torch.zeros(batch, rows * columns, high * wide, 9, dtype=torch.float64)
    centres = torch.zeros(batch, rows, columns, channels, dtype=torch.float64)
    for b in range(batch):
        for i in range(rows):
            for j in range(columns):
                cell = plane[b, i * high : (i + 1) * high, j * wide : (j + 1) * wide]
                centres[b, i, j] = cell.reshape(-1, channels).mean(0)
    for _ in range(iterations):
        total, mass = torch.zeros_like(centres), torch.zeros(batch, rows, columns, dtype=torch.float64)
        for b in range(batch):
            for i in range(rows):
                for j in range(columns):
                    for p in range(high * wide):
                        pixel = plane[b, i * high + p // wide, j * wide + p % wide]
                        logits = []
                        for k in range(9):
                            y, z = i + k // 3 - 1, j + k % 3 - 1
                            inside = 0 <= y < rows and 0 <= z < columns
                            outside = -math.inf if masked else 0.0
                            logits.append(float(pixel @ centres[b, y, z]) * channels**-0.5 if inside else outside)
                        share = torch.tensor(logits, dtype=torch.float64).softmax(0)
                        affinity[b, i * columns + j, p] = share
                        for k in range(9):
                            y, z = i + k // 3 - 1, j + k % 3 - 1
                            if 0 <= y < rows and 0 <= z < columns:
                                total[b, y, z] += share[k] * pixel
                                mass[b, y, z] += share[k]
        centres = total / (mass[..., None] + 1e-12)
    return affinity, centres.reshape(batch, rows * columns, channels)


def spread_by_loops(s: Tensor, affinity: Tensor, height: int, width: int, high: int, wide: int) -> Tensor:
    rows, columns = math.ceil(height / high), math.ceil(width / wide)
    out = torch.zeros(len(s), height * width, s.shape[2], dtype=torch.float64)
    for b in range(len(s)):
        for y in range(height):
            for x in range(width):
                cell, p = y // high * columns + x // wide, y % high * wide + x % wide
                for k in range(9):
                    i, j = y // high + k // 3 - 1, x // wide + k % 3 - 1
                    if 0 <= i < rows and 0 <= j < columns:
                        out[b, y * width + x] += affinity[b, cell, p, k].double() * s[b, i * columns + j].double()
    return out


def pooled(x: Tensor, *grid: int, iterations: int = 1, masked: bool = False) -> tuple[Tensor, Tensor]:
    affinity = ops.super_token_affinity(x, *grid, iterations, masked)
    return affinity, ops.super_token_pool(x, affinity, *grid)


def some(seed: int, batch: int, tokens: int, channels: int = 5) -> Tensor:
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(seed))


sides = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 2), sides, st.integers(1, 3), st.booleans())
def test_super_tokens_equal_the_loop(seed, batch, grid, iterations, masked):
    """On any grid: sides that are no multiple of a cell's are filled up with zeros and cut again."""
    x = some(seed, batch, grid[0] * grid[1])
    affinity, got = pooled(x, *grid, iterations=iterations, masked=masked)
    want, centres = by_loops(x, *grid, iterations, masked)
    torch.testing.assert_close(affinity.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.double(), centres, rtol=1e-4, atol=1e-5)
    back = ops.super_token_spread(got, affinity, *grid)
    torch.testing.assert_close(back.double(), spread_by_loops(got, affinity, *grid), rtol=1e-4, atol=1e-5)
    assert back.shape == x.shape and affinity.dtype == torch.float32


def test_a_constant_image_is_constant_in_the_middle_and_loses_mass_at_the_edge():
    token = torch.tensor([0.5, -1.0, 2.0])
    affinity, got = pooled(token.expand(1, 100, 3), 10, 10, 2, 2)
    middle = [i * 5 + j for i in range(1, 4) for j in range(1, 4)]
    torch.testing.assert_close(got[0, middle], token.expand(9, 3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(affinity.sum(3), torch.ones(1, 25, 4), rtol=1e-6, atol=1e-6)
    assert (valid_mass(affinity, 5, 5)[0, middle] > 1 - 1e-6).all()


def valid_mass(affinity: Tensor, rows: int, columns: int) -> Tensor:
    """[B, m, hw]: what of each patch goes to super tokens that there are."""
    there = torch.zeros(rows * columns, 9)
    for cell in range(rows * columns):
        for k in range(9):
            i, j = cell // columns + k // 3 - 1, cell % columns + k % 3 - 1
            there[cell, k] = 0 <= i < rows and 0 <= j < columns
    return (affinity * there[:, None]).sum(3)


def test_ghosts_take_their_share_unless_they_are_masked():
    """Where neighbours are off the grid: four of nine are there in a corner, six along an edge."""
    x = some(0, 64, 144, 32)
    mass = valid_mass(pooled(x, 12, 12, 2, 2)[0], 6, 6).mean((0, 2)).reshape(6, 6)
    assert (mass[1:-1, 1:-1] - 1).abs().max() < 1e-5
    corners = mass[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 4 / 9).all() and (corners < 0.7).all()
    edges = torch.cat([mass[0, 1:-1], mass[-1, 1:-1], mass[1:-1, 0], mass[1:-1, -1]])
    assert (edges > corners.max()).all() and (edges < 0.9).all()
    masked = valid_mass(pooled(x, 12, 12, 2, 2, masked=True)[0], 6, 6)
    torch.testing.assert_close(masked, torch.ones_like(masked), rtol=0, atol=1e-5)


def test_one_super_token_is_a_weighted_mean():
    """Of nine logits only the middle one is not 0: exp(s) / (8 + exp(s)) of each patch counts."""
    x = some(1, 2, 12)
    affinity, got = pooled(x, 3, 4, 3, 4)
    mean = x.double().mean(1, keepdim=True)
    s = (x.double() * mean).sum(2) * 5**-0.5
    share = s.exp() / (8 + s.exp())
    torch.testing.assert_close(affinity[:, 0, :, 4].double(), share, rtol=1e-5, atol=1e-6)
    want = (share[..., None] * x.double()).sum(1) / share.sum(1, keepdim=True)
    torch.testing.assert_close(got[:, 0].double(), want, rtol=1e-5, atol=1e-6)


def test_a_shift_by_a_cell_shifts_super_tokens_away_from_the_edge():
    plane = some(2, 1, 14 * 10).reshape(1, 14, 10, 5)
    shifted = plane.roll(2, 1)
    one, other = (pooled(p.flatten(1, 2), 14, 10, 2, 2)[1].reshape(1, 7, 5, 5) for p in (plane, shifted))
    # A super token is made of patches of the nine cells around it, and these look one cell further.
    torch.testing.assert_close(other[:, 3:-2, 2:-2], one[:, 2:-3, 2:-2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_single_precision(dtype):
    """1e-12 is 0 in float16: without a neighbour's mass the division would be by zero."""
    x = (some(3, 2, 35) * 4).to(dtype)
    affinity, got = pooled(x, 5, 7, 2, 3)
    single, want = pooled(x.float(), 5, 7, 2, 3)
    assert torch.equal(affinity, single) and got.dtype == dtype
    assert torch.equal(got, want.to(dtype))
    back = ops.super_token_spread(got, affinity, 5, 7, 2, 3)
    assert back.dtype == dtype and torch.equal(back, ops.super_token_spread(got.float(), single, 5, 7, 2, 3).to(dtype))


def test_affinities_have_no_gradient_and_the_last_sum_has():
    x = some(4, 1, 12).requires_grad_()
    affinity, got = pooled(x, 3, 4, 2, 2, iterations=2)
    assert not affinity.requires_grad
    (grad,) = torch.autograd.grad(got.sum(), x)
    _, constant = (v.detach() for v in pooled(x, 3, 4, 2, 2, iterations=2))
    moved = ops.super_token_pool(x + 1, affinity, 3, 4, 2, 2) - constant
    torch.testing.assert_close(grad.sum((0, 1)), moved.sum((0, 1)), rtol=1e-4, atol=1e-4)  # linear in x


def test_wrong_arguments_are_refused():
    x, affinity = torch.zeros(1, 12, 3), torch.zeros(1, 4, 4, 9)
    with pytest.raises(ValueError, match="a side is below 1"):
        ops.super_token_affinity(x, 3, 4, 0, 2, 1, False)
    with pytest.raises(ValueError, match=r"x must be \[B, 3\*5, C\]"):
        ops.super_token_affinity(x, 3, 5, 2, 2, 1, False)
    with pytest.raises(ValueError, match="iterations must be"):
        ops.super_token_affinity(x, 3, 4, 2, 2, 0, False)
    with pytest.raises(ValueError, match="affinity must be"):
        ops.super_token_pool(x, affinity[:, :3], 3, 4, 2, 2)
    with pytest.raises(ValueError, match=r"x must be \[B, 4, C\]"):
        ops.super_token_spread(x, affinity, 3, 4, 2, 2)
