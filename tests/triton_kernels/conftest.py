"""Kernels run on a GPU where there is one, and under Triton's interpreter elsewhere (tests/conftest.py asks for it)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

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
