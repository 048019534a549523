"""Every kernel is compiled for GPUs, on any machine: what the interpreter takes, the compiler may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernelcases
import pytest

TESTS = Path(__file__).parent.parent


def run(script: str, *names: str) -> list[str]:
    """What a program prints, in a process in which no interpreter is asked for."""
    ran = subprocess.run(
        [sys.executable, str(TESTS / script), *names],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout.split()


@pytest.mark.slow
def test_inductor_sees_every_kernel_and_it_compiles_for_gpus() -> None:
    assert run("gpucode.py") == sorted(kernelcases.CASES)


@pytest.mark.slow
def test_what_inductor_writes_of_every_kernel_compiles() -> None:
    assert run("inductorcode.py") == sorted(kernelcases.CASES)


def test_what_inductor_writes_of_some_kernels_compiles() -> None:
    """Among them one with floats, one with a mask of bools, and one that comes in several launches."""
    names = ["attend", "keep_keys", "key_viewers"]
    assert run("inductorcode.py", *names) == names
