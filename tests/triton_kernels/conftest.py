"""Kernels run on a GPU where there is one, and under Triton's interpreter elsewhere (tests/conftest.py asks for it)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def kernels_unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are chosen wherever they can run: the table that is shipped chooses none before it was measured."""
    from tokcompile.lowering.choosekernels import SETTING, TABLE

    monkeypatch.delenv(SETTING, raising=False)
    path = tmp_path / "unmeasured.json"
    path.write_text(json.dumps({"unmeasured": "kernel"}))
    monkeypatch.setenv(TABLE, str(path))


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each tensor that `torch.empty` makes from now on, as kernels make theirs."""
    sizes: list[int] = []
    empty = torch.empty

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch, "empty", counted)
    return sizes
