"""explain: what rules change in a model, block by block: tokens, floating point operations, bytes of the KV cache."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from rich.console import RenderableType
from torch.fx import Node

from tokcompile.applied import Applied
from tokcompile.binding import RuleInstance
from tokcompile.capturing.capture import capture
from tokcompile.errors import TokredError
from tokcompile.flops import Counter, concrete, is_attention_matrix
from tokcompile.lowering.choosekernels import Choice, choices_of
from tokcompile.params import plain
from tokcompile.pipeline import apply_rules
from tokcompile.program import Program, tensor
from tokcompile.sites import Attention, Block, Sites, find_sites
from tokcompile.sites.reach import Reach

SECTIONS = ("vision", "projector", "decoder", "encoder", "rule", "rest")
_FUSED = (torch.ops.aten.scaled_dot_product_attention.default, torch.ops.tokred.attention.default)


@dataclass(frozen=True)
class Row:
    """One block, before or after.

    Attributes:
        tokens: query tokens of its attention, per batch row.
        flops, kv_bytes: of the whole batch; `kv_bytes` is 0 without a cache.
        fused: its attention is one fused call.
        live: the outputs depend on it; what does not is not counted.
    """

    stack: str
    index: int
    path: str
    tokens: int
    flops: int
    kv_bytes: int
    fused: bool
    live: bool


@dataclass(frozen=True)
class Measure:
    """A graph at one moment.

    Attributes:
        totals: flops by section; `rule` is what scoring, selecting and moving tokens costs.
        nodes: calls that the outputs depend on.
        matrices: values [.., H, N, N] beyond 256 tokens, made by a node or inside one: `node` and `shape`.
        unknown: operators whose cost is not known, counted as 0.
    """

    rows: tuple[Row, ...]
    totals: dict[str, int]
    nodes: int
    matrices: tuple[dict[str, Any], ...]
    unknown: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Floating point operations of the graph."""
        return sum(self.totals.values())

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache that the graph hands back."""
        return sum(row.kv_bytes for row in self.rows)

    def tokens(self, stack: str) -> int:
        """Tokens in the last live block of a stack; 0 without one."""
        return next((row.tokens for row in reversed(self.rows) if row.stack == stack and row.live), 0)


@dataclass
class Part:
    """One captured graph: measured as it came, and after the rules; `after` is None when they were refused.

    Attributes:
        kernels: for each operator of the rules, whether its Triton kernel would run on the model's device, and why.
    """

    before: Measure
    after: Measure | None = None
    applied: list[Applied] = field(default_factory=list)
    kernels: list[Choice] = field(default_factory=list)
    milliseconds: float = 0.0
    refused: str = ""


@dataclass
class Explanation:
    """What rules change in a model.

    Attributes:
        parts: one per graph; a model that captures whole has one.
        inputs: shapes of the example inputs.
    """

    model: str
    rules: list[RuleInstance]
    parts: list[Part]
    inputs: dict[str, list[int]]
    capture_milliseconds: float
    versions: dict[str, str]

    @property
    def whole(self) -> bool:
        """Whether the model came as one graph."""
        return len(self.parts) == 1

    @property
    def note(self) -> str:
        """What must be said of a model that came in pieces; "" otherwise."""
        if self.whole:
            return ""
        seen = sum(bool(part.before.rows) for part in self.parts)
        done = sum(part.after is not None for part in self.parts)
        return (
            f"The model came in {len(self.parts)} graphs, of which {seen} hold transformer blocks. A rule sees one "
            f"graph at a time: it could be applied to {done} of them. What lies between the graphs ran as Python "
            "and is not counted."
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return {
            "model": self.model,
            "inputs": self.inputs,
            "graphs": len(self.parts),
            "note": self.note,
            "rules": [{"rule": r.name, **{k: plain(v) for k, v in r.params.items()}} for r in self.rules],
            "capture_milliseconds": self.capture_milliseconds,
            "versions": self.versions,
            "parts": [_part_data(part) for part in self.parts],
        }

    def to_table(self, plain: bool = False) -> RenderableType:
        """Tables for a terminal; plain ones have no frames, for pipes and files."""
        from tokcompile.pages.reporttables import render

        return render(self, plain)

    def to_html(self) -> str:
        """One self-contained page: no script, nothing fetched."""
        from tokcompile.pages.html import explanation_page

        return explanation_page(self)


def explain(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    rules: Sequence[RuleInstance],
    dynamic: bool | None = None,
    name: str = "",
) -> Explanation:
    """Measure a model before and after rules, without running it after.

    Args:
        model: an unmodified model; one on the meta device will do.
        inputs: keyword arguments of its forward, the shapes of which everything is measured at.
        rules: applied in order.
        dynamic: as for torch.compile.
        name: what to call the model.

    Raises:
        TokredError: a rule cannot be applied to a model that came whole, or nothing was captured.
    """
    start = time.perf_counter()
    programs = capture(model, inputs, dynamic=dynamic)
    captured = (time.perf_counter() - start) * 1e3
    shapes = {key: list(value.shape) for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    return Explanation(
        name or type(model).__name__, list(rules), explain_captured(programs, rules), shapes, captured, versions()
    )


def explain_captured(programs: Sequence[Program], rules: Sequence[RuleInstance]) -> list[Part]:
    """Measure captured programs, rewrite them in place, and measure them again."""
    return [_explain_one(program, rules, whole=len(programs) == 1) for program in programs]


def versions() -> dict[str, str]:
    """Versions that a report was made with."""
    import tokcompile

    return {
        "tokcompile": tokcompile.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _explain_one(program: Program, rules: Sequence[RuleInstance], whole: bool) -> Part:
    counter = Counter()
    sites = find_sites(program)
    blocks = [(name, i, b) for name, stack in sites.stacks.items() for i, b in enumerate(stack.blocks)]
    part = Part(measure(program, sites, blocks, sites, counter))
    start = time.perf_counter()
    try:
        part.applied = apply_rules(program, rules)
    except TokredError as error:
        if whole:
            raise
        part.refused = str(error)
        return part
    part.milliseconds = (time.perf_counter() - start) * 1e3
    part.after = measure(program, find_sites(program), blocks, sites, counter)
    with torch.no_grad():  # as the program was captured
        part.kernels = choices_of(program.gm)
    return part


def measure(
    program: Program, now: Sites, blocks: list[tuple[str, int, Block]], first: Sites, counter: Counter
) -> Measure:
    """Measure a program.

    Args:
        now: its sites as it is.
        blocks: stack, number and block, as they were at first: an edit keeps the nodes of attention, so a block is
            known again, even where a drop in the middle cuts its stack in two.
        first: the sites that the blocks belong to.
    """
    live = Reach(program.graph).ancestors([program.output])
    section = _sections(program, blocks, first, live)
    cost = {node: counter.cost(node) for node in live}
    totals = dict.fromkeys(SECTIONS, 0)
    flops = [0] * len(blocks)
    for node, place in section.items():
        block = place if isinstance(place, int) else None
        name = _kind(blocks[block][0]) if block is not None else place
        totals[name] += cost[node].flops
        if block is not None:
            flops[block] += cost[node].flops
    rows = tuple(_row(*blocks[i], flops[i], now, live) for i in range(len(blocks)))
    sizes = {_matrix_size(site) for site in now.attentions}
    found = [
        {"node": n.name, "shape": list(s)} for n in section for s in _matrices(n, cost[n].matrices) if s[-2:] in sizes
    ]
    found.sort(key=lambda each: each["node"])
    count = sum(n.op == "call_function" for n in live)
    return Measure(rows, totals, count, tuple(found), tuple(sorted(counter.unknown)))


def _matrix_size(site: Attention) -> tuple[int, int]:
    """Query and key tokens of an attention: an image of many pixels is square too, but is not of this size."""
    query, key = site.query.meta["val"].shape, site.key.meta["val"].shape
    return concrete(query[-2]), concrete(key[-1 if site.key_transposed else -2])


def _matrices(node: Node, inside: tuple[tuple[int, ...], ...]) -> set[tuple[int, ...]]:
    shapes = set(inside)
    if tensor(node):
        shapes.add(tuple(concrete(n) for n in node.meta["val"].shape))
    return {shape for shape in shapes if is_attention_matrix(shape)}


def _kind(stack: str) -> str:
    return stack.rstrip("0123456789")


def _row(stack: str, index: int, block: Block, flops: int, now: Sites, live: set[Node]) -> Row:
    node = block.attention.node
    alive = node in live
    cache = next((c for b, c in now.caches.items() if b.attention.node is node), None)
    size = sum(_bytes(n) for n in (cache.key, cache.value)) if cache is not None else 0
    tokens = concrete(node.meta["val"].shape[-2])
    return Row(stack, index, block.path, tokens, flops, size, node.target in _FUSED, alive)


def _bytes(node: Node) -> int:
    value = node.meta["val"]
    count = value.dtype.itemsize
    for size in value.shape:
        count *= concrete(size)
    return count


def _sections(
    program: Program, blocks: list[tuple[str, int, Block]], sites: Sites, live: set[Node]
) -> dict[Node, int | str]:
    """For each live call: the number of its block, or the name of a section."""
    reach = Reach(program.graph)
    spans = [(i, b.input, b.output) for i, (_, _, b) in enumerate(blocks) if {b.input, b.output} <= reach.order.keys()]
    vision = [b for name, _, b in blocks if _kind(name) == "vision" and b.output in reach.order]
    out: dict[Node, int | str] = {}
    for node in reach.order:
        if node not in live or node.op != "call_function":
            continue
        if "tokred" in (node.meta.get("custom") or {}):
            out[node] = "rule"
            continue
        inside = next(
            (i for i, start, end in spans if node is not start and reach.above(start, node) and reach.above(node, end)),
            None,
        )
        out[node] = inside if inside is not None else _outside(node, sites, vision, reach)
    return out


def _outside(node: Node, sites: Sites, vision: list[Block], reach: Reach) -> str:
    """The section of a call that is in no block: vision embeddings and norms, the projector, or the rest."""
    if not vision:
        return "rest"
    features = sites.splice.features if sites.splice is not None else None
    if features is None or not reach.above(node, features):
        return "vision" if reach.above(node, vision[0].input) else "rest"
    if sites.projector is not None and sites.projector.input in reach.order:
        entry = sites.projector.input
        after = reach.above(entry, node) and node is not entry
        return "projector" if after else "vision"
    return "vision"


def _part_data(part: Part) -> dict[str, Any]:
    return {
        "before": _measure_data(part.before),
        "after": _measure_data(part.after) if part.after else None,
        "applied": [{**asdict(a), "counts": dict(a.counts)} for a in part.applied],
        "kernels": [asdict(choice) for choice in part.kernels],
        "milliseconds": part.milliseconds,
        "refused": part.refused,
    }


def _measure_data(measured: Measure) -> dict[str, Any]:
    return {"flops": measured.flops, "kv_bytes": measured.kv_bytes, **asdict(measured)}
