"""Find, once for a model, which pairs of numbers of each head rank keys as the whole head does.

FASA (2026), section 3.2: the logit of a query and a key is a sum over the frequencies of a rotary head. The contextual
agreement of a frequency is the share of the K keys of largest logits that are also among the K keys for which it alone
is largest; the frequencies of the largest mean agreement dominate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tokcompile.capturing.capture import from_dynamo
from tokcompile.capturing.dynamo import prepare
from tokcompile.capturing.imagesizes import packed, precompute
from tokcompile.errors import CaptureError, EditError, RuleError
from tokcompile.kernels import _order
from tokcompile.passes.pairtable import TABLE
from tokcompile.pipeline import facts
from tokcompile.program import Program
from tokcompile.program import place as node_place
from tokcompile.rulefile import parse_rules
from tokcompile.sites import Sites, find_sites
from tokcompile.sites.cache import unrepeated
from tokcompile.sites.pairing import Pairing, find_pairings
from tokcompile.steps import Route
from tokcompile.weights import Weights

_AT_ONCE = 1 << 24
"""Numbers of one product over queries, keys and pairs that are held at a time."""


@dataclass
class _Heads:
    """What is known so far of one block: its pairing, and common keys summed over queries, int64 [H, P]."""

    pairing: Pairing
    group: int
    total: Tensor | int = 0
    count: int = 0


@dataclass
class _Taps:
    """A Dynamo backend whose graphs also hand out queries and keys as their attention reads them.

    Attributes:
        blocks: of the decoder, by number; those that nothing turns are left out.
        depth: how many blocks the decoder has.
    """

    rule: str
    keys: int
    queries: int
    blocks: dict[int, _Heads] = field(default_factory=dict)
    depth: int = 0
    known: dict[str, int] = field(default_factory=dict)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, example_inputs)
        sites = find_sites(program)
        if "decoder" not in sites.stacks:
            return gm.forward
        self.depth, self.known = len(sites.stacks["decoder"].blocks), facts(program, sites)
        numbers, taps = self._find(program, sites)
        padding = [sites.padding] if sites.padding is not None else []
        own = list(program.output.args[0])
        program.output.args = ((*own, *taps, *padding),)
        program.gm.recompile()

        def run(*args: Any) -> Any:
            results = list(program.gm(*args))
            held = results[len(own) :]
            valid = held.pop().bool() if padding else None
            for place, index in enumerate(numbers):
                self._count(self.blocks[index], held[2 * place], held[2 * place + 1], valid)
            return tuple(results[: len(own)])

        return run

    def _find(self, program: Program, sites: Sites) -> tuple[list[int], list[Node]]:
        pairings = find_pairings(program, sites, "decoder")
        numbers, taps = [], []
        for index, block in enumerate(sites.stacks["decoder"].blocks):
            site, cache = block.attention, sites.caches.get(block)
            if site not in pairings or cache is None:
                continue
            plain = unrepeated(site.key, cache.key)
            key = site.key if plain is None else plain
            group = site.query.meta["val"].shape[1] // key.meta["val"].shape[1]
            if plain is None and site.key_transposed:
                with program.graph.inserting_after(key):
                    key = program.graph.call_method("transpose", (key, -2, -1))
            self.blocks.setdefault(index, _Heads(pairings[site], group))
            numbers.append(index)
            taps += [site.query, key]
        if not numbers:
            raise EditError(
                "no pairs of numbers can be calibrated: the decoder has no rotary attention with a cache",
                where=[node_place(block.attention.node) for block in sites.stacks["decoder"].blocks[:1]],
                found=f"{len(sites.stacks['decoder'].blocks)} blocks",
                remedy="use it on a model whose positions turn queries and keys, with use_cache=True",
            )
        return numbers, taps

    def _count(self, heads: _Heads, query: Tensor, key: Tensor, valid: Tensor | None) -> None:
        for row in range(query.shape[0]):
            real = torch.ones(query.shape[2], dtype=torch.bool) if valid is None else valid[row, : query.shape[2]].cpu()
            places = real.nonzero()[:, 0].to(query.device)
            found, count = agreement(query[row][:, places], key[row][:, places], heads.pairing, self.keys, self.queries)
            heads.total, heads.count = heads.total + found.cpu(), heads.count + count


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    rule: str | Path,
    *,
    keys: int = 256,
    queries: int = 64,
    **params: Any,
) -> Weights:
    """Make the table of pairs that a rule with `route`, by frequencies, reads.

    Args:
        model: an unmodified model in eval mode; it stays as it is.
        batches: keyword arguments of its forward, each a batch of prompts. Padding does not count.
        rule: name or path of the rule; its parameters follow as keywords.
        keys: K, how many keys of a query are compared; queries that see no more than these do not count.
        queries: how many queries of each row count, evenly spread.

    Returns:
        Weights that hold `RULE.pairs`, int16 [blocks, heads, pairs], ascending; give them as `weights`, or save them.

    Raises:
        RuleError: the rule has no such step, or no query saw enough keys.
        EditError: the model has no rotary attention, or one whose pairs are not known.
        CaptureError: the decoder was not captured.
    """
    if keys < 1 or queries < 1:
        raise RuleError("calibration compares keys of queries", found=f"keys={keys}, queries={queries}", remedy="1 on")
    (instance,) = parse_rules({"rule": str(rule), **params})
    steps = [step for step in instance.rule.steps if isinstance(step, Route) and step.by == "frequencies"]
    if len(steps) != 1:
        raise RuleError(
            f"rule '{instance.name}' has no table to calibrate",
            where=[instance.rule.path],
            found=f"{len(steps)} steps that route by frequencies",
            remedy="a rule with one such step",
        )
    taps = _Taps(instance.name, keys, queries)
    _run(model, batches, taps)
    if not taps.depth:
        raise CaptureError("no decoder was captured", remedy="calibrate a language model, in one graph")
    (step,) = instance.resolve_only(steps, taps.known)
    table = _table(taps, int(step.pairs), str(step.per))
    weights = Weights()
    weights.of(instance.name, TABLE, tuple(table.shape), lambda: table)
    return weights


def _run(model: nn.Module, batches: Iterable[Mapping[str, Any]], taps: _Taps) -> None:
    prepare()
    torch._dynamo.reset()
    try:
        with torch.no_grad(), packed(model):
            compiled = torch.compile(model, backend=taps)
            for batch in batches:
                compiled(**precompute(model, batch))
    finally:
        torch._dynamo.reset()


def _table(taps: _Taps, pairs: int, per: str) -> Tensor:
    """int16 [blocks, heads, pairs]; blocks that nothing turns have the first pairs, which nobody reads."""
    made: dict[int, Tensor] = {}
    for index, heads in taps.blocks.items():
        if not heads.count:
            raise RuleError(
                "no query of the calibration saw more keys than are compared",
                found=f"keys={taps.keys}",
                remedy="longer prompts, or fewer keys",
            )
        if pairs > heads.pairing.pairs:
            raise RuleError("there are fewer pairs than are to be chosen", found=f"{pairs} of {heads.pairing.pairs}")
        total = heads.total  # in whole numbers, so that equal agreement is equal
        if per == "kv_head":
            total = total.unflatten(0, (-1, heads.group)).sum(1)
        order = total.sort(dim=1, descending=True, stable=True).indices[:, :pairs]
        made[index] = order.sort(1).values
    like = torch.arange(pairs).expand_as(next(iter(made.values())))
    return torch.stack([made.get(index, like) for index in range(taps.depth)]).to(torch.int16)


def agreement(query: Tensor, key: Tensor, pairing: Pairing, keys: int, queries: int) -> tuple[Tensor, int]:
    """Count how many of the best keys of a whole head are among the best of each pair alone.

    Args:
        query: [H, T, D], key [Hkv, T, D] of the real tokens of one row, after rotation; each sees itself and those
            before it. Query head h reads key head h // (H // Hkv).
        pairing: which numbers are pairs.
        keys: how many of the best keys are compared.
        queries: how many queries count at most, evenly spread over those that see more than `keys`.

    Returns:
        int64 [H, P], common keys summed over queries, and the number of queries: the mean agreement is the former
        divided by the latter and by `keys`.
    """
    heads, tokens, _ = query.shape
    chosen = range(keys, tokens)
    chosen = [chosen[i * len(chosen) // min(queries, len(chosen))] for i in range(min(queries, len(chosen)))]
    total = torch.zeros(heads, pairing.pairs, dtype=torch.int64, device=query.device)
    step = max(_AT_ONCE // max(tokens * pairing.pairs, 1), 1)
    for head in range(heads):
        own = key[head // (heads // key.shape[0])].float()
        for start in range(0, len(chosen), step):
            places = torch.tensor(chosen[start : start + step], device=query.device)
            total[head] += _common(query[head, places].float(), own, places, pairing, keys)
    return total, len(chosen)


def _common(query: Tensor, key: Tensor, places: Tensor, pairing: Pairing, keys: int) -> Tensor:
    """int64 [P], summed over queries [n, D] that stand at places [n] among keys [T, D]."""
    first, second = _numbers(pairing)
    products = query[:, None] * key
    parts = (products[..., first] + products[..., second]).transpose(1, 2)
    seen = torch.arange(key.shape[0], device=key.device) <= places[:, None]
    best = _best(products.sum(-1), seen, keys)
    alone = _best(parts.flatten(0, 1), seen.repeat_interleave(parts.shape[1], 0), keys).view(parts.shape)
    return (best[:, None] & alone).sum((0, 2))


def _best(scores: Tensor, seen: Tensor, keys: int) -> Tensor:
    """The largest of the keys that are seen, bool [n, T]; the lowest index wins a tie."""
    return _order.largest(_order.pack(seen.to(torch.int64), scores, seen), keys)


def _numbers(pairing: Pairing) -> tuple[list[int], list[int]]:
    every, start = range(pairing.pairs), pairing.start
    if pairing.neighbours:
        return [start + 2 * i for i in every], [start + 2 * i + 1 for i in every]
    return [start + i for i in every], [start + i + pairing.pairs for i in every]
