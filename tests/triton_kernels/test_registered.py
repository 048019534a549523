"""What holds of every kernel as an operator: opcheck, shapes of the reference, gradients, one graph for any size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import kernelcases
import pytest
import torch
from launched import DEVICE, launched
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from tokcompile import kernels
from tokcompile.kernels import _library

each_kernel = pytest.mark.parametrize("name", sorted(kernelcases.CASES))


def arguments(name: str, grad: bool = False) -> tuple:
    """As the case gives them, on the device; floats of its tensors ask for gradients where told."""

    def ready(value):
        if not isinstance(value, Tensor):
            return value
        value = value.to(DEVICE)
        return value.requires_grad_() if grad and value.is_floating_point() else value

    return tuple(tree_map(ready, list(kernelcases.CASES[name]())))


def reference(name: str):
    return _library.kernel_reference(name)


def floats(values) -> Iterator[Tensor]:
    return (v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point())


@each_kernel
def test_opcheck_is_clean(name: str) -> None:
    found = torch.library.opcheck(kernels.kernel_op(name), arguments(name, grad=True))
    assert set(found.values()) == {"SUCCESS"}


@each_kernel
def test_the_operator_is_the_kernel_with_the_results_of_the_reference(name: str) -> None:
    args = arguments(name)
    made = kernels.kernel_op(name)(*args)
    for one, other, third in zip(*map(tree_leaves, (made, launched(name, *args), reference(name)(*args))), strict=True):
        assert torch.equal(one.cpu(), other)
        assert one.dtype == third.dtype
        torch.testing.assert_close(one, third, rtol=1e-4, atol=1e-5)


@each_kernel
def test_fake_tensors_have_the_shapes_of_the_reference(name: str) -> None:
    args = arguments(name)
    with FakeTensorMode() as mode:
        fakes = tree_map(lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v, list(args))
        made = tree_leaves(kernels.kernel_op(name)(*fakes))
    for one, other in zip(made, tree_leaves(reference(name)(*args)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype) and one.is_contiguous()


@each_kernel
def test_gradients_are_those_of_the_reference(name: str) -> None:
    mine, theirs = arguments(name, grad=True), arguments(name, grad=True)
    sums = []
    for run, args in ((kernels.kernel_op(name), mine), (reference(name), theirs)):
        made = [each for each in floats(run(*args)) if each.requires_grad]
        sums.append(sum((each.sin().sum() for each in made), torch.zeros(())))
    # Of a reference that counts, the kernel's results may ask for gradients; there are none.
    assert sums[0].requires_grad or not sums[1].requires_grad
    for each in sums:
        if each.requires_grad:
            each.backward()
    for one, other in zip(floats(mine), floats(theirs), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_every_kernel_has_a_case() -> None:
    assert set(kernelcases.CASES) == kernelcases.all_names()


def test_an_operator_is_registered_once() -> None:
    assert kernels.kernel_op("topk_mask") is kernels.kernel_op("topk_mask")


def test_what_has_no_kernel_is_named() -> None:
    with pytest.raises(KeyError, match="no kernel of tokred::last_valid; there are: .*topk_mask"):
        kernels.kernel_op("last_valid")


WITHOUT = """
import sys
sys.modules["triton"] = None
import tokcompile.lowering.lower
from tokcompile import kernels
assert "Triton cannot be imported" in kernels.kernel_fault("topk_mask", ())
assert "topk_mask" in kernels.kernel_names()
"""


@pytest.mark.slow
def test_all_but_kernels_works_without_triton() -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
