"""What is changed in Dynamo so that it sees a model as one graph: no value, and no other function's graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tokcompile.capturing.dynamo import prepare


def whole(function: Callable[[Tensor], Tensor], x: Tensor, dynamic: bool = False) -> Tensor:
    """Run a function as one graph.

    Raises:
        Unsupported: Dynamo would split it.
    """
    prepare()
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)(x)


def halved(x: Tensor) -> Tensor:
    """Branches on the product of the sizes, as a model that checks its crops does."""
    return x / 2 if np.prod(x.shape) % 6 == 0 else x


def test_a_product_of_sizes_by_numpy_is_a_number() -> None:
    x, other = torch.rand(2, 3), torch.rand(2, 4)
    assert torch.equal(whole(halved, x), x / 2) and torch.equal(whole(halved, other), other)
    assert torch.equal(whole(lambda x: x * np.prod([2, 3]), x), x * 6)


def test_other_products_by_numpy_stay_what_they_were() -> None:
    x = torch.rand(2, 3)
    assert torch.equal(whole(lambda x: x + np.prod([[2, 3], [4, 5]], axis=0)[1], x), x + 15)
    assert torch.equal(whole(lambda x: torch.as_tensor(np.prod(x.numpy())), x), torch.as_tensor(np.prod(x.numpy())))


def test_a_product_of_sizes_that_are_symbols_splits_as_before() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent branching"):
        whole(halved, torch.rand(2, 3), dynamic=True)


def test_prepare_changes_nothing_a_second_time() -> None:
    prepare()
    numpy_variable = torch._dynamo.variables.misc.NumpyVariable
    call = numpy_variable.call_function
    prepare()
    assert numpy_variable.call_function is call
