"""attention_received and attention_row: against float64 softmax with all heads at once."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from tokcompile.kernels import _attention, attention_received

ops = torch.ops.tokred
MASKS = ("none", "bool", "bool_rows", "additive", "padding", "two_d")


def make_mask(kind: str, batch: int, heads: int, queries: int, keys: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    shape = {
        "bool": (batch, heads, queries, keys),
        "bool_rows": (1, 1, queries, 1),
        "additive": (batch, 1, queries, keys),
        "padding": (batch, 1, 1, keys),
        "two_d": (queries, keys),
    }[kind]
    seen = torch.rand(shape) > 0.4
    return torch.where(seen, torch.randn(shape), -torch.inf) if kind == "additive" else seen


@st.composite
def attentions(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch, shared, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys, depth = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.sampled_from([1, 4]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    query = torch.randn(batch, shared * group, queries, depth).to(dtype) * draw(st.sampled_from([1, 30]))
    key = torch.randn(batch, keys, shared, depth).to(dtype).transpose(1, 2)
    mask = make_mask(draw(st.sampled_from(MASKS)), batch, shared * group, queries, keys)
    return query, key, mask, draw(st.booleans()), draw(st.sampled_from([0.0, 2.0]))


@settings(max_examples=60, deadline=None)
@given(attentions(), st.sampled_from(_attention.HEADS), st.sampled_from(["sum", "mean"]), st.booleans())
def test_received_equals_the_oracle(case, heads, reduce, some_rows):
    query, key, mask, causal, softcap = case
    rows = torch.rand(query.shape[0], query.shape[2]) > 0.5 if some_rows else None
    got = ops.attention_received(query, key, mask, rows, 0.5, causal, softcap, heads, reduce)
    want = oracles.received(oracles.probabilities(query, key, mask, 0.5, causal, softcap), rows, heads, reduce)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(attentions(), st.sampled_from(_attention.HEADS))
def test_row_equals_the_oracle(case, heads):
    query, key, mask, causal, softcap = case
    index = torch.randint(query.shape[2], (query.shape[0],))
    got = ops.attention_row(query, key, mask, index, 0.5, causal, softcap, heads)
    p = oracles.probabilities(query, key, mask, 0.5, causal, softcap)
    want = oracles.over_heads(torch.stack([p[b, :, i] for b, i in enumerate(index.tolist())]), heads)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(attentions(), st.sampled_from(_attention.HEADS), st.booleans())
def test_sinks_take_their_share(case, heads, by_row):
    query, key, mask, causal, softcap = case
    batch, count, tokens, _ = query.shape
    sinks = torch.randn(batch, count) if by_row else torch.randn(count)
    p = oracles.probabilities(query, key, mask, 0.5, causal, softcap, sinks)
    got = ops.attention_received(query, key, mask, None, 0.5, causal, softcap, heads, "mean", sinks)
    torch.testing.assert_close(got.double(), oracles.received(p, None, heads, "mean"), rtol=1e-4, atol=1e-5)
    index = torch.randint(tokens, (batch,))
    got = ops.attention_row(query, key, mask, index, 0.5, causal, softcap, heads, sinks)
    want = oracles.over_heads(torch.stack([p[b, :, i] for b, i in enumerate(index.tolist())]), heads)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_sinks_of_another_number_of_heads_are_refused():
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="sinks must be"):
        ops.attention_row(query, query, None, torch.zeros(1, dtype=torch.int64), 1.0, False, 0.0, "mean", torch.ones(3))


def test_long_sequences_are_cut_into_blocks_of_rows(monkeypatch):
    query, key = torch.randn(2, 2, 37, 4), torch.randn(2, 2, 23, 4)
    mask, rows = make_mask("additive", 2, 2, 37, 23), torch.rand(2, 37) > 0.5
    arguments = (query, key, mask, rows, 0.5, True, 0.0, "mean", "mean")
    whole = ops.attention_received(*arguments)
    module = __import__("sys").modules["tokcompile.kernels._columns"]
    monkeypatch.setattr(module, "MAX_BLOCK", 100)
    assert module._block_rows(37, 23) == 4
    torch.testing.assert_close(ops.attention_received(*arguments), whole, rtol=1e-6, atol=1e-6)


def test_masses_sum_to_one_or_to_the_rows():
    query = torch.randn(2, 3, 11, 8)
    for reduce, total in (("mean", 1.0), ("sum", 11.0)):
        got = ops.attention_received(query, query, None, None, 0.3, False, 0.0, "mean", reduce)
        torch.testing.assert_close(got.sum(1), torch.full((2,), total), rtol=1e-5, atol=1e-5)


def test_an_additive_mask_of_the_lowest_float_hides_a_key_and_leaves_no_nan():
    query, mask = torch.randn(1, 2, 4, 8), torch.zeros(1, 1, 4, 4)
    mask[..., 0] = torch.finfo(torch.float32).min
    mask[:, :, 2] = -torch.inf
    got = ops.attention_received(query, query, mask, None, 1.0, False, 0.0, "sum", "sum")
    assert got[0, 0] == 0 and got.isfinite().all()


@pytest.mark.parametrize("shared, causal", [(2, False), (1, True)])
def test_no_value_of_all_heads_exists(shared, causal):
    """Traced down to ATen: nothing with two token dimensions has a head dimension too."""
    tokens = 300
    key, rows = torch.randn(2, shared, tokens, 8), torch.ones(2, tokens, dtype=torch.bool)

    def score(query, key, rows):
        return attention_received(query, key, None, rows, 0.3, causal, 0.0, "max", "mean")

    graph = make_fx(score, tracing_mode="fake")(torch.randn(2, 2, tokens, 8), key, rows).graph
    shapes = [tuple(n.meta["val"].shape) for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert any(shape[-2:] == (tokens, tokens) for shape in shapes)
    assert not [shape for shape in shapes if shape.count(tokens) > 1 and len(shape) > 3]
    assert max(torch.Size(shape).numel() for shape in shapes) == 2 * tokens * tokens


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_inductor_holds_the_weights_of_one_head_at_a_time(heads):
    query, key = torch.randn(1, 6, 300, 8), torch.randn(1, 6, 300, 8)

    def score(query, key):
        return ops.attention_received(query, key, None, None, 0.3, False, 0.0, heads, "mean")

    torch._dynamo.reset()
    got, (code, *_) = run_and_get_code(torch.compile(score, fullgraph=True), query, key)
    torch.testing.assert_close(got, score(query, key), rtol=1e-5, atol=1e-6)
    # Buffers of one size are reused when the first is free, so the number allocated is the number alive at once.
    assert code.count("empty_strided_cpu((1, 300, 300)") == 1


def test_bad_arguments_are_refused():
    query, key = torch.zeros(1, 4, 2, 8), torch.zeros(1, 3, 2, 8)
    with pytest.raises(ValueError, match="4 query heads do not divide among 3"):
        ops.attention_received(query, key, None, None, 1.0, False, 0.0, "mean", "sum")
    with pytest.raises(ValueError, match="heads must be one of mean, max, sum"):
        ops.attention_row(query, query, None, torch.zeros(1, dtype=torch.int64), 1.0, False, 0.0, "median")
    with pytest.raises(ValueError, match="reduce must be one of sum, mean"):
        ops.attention_received(query, query, None, None, 1.0, False, 0.0, "mean", "max")
    with pytest.raises(ValueError, match="rows must be bool"):
        ops.attention_received(query, query, None, torch.ones(1, 2), 1.0, False, 0.0, "mean", "sum")
    with pytest.raises(ValueError, match="mask must broadcast"):
        ops.attention_received(query, query, torch.ones(2), None, 1.0, False, 0.0, "mean", "sum")
