"""Attention that hands on the sums of its rows, in Triton, against float64; and what is received, made of the sums."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from drawn import made
from drawnattentions import attentions
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched, strided
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokcompile.kernels import _triton_tiles, kernel_fault, kernel_op

# The interpreter's numpy tells of what a GPU does in silence: exp2 of a large number is infinite.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SCALE = 0.3


def log_sums(case: dict[str, Any]) -> Tensor:
    """The log-sum-exp of each row, float64 [B, H, Tq]."""
    logits = oracles.masked_logits(
        *(case[n] for n in ("query", "key", "mask")), SCALE, case["is_causal"], case["softcap"]
    )
    if case["sinks"] is not None:
        column = case["sinks"].double().expand(logits.shape[:2])[..., None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
    return logits.logsumexp(-1)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """Attentions with values of another width, of any strides."""
    case = draw(attentions())
    batch, shared, keys, _ = case["key"].shape
    value = torch.randn(batch, shared, keys, draw(st.sampled_from([1, 8, 24]))).to(case["key"].dtype)
    if draw(st.booleans()):
        value = value[:1, :1].expand(value.shape)
    sinks = None if case["sinks"] is None else torch.randn(case["sinks"])
    return case | {"value": strided(value, draw(st.integers(0, 2))), "sinks": sinks}


def run(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    names = ("query", "key", "value", "mask")
    return launched(
        "attend_with_sums", *(case[n] for n in names), SCALE, *(case[n] for n in ("is_causal", "softcap", "sinks"))
    )


@settings(max_examples=40)
@given(cases())
def test_attention_and_its_sums(case: dict[str, Any]) -> None:
    query, value = case["query"], case["value"]
    out, sums, peaks = run(case)
    names = ("query", "key", "mask", "is_causal", "softcap", "sinks")
    q, k, mask, causal, cap, sinks = (case[n] for n in names)
    wide = value.double().repeat_interleave(query.shape[1] // value.shape[1], 1)
    wanted = (oracles.probabilities(q, k, mask, SCALE, causal, cap, sinks) @ wide).transpose(1, 2)
    atol = ROUNDING[value.dtype]
    assert out.dtype == value.dtype
    torch.testing.assert_close(out.double(), wanted, rtol=atol, atol=atol)
    assert sums.dtype == peaks.dtype == torch.float32
    torch.testing.assert_close(peaks.double() * math.log(2) + sums, log_sums(case), rtol=1e-5, atol=1e-4)


@settings(max_examples=25)
@given(cases(), st.sampled_from(["mean", "max", "sum"]), st.sampled_from(["sum", "mean"]), st.booleans())
def test_its_sums_give_what_is_received(case: dict[str, Any], heads: str, reduce: str, every: bool) -> None:
    """Rows that a mask hides with finite numbers are shared by all keys, as softmax has it."""
    query, key, mask, causal, cap, sinks = (case[n] for n in ("query", "key", "mask", "is_causal", "softcap", "sinks"))
    rows = None if every else torch.rand(query.shape[0], query.shape[2]) > 0.4
    _, sums, peaks = run(case)
    how = (SCALE, causal, heads, reduce, mask, cap, peaks)
    got = launched("received_by_sums", query, key, sums, rows, *how)
    p = oracles.probabilities(query, key, mask, SCALE, causal, cap, sinks)
    torch.testing.assert_close(got.double(), oracles.received(p, rows, heads, reduce), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("large", [-1e4, -1e9, -3e38, torch.finfo(torch.float32).min])
def test_rows_that_large_numbers_hide_are_shared_as_without_sums(large: float) -> None:
    """One float32 that holds the logarithm of a whole sum would have lost by how many keys."""
    query, key = made(0, 2, 4, 40, 16), made(1, 2, 2, 40, 16)
    mask = torch.zeros(2, 1, 40, 40).masked_fill(made(2, 2, 1, 40, 40) > 0, large)
    mask[:, :, 5] = large
    _, sums, peaks = launched("attend_with_sums", query, key, key, mask, SCALE, False)
    got = launched("received_by_sums", query, key, sums, None, SCALE, False, "mean", "mean", mask, 0.0, peaks)
    wanted = launched("attention_received", query, key, mask, None, SCALE, False, 0.0, "mean", "mean")
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_row_that_sees_nothing_is_what_the_model_makes_of_it(dtype: torch.dtype, kind: str) -> None:
    query, key, value = (made(seed, 2, 2, 20, 8).to(dtype) for seed in range(3))
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    mask[7] = False
    if kind == "added":
        mask = torch.zeros(20, 20, dtype=dtype).masked_fill(~mask, -torch.inf)
    out, sums, peaks = launched("attend_with_sums", query, key, value, mask, 8**-0.5, False)
    wanted = scaled_dot_product_attention(query, key, value, mask)
    assert not out[:, 7].any() and not wanted[:, :, 7].any()
    assert torch.isneginf(sums[:, :, 7]).all() and torch.isfinite(peaks).all()
    torch.testing.assert_close(out.transpose(1, 2), wanted, rtol=3e-2, atol=ROUNDING[dtype])
    received = launched("received_by_sums", query, key, sums, None, 8**-0.5, False, "sum", "sum", mask, 0.0, peaks)
    torch.testing.assert_close(received.sum(1), torch.full((2,), 2 * 19.0), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [32, 72, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_all_head_sizes(depth: int, dtype: torch.dtype) -> None:
    query, key, value = (made(n, 1, heads, 70, depth).to(dtype) for n, heads in enumerate((4, 2, 2)))
    out, *_ = launched("attend_with_sums", query, key, value, None, depth**-0.5, True)
    p = oracles.probabilities(query, key, None, depth**-0.5, True, 0.0)
    wanted = (p @ value.double().repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out.double(), wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_the_same_bits_twice() -> None:
    query, key = made(0, 1, 2, 40, 8), made(1, 1, 2, 40, 8)
    one, other = (launched("attend_with_sums", query, key, key, None, SCALE, True) for _ in range(2))
    assert all(torch.equal(*each) for each in zip(one, other, strict=True))


def test_rows_of_a_mask_begin_where_they_can_be_read_in_wide_pieces() -> None:
    mask = made(0, 2, 1, 5, 7) > 0
    for kind in (mask, mask.expand(2, 4, 5, 7), mask[:, :, :1], torch.cat([mask, mask], -1)[..., 2:9]):
        wide = _triton_tiles.in_wide_rows(kind)
        assert torch.equal(wide, kind)
        assert all(stride % 16 == 0 for stride in wide.stride()[:-1]) and wide.stride(-1) == 1
        assert wide.untyped_storage().nbytes() <= 2 * 5 * 16
    # Nothing is gained, or can be.
    for kind in (wide, torch.ones(2, 1, 5, 32), mask.mT, mask[..., :1].expand(mask.shape)):
        assert _triton_tiles.in_wide_rows(kind) is kind


def test_no_value_of_rows_by_keys_is_made(allocated: list[int]) -> None:
    """A mask of one row serves all rows and heads; all that is allocated is linear in the tokens."""
    query, mask = torch.randn(1, 1, 150, 4), torch.ones(1, 1, 1, 150, dtype=torch.bool)
    kernel_op("attend_with_sums")(query, query, query, mask, SCALE, False)
    assert len(allocated) == 3 and max(allocated) == query.numel()


def test_keys_that_no_row_of_a_tile_may_see_are_not_read() -> None:
    """NaN behind the diagonal of the last row's tile would be in its result."""
    query = made(0, 1, 1, 20, 8)
    key = torch.cat([made(1, 1, 1, 32, 8), torch.full((1, 1, 20, 8), torch.nan)], 2)
    for each in launched("attend_with_sums", query, key, key, None, SCALE, True):
        assert torch.isfinite(each).all()


def test_what_is_not_supported() -> None:
    query, wide = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, _triton_tiles.WIDEST + 1)
    assert kernel_fault("attend_with_sums", (query, query, query, None)) is None
    assert "of one dtype" in kernel_fault("attend_with_sums", (query.half(), query, query, None))
    assert "float64" in kernel_fault("attend_with_sums", (query, query, query.double(), None))
    assert "257" in kernel_fault("attend_with_sums", (query, query, wide, None))


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((1, 4, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8)), "4 query heads do not divide among 3"),
        (((1, 4, 2, 8), (1, 2, 2, 8), (1, 2, 3, 8)), "value must be"),
        (((1, 4, 2, 8), (1, 2, 2, 4), (1, 2, 2, 8)), "query and key must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...], said: str) -> None:
    query, key, value = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=said):
        launched("attend_with_sums", query, key, value, None, 1.0, False)
