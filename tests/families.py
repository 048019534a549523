"""What is asked of every family of the catalogue: sites, its own bits when all is kept, runs on fewer tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import byhand
import naive
import pytest
import torch
import unloaded
from harness import difference, prune
from torch import Tensor, nn

import tokcompile
from tokcompile.capturing import imagesizes
from tokcompile.capturing.capture import capture
from tokcompile.models.catalogue import Family
from tokcompile.program import Program
from tokcompile.sites import Sites, find_sites

RULES = {
    # Random tokens of any text; the first stays, and the last, which the head reads.
    "text": """
rule: text
about: Drop random tokens before a block.
params:
  keep: {type: ratio_or_count, default: 9, about: tokens kept}
  block: {type: int, default: 1, min: 0, about: the block}
steps:
  - score: {name: luck, by: random, at: "STACK.${block}.input"}
  - select: {name: ends, by: protect, protect: [first, last]}
  - select: {name: kept, by: fill, first: [ends], scores: luck, among: all, keep: "${keep}"}
  - drop: {at: "STACK.${block}.input", keep: kept, positions: keep}
""",
    # Random tokens of one group alone.
    "group": """
rule: group
about: Drop random tokens of one group before a block.
params:
  keep: {type: ratio_or_count, default: 9, about: tokens kept}
  block: {type: int, default: 1, min: 0, about: the block}
  among: {type: choice, default: all, choices: [all, image], about: the group}
  per: {type: choice, default: row, choices: [image, row], about: what the budget is of}
steps:
  - score: {name: luck, by: random, at: "STACK.${block}.input"}
  - select: {name: kept, by: topk, scores: luck, among: "${among}", keep: "${keep}", per: "${per}"}
  - drop: {at: "STACK.${block}.input", keep: kept, positions: keep}
""",
    # Random features of every image, before they are put among the text.
    "features": """
rule: features
about: Drop random features of images before they are spliced into the text.
params:
  keep: {type: ratio_or_count, default: 9, about: features kept of each image or row}
  per: {type: choice, default: image, choices: [image, row], about: what the budget is of}
steps:
  - score: {name: luck, by: random, at: "STACK"}
  - select: {name: kept, by: topk, scores: luck, among: image, keep: "${keep}", per: "${per}"}
  - drop: {at: "STACK", keep: kept, positions: keep}
""",
}
PLACEHOLDERS = ("image_token_id", "video_token_id")
"""Where configurations say which tokens of a text stand for features."""


@dataclass
class Subject:
    """A family's model with an example, its program and sites.

    Attributes:
        inputs: a batch of two; rows of a text are padded by different numbers.
    """

    family: Family
    model: nn.Module
    inputs: dict[str, Any]

    @cached_property
    def program(self) -> Program:
        """The model as it is captured; at the first question, since not every test asks."""
        (program,) = capture(self.model, self.inputs)
        return program

    @cached_property
    def sites(self) -> Sites:
        """The sites of the program."""
        return find_sites(self.program)


def subject(family: Family, given: dict[str, Any] | None = None, **example: Any) -> Subject:
    """Build and call once; `example` has further arguments of the family's example inputs, `given` others."""
    if why := unloaded.missing(family.needs):
        pytest.skip(why)
    model = family.build()
    inputs = given or family.example(model, batch=2, padded=True, **example)
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # a cap is not part of sdpa, where transformers 5.17 still allows both
    if family.kind in ("decoder", "vlm", "encoder-decoder"):
        inputs = {**inputs, "use_cache": False}
    imagesizes.install(model)
    inputs = tokcompile.precompute(model, inputs)
    with torch.no_grad():
        model(**inputs)
    return Subject(family, model, inputs)


def traced(subject: Subject) -> list[Tensor]:
    """What a model says when Dynamo traces it without a rule.

    Where transformers builds a mask only then, which hides nothing (5.17 does), the last bits may be others.
    """
    torch._dynamo.reset()
    with torch.no_grad():
        return outputs(torch.compile(subject.model, backend="eager")(**subject.inputs))


def outputs(out: Any) -> list[Tensor]:
    """What a model says: its logits, or else its states; by the order in which it names them."""
    if isinstance(out, Tensor):
        return [out]
    names = ("logits",) if getattr(out, "logits", None) is not None else ("last_hidden_state", "pooler_output")
    return [value for name in names if (value := getattr(out, name, None)) is not None]


