"""How long a rewrite takes at every depth: models of real widths without memory, and rules that cut their tokens."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tokcompile.binding import RuleInstance
from tokcompile.capturing.capture import capture
from tokcompile.pipeline import apply_rules
from tokcompile.program import Program
from tokcompile.rulefile import parse_rule
from tokcompile.sites import find_sites
from tokcompile.verify import verify

DEPTHS = (4, 8, 16, 24, 32, 48, 64, 80)
TOKENS = 640
RULES = {
    "decoder": """
rule: half_text
about: Keep the tokens that the second block looks at most, and both ends, before the third block.
steps:
  - score: {name: looks, by: attention_received, at: decoder.1.attention, heads: mean}
  - select: {name: ends, by: protect, protect: [first, last]}
  - select: {name: kept, by: fill, first: [ends], scores: looks, among: all, keep: "1/2"}
  - drop: {at: decoder.2.input, keep: kept, positions: keep}
""",
    "vision": """
rule: half_image
about: Keep the patches that the second block looks at most, before the third block.
steps:
  - score: {name: looks, by: attention_received, at: vision.1.attention, heads: mean}
  - select: {name: kept, by: topk, scores: looks, among: image, keep: "1/2", per: row}
  - drop: {at: vision.2.input, keep: kept, positions: keep}
""",
}


@dataclass(frozen=True)
class Subject:
    """A kind of model: how one of some depth is built, its inputs, and the stack that is cut."""

    about: str
    stack: str
    build: Callable[[int], nn.Module]
    inputs: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Times:
    """Seconds of one rewrite, of processor time; `rewrite` is what applying a rule takes beside `axes` and `sites`."""

    layers: int
    nodes: int
    axes: float
    sites: float
    rewrite: float
    verify: float

    @property
    def total(self) -> float:
        """Everything but capture."""
        return self.axes + self.sites + self.rewrite + self.verify

    @property
    def per_node(self) -> float:
        """Microseconds a node of the captured graph."""
        return self.total / self.nodes * 1e6

    def data(self) -> dict[str, float]:
        """All figures, by name."""
        return {**asdict(self), "total": self.total, "per_node": self.per_node}


def _decoder(layers: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config)


def _text() -> dict[str, Any]:
    ids = torch.full((1, TOKENS), 7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _tower(layers: int) -> nn.Module:
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return CLIPVisionModel(config)


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(1, 3, 336, 336)}


SUBJECTS = {
    "decoder": Subject("Llama of width 4096, 32 heads, 8 of keys, a cache, 640 tokens", "decoder", _decoder, _text),
    "vision": Subject("CLIP tower of width 1024, 16 heads, 1 + 576 tokens", "vision", _tower, _image),
}


def captured(subject: Subject, layers: int) -> Program:
    """The one graph of a model without memory for its weights."""
    # Fake values rather than the meta device: a cache that starts empty does not trace there.
    with torch.no_grad(), FakeTensorMode():
        model, inputs = subject.build(layers).eval(), subject.inputs()
    (program,) = capture(model, inputs)
    return program


def measure(subject: Subject, program: Program, layers: int, rounds: int = 3) -> Times:
    """The best of some rounds, each on a copy of the captured graph."""
    rule = parse_rule(RULES[subject.stack], "half.yaml").bind()
    found = [_once(program.copy(), rule, layers) for _ in range(rounds)]
    return min(found, key=lambda times: times.total)


def _once(program: Program, rule: RuleInstance, layers: int) -> Times:
    nodes = len(program.graph.nodes)
    gc.collect()
    axes = _seconds(lambda: program.axes)
    sites = _seconds(lambda: find_sites(program))
    program.changed()
    rewritten = _seconds(lambda: apply_rules(program, [rule], check=False))
    return Times(layers, nodes, axes, sites, rewritten - axes - sites, _seconds(lambda: verify(program)))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
