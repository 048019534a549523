"""`make speed`: time a ViT-B/16 of 384 pixels with merged pairs, and write docs/speed.md.

All variants run in one process, in every round in another order: eager, Inductor without a rule, the merge as it is
usually written (hooks in eager modules), the rule, and the ideal, which is the rewritten graph with its pairs given.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import unloaded
from torch import Tensor, nn

import tokcompile
from tokcompile.backend import tokred
from tokcompile.demo_bench import time_interleaved
from tokcompile.report import explain
from tokcompile.rulefile import load_rule

PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
INTRO = """\
# Speed of merging

What `make speed` measured: {made}.
ViT-B/16 of {size} pixels ({tokens} tokens) with random weights, batch {batch}, float32, {threads} threads; medians of
{rounds} rounds, in each of which every variant runs once. *Promised* is the ratio of floating point operations of the
model without and with the rule, *kept* how much of it the times show. *Usual* is the merge as modules of an eager model
do it, with scatter; *ideal* is the rewritten graph with its pairs given as constants: the model on the reduced
sequence, and nothing chosen.

| pairs a block | tokens left | promised | Inductor / tokred | kept | eager / tokred | usual / tokred | tokred / ideal |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


class Usual(nn.Module):
    """A ViT of timm whose blocks merge in eager mode, as an implementation that replaces modules does it."""

    def __init__(self, model: nn.Module, pairs: int) -> None:
        super().__init__()
        self.model, self.pairs = model, pairs

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        size = None
        for block in model.blocks:
            attended, keys = self._attention(block.attn, block.norm1(x), size)
            x = x + block.ls1(attended)
            x, size = self._merged(x, keys, size)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x))

    def _attention(self, attention: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if size is None else size.log()[:, None, None, :, 0]
        out = nn.functional.scaled_dot_product_attention(q, k, v, bias)
        return attention.proj(out.transpose(1, 2).flatten(2)), k.mean(1)

    def _merged(self, x: Tensor, metric: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens = x.shape[1]
        count = min(self.pairs, (tokens - 1) // 2)
        size = torch.ones_like(x[..., :1]) if size is None else size
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        scores[:, 0] = -torch.inf
        best, partner = scores.max(-1)
        order = best.argsort(dim=-1, descending=True)
        merged, stays = order[:, :count, None], order[:, count:, None].sort(dim=1).values
        into = partner[..., None].gather(1, merged)

        def merge(value: Tensor) -> Tensor:
            even, odd = value[:, ::2], value[:, 1::2]
            rest = even.gather(1, stays.expand(-1, -1, value.shape[-1]))
            given = even.gather(1, merged.expand(-1, -1, value.shape[-1]))
            odd = odd.scatter_reduce(1, into.expand(-1, -1, value.shape[-1]), given, "sum")
            return torch.cat([rest, odd], 1)

        total = merge(size)
        return merge(x * size) / total, total


def compiled(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """A model under a rule, with code of its own: every variant has a forward that Dynamo has not seen."""

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    backend = {"backend": tokred, "options": options} if options else {}
    return torch.compile(Once(), dynamic=False, **backend)


@torch.no_grad()
def measure(model: nn.Module, images: Tensor, pairs: int, rounds: int) -> dict[str, Any]:
    """Times of all variants for one number of pairs, in milliseconds, and what floating point operations promise."""
    torch._dynamo.reset()
    rule = {"rule": "tome", "pairs": pairs}
    recording = tokcompile.Recording()
    # A recording's copies are part of the call that is timed, as those of the ideal's constants are not.
    recorded = compiled(model, **rule, record=recording)
    expected = recorded(images)
    variants: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
        name: lambda inputs, run=run: run(inputs["x"])
        for name, run in {
            "eager": model,
            "inductor": compiled(model),
            "usual": Usual(model, pairs),
            "tokred": compiled(model, **rule),
            "ideal": compiled(model, **rule, replay=recording),
        }.items()
    }
    for name in ("usual", "tokred", "ideal"):
        torch.testing.assert_close(variants[name]({"x": images}), expected, rtol=1e-3, atol=1e-4, msg=name)
    spent = time_interleaved(variants, {"x": images}, rounds, 2, lambda what: None)
    torch._dynamo.reset()
    (part,) = explain(model, {"x": images}, [load_rule("tome").bind(pairs=pairs)]).parts
    return {
        "pairs": pairs,
        "tokens": next(reversed(part.applied[0].steps))["to"],
        "promised": part.before.flops / part.after.flops,
        **{name: statistics.median(times) for name, times in spent.items()},
    }


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    gained = found["inductor"] / found["tokred"]
    return (
        f"| {found['pairs']} | {found['tokens']} | {found['promised']:.2f} | {gained:.2f} "
        f"| {gained / found['promised']:.2f} "
        f"| {found['eager'] / found['tokred']:.2f} | {found['usual'] / found['tokred']:.2f} "
        f"| {found['tokred'] / found['ideal']:.3f} |"
    )


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 23, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    library = unloaded.declare_operators()
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_384", pretrained=False, img_size=given.size).eval()
    images = torch.randn(given.batch, 3, given.size, given.size)
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    made = f"{datetime.date.today()}, {versions}, {platform.machine()}, {os.cpu_count()} cores"
    page = INTRO.format(
        made=made,
        size=given.size,
        tokens=model.pos_embed.shape[1],
        batch=given.batch,
        threads=torch.get_num_threads(),
        rounds=given.rounds,
    )
    for pairs in given.pairs:
        found = measure(model, images, pairs, given.rounds)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
        page += row(found) + "\n"
    given.out.write_text(page)
    del library


if __name__ == "__main__":
    main()
