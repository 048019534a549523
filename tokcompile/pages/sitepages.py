"""What `tokred sites` shows: what a rule may address in a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.pages.rulepages import table
from tokcompile.pipeline import facts
from tokcompile.program import Program
from tokcompile.sites import Attention, Block, Sites, Stack, addresses, find_sites
from tokcompile.sites.cache import handed_back, key_heads
from tokcompile.sites.order import find_order
from tokcompile.sites.sight import Sight, find_sight

Shape = list[int | str]
UNKNOWN = "?"
"""A size that is known only when the model runs."""


def sites_data(name: str, programs: Sequence[Program]) -> dict[str, Any]:
    """Stacks, single sites and addresses of each graph, as data."""
    return {"model": name, "graphs": [_graph(program) for program in programs]}


def _graph(program: Program) -> dict[str, Any]:
    sites = find_sites(program)
    single = {
        "projector": _flow(sites.projector),
        "splice": _splice(sites),
        "embedding": _node(sites.embedding),
        "head": _node(sites.head),
        "padding mask": _node(sites.padding),
    }
    return {
        "calls": sum(n.op == "call_function" for n in program.graph.nodes),
        "phase": sites.phase,
        "stacks": [_stack(name, program, sites) for name in sites.stacks],
        "sites": {key: value for key, value in single.items() if value is not None},
        "attention_without_a_stack": len(sites.loose),
        "addresses": addresses(sites),
        "numbers": facts(program, sites),
    }


def _stack(name: str, program: Program, sites: Sites) -> dict[str, Any]:
    stack = sites.stacks[name]
    first = stack.blocks[0]
    query = _shape(first.attention.query)
    caches = _caches(program, sites, stack)
    return {
        "stack": name,
        "blocks": len(stack.blocks),
        "features": stack.features,
        "path": _path(stack.blocks),
        "tokens": _tokens(first.input),
        "token_parts": _parts(program, first.input),
        "width": _shape(first.input)[-1],
        "heads": query[1],
        "kv_heads": min(_size(key_heads(block)) for block in stack.blocks),
        "head_size": query[-1],
        "value_size": _shape(first.attention.value)[-1],
        "positions": _positions(program, sites, stack),
        "attention": _attention(first),
        "sees": _sees(sites, stack),
        "cross_attention": {"blocks": _cross(stack), "keys": _cross_keys(stack)},
        "caches": sum(len(each["blocks"]) for each in caches),
        "cache_shapes": caches,
    }


def _tokens(stream: Node) -> int:
    """The tokens of a stream [B, T, C], or of packed rows [n, C]."""
    shape = _shape(stream)
    return shape[0] if len(shape) == 2 else shape[1]


def _parts(program: Program, stream: Node) -> str:
    """How the tokens of a stream are put together, such as `1 + 24×24`; "" where they are just tokens."""
    dims = program.axes.of(stream)
    if len(dims) != 3:
        return ""
    text = _sum(dims[1])
    return text if any(sign in text for sign in "+×") else ""


def _sum(axis: Dim) -> str:
    axis = resolve(axis)
    if len(axis) == 1 and axis[0].segments is not None:
        return " + ".join(map(_sum, axis[0].segments))
    if len(axis) == 2:  # rows and columns; more factors than two are windows or tiles
        return "×".join(str(atom.size) for atom in axis)
    return str(product(axis))


def _positions(program: Program, sites: Sites, stack: Stack) -> list[str]:
    found = []
    for order in find_order(program, sites, stack.name):
        shape = f" {_text([_size(n) for n in order.shape])}" if order.shape is not None else ""
        found.append(order.kind + shape + _among(order.blocks, stack))
    return found


def _among(blocks: Sequence[int], stack: Stack) -> str:
    """Which blocks, in words; "" for all."""
    return "" if len(blocks) == len(stack.blocks) else f" (blocks {spans(blocks)})"


def spans(numbers: Iterable[int]) -> str:
    """Numbers in words: `0..2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{start}" if start == end else f"{start}..{end}" for start, end in runs)


def _attention(block: Block) -> str:
    site = block.attention
    words = ["fused" if "attention" in str(site.node.target) else "written out"]
    words += [f"softcap {site.softcap:g}"] if site.softcap else []
    words += ["sinks"] if site.sinks is not None else []
    words += [] if site.padding is None else ["padding mask"]
    queries, tokens = _shape(site.query)[-2], _tokens(block.input)
    words += [f"{queries} tokens at a time"] if queries != tokens else []
    return ", ".join(words)


def _sees(sites: Sites, stack: Stack) -> list[dict[str, Any]]:
    """What the queries of the blocks see, blocks that see the same together."""
    by_mask: dict[tuple[Node | None, bool], Sight | None] = {}
    groups: dict[tuple[str, int | None], list[int]] = {}
    for number, block in enumerate(stack.blocks):
        site = block.attention
        if not sites.reach.above(block.input, site.key):
            groups.setdefault((f"another sequence of {_keys(site)}", None), []).append(number)
            continue
        key = (site.mask, site.is_causal)
        if key not in by_mask:
            by_mask[key] = find_sight(site, sites.reach)
        groups.setdefault(_words(by_mask[key], site.mask), []).append(number)
    return [{"blocks": blocks, "keys": text, "window": window} for (text, window), blocks in groups.items()]


def _words(sight: Sight | None, mask: Node | None) -> tuple[str, int | None]:
    if sight is None:
        return f"what a mask {_text(_shape(mask))} says", None
    if sight.causal:
        return "causal" + (f", window of {sight.window}" if sight.window else ""), sight.window
    if sight.back is None and sight.ahead is None:
        return "all", None
    return f"window of {sight.back} before to {sight.ahead} after", sight.window


def _keys(site: Attention) -> int | str:
    return _shape(site.key)[-1 if site.key_transposed else -2]


def _cross(stack: Stack) -> list[int]:
    """Blocks with an attention to another sequence after their self-attention."""
    return [number for number, block in enumerate(stack.blocks) if block.cross]


def _cross_keys(stack: Stack) -> int | str | None:
    return next((_keys(site) for block in stack.blocks for site in block.cross), None)


def _caches(program: Program, sites: Sites, stack: Stack) -> list[dict[str, Any]]:
    """What blocks hand back for a later step, blocks that hand back the same shapes together."""
    outputs = [n for n in program.output.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    groups: dict[tuple[tuple[int | str, ...], ...], list[int]] = {}
    for number, block in enumerate(stack.blocks):
        shapes = tuple(tuple(_shape(node)) for node in handed_back(block, sites.reach, outputs))
        if shapes:
            groups.setdefault(shapes, []).append(number)
    return [{"blocks": blocks, "shapes": [list(s) for s in shapes]} for shapes, blocks in groups.items()]


def _path(blocks: Sequence[Block]) -> str:
    """The modules of a stack: `model.layers.0..31`, or the first and the last where they are not in one list."""
    first, last = (block.path.replace("[", ".").replace("]", "").split(".") for block in (blocks[0], blocks[-1]))
    for at, (one, two) in enumerate(zip(first, last, strict=False)):
        if one == two:
            continue
        if one.isdigit() and two.isdigit():
            return ".".join([*first[:at], f"{one}..{two}"])
        return f"{'.'.join(first)} … {'.'.join(last)}"
    return ".".join(first)


def _size(size: Any) -> int | str:
    if isinstance(size, int):
        return size
    return UNKNOWN if size.node.hint is None else int(size.node.hint)


def _shape(node: Node) -> Shape:
    return [_size(n) for n in node.meta["val"].shape]


def _text(value: Shape | str) -> str:
    return value if isinstance(value, str) else f"[{', '.join(map(str, value))}]"


def _node(node: Node | None) -> dict[str, Any] | None:
    return None if node is None else {"node": node.name, "shape": _shape(node)}


def _flow(site: Any) -> dict[str, Any] | None:
    return None if site is None else {"input": _shape(site.input), "output": _shape(site.output)}


def _splice(sites: Sites) -> dict[str, Any] | None:
    if sites.splice is None:
        return None
    return {"features": _shape(sites.splice.features), "into": _shape(sites.splice.node)}


def render_sites(data: dict[str, Any], plain: bool) -> RenderableType:
    """The page of `tokred sites`; pieces of a model that hold no blocks are counted alone."""
    graphs = data["graphs"]
    count = "one graph" if len(graphs) == 1 else f"{len(graphs)} graphs; a rule sees one graph at a time"
    parts: list[RenderableType] = [Text(f"{data['model']}: {count}", style="bold")]
    for number, graph in enumerate(graphs):
        if graph["stacks"] or len(graphs) == 1:
            parts += _page(number, graph, plain)
    others = [graph for graph in graphs if not graph["stacks"]]
    if others and len(graphs) > 1:
        calls = sum(graph["calls"] for graph in others)
        parts += [Text(), Text(f"{len(others)} graphs without transformer blocks: {calls} calls")]
    return Group(*parts)


def render_models(lines: Sequence[dict[str, str]], plain: bool) -> RenderableType:
    """The page of `tokred models`."""
    result = table("name", "kind", "source", "about", plain=plain)
    for line in lines:
        result.add_row(line["name"], line["kind"], line["source"], Text(line["about"]))
    return result


def _page(number: int, graph: dict[str, Any], plain: bool) -> list[RenderableType]:
    loose = graph["attention_without_a_stack"]
    title = f"graph {number}: {graph['calls']} calls, {graph['phase']}"
    title += f", attention on no residual stream: {loose}" if loose else ""
    parts: list[RenderableType] = [Text(), Text(title)]
    if not graph["stacks"]:
        return [*parts, Text("no transformer blocks")]
    parts += [_stacks(graph, plain)]
    parts += [Text(), _single(graph, plain)] if graph["sites"] else []
    numbers = ", ".join(f"{name} = {value}" for name, value in graph["numbers"].items())
    return [*parts, Text(), Text("addresses: " + ", ".join(graph["addresses"])), Text(f"numbers: {numbers}")]


def _stacks(graph: dict[str, Any], plain: bool) -> RenderableType:
    columns = ("stack", "blocks", "tokens", "width", "heads", "head size", "positions", "attention", "sees", "caches")
    result = table(*columns, "module", plain=plain)
    for stack in graph["stacks"]:
        unused = stack["blocks"] - 1 - stack["features"]
        blocks = f"{stack['blocks']}" + (f" (output from {stack['features']})" if unused else "")
        tokens = f"{stack['tokens']}" + (f" = {stack['token_parts']}" if stack["token_parts"] else "")
        words = (
            ", ".join(stack["positions"]) or "none",
            stack["attention"],
            _seen(stack),
            _cached(stack),
            stack["path"],
        )
        pairs = (_pair(stack["heads"], stack["kv_heads"]), _pair(stack["head_size"], stack["value_size"]))
        result.add_row(stack["stack"], blocks, tokens, str(stack["width"]), *pairs, *map(Text, words))
    return result


def _pair(query: Any, other: Any) -> str:
    return " / ".join(map(str, dict.fromkeys((query, other))))


def _seen(stack: dict[str, Any]) -> str:
    several = len(stack["sees"]) > 1
    parts = [each["keys"] + (f" (blocks {spans(each['blocks'])})" if several else "") for each in stack["sees"]]
    cross = stack["cross_attention"]
    if cross["blocks"]:
        where = "" if len(cross["blocks"]) == stack["blocks"] else f" (blocks {spans(cross['blocks'])})"
        parts.append(f"then another sequence of {cross['keys']}{where}")
    return "; ".join(parts)


def _cached(stack: dict[str, Any]) -> str:
    parts = []
    for each in stack["cache_shapes"]:
        shapes = " + ".join(dict.fromkeys(map(_text, each["shapes"])))
        where = f" (blocks {spans(each['blocks'])})" if len(each["blocks"]) < stack["blocks"] else ""
        parts.append(f"{len(each['blocks'])} × {shapes}{where}")
    return "; ".join(parts) or "–"


def _single(graph: dict[str, Any], plain: bool) -> RenderableType:
    result = table("site", "what it is", plain=plain)
    for name, site in graph["sites"].items():
        result.add_row(name, Text(", ".join(f"{key} {_text(value)}" for key, value in site.items())))
    return result
