"""One cell of `make bench-kv`: generate from a long prompt in one way, and print its times and memory as JSON.

Needs torch and transformers, and the library that it measures: it runs in environments of other versions too.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

PRESSES = {"snapkv": ("SnapKVPress", {"window_size": 32, "kernel_size": 5}), "knorm": ("KnormPress", {})}
RULES: dict[str, dict[str, Any]] = {"snapkv": {"window": 32, "kernel": 5}, "knorm": {}}


def build(layers: int) -> LlamaForCausalLM:
    """A Llama with random weights; of 12 layers it has 110 million parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def memory(field: str) -> int:
    """A size of this process in bytes: VmRSS, or VmHWM, the largest since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def held(cache: Any) -> int:
    """Bytes that a cache's keys and values keep alive."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class Clock:
    """Notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Stop nothing."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def bytes_per_token(model: LlamaForCausalLM) -> int:
    """What the keys and values of one token hold in all layers."""
    it = model.config
    return it.num_hidden_layers * 2 * it.num_key_value_heads * it.head_dim * model.dtype.itemsize


def count(tokens: int) -> dict[str, Any]:
    """Options for exactly so many new tokens, the most likely ones."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=["eager", "inductor", "tokred", "kvpress"])
    parser.add_argument("--rule", default="snapkv", choices=PRESSES)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = build(given.layers)
    ids = torch.randint(0, 16000, (1, given.context), generator=torch.Generator().manual_seed(1))
    around: Any = nullcontext
    if given.how == "inductor":
        model.compile()
    elif given.how == "tokred":
        options = {"rule": given.rule, "budget": given.budget, **RULES[given.rule]}
        model.compile(backend="tokred", options=options)
    elif given.how == "kvpress":
        import kvpress

        name, more = PRESSES[given.rule]
        press = getattr(kvpress, name)(compression_ratio=1 - given.budget / given.context, **more)
        around = lambda: press(model)  # noqa: E731

    def run(tokens: int) -> tuple[float, list[float], Any]:
        """The seconds until the first token, and those of each further one, and the cache."""
        cache, clock = DynamicCache(), Clock()
        with around(), torch.no_grad():
            start = time.perf_counter()
            model.generate(ids, past_key_values=cache, stopping_criteria=[clock], **count(tokens))
        return clock.times[0] - start, [after - before for before, after in pairwise(clock.times)], cache

    run(4)  # compiles
    prompts, steps = [], []
    for _ in range(given.rounds):
        prompt, each, _ = run(1 + given.steps)
        prompts.append(prompt)
        steps += each
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    prompt, _, cache = run(1)
    prompts.append(prompt)
    print(
        json.dumps(
            {
                "prefill": min(prompts),
                "decode": median(steps),
                "peak": memory("VmHWM") - before,
                "cache": held(cache),
                "kept": cache.layers[0].keys.shape[2],
                "token": bytes_per_token(model),
            }
        )
    )


if __name__ == "__main__":
    main()
