"""Products of a matrix with one row, written as reductions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from tokcompile.lowering.rowproducts import LEAST, reduce_row_products

aten = torch.ops.aten
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def traced(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, out: int = 320, bias: bool = True, **how: bool):
    torch.manual_seed(0)
    layer = nn.Linear(shape[-1], out, bias=bias).to(dtype)
    row = torch.randn(shape).to(dtype)
    weights = [layer.weight.t().contiguous().t() if how.get("transposed") else layer.weight]
    weights += [layer.bias] if bias else []
    inputs = [row, *(weight.detach() for weight in weights)]
    graph = make_fx(lambda *args: aten.linear.default(*args), tracing_mode="fake", pre_dispatch=True)(*inputs)
    return graph, inputs


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(256,), (1, 256), (1, 1, 256)], ids=str)
def test_a_row_product_is_as_exact_as_float64(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    graph, inputs = traced(shape, dtype, bias=bias)
    assert reduce_row_products(graph) == 1
    assert all(node.target is not aten.linear.default for node in graph.graph.nodes)
    found = graph(*inputs)
    exact = nn.functional.linear(*(value.double() for value in inputs))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        pytest.param((2, 1, 256), {}, id="two rows"),
        pytest.param((1, 3, 256), {}, id="three tokens"),
        pytest.param((1, 256), {"out": LEAST // 256 - 1}, id="small weight"),
        pytest.param((1, 256), {"transposed": True}, id="weight by columns"),
    ],
)
def test_other_products_stay(shape: tuple[int, ...], how: dict[str, int]) -> None:
    graph, _ = traced(shape, **how)
    before = graph.code
    assert reduce_row_products(graph) == 0
    assert graph.code == before


def test_a_row_that_is_a_view_is_read_where_it_stands() -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(320, 256), torch.randn(1, 4, 512)

    def last(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return aten.linear.default(rows[:, -1:, 1::2], weight)

    graph = make_fx(last, tracing_mode="fake", pre_dispatch=True)(rows, weight)
    assert reduce_row_products(graph) == 1
    torch.testing.assert_close(graph(rows, weight), last(rows, weight))
    compiled = torch.compile(graph, dynamic=False)
    torch.testing.assert_close(compiled(rows, weight), last(rows, weight))


def test_gradients_are_those_of_the_product() -> None:
    graph, inputs = traced((1, 1, 256))
    expected = [value.clone().requires_grad_() for value in inputs]
    nn.functional.linear(*expected).square().sum().backward()
    reduce_row_products(graph)
    found = [value.clone().requires_grad_() for value in inputs]
    graph(*found).square().sum().backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