def rule(folder: Path, kind: str, stack: str) -> str:
    """Write one of `RULES` for a stack; the path of its file."""
    path = folder / f"{kind}.yaml"
    path.write_text(RULES[kind].replace("STACK", stack))
    return str(path)


def blocks_of(model: nn.Module, sites: Sites, stack: str) -> nn.ModuleList | nn.Sequential:
    """The modules of a stack's blocks, by the display paths of the blocks: those that run, where a model skips some."""
    paths = ["." + re.sub(r"\[(\d+)\]", r".\1", block.path) for block in sites.stacks[stack].blocks]
    path = paths[0]
    lists = {"." + name: m for name, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}
    found = None
    while path:
        path = path.rpartition(".")[0]
        # A piece of a model names its modules from the piece on; a block may hold lists of its own, so the outermost.
        fitting = [m for name, m in lists.items() if path and name.endswith(path)]
        found = next((m for m in fitting if len(m) == len(paths)), found)
    if found is not None:
        return found
    above, _, _ = paths[0].rpartition(".")
    if above in lists and all(re.fullmatch(rf"{re.escape(above)}\.\d+", path) for path in paths):
        return nn.ModuleList(lists[above][int(path.rpartition(".")[2])] for path in paths)
    raise LookupError(f"no list of blocks above {paths[0]}")


def kept_by_luck(valid: Tensor, group: Tensor, keep: int, ends: bool) -> byhand.Kept:
    """Which tokens the rules keep: the luckiest of a group and all others. `valid` and `group` are bool [B, T]."""
    out = []
    tokens = valid.shape[1]
    luck = torch.tensor(naive.lucky(tokens, 0))
    for real, among in zip(valid.tolist(), group.tolist(), strict=True):
        scores = torch.where(torch.tensor(real), luck, -torch.inf)
        if ends:
            places = [i for i in range(tokens) if real[i]]
            scores[[places[0], places[-1]]] = torch.inf
        chosen = naive.best(scores, [i for i in range(tokens) if among[i]], keep)
        out.append(sorted({*chosen, *(i for i in range(tokens) if not among[i])}))
    return out


def dropped(
    subject: Subject, stack: str, folder: Path, block: int = 1, keep: int = 9
) -> tuple[list[Tensor], list[byhand.Kept]]:
    """Run compiled under a drop before a block: the outputs, and the tokens kept by it and by what follows from it."""
    torch._dynamo.reset()
    pruned = prune(subject.model, **options_for(subject, stack, folder, block, keep))
    return outputs(pruned(**subject.inputs)), pruned.kept


def check_drop(subject: Subject, folder: Path, block: int = 1) -> byhand.Kept:
    """Keeping all keeps every bit, a drop equals a run by hand and is of the tokens that luck says; those kept."""
    with torch.no_grad():
        expected = outputs(subject.model(**subject.inputs))
    torch._dynamo.reset()
    everything = prune(subject.model, rule=rule(folder, "group", "decoder"), keep=1.0, among=among(subject, "decoder"))
    assert compared(outputs(everything(**subject.inputs)), expected) == 0
    got, (kept,) = dropped(subject, "decoder", folder, block=block, keep=7)
    assert compared(got, hand_run(subject, "decoder", kept, block=block)) == 0
    assert kept == lucky(subject, 7)
    return kept


def lucky(subject: Subject, keep: int) -> byhand.Kept:
    """The tokens of text that a drop in a decoder is to keep, by what rows have of padding, images and videos."""
    valid = subject.inputs["attention_mask"].bool()
    config, ids = subject.model.config, subject.inputs["input_ids"]
    images = among(subject, "decoder") == "image"
    seen = torch.isin(ids, torch.tensor([getattr(config, n) for n in PLACEHOLDERS if hasattr(config, n)]))
    return kept_by_luck(valid, seen if images else torch.ones_like(valid), keep, ends=not images)


def exported(subject: Subject) -> torch.export.ExportedProgram:
    """The model as torch.export has it."""
    return tokcompile.export(subject.model, subject.inputs)


@torch.no_grad()
def ran(program: torch.export.ExportedProgram, subject: Subject) -> list[Tensor]:
    """What an exported program says."""
    return outputs(program.module()(**subject.inputs))


