"""Settings of every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before transformers is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# Before Triton is imported, which Inductor does: without a GPU, Triton's interpreter runs the kernels. Inductor's own
# code for CPUs is C++ and compiled as ever.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import unloaded
from hypothesis import settings

unloaded.declare_operators()
# Workers share the processor's cores: with two threads each, they would wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# A busy machine is no failure, and a run must say the same twice.
settings.register_profile("tokcompile", deadline=None, derandomize=True)
settings.load_profile("tokcompile")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Forget compiled graphs after each test: a cached one would hide what the next test checks."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models as small as those of the catalogue lose more to two threads, which wait for each other, than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
