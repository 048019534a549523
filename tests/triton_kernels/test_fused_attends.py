"""Attention to chosen keys that reads them in the cache: when it is one kernel, and when it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oncuda
import pytest
import torch
from drawn import made
from torch import Tensor

pytestmark = pytest.mark.usefixtures("kernels_unmeasured")
ops = torch.ops.tokred
QUERY, KEY, VALUE = made(0, 2, 4, 1, 8), made(1, 2, 2, 9, 8), made(2, 2, 2, 9, 8)
MASK, INDEX, OTHER = (
    made(3, 2, 1, 1, 9) > -1,
    torch.tensor([[[0, 3, 8], [1, 2, 5]]] * 2),
    torch.tensor([[[2, 4, 6]]] * 2),
)
VALUES = (QUERY, KEY, VALUE, MASK, INDEX, OTHER)
Step = Callable[..., Any]


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, index: Tensor, other: Tensor) -> Tensor:
    keys, values = ops.gather_keys(key, index), ops.gather_keys(value, index)
    return ops.attend(query, keys, values, ops.gather_mask(mask, index), 0.5, 0.0)


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, index: Tensor, other: Tensor) -> Tensor:
    return ops.attend(query, ops.gather_keys(key, other), ops.gather_keys(value, other), None, 0.5, 2.0)


def same_keys_and_values(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, index: Tensor, other: Tensor
) -> Tensor:
    keys = ops.gather_keys(key, index)
    return ops.attend(query, keys, keys, None, 0.5, 0.0)


@pytest.mark.parametrize("step", [masked, plain, same_keys_and_values])
def test_chosen_keys_are_read_where_they_are(step: Step) -> None:
    called = oncuda.lowered(step, VALUES)
    assert called.count("tokred_triton::attend_chosen") == 1
    assert not [name for name in called if "gather" in name]


def two_indices(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, index: Tensor, other: Tensor) -> Tensor:
    return ops.attend(query, ops.gather_keys(key, index), ops.gather_keys(value, index.flip(2)), None, 0.5, 0.0)


def keys_are_read_again(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, index: Tensor, other: Tensor) -> Any:
    keys = ops.gather_keys(key, index)
    return ops.attend(query, keys, ops.gather_keys(value, index), None, 0.5, 0.0), keys.sum()


def keys_are_turned(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, index: Tensor, other: Tensor) -> Tensor:
    return ops.attend(query, ops.gather_keys(key, index) * 2, ops.gather_keys(value, index), None, 0.5, 0.0)


def mask_is_another(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, index: Tensor, other: Tensor) -> Tensor:
    keys, values = ops.gather_keys(key, index), ops.gather_keys(value, index)
    return ops.attend(query, keys, values, mask[..., :3], 0.5, 0.0)


def cache_is_changed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, index: Tensor, other: Tensor) -> Tensor:
    keys, values = ops.gather_keys(key, index), ops.gather_keys(value, index)
    torch.ops.aten.add_.Tensor(key, 1)
    return ops.attend(query, keys, values, None, 0.5, 0.0)


@pytest.mark.parametrize("step", [two_indices, keys_are_read_again, keys_are_turned, mask_is_another, cache_is_changed])
def test_what_else_is_made_of_them_keeps_the_gathers(step: Step) -> None:
    called = oncuda.lowered(step, VALUES)
    assert "tokred_triton::attend" in called and "tokred_triton::attend_chosen" not in called
    assert [name for name in called if "gather" in name]