def options_for(subject: Subject, stack: str, folder: Path, block: int = 1, keep: float = 9) -> dict[str, Any]:
    """A rule that drops random tokens before a block of a stack, with its parameters."""
    images = among(subject, stack) == "image"
    kind = "text" if stack == "decoder" and not images else "group"
    options: dict[str, Any] = {"rule": rule(folder, kind, stack), "keep": keep, "block": block}
    return options | group_of(subject, stack) if images else options


def group_of(subject: Subject, stack: str) -> dict[str, Any]:
    """Which tokens the rule "group" chooses from, and what its budget is of: in a vision stack, of each image."""
    return {"among": among(subject, stack), "per": "image" if stack.startswith("vision") else "row"}


def among(subject: Subject, stack: str) -> str:
    """Which tokens a rule chooses from: those of images where a sequence has some."""
    spliced = subject.sites.splice is not None and stack == "decoder"
    return "image" if spliced or stack.startswith("vision") else "all"


def hand_run(
    subject: Subject,
    stack: str,
    kept: byhand.Kept,
    block: int = 1,
    inputs: dict[str, Any] | None = None,
    length: int | None = None,
    compact: bool = False,
    then: tuple[int, byhand.Kept] | None = None,
) -> list[Tensor]:
    """The same by hand, given the tokens; of other inputs than the example's, whose sequence has another length.

    `then` is a block further down, and what stays of these tokens from there on.
    """
    inputs = subject.inputs if inputs is None else inputs
    length = length or subject.sites.stacks[stack].blocks[0].input.meta["val"].shape[1]
    readers: Any = ()
    if stack == "encoder" and "decoder" in subject.sites.stacks:
        readers = blocks_of(subject.model, subject.sites, "decoder")
    blocks = blocks_of(subject.model, subject.sites, stack)
    cut = byhand.Cut(blocks, block, kept, length, readers, _rotary(subject.model, blocks) if compact else ())
    cuts = [cut] if then is None else [cut, byhand.Cut(blocks, *then, len(kept[0]))]
    with torch.no_grad(), byhand.applied(cuts), _added_late(subject.model, cut):
        if subject.family.name in FINISH:
            return [FINISH[subject.family.name](subject.model, _last_states(subject, blocks, inputs))]
        return outputs(subject.model(**inputs))


def _rotary(model: nn.Module, blocks: nn.ModuleList | nn.Sequential) -> list[nn.Module]:
    """What makes rotary tables for a list of blocks: modules beside it."""
    owner = next(m for m in model.modules() if blocks in m.children())
    return [m for m in owner.children() if "RotaryEmbedding" in type(m).__name__]


FINISH = {"gpt2": lambda model, hidden: model.lm_head(model.transformer.ln_f(hidden))}
"""Models that end with a view to the length that they were called with: what is left to do after the last block."""


@contextmanager
def _added_late(model: nn.Module, cut: byhand.Cut) -> Iterator[None]:
    """Let a text model that adds image features to the stream between its blocks add those of the kept tokens alone."""
    text = next((m for m in model.modules() if hasattr(m, "_deepstack_process")), None)
    if text is None:
        yield
        return
    original = text._deepstack_process

    def add(hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        if hidden.shape[1] == mask.shape[1]:
            return original(hidden, mask, features)
        wide = torch.zeros(*mask.shape, features.shape[-1])
        wide[mask] = features
        short = byhand.take(mask, cut.kept, cut.length)
        return original(hidden, short, byhand.take(wide, cut.kept, cut.length)[short])

    text._deepstack_process = add
    try:
        yield
    finally:
        del text._deepstack_process


def _last_states(subject: Subject, blocks: nn.ModuleList | nn.Sequential, inputs: dict[str, Any]) -> Tensor:
    states: list[Any] = []
    hook = blocks[-1].register_forward_hook(lambda module, args, out: states.append(out))
    try:
        subject.model(**inputs)
    except RuntimeError as error:
        assert "invalid for input of size" in str(error)
    finally:
        hook.remove()
    return states[0] if isinstance(states[0], Tensor) else states[0][0]


def compared(got: list[Tensor], expected: list[Tensor], valid: Tensor | None = None) -> float:
    """The largest difference; of real tokens alone where `valid` [B, T] is given and a value has them."""
    worst = 0.0
    for one, other in zip(got, expected, strict=True):
        if valid is not None and one.ndim == 3 and one.shape[1] == valid.shape[1]:
            one, other = one[valid], other[valid]
        worst = max(worst, difference(one, other))
    return worst
