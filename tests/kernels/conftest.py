"""Compile what is in the tree, not what an earlier run cached."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.config
import torch._inductor.config


@pytest.fixture(autouse=True)
def no_stale_graphs():
    """AOTAutograd's cache knows an op by its name: after a change of a reference it would hand out the old code."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
