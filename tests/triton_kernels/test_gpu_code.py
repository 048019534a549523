"""Every kernel is compiled for GPUs, on any machine: what the interpreter takes, the compiler may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernelcases
import pytest
from rulecases import RULES

TESTS = Path(__file__).parent.parent
STEPPED = ("tokenselect", "h2o", "fastv", "pospad")


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


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_inductor_compiles_a_model_under_a_rule_with_all_kernels_in_place(rule: str) -> None:
    name, chosen, compiled = run("rulecode.py", rule)[-3:]
    assert name == rule and (int(chosen) > 0) == (int(compiled) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("rule", STEPPED)
def test_inductor_compiles_later_steps_with_all_kernels_in_place(rule: str) -> None:
    """Whose caches are of any length."""
    name, chosen, compiled = run("rulecode.py", rule, "--steps", "4")[-3:]
    assert name == rule and int(chosen) > 0 and int(compiled) > 0
