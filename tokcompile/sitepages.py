"""What `tokred sites` shows: what a rule may address in a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from torch.fx import Node

from tokcompile.flops import concrete
from tokcompile.program import Program
from tokcompile.rulepages import table
from tokcompile.sites import Block, Sites, Stack, addresses, find_sites


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
        "stacks": [_stack(name, stack, sites) for name, stack in sites.stacks.items()],
        "sites": {key: value for key, value in single.items() if value is not None},
        "attention_without_a_stack": len(sites.loose),
        "addresses": addresses(sites),
    }


def _stack(name: str, stack: Stack, sites: Sites) -> dict[str, Any]:
    first = stack.blocks[0]
    query, key = _shape(first.attention.query), _shape(first.attention.key)
    rotary = sites.rotary.get(name, [])
    # Written-out attention may hand over keys that were repeated for each query head: the cache knows better.
    cached = [sites.caches[b] for b in stack.blocks if b in sites.caches]
    return {
        "stack": name,
        "blocks": len(stack.blocks),
        "features": stack.features,
        "path": _path(stack.blocks),
        "tokens": _shape(first.input)[1],
        "width": _shape(first.input)[-1],
        "heads": query[1],
        "kv_heads": _shape(cached[0].key)[1] if cached else key[1],
        "head_size": query[-1],
        "positions": [f"rotary from '{r.positions.name}' {_shape(r.positions)}" for r in rotary],
        "attention": _attention(stack.blocks),
        "caches": len(cached),
        "cache_shape": _shape(cached[0].key) if cached else None,
    }


def _attention(blocks: Sequence[Block]) -> str:
    first = blocks[0].attention
    call = str(first.node.target).removesuffix(".default").replace(".", "::", 1)
    kind = call if "attention" in call else "written out"
    extra = ["causal"] if first.is_causal else []
    extra += [f"mask {_shape(first.mask)}"] if first.mask is not None else []
    extra += ["padding mask"] if first.padding is not None else []
    extra += [f"softcap {first.softcap:g}"] if first.softcap else []
    return ", ".join([kind, *extra])


def _path(blocks: Sequence[Block]) -> str:
    first, last = blocks[0].path, blocks[-1].path
    head, _, number = first.rpartition(".")
    end = last.rpartition(".")[2]
    return f"{head}.{number}..{end}" if len(blocks) > 1 and number.isdigit() and end.isdigit() else first


def _shape(node: Node) -> list[int]:
    return [concrete(n) for n in node.meta["val"].shape]


def _node(node: Node | None) -> dict[str, Any] | None:
    return None if node is None else {"node": node.name, "shape": _shape(node)}


def _flow(site: Any) -> dict[str, Any] | None:
    return None if site is None else {"input": _shape(site.input), "output": _shape(site.output)}


def _splice(sites: Sites) -> dict[str, Any] | None:
    if sites.splice is None:
        return None
    return {"features": _shape(sites.splice.features), "into": _shape(sites.splice.node)}


def render_sites(data: dict[str, Any], plain: bool) -> RenderableType:
    """The page of `tokred sites`."""
    graphs = data["graphs"]
    count = "one graph" if len(graphs) == 1 else f"{len(graphs)} graphs; a rule sees one graph at a time"
    parts: list[RenderableType] = [Text(f"{data['model']}: {count}", style="bold")]
    for number, graph in enumerate(graphs):
        loose = graph["attention_without_a_stack"]
        title = f"graph {number}: {graph['calls']} calls, {graph['phase']}"
        parts += [Text(), Text(title + (f", {loose} attention sites on no residual stream" if loose else ""))]
        parts += [_stacks(graph, plain), _single(graph, plain)] if graph["stacks"] else [Text("no transformer blocks")]
        if graph["addresses"]:
            parts += [Text(), Text("addresses: " + ", ".join(graph["addresses"]))]
    return Group(*parts)


def _stacks(graph: dict[str, Any], plain: bool) -> RenderableType:
    result = table(
        "stack", "blocks", "tokens", "width", "heads", "size", "positions", "attention", "caches", "module", plain=plain
    )
    for stack in graph["stacks"]:
        unused = stack["blocks"] - 1 - stack["features"]
        blocks = f"{stack['blocks']}" + (f" (output from {stack['features']})" if unused else "")
        heads = " / ".join(map(str, dict.fromkeys((stack["heads"], stack["kv_heads"]))))
        cache = f"{stack['caches']} × {stack['cache_shape']}" if stack["caches"] else "–"
        sizes = (str(stack[key]) for key in ("tokens", "width"))
        words = (", ".join(stack["positions"]) or "in the embeddings", stack["attention"], cache, stack["path"])
        result.add_row(stack["stack"], blocks, *sizes, heads, str(stack["head_size"]), *map(Text, words))
    return result


def _single(graph: dict[str, Any], plain: bool) -> RenderableType:
    result = table("site", "what it is", plain=plain)
    for name, site in graph["sites"].items():
        result.add_row(name, Text(", ".join(f"{key} {value}" for key, value in site.items())))
    return result
