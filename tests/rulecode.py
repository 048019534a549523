"""Let Inductor compile models under rules with all kernels in place, on a machine without a GPU.

A rewritten graph is lowered as on a GPU, and Inductor writes its code, of which the kernels are compiled for a GPU. The
model itself runs the references, on the CPU. Run as a program, in a process in which Triton's interpreter is not asked
for.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import harness
import inductorcode
import oncuda
import ruleexamples
import torch
import triton
from gpucompile import NoDriver
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

import tokcompile.backend
from tokcompile.lowering.choosekernels import choose_kernels


def _nothing(*args: Any) -> Callable[..., None]:
    """Stands for code for a CPU, which is not of interest."""
    return lambda *given: None


class Lowering:
    """What takes the place of `lower`, and counts kernels.

    Attributes:
        chosen: operators for which kernels were chosen.
        compiled: sources of kernels that Inductor wrote, each compiled once.
    """

    def __init__(self) -> None:
        self.chosen = 0
        self.compiled: set[str] = set()

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], target: str, choices: Any = None) -> Callable[..., Any]:
        """Lower a graph as on a GPU; what is returned runs references."""
        plain = GraphModule(gm, copy.deepcopy(gm.graph))
        oncuda.put_on_cuda(gm)
        self.chosen += sum(choice.kernel for choice in choose_kernels(gm, "on"))
        with mock.patch.object(AsyncCompile, "cpp_pybinding", _nothing), inductorcode.written() as found:
            compile_fx(gm, list(inputs))
        for name, source in found:
            if source not in self.compiled:
                inductorcode.compile_source(name, source)
                self.compiled.add(source)
        return plain.forward


def check(rule: str, steps: int) -> None:
    """Compile a model under a rule, and print how many kernels were chosen and compiled. Raises what Inductor does.

    Args:
        steps: tokens to generate; 0 for one call.
    """
    torch._dynamo.reset()
    lowering = Lowering()
    with mock.patch.object(tokcompile.backend, "lower", lowering):
        if steps:
            ruleexamples.generated(rule, steps)
        else:
            model, inputs, options = ruleexamples.example(rule)
            harness.prune(model, **options)(**inputs)
    print(rule, lowering.chosen, len(lowering.compiled), flush=True)


def main() -> None:
    """Check some rules."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rules", nargs="+")
    parser.add_argument("--steps", type=int, default=0, help="tokens to generate; 0 for one call")
    given = parser.parse_args()
    triton.runtime.driver.set_active(NoDriver())
    # What stands for compiled code must not stay in a cache.
    torch._inductor.config.force_disable_caches = True
    for rule in given.rules:
        check(rule, given.steps)


if __name__ == "__main__":
    main()
