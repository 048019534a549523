"""Token maps on graphs: what an edit changes, as text to review; and that a cut is right or refused, on any graph."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fleet
import pytest
import torch
import torch.nn.functional as F
import transformers
from graphs import calls, traced
from harness import difference
from torch import Tensor

from tokcompile.capturing.capture import capture
from tokcompile.dump import as_text
from tokcompile.editing.edit import Editor
from tokcompile.editing.tokenmap import make_map
from tokcompile.editing.transport import Transport
from tokcompile.errors import EditError
from tokcompile.pipeline import apply_rules
from tokcompile.program import Program
from tokcompile.rulefile import load_rule, parse_rules
from tokcompile.sites import find_sites
from tokcompile.verify import verify

aten = torch.ops.aten
GOLDEN = Path(__file__).parents[1] / "golden"
WRITTEN_UNDER = "5.23"
"""The transformers whose graphs are in `GOLDEN`."""


# What each rule changes, line by line.


def _short(text: str) -> str:
    """Names of parameters without the modules that they pass through."""
    for long, short in (
        ("l_self_modules_model_modules_", ""),
        ("language_model_modules_", "text."),
        ("vision_tower_modules_", "vision."),
        ("_modules_", "."),
        ("_parameters_", "."),
        ("_buffers_", "."),
    ):
        text = text.replace(long, short)
    return text


def _lines(program: Program) -> dict[str, str]:
    """The readable line of each node, by its name."""
    return {n.name: _short(as_text([n], modules=False)) for n in program.graph.nodes}


def _changed(before: dict[str, str], after: dict[str, str]) -> str:
    """Lines that an edit made (`+`), and those whose operator or arguments it changed (`~`), in graph order."""
    out = []
    for name, line in after.items():
        if name not in before:
            out.append("+ " + line)
        elif line.partition(" = ")[2] != before[name].partition(" = ")[2]:
            out.append("~ " + line)
    return "".join(out)


GOLDENS = {
    "fastv": ({"rule": "fastv", "keep": 5}, {"inserted": 22, "rewired": 8, "repaired": 9}),
    "hiprune": ({"rule": "hiprune", "keep": 5, "alpha": 1.0}, {"inserted": 43, "rewired": 18, "repaired": 27}),
    "random": ({"rule": "random", "keep": 5}, {"inserted": 35, "rewired": 18, "repaired": 27}),
    "divprune": ({"rule": "divprune", "keep": 5}, {"inserted": 38, "rewired": 18, "repaired": 27}),
    "visionzip": (
        {"rule": "visionzip", "dominant": 4, "contextual": 2},
        {"inserted": 65, "rewired": 18, "repaired": 27},
    ),
    "pospad": ({"rule": "pospad", "keep": 5}, {"inserted": 47, "rewired": 24, "repaired": 30}),
    "meta_tokens": (
        {"rule": "meta_tokens", "share": 0.25, "layers": 0},
        {"inserted": 42, "rewired": 19, "repaired": 27},
    ),
    "v2pe": ({"rule": "v2pe"}, {"inserted": 18, "rewired": 12}),
    "rope_scaling": ({"rule": "rope_scaling", "factor": 2.0}, {"inserted": 16, "rewired": 3}),
}


@pytest.mark.skipif(
    not transformers.__version__.startswith(f"{WRITTEN_UNDER}."),
    reason=f"transformers {WRITTEN_UNDER}, of which the texts are, makes rotary tables and heads by other operators",
)
@pytest.mark.parametrize("name", GOLDENS)
def test_a_rule_changes_the_lines_of_its_golden_text(name: str) -> None:
    """TOKRED_REGENERATE=1 writes the text anew; read the difference before it is committed."""
    options, counts = GOLDENS[name]
    model = fleet.shared("llava")
    (program,) = capture(model, fleet.example(model))
    before = _lines(program)
    (applied,) = apply_rules(program, parse_rules(options))
    text = _changed(before, _lines(program))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("TOKRED_REGENERATE"):
        path.write_text(text)
    assert text == path.read_text()
    assert dict(applied.counts) == counts


def test_every_node_that_a_rule_makes_is_stamped_with_its_name_and_place() -> None:
    model = fleet.shared("llava")
    (program,) = capture(model, fleet.example(model))
    before = set(program.graph.nodes)
    apply_rules(program, parse_rules({"rule": "fastv", "keep": 5}))
    made = [n for n in program.graph.nodes if n not in before]
    assert made and all(n.meta["custom"]["tokred"] == "fastv" for n in made)
    rule = load_rule("fastv")
    steps = {f"{rule.path}:{step.line} ({step.verb})" for step in rule.steps}
    assert {n.meta["custom"]["tokred_step"] for n in made} == steps
    (cut,) = {n.meta["custom"]["tokred_step"] for n in made if n.target is torch.ops.tokred.kept_indices.default}
    assert cut.endswith("(drop)")
    assert all("val" in n.meta for n in made)


def test_a_rule_that_keeps_everything_changes_nothing() -> None:
    model = fleet.shared("llava")
    (program,) = capture(model, fleet.example(model))
    before = _lines(program)
    (applied,) = apply_rules(program, parse_rules({"rule": "fastv", "keep": 1.0}))
    assert _changed(before, _lines(program)) == "" and applied.steps[-1]["note"] == "everything is kept: no edit"


# A cut at the input of any graph.

KEPT = [[0, 2, 3, 5], [1, 2, 4, 5]]
TOKENS, WIDE = 6, 6


class Refused(Exception):
    """The edit, or the check that it left in the graph, said no."""


def cut(function: Callable[..., Any], x: Tensor, kept: list[list[int]], *more: Tensor) -> Any:
    """Trace a function of [B, T, C] and other inputs, cut its first, verify, and run what came out."""
    keep = torch.zeros(x.shape[:2], dtype=torch.bool)
    for row, chosen in enumerate(kept):
        keep[row, chosen] = True
    program = traced(lambda x, keep, *more: function(x, *more), x, keep, *more)
    value, mask = list(program.graph.nodes)[:2]
    editor = Editor(program, "test", Counter())
    transport = Transport(editor, find_sites(program))
    rows, axis, _ = program.axes.of(value)
    try:
        with editor.after([value, mask]):
            token_map = make_map(transport.editor, mask, axis, rows, x.shape[1], len(kept[0]), "keep")
        transport.apply(value, token_map)
        program.graph.eliminate_dead_code()
        program.changed()
        verify(program)
    except EditError as error:
        raise Refused(error.cause) from error
    program.gm.recompile()
    try:
        return program.gm(x, keep, *more)
    except RuntimeError as error:
        if "dropped token is read by its place" in str(error):
            raise Refused(str(error)) from error
        raise


def test_the_verifier_compares_repeated_operators_too() -> None:
    """Those of the same shapes run once; each is compared with what it claims."""
    program = traced(lambda x: (x.relu() * 2).relu() * 3, torch.rand(2, 3))
    second = calls(program, aten.relu.default)[1]
    verify(program)
    with program.fake_mode:
        second.meta["val"] = torch.empty(2, 4)
    with pytest.raises(EditError, match="another shape") as caught:
        verify(program)
    assert second.name in caught.value.where[0]


def reduced(x: Tensor, kept: list[list[int]]) -> Tensor:
    """The rows with their kept tokens alone."""
    return torch.stack([row[chosen] for row, chosen in zip(x, kept, strict=True)])


X = torch.rand(2, TOKENS, WIDE, generator=torch.Generator().manual_seed(0)) - 0.5
W = torch.rand(WIDE, WIDE, generator=torch.Generator().manual_seed(1)) - 0.5
INDEX = torch.tensor([4, 1])


def _heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 2, 3).transpose(1, 2)


def _by_expert(x: Tensor, w: Tensor) -> Tensor:
    """Each token goes to two experts, sorted by expert on the way, as a mixture of experts does."""
    flat = x.reshape(-1, WIDE)
    weights, experts = (flat @ w).softmax(-1).topk(2, -1)
    order = experts.reshape(-1).sort().indices
    sorted_rows = flat[order // 2] * weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return sorted_rows[back].view(flat.shape[0], 2, WIDE).sum(1).reshape(x.shape)


def _written(x: Tensor, w: Tensor, i: Tensor) -> Tensor:
    out = x.clone()
    out[:, i] = w[0]
    return out


def _filled(x: Tensor) -> Tensor:
    """Rows are overwritten in place, and read under the name that they had before."""
    doubled = x * 2
    doubled.masked_fill_(x[:, :, :1] > 0, -1.0)
    return doubled + x


FOLLOWED = {
    "pointwise": lambda x, w, i: x.relu() * 2 + x,
    "linear-on-flat-rows": lambda x, w, i: F.linear(x.reshape(-1, WIDE), w).view(x.shape),
    "attention-by-heads": lambda x, w, i: (
        F.scaled_dot_product_attention(_heads(x), _heads(x), _heads(x)).transpose(1, 2).reshape(x.shape)
    ),
    "attention-with-a-causal-mask": lambda x, w, i: F.scaled_dot_product_attention(
        _heads(x), _heads(x), _heads(x), torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool).tril()
    ),
    "written-attention": lambda x, w, i: (x @ x.mT).softmax(-1) @ x,
    "mean-over-tokens": lambda x, w, i: x.mean(1),
    "expand": lambda x, w, i: (x[:, :, None].expand(-1, -1, 2, -1) * 2).flatten(2),
    "stack-and-unbind": lambda x, w, i: torch.stack([x, -x]).unbind(0)[1],
    "split-of-features": lambda x, w, i: torch.cat(x.split([2, 4], -1)[::-1], -1),
    "last-token": lambda x, w, i: x[:, -1],
    "norm": lambda x, w, i: F.layer_norm(x, [WIDE], w[0]),
    "new-ones": lambda x, w, i: x * x.new_ones(x.shape[:2])[..., None],
    "cumulative": lambda x, w, i: x.cumsum(1),
    "joined": lambda x, w, i: torch.cat([torch.zeros(2, 1, WIDE), x, torch.ones(2, 2, WIDE)], 1).cumsum(1),
    "a-sink": lambda x, w, i: torch.cat([x @ x.mT, w[:1, :1].expand(2, x.shape[1], 1)], -1).softmax(-1)[..., :-1] @ x,
    "sorted": lambda x, w, i: x.sort(1).values,
    "sorted-and-back": lambda x, w, i: _by_expert(x, w),
    "filled-in-place": lambda x, w, i: _filled(x),
    "flip-of-features": lambda x, w, i: x.flip(2),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_cut_gives_what_the_function_gives_on_the_reduced_sequence(name: str) -> None:
    function = FOLLOWED[name]
    assert difference(cut(function, X, KEPT, W, INDEX), function(reduced(X, KEPT), W, INDEX)) == 0


RANGES = {
    "first": lambda x: x[:, :1],
    "second": lambda x: x[:, 1:2],
    "last": lambda x: x[:, x.shape[1] - 1 :],
    "all-but-the-last": lambda x: x[:, : x.shape[1] - 1].relu(),
    "all-by-their-number": lambda x: x[:, : x.shape[1]].relu(),
    "the-same-twice": lambda x: x[:, 1:].cos() * x[:, 1:],
    "apart-and-joined-again": lambda x: torch.cat([x[:, :1], x[:, 1:].cos()], 1) * x,
    "apart-at-both-ends": lambda x: torch.cat([x[:, :1] * 2, x[:, 1:-1].cos(), x[:, -1:]], 1) * x,
    "apart-and-joined-with-others": lambda x: torch.cat([torch.zeros(2, 3, WIDE), x[:, 1:].cos()], 1),
    "joined-with-others-twice": lambda x: torch.cat([_ones(x), x], 1) * torch.cat([_ones(x) * 2, x.cos()], 1),
}


def _ones(x: Tensor) -> Tensor:
    return torch.ones(2, 1, WIDE, dtype=x.dtype)


@pytest.mark.parametrize("name", RANGES)
def test_a_range_at_an_end_follows_a_cut_that_leaves_the_ends(name: str) -> None:
    kept = [[0, 1, 3, 5], [0, 1, 4, 5]]
    assert difference(cut(RANGES[name], X, kept), RANGES[name](reduced(X, kept))) == 0


SHIFTED = {
    "the-first-last": lambda x: torch.cat([x[:, 1:], x[:, :1]], 1) * x,
    "joined-at-different-ends": lambda x: torch.cat([_ones(x), x], 1) * torch.cat([x, _ones(x)], 1),
    "without-different-ends": lambda x: x[:, 1:] * x[:, :-1],
}


@pytest.mark.parametrize("name", SHIFTED)
def test_tokens_that_meet_their_neighbours_are_refused(name: str) -> None:
    with pytest.raises(Refused, match="different places|position|takes"):
        cut(SHIFTED[name], X, [[0, 1, 3, 5], [0, 1, 4, 5]])


def test_a_table_made_from_places_is_gathered_not_made_anew() -> None:
    def function(x: Tensor, places: Tensor | None = None) -> Tensor:
        places = torch.arange(x.shape[1]) if places is None else places
        return x * places.float().cos()[..., None]

    expected = function(reduced(X, KEPT), torch.tensor(KEPT))
    assert difference(cut(function, X, KEPT), expected) == 0


BIAS = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(2))
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
TABLE = torch.rand(TOKENS, 3, generator=torch.Generator().manual_seed(3))
SHARED = {
    "bias": (lambda x, bias: (x @ x.mT + bias).softmax(-1) @ x, BIAS, lambda t, k: t[k][:, k]),
    "mask": (
        lambda x, mask: F.scaled_dot_product_attention(_heads(x), _heads(x), _heads(x), mask),
        CAUSAL,
        lambda t, k: t[k][:, k],
    ),
    "table": (lambda x, table: _heads(x) * table, TABLE, lambda t, k: t[k]),
    "table-for-all-heads": (lambda x, table: _heads(x) * table[None, None], TABLE, lambda t, k: t[k]),
    "table-for-one-row": (lambda x, table: x * table.repeat(1, 2)[None], TABLE, lambda t, k: t[k]),
}


@pytest.mark.parametrize("name", SHARED)
def test_each_row_of_a_shared_value_follows_its_own_tokens(name: str) -> None:
    """There are as many heads as rows: a batch dimension put in the wrong place fits all the same."""
    function, value, take = SHARED[name]
    expected = [function(row[None], take(value, k)) for row, k in zip(reduced(X, KEPT), KEPT, strict=True)]
    assert difference(cut(function, X, KEPT, value), torch.cat(expected)) <= 1e-6


def test_a_sequence_of_one_row_without_a_batch_atom() -> None:
    def function(x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x * torch.arange(TOKENS)[None, -x.shape[1] :, None].sign()

    out = cut(function, X[:1], [[0, 2, 3, 5]])
    assert out.shape == (1, 4, WIDE)


REFUSED = {
    "convolution-over-tokens": lambda x, w, i: F.conv1d(x.mT, w[:, :, None].expand(-1, -1, 3), padding=1).mT,
    "convolution-over-a-grid": lambda x, w, i: F.conv2d(x[:, None], torch.ones(1, 1, 1, 3), padding=(0, 1))[:, 0],
    "pool-over-tokens": lambda x, w, i: F.avg_pool2d(x[:, None], (3, 1), (1, 1), (1, 0))[:, 0],
    "resampled-over-tokens": lambda x, w, i: F.interpolate(x[:, None], size=(3, WIDE), mode="bilinear")[:, 0],
    "adaptive-pool-over-tokens": lambda x, w, i: F.adaptive_avg_pool2d(x[:, None], (3, WIDE))[:, 0],
    "ranks": lambda x, w, i: x[:, :, 0].argsort(1),
    "index": lambda x, w, i: x[:, i],
    "index-by-rows": lambda x, w, i: x[torch.arange(2), i],
    "gather": lambda x, w, i: x.gather(1, i[:, None, None].expand(2, 1, WIDE)),
    "index-select": lambda x, w, i: x.index_select(1, i),
    "argmax": lambda x, w, i: x.argmax(1),
    "unbind": lambda x, w, i: x.unbind(1)[3],
    "split": lambda x, w, i: x.split(3, 1)[1],
    "chunk": lambda x, w, i: x.chunk(2, 1)[0],
    "flip": lambda x, w, i: x.flip(1),
    "roll": lambda x, w, i: x.roll(1, 1),
    "every-other": lambda x, w, i: x[:, ::2],
    "middle": lambda x, w, i: x[:, 2:4],
    "joined-with-itself": lambda x, w, i: torch.cat([x, x], 1)[:, :7],
    "convolution": lambda x, w, i: F.conv1d(x.mT, w[:, :, None].expand(WIDE, WIDE, 3), padding=1),
    "triangle": lambda x, w, i: x.tril(),
    "scatter": lambda x, w, i: x.scatter(1, i[:, None, None], 1.0),
    "patches": lambda x, w, i: x.view(2, 2, 3, WIDE).transpose(1, 2),
    "table": lambda x, w, i: F.embedding(i, x[0]),
    "first-of-a-sorted-order": lambda x, w, i: x.sum(-1).sort(1).values[:, :2],
    "rows-in-a-sorted-order": lambda x, w, i: x.sum(-1).reshape(-1).sort().values[:8] * torch.arange(8),
    "values-for-a-sorted-order": lambda x, w, i: x.sum(-1).reshape(-1).sort().values * torch.arange(12),
    "written-by-number": lambda x, w, i: _written(x, w, i),
    "dropped-first": lambda x, w, i: x[:, :2],
    "a-dropped-token": lambda x, w, i: x[:, 3] * 2,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_depends_on_places_is_refused_or_right(name: str) -> None:
    """Each of these reads tokens by number: on the shorter sequence it would quietly read others."""
    kept = [[0, 2, 4, 5], [1, 2, 4, 5]]
    with pytest.raises(Refused):
        cut(REFUSED[name], X, kept, W, INDEX)


def test_the_cut_of_a_value_without_the_axis_is_refused() -> None:
    program = traced(lambda x, keep: x.sum(1), X, torch.ones(2, TOKENS, dtype=torch.bool))
    value, mask = list(program.graph.nodes)[:2]
    (total,) = calls(program, aten.sum.dim_IntList)
    editor = Editor(program, "test", Counter())
    transport = Transport(editor, find_sites(program))
    rows, axis, _ = program.axes.of(value)
    with editor.after([value, mask]):
        token_map = make_map(transport.editor, mask, axis, rows, TOKENS, 4, "keep")
    with pytest.raises(EditError, match="does not hold the token axis once"):
        transport.apply(total, token_map)


def test_a_row_that_keeps_another_number_of_tokens_fails_when_run() -> None:
    def run(kept: list[list[int]]) -> Any:
        keep = torch.zeros(2, TOKENS, dtype=torch.bool)
        for row, chosen in enumerate(kept):
            keep[row, chosen] = True
        program = traced(lambda x, keep: x.relu(), X, keep)
        value, mask = list(program.graph.nodes)[:2]
        editor = Editor(program, "test", Counter())
        transport = Transport(editor, find_sites(program))
        rows, axis, _ = program.axes.of(value)
        with editor.after([value, mask]):
            token_map = make_map(transport.editor, mask, axis, rows, TOKENS, 4, "keep")
        transport.apply(value, token_map)
        program.gm.recompile()
        return program.gm(X, keep)

    assert run(KEPT).shape == (2, 4, WIDE)
    with pytest.raises(RuntimeError, match="different numbers"):
        run([[0, 1, 2], [0, 1, 2, 3, 4]])
