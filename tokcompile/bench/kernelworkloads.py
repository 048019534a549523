"""What `tokred bench --kernels` gives each kernel: shapes of real models, of as many bytes as asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokcompile import kernels

WIDTH, HEADS, HEAD, ROW = 4096, 8, 128, 16384
"""Of a stream, of a cache, of one of its heads, and tokens of a row that is selected from."""


@dataclass(frozen=True)
class Maker:
    """Random tensors on a device, the same for the same calls.

    Attributes:
        dtype: of floats.
        size: bytes that a call should move.
    """

    device: torch.device
    dtype: torch.dtype
    size: int

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self._seeded(), device=self.device).to(dtype or self.dtype)

    def flags(self, *shape: int, share: float = 0.5) -> Tensor:
        """Bools, True for a share of them."""
        return torch.rand(shape, generator=self._seeded(), device=self.device) < share

    def chosen(self, most: int, *shape: int) -> Tensor:
        """Ascending indices below a number."""
        found = torch.randint(0, most, shape, generator=self._seeded(), device=self.device)
        return found.sort(-1).values

    def units(self, each: int) -> int:
        """How many of some bytes each make the size; at least two."""
        return max(self.size // each, 2)

    def _seeded(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)


@dataclass(frozen=True)
class Workload:
    """One operator's call.

    Attributes:
        make: its arguments.
        moved: bytes that any implementation has to move, given arguments and results.
        dtypes: what it is measured in, of floats.
        run: gives what is timed for the kernel; None: its operator alone.
        usual: gives what runs without the kernel; None: its reference.
        bound: what keeps it from being faster: the bytes that move, products, or steps that wait for each other.
    """

    make: Callable[[Maker], tuple[Any, ...]]
    moved: Callable[[tuple[Any, ...], list[Tensor]], int]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    run: Callable[[], Callable[..., Any]] | None = None
    usual: Callable[[], Callable[..., Any]] | None = None
    bound: Literal["bytes", "products", "steps"] = "bytes"


def held(*values: Tensor | None) -> int:
    """Bytes of tensors, each element once."""
    return sum(value.numel() * value.dtype.itemsize for value in values if value is not None)


def _copies(args: tuple[Any, ...], results: list[Tensor]) -> int:
    """Results are read and written, and the index is read."""
    return 2 * held(*results) + held(args[1])


def _all(args: tuple[Any, ...], results: list[Tensor]) -> int:
    """Arguments are read and results written."""
    return held(*(value for value in args if isinstance(value, Tensor)), *results)


def _tokens(m: Maker) -> tuple[Any, ...]:
    kept = m.units(2 * WIDTH * m.dtype.itemsize)
    return m.floats(1, 2 * kept, WIDTH), m.chosen(2 * kept, 1, kept), 1, 0


def _edit(m: Maker) -> tuple[Any, ...]:
    """Hidden states, two rotary tables and positions of one edit."""
    x, source, dim, batch = _tokens(m)
    tokens = x.shape[1]
    tables = [m.floats(1, tokens, HEAD) for _ in range(2)]
    positions = torch.arange(tokens, device=m.device)[None]
    return [x, *tables, positions], source, [0, dim, batch] * 4


def _keys(m: Maker) -> tuple[Any, ...]:
    kept = m.units(2 * HEADS * HEAD * m.dtype.itemsize)
    return m.floats(1, HEADS, 4 * kept, HEAD), m.chosen(4 * kept, 1, HEADS, kept)


def _pairs(m: Maker) -> tuple[Any, ...]:
    cache, index = _keys(m)
    return cache, m.chosen(HEADS * cache.shape[2], *index.shape)


def _mask(m: Maker) -> tuple[Any, ...]:
    kept = max(int((m.size / 4) ** 0.5), 2)
    return m.flags(1, 1, 2 * kept, 2 * kept), m.chosen(2 * kept, 1, 1, kept)


def _merge(m: Maker) -> tuple[Any, ...]:
    tokens = max(m.units(2 * HEADS * HEAD * m.dtype.itemsize), 16)
    kept = tokens // 4
    classes = m.chosen(kept + 1, 1, HEADS, tokens).flip(-1)
    weights = m.floats(1, HEADS, tokens, dtype=torch.float32).abs()
    cache = m.floats(1, HEADS, tokens, HEAD)
    return cache, m.chosen(tokens, 1, HEADS, kept), classes, weights, None, None, None, False


def _scores(m: Maker) -> Tensor:
    return m.floats(m.units(ROW * (m.dtype.itemsize + 1)), ROW)


def _keep(m: Maker) -> tuple[Any, ...]:
    rows = m.units(HEADS * ROW * (m.dtype.itemsize + 2))
    return m.floats(rows, HEADS, ROW), m.flags(rows, ROW, share=0.9), None, 4, 32, ROW // 4


def _turn(m: Maker) -> tuple[Any, ...]:
    tokens = m.units(2 * 4 * HEADS * HEAD * m.dtype.itemsize)
    here = torch.arange(tokens, device=m.device)[None]
    frequencies = 1e4 ** -torch.linspace(0, 1, HEAD // 2, device=m.device)
    return m.floats(1, 4 * HEADS, tokens, HEAD), here, here // 2, frequencies, 0, False


def _unturn(m: Maker) -> tuple[Any, ...]:
    tokens = m.units(HEADS * HEAD * (m.dtype.itemsize + 4))
    angles = m.floats(1, 1, tokens, HEAD, dtype=torch.float32)
    return m.floats(1, HEADS, tokens, HEAD), angles.cos().to(m.dtype), angles.sin().to(m.dtype), False


def _slots(m: Maker) -> tuple[Any, ...]:
    return m.flags(m.units(ROW * 5), ROW), ROW // 2


def _marked(m: Maker) -> tuple[Any, ...]:
    length = m.units(2 * WIDTH * m.dtype.itemsize)
    return m.floats(1, 2 * length, WIDTH), m.chosen(2 * length, 1, length) - length // 8, m.floats(WIDTH)


def _packed(m: Maker) -> tuple[Any, ...]:
    """Runs of some tokens, and their means."""
    tokens = m.units(2 * WIDTH * m.dtype.itemsize)
    return m.floats(1, tokens, WIDTH), m.flags(1, tokens, share=0.7), tokens, None, True


def _site(m: Maker, queries: int | None = None) -> tuple[Tensor, Tensor]:
    """Queries of four heads for each head of keys; as many as there are keys, or few."""
    tokens = m.units(5 * HEADS * HEAD * m.dtype.itemsize if queries is None else HEADS * HEAD * m.dtype.itemsize)
    return m.floats(1, 4 * HEADS, queries or tokens, HEAD), m.floats(1, HEADS, tokens, HEAD)


def _received(m: Maker) -> tuple[Any, ...]:
    return *_site(m), None, None, HEAD**-0.5, True, 0.0, "mean", "mean", None


def _received_by_sums(m: Maker) -> tuple[Any, ...]:
    """Sums as of rows whose keys are all alike."""
    query, key = _site(m)
    sums = torch.arange(1, query.shape[2] + 1, device=m.device).log().expand(query.shape[:3])
    return query, key, sums, None, HEAD**-0.5, True, "mean", "mean"


def _masked(m: Maker) -> tuple[Any, ...]:
    """Causal attention of a row whose first eighth is padding; its mask has a byte for each query and key."""
    token = 10 * HEADS * HEAD * m.dtype.itemsize
    tokens = max(int(((token**2 + 4 * m.size) ** 0.5 - token) / 2), 8)
    seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=m.device).tril()
    seen[..., : tokens // 8] = False
    query, key = m.floats(1, 4 * HEADS, tokens, HEAD), m.floats(1, HEADS, tokens, HEAD)
    return query, key, key.flip(2), seen, HEAD**-0.5, False


_SCORES = ("mean", "mean")
"""How attention received is brought together where it is timed with its attention."""


def _sums_shared() -> Callable[..., Any]:
    """Attention, and what is received of it, made of its sums."""
    attend, received_by = (kernels.kernel_op(name) for name in ("attend_with_sums", "received_by_sums"))

    def call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        out, sums, peaks = attend(query, key, value, mask, *how)
        return out.transpose(1, 2), received_by(query, key, sums, None, *how, *_SCORES, mask, 0.0, peaks)

    return call


def _sums_apart() -> Callable[..., Any]:
    """The model's attention, and beside it what is received of it."""
    received = kernels.kernel_op("attention_received")

    def call(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out = scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=True)
        return out, received(query, key, mask, None, scale, causal, 0.0, *_SCORES)

    return call


