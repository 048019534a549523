"""Kernels run on a GPU where there is one, and under Triton's interpreter elsewhere (tests/conftest.py asks for it)."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
