"""Every kernel is compiled for GPUs, on any machine: what the interpreter takes, the compiler may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernelcases
import pytest

SCRIPT = Path(__file__).parent.parent / "gpucode.py"


@pytest.mark.slow
def test_inductor_sees_every_kernel_and_it_compiles_for_gpus() -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split() == sorted(kernelcases.CASES)