def _received_by_head(m: Maker) -> tuple[Any, ...]:
    """From a window of 64 queries."""
    return *_site(m, 64), None, None, 64, HEADS, HEAD**-0.5, False, 0.0, "mean", "mean", None


def _row(m: Maker) -> tuple[Any, ...]:
    query, key = _site(m, 64)
    return query, key, None, torch.full((1,), 63, device=m.device), HEAD**-0.5, False, 0.0, "mean", None


def _attend(m: Maker) -> tuple[Any, ...]:
    query, key = _site(Maker(m.device, m.dtype, m.size // 2), 1)
    return query, key, key.flip(2), None, HEAD**-0.5, 0.0, None


def _attend_chosen(m: Maker) -> tuple[Any, ...]:
    """A quarter of the keys."""
    query, key = _site(Maker(m.device, m.dtype, 2 * m.size), 1)
    index = m.chosen(key.shape[2], 1, HEADS, key.shape[2] // 4)
    return query, key, key.flip(2), None, index, HEAD**-0.5, 0.0, None


def _votes(m: Maker) -> tuple[Any, ...]:
    query, key = _site(m, 1)
    return query[:, :, 0].float(), key, None, 4, 64


def _turned_votes(m: Maker) -> tuple[Any, ...]:
    """Of keys as if they all stood at the first position."""
    query, key = _site(m, 1)
    here = torch.arange(key.shape[2], device=m.device)[None]
    frequencies = 1e4 ** -torch.linspace(0, 1, HEAD // 2, device=m.device)
    return query[:, :, 0].float(), key, here, torch.zeros_like(here), frequencies, 0, False, None, None, 4, 64


def _pair_scores(m: Maker) -> tuple[Any, ...]:
    """A quarter of the pairs, the same for each head of keys."""
    query, key = _site(m, 1)
    return query[:, :, 0], key, m.chosen(HEAD // 2, HEADS, HEAD // 8), None, 0, HEAD // 2, False


def _viewers(m: Maker) -> tuple[Any, ...]:
    tokens = max(int(m.size**0.5), 2)
    like = m.floats(1, 1, tokens, 1)
    return like, like, m.flags(1, 1, tokens, tokens), None, 0, True


PATCHES = 4096
"""Tokens of an image whose pairs are merged."""


def _match(m: Maker) -> tuple[Any, ...]:
    return m.floats(m.units(PATCHES * 64 * m.dtype.itemsize), PATCHES, 64), PATCHES // 4, 0


def _merge_pairs(m: Maker) -> tuple[Any, ...]:
    """A quarter of the tokens goes into the others."""
    quarter = m.units(8 * 1024 * m.dtype.itemsize)
    order = torch.arange(4 * quarter, device=m.device)[None]
    size = m.flags(1, 4 * quarter).to(torch.float32) + 1
    into = m.chosen(3 * quarter, 1, quarter)
    return m.floats(1, 4 * quarter, 1024), size, order[:, : 3 * quarter], order[:, 3 * quarter :], into, True


def _walk(m: Maker) -> tuple[Any, ...]:
    """Images of 576 tokens, of which a ninth is chosen."""
    images = m.units(64 * 576 * m.dtype.itemsize)
    tokens = m.floats(images, 576, 64)
    return torch.cdist(tokens, tokens).to(m.dtype), m.floats(images, 576), None, 64


ONE = (torch.float32,)
WORKLOADS: dict[str, Workload] = {
    "attend": Workload(_attend, _all),
    "attend_chosen": Workload(_attend_chosen, lambda args, results: held(args[1]) // 2 + held(args[4], *results)),
    # Chosen where the two together are faster than what they stand for.
    "attend_with_sums": Workload(_masked, _all, run=_sums_shared, usual=_sums_apart, bound="products"),
    "attention_received": Workload(_received, _all, bound="products"),
    "attention_row": Workload(_row, lambda args, results: held(args[1], *results)),
    # A row of distances for each token that is chosen.
    "farthest_mask": Workload(_walk, lambda args, results: args[3] * held(args[1], *results), ONE, bound="steps"),
    "fill_mask": Workload(
        lambda m: ([m.flags(*_scores(m).shape, share=0.1)], _scores(m), None, ROW // 4),
        lambda args, results: held(*args[0], args[1], *results),
    ),
    "gather_keys": Workload(_keys, _copies),
    "gather_many": Workload(_edit, _copies),
    "gather_mask": Workload(_mask, _copies, ONE),
    "gather_pairs": Workload(_pairs, _copies),
    "gather_tokens": Workload(_tokens, _copies),
    "keep_keys": Workload(_keep, _all),
    "kept_indices": Workload(lambda m: (m.flags(m.units(ROW * 3), ROW), ROW // 4), _all, ONE),
    "key_attention": Workload(_received_by_head, lambda args, results: held(args[1], *results), bound="products"),
    "key_viewers": Workload(_viewers, lambda args, results: held(args[2], *results), ONE),
    "key_votes": Workload(_votes, _all),
    "mark_pack": Workload(_packed, lambda args, results: held(*args[:2], *results)),
    "mark_slots": Workload(_slots, _all, ONE),
    "mark_tokens": Workload(_marked, _copies),
    "match_pairs": Workload(_match, _all, bound="products"),
    "merge_keys": Workload(_merge, lambda args, results: _all(args, results) + held(*results), bound="products"),
    "merge_pairs": Workload(_merge_pairs, _all),
    "pair_scores": Workload(_pair_scores, _all),
    "received_by_sums": Workload(_received_by_sums, _all, bound="products"),
    "topk_mask": Workload(lambda m: (_scores(m), None, ROW // 4), _all),
    "turn_pairs": Workload(_turn, _all),
    "turned_votes": Workload(_turned_votes, lambda args, results: held(*args[:3], *results)),
    "unturn_keys": Workload(_unturn, _all),
    "window_topk_mask": Workload(lambda m: (_scores(m), 128, 128, 8, 8, 64), _all),
}
"""By the operator's name. One without a workload is not measured, and the bench says so."""
