"""Kernels run on a GPU where there is one, and under Triton's interpreter elsewhere (tests/conftest.py asks for it)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    """Make new tensors where kernels run."""
    before = torch.get_default_device()
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    yield
    torch.set_default_device(before)
