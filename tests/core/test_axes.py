"""Token-axis inference: atoms, a rule for each operator, and random graphs against what really changes with T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from graphs import calls, results, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokcompile.axes import Atom, infer, product, resolve
from tokcompile.axes.atoms import divide, fresh, refine, regroup, same, unify, union

aten = torch.ops.aten
N = 4  # every dimension of the rule tests is this long: size can tell nothing


# Atoms.


def test_dimensions_that_an_operator_aligns_become_one() -> None:
    left, right = fresh(6), fresh(6)
    assert unify(left, right) and resolve(left) == resolve(right)


def test_dimensions_of_different_static_sizes_are_a_conflict() -> None:
    left, right = fresh(6), fresh(4)
    assert not unify(left, right) and resolve(left) != resolve(right)


def test_size_one_aligns_with_anything_and_says_nothing() -> None:
    dim = fresh(6)
    assert fresh(1) == () and unify((), dim) and unify(dim, ()) and resolve(dim) == dim


def test_a_product_refines_the_atom_that_it_is_aligned_with() -> None:
    whole, parts = fresh(12), (*fresh(3), *fresh(4))
    assert unify(whole, parts)
    assert resolve(whole) == parts and product(whole) == 12


def test_products_that_are_cut_elsewhere_refine_each_other() -> None:
    left, right = (*fresh(4), *fresh(6)), (*fresh(2), *fresh(12))
    assert unify(left, right)
    assert [a.size for a in resolve(left)] == [2, 2, 6] and resolve(left) == resolve(right)


def test_products_without_a_common_factor_cannot_be_aligned() -> None:
    assert not unify((*fresh(4), *fresh(9)), (*fresh(6), *fresh(6)))


def test_an_atom_cannot_be_a_part_of_itself() -> None:
    (atom,), (other,) = fresh(6), fresh(2)
    assert not refine(atom, (atom, other))
    assert refine(atom, (atom,))


def test_a_refined_atom_is_refined_wherever_it_stands() -> None:
    token = fresh(12)
    alias = fresh(12)
    unify(token, alias)
    refine(token[0], (*fresh(4), *fresh(3)))
    assert [a.size for a in resolve(alias)] == [4, 3]


def test_segments_of_aligned_concatenations_are_aligned() -> None:
    first, second = Atom(5), Atom(5)
    first.segments, second.segments = ((Atom(1),), (Atom(4),)), ((Atom(1),), (Atom(4),))
    assert union(first, second)
    assert resolve(first.segments[1]) == resolve(second.segments[1])


def test_slices_of_aligned_atoms_are_aligned() -> None:
    first, second = Atom(5), Atom(5)
    first.slices[0, 3], second.slices[0, 3] = Atom(3), Atom(3)
    union(first, second)
    assert first.slices[0, 3].root() is second.slices[0, 3].root()


def test_an_axis_after_an_edit_keeps_its_origin_when_aligned() -> None:
    old, new, plain = fresh(9), Atom(5), Atom(5)
    new.origin = old
    union(plain, new)
    assert plain.root().origin == old


def test_a_symbol_gives_way_to_the_size_that_it_is_aligned_with() -> None:
    symbol = sympy.Symbol("s0", integer=True)
    left, right = fresh(symbol), fresh(6)
    assert unify(left, right) and product(left) == 6


@pytest.mark.parametrize(
    ("left", "right", "ratio"),
    [
        (12, 4, 3),
        (12, 5, None),
        (sympy.Symbol("s") * 4, 4, sympy.Symbol("s")),
        (sympy.Symbol("s"), 2, None),
        (sympy.Symbol("s") * 4, sympy.Symbol("s"), 4),
    ],
)
def test_sizes_divide_only_when_whole(left: Any, right: Any, ratio: Any) -> None:
    assert divide(left, right) == ratio
    assert ratio is None or same(ratio * right, left)


def test_a_view_groups_the_same_atoms_anew() -> None:
    batch, token, wide = Atom(2), Atom(6), Atom(6)
    flat = regroup([(batch,), (token,), (wide,)], [12, 6])
    assert flat == [(batch, token), (wide,)]
    assert regroup(flat, [2, 6, 1, 6]) == [(batch,), (token,), (), (wide,)]


def test_a_view_that_splits_an_atom_refines_it() -> None:
    token = Atom(12)
    first, second = regroup([(token,)], [3, 4])
    assert resolve((token,)) == (*first, *second)


def test_a_view_that_does_not_factor_says_nothing() -> None:
    rows, columns = Atom(4), Atom(9)
    made = regroup([(rows,), (columns,)], [6, 6])
    assert [product(d) for d in made] == [6, 6]
    assert not {rows, columns} & {a for d in made for a in resolve(d)}


def test_symbolic_sizes_are_grouped_as_numbers_are() -> None:
    b, t = sympy.symbols("b t", integer=True, positive=True)
    batch, token = Atom(b), Atom(t)
    assert regroup([(batch,), (token,), (Atom(8),)], [b * t, 8])[0] == (batch, token)
    assert regroup([(batch, token)], [b, t]) == [(batch,), (token,)]


# Rules: letters name the dimensions of the inputs, a dot is an axis of its own, brackets are a product.


def _spelled(function: Callable[..., Any], inputs: str) -> str:
    """Spell the dimensions of the results in the letters of the inputs."""
    spelt = inputs.split()
    tensors = [torch.arange(N ** len(s)).reshape([N] * len(s)).remainder(N).float() for s in spelt]
    program = traced(function, *tensors)
    axes = infer(program.graph)
    letters: dict[Atom, str] = {}
    for node, names in zip((n for n in program.graph.nodes if n.op == "placeholder"), spelt, strict=True):
        for (atom,), name in zip(axes.of(node), names, strict=True):
            letters.setdefault(atom, name)
    assert not axes.unknown, axes.unknown
    return ", ".join(" ".join(_word(d, letters) for d in axes.of(node)) for node in results(program))


def _word(dim: tuple[Atom, ...], letters: dict[Atom, str]) -> str:
    word = "".join(letters.get(a, ".") for a in dim)
    return word if len(word) == 1 else f"({word})"


@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        pytest.param(lambda x, y: x + y, "btc tc", "b t c", id="pointwise-broadcasts-from-the-right"),
        pytest.param(lambda x, y: (x + y, y.exp()), "bt ut", "b t, b t", id="pointwise-aligns"),
        pytest.param(lambda x, w: F.linear(x, w), "btc kc", "b t k", id="linear"),
        pytest.param(lambda b, x, w: torch.addmm(b, x, w), "k tc ck", "t k", id="addmm"),
        pytest.param(lambda x, y: x @ y, "bhtc bhcs", "b h t s", id="matmul"),
        pytest.param(lambda x, y: x @ y, "btc ck", "b t k", id="matmul-broadcasts"),
        pytest.param(lambda x, y: x @ y, "btc c", "b t", id="matrix-vector"),
        pytest.param(lambda x, y: torch.bmm(x, y), "btc bck", "b t k", id="bmm"),
        pytest.param(lambda x: x.transpose(1, 2), "btc", "b c t", id="transpose"),
        pytest.param(lambda x: x.t(), "tc", "c t", id="t"),
        pytest.param(lambda x: x.mT, "btc", "b c t", id="mT"),
        pytest.param(lambda x: x.permute(2, 0, 1), "btc", "c b t", id="permute"),
        pytest.param(lambda x: x.unsqueeze(-1), "bt", "b t ()", id="unsqueeze"),
        pytest.param(lambda x: x.unsqueeze(0).squeeze(), "bt", "b t", id="squeeze"),
        pytest.param(lambda x: x.view(N * N, N), "btc", "(bt) c", id="view-merges"),
        pytest.param(lambda x: x.flatten(0, 1).unflatten(0, (N, N)), "btc", "b t c", id="unflatten-splits"),
        pytest.param(lambda x: x.transpose(0, 1).reshape(N * N, N), "btc", "(tb) c", id="reshape-follows-the-order"),
        pytest.param(lambda x: x[:, 0], "btc", "b c", id="select"),
        pytest.param(lambda x: x[:, -1:], "btc", "b () c", id="slice-of-one"),
        pytest.param(lambda x: x[:, 1:], "btc", "b . c", id="slice-is-another-axis"),
        pytest.param(lambda x, y: torch.cat([x, y], 1)[:, N:], "btc bsc", "b s c", id="slice-of-a-segment"),
        pytest.param(lambda x, y: torch.cat([x, y], 1), "btc bsc", "b . c", id="cat"),
        pytest.param(lambda x: torch.cat([x, x]), "tc", "(.t) c", id="cat-of-alike-is-a-count-and-the-axis"),
        pytest.param(lambda x: torch.cat([torch.ones(0), x]), "t", "t", id="cat-with-nothing"),
        pytest.param(lambda x, y: torch.stack([x, y], 1), "bt bt", "b . t", id="stack"),
        pytest.param(lambda x, y: torch.cat([x, y], 1).split([N, N], 1), "bt bs", "b t, b s", id="split"),
        pytest.param(lambda x: torch.stack([x, x]).unbind(0), "bt", "b t, b t", id="unbind"),
        pytest.param(lambda x: x.chunk(2, 0), "tc", ". c, . c", id="chunk"),
        pytest.param(lambda x: x[:, None].expand(N, N, N), "tc", "t . c", id="expand"),
        pytest.param(lambda x: x.sum(1), "btc", "b c", id="sum"),
        pytest.param(lambda x: x.mean(-1, keepdim=True), "btc", "b t ()", id="mean-keeps"),
        pytest.param(lambda x: x.amax((0, 2)), "btc", "t", id="amax-of-several"),
        pytest.param(lambda x: x.argmax(-1), "btc", "b t", id="argmax"),
        pytest.param(lambda x: (x > 0).any(-1), "bt", "b", id="any"),
        pytest.param(lambda i, w: F.embedding(i.long(), w), "bt vc", "b t c", id="embedding"),
        pytest.param(lambda x, i: x[i.long()], "tc bs", "b s c", id="index"),
        pytest.param(lambda x, i, j: x[i.long(), j.long()], "btc r r", "r c", id="index-by-two"),
        pytest.param(lambda x, i: x.gather(1, i.long()), "bt bs", "b s", id="gather"),
        pytest.param(lambda x: torch.arange(N)[None] + x, "bt", "b t", id="arange-takes-the-axis-it-is-added-to"),
        pytest.param(lambda x: x.cumsum(1).softmax(-1).flip(1), "btc", "b t c", id="along-an-axis"),
        pytest.param(lambda x, w: F.layer_norm(x, [N], w), "btc c", "b t c", id="layer-norm"),
        pytest.param(lambda x, m, f: x.masked_scatter(m > 0, f), "btc btc nc", "b t c", id="masked-scatter"),
        pytest.param(
            lambda x, m, f: (x.masked_scatter(m > 0, f), f.exp()),
            "btc btc nc",
            "b t c, b c",
            id="masked-scatter-gives-rows-equal-shares",
        ),
        pytest.param(
            lambda x: torch.cat([part.exp() for part in x.flatten(0, 1).split(N)]),
            "btc",
            "(bt) c",
            id="cat-of-all-pieces-of-a-split",
        ),
        pytest.param(
            lambda x: torch.cat([part.exp() for part in reversed(x.flatten(0, 1).split(N))]),
            "btc",
            "(.t) c",
            id="cat-of-pieces-in-another-order",
        ),
        pytest.param(lambda x, i: x[i.long().argsort()], "tc s", ". c", id="argsort-is-another-order"),
        pytest.param(
            lambda x, i: x[i.long()].exp()[i.long().argsort()],
            "tc s",
            ". c",
            id="argsort-of-other-numbers",
        ),
        pytest.param(
            lambda x, i: (lambda order: x[order].exp()[order.argsort()])(i.long()),
            "tc s",
            "t c",
            id="argsort-leads-back",
        ),
        pytest.param(lambda x, w: F.conv2d(x, w), "bchw kcyx", "b k () ()", id="conv2d"),
        pytest.param(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), "bhtd bhsd bhse", "b h t e", id="sdpa"),
        pytest.param(
            lambda q, k, v: (F.scaled_dot_product_attention(q, k, v), v.exp()),
            "bhtd bhsd bhre",
            "b h t e, b h s e",
            id="sdpa-aligns-values-with-keys",
        ),
        pytest.param(
            lambda q, m: (F.scaled_dot_product_attention(q, q, q, m), m.exp()),
            "bhtd bhxy",
            "b h t d, b h t t",
            id="sdpa-aligns-its-mask",
        ),
    ],
)
def test_a_rule_spells_its_result(function: Callable[..., Any], inputs: str, expected: str) -> None:
    assert _spelled(function, inputs) == expected


def test_a_bool_mask_picks_rows_of_another_number() -> None:
    program = traced(lambda x, m: x[m > 0].exp(), torch.zeros(4, 6), torch.zeros(4), dynamic=[[], [0]])
    axes = infer(program.graph)
    rows, columns = axes.of(results(program)[0])
    x, _ = (n for n in program.graph.nodes if n.op == "placeholder")
    assert rows and rows != axes.dim(x, 0) and columns == axes.dim(x, 1)


@pytest.mark.parametrize(
    ("pool", "channels", "tokens"),
    [
        pytest.param(lambda x: F.avg_pool2d(x, 2).flatten(2), "c", "hw", id="avg-pool"),
        pytest.param(lambda x: F.unfold(x, (2, 2), stride=2), "cyx", "hw", id="im2col"),
    ],
)
def test_windows_side_by_side_are_factors_of_rows_and_columns(pool: Any, channels: str, tokens: str) -> None:
    program = traced(lambda x: pool(x.reshape(2, 3, 8, 6)), torch.zeros(2, 3, 48))
    axes = infer(program.graph)
    (x,) = (n for n in program.graph.nodes if n.op == "placeholder")
    assert [a.size for a in axes.dim(x, 2)] == [4, 2, 3, 2]
    parts = dict(zip("hywx", axes.dim(x, 2), strict=True)) | {"c": axes.dim(x, 1)[0]}
    batch, first, last = axes.of(results(program)[0])
    assert batch == axes.dim(x, 0)
    assert (first, last) == (tuple(parts[c] for c in channels), tuple(parts[c] for c in tokens))


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param(lambda x: F.interpolate(x, size=(4, 3), mode="bilinear"), id="bilinear"),
        pytest.param(lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), id="nearest"),
        pytest.param(lambda x: F.interpolate(x, size=(5, 7), mode="bicubic"), id="bicubic"),
        pytest.param(lambda x: F.adaptive_avg_pool2d(x, (4, 3)), id="adaptive-pool"),
    ],
)
def test_grids_of_another_size_keep_images_and_channels(pool: Any) -> None:
    program = traced(lambda x: pool(x), torch.zeros(2, 3, 8, 6))
    axes = infer(program.graph)
    (x,) = (n for n in program.graph.nodes if n.op == "placeholder")
    (made,) = results(program)
    assert not axes.unknown and axes.of(made)[:2] == axes.of(x)[:2]
    assert not {a for dim in axes.of(made)[-2:] for a in dim} & {a for dim in axes.of(x) for a in dim}


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param(lambda x: F.avg_pool2d(x, 2, stride=1), id="overlapping"),
        pytest.param(lambda x: F.avg_pool2d(x, 2, padding=1), id="padded"),
        pytest.param(lambda x: F.avg_pool2d(x, 4), id="not-whole"),
        pytest.param(lambda x: F.unfold(x, (2, 2), stride=2, dilation=2), id="dilated"),
    ],
)
def test_other_windows_say_nothing(pool: Any) -> None:
    program = traced(lambda x: pool(x), torch.zeros(2, 3, 8, 6))
    axes = infer(program.graph)
    (x,) = (n for n in program.graph.nodes if n.op == "placeholder")
    assert [len(dim) for dim in axes.of(x)] == [1] * 4
    assert not {a for dim in axes.of(results(program)[0])[-2:] for a in dim} & {a for dim in axes.of(x) for a in dim}


def test_an_operator_without_a_rule_is_listed_and_says_nothing() -> None:
    program = traced(lambda x: x.unfold(1, 2, 1).exp(), torch.zeros(2, 6))
    axes = infer(program.graph)
    (unfold,) = calls(program, aten.unfold.default)
    assert axes.unknown == {unfold}
    assert not set(axes.dim(unfold, 1)) & set(axes.dim(next(iter(program.graph.nodes)), 1))


def test_the_operators_of_a_model_without_a_conflict_report_none() -> None:
    program = traced(lambda x, w: F.linear(x, w) @ F.linear(x, w).mT, torch.zeros(2, 6, 6), torch.zeros(6, 6))
    assert infer(program.graph).context.conflicts == []


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.reshape(x.shape[0] * x.shape[1], 8).reshape(x.shape),
        lambda x: (
            x.view(x.shape[0], -1, 2, 4)
            .transpose(1, 2)
            .flatten(2)
            .view(x.shape[0], 2, x.shape[1], 4)
            .transpose(1, 2)
            .flatten(2)
        ),
        lambda x: torch.cat([x, torch.ones(x.shape[0], 3, 8)], 1)[:, : x.shape[1]],
        lambda x: x * torch.arange(x.shape[1])[:, None],
        lambda x: (x @ x.mT).softmax(-1) @ x,
    ],
    ids=["flatten", "heads", "segment", "arange", "attention"],
)
def test_symbolic_batch_and_length_are_followed(function: Callable[..., Any]) -> None:
    program = traced(function, torch.zeros(2, 6, 8), dynamic=[(0, 1)])
    axes = infer(program.graph)
    start = next(iter(program.graph.nodes))
    (end,) = results(program)
    assert axes.of(end)[:2] == axes.of(start)[:2]


# Random graphs.

HEADS = 2


class Walk:
    """A random chain of operators on one value, as instructions that run on tensors of any T.

    `words` says what each dimension is made of: this only steers the choice of operators that are legal.
    """

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.words: list[tuple[str, ...]] = [("B",), ("T",), ("C",)]
        self.steps: list[Callable[[Tensor], Tensor]] = []

    def pick(self, spots: list[int]) -> int:
        return self.draw(st.sampled_from(spots))

    def add(self, step: Callable[[Tensor], Tensor], words: list[tuple[str, ...]]) -> None:
        self.steps.append(step)
        self.words = words

    def spots(self, test: Callable[[tuple[str, ...]], bool]) -> list[int]:
        return [i for i, word in enumerate(self.words) if test(word)]

    def grow(self) -> None:
        """Append one operator, if the one drawn is legal here."""
        getattr(self, self.draw(st.sampled_from(OPERATORS)))()

    def _transpose(self) -> None:
        i, j = self.pick([*range(len(self.words))]), self.pick([*range(len(self.words))])
        words = list(self.words)
        words[i], words[j] = words[j], words[i]
        self.add(lambda x: x.transpose(i, j), words)

    def _permute(self) -> None:
        order = self.draw(st.permutations(range(len(self.words))))
        self.add(lambda x: x.permute(order), [self.words[i] for i in order])

    def _merge(self) -> None:
        if len(self.words) > 1:
            i = self.pick([*range(len(self.words) - 1)])
            self.add(
                lambda x: x.flatten(i, i + 1),
                [*self.words[:i], self.words[i] + self.words[i + 1], *self.words[i + 2 :]],
            )

    def _split(self) -> None:
        """Take a product apart again, by a view that names all sizes but one."""
        spots = self.spots(lambda word: len(word) > 1 and word.count("T") < 2)
        if spots and len(self.words) < 6:
            i = self.pick(spots)
            first, rest = self.words[i][:1], self.words[i][1:]
            lead = "T" in first
            size = SIZES[(rest if lead else first)[0]] if not lead else _size(rest)
            self.add(
                lambda x: x.reshape(*x.shape[:i], *((-1, size) if lead else (size, -1)), *x.shape[i + 1 :]),
                [*self.words[:i], first, rest, *self.words[i + 1 :]],
            )

    def _heads(self) -> None:
        if self.words[-1] == ("C",) and len(self.words) < 6:
            self.add(
                lambda x: (
                    x.view(*x.shape[:-1], HEADS, -1) if x.is_contiguous() else x.reshape(*x.shape[:-1], HEADS, -1)
                ),
                [*self.words[:-1], ("H",), ("D",)],
            )

    def _unsqueeze(self) -> None:
        i = self.pick([*range(len(self.words) + 1)])
        if len(self.words) < 6:
            self.add(lambda x: x.unsqueeze(i), [*self.words[:i], (), *self.words[i:]])

    def _squeeze(self) -> None:
        spots = self.spots(lambda word: word == ())
        if spots:
            i = self.pick(spots)
            self.add(lambda x: x.squeeze(i), [*self.words[:i], *self.words[i + 1 :]])

    def _expand(self) -> None:
        spots = self.spots(lambda word: word == ())
        if spots:
            i = self.pick(spots)
            self.add(
                lambda x: x.expand(*x.shape[:i], SIZES["C"], *x.shape[i + 1 :]),
                [*self.words[:i], ("C",), *self.words[i + 1 :]],
            )

    def _pointwise(self) -> None:
        """A table over the last dimension, made from its size."""
        self.add(lambda x: x * torch.arange(x.shape[-1]).cos() + 1, self.words)

    def _residual(self) -> None:
        self.add(lambda x: x + x.mean(-1, keepdim=True), self.words)

    def _linear(self) -> None:
        if self.words[-1] in (("C",), ("D",), ("K",)):
            self.add(lambda x: F.linear(x, torch.ones(SIZES["K"], x.shape[-1])), [*self.words[:-1], ("K",)])

    def _norm(self) -> None:
        if self.words[-1] and "T" not in self.words[-1]:
            self.add(lambda x: F.layer_norm(x, x.shape[-1:]), self.words)

    def _matmul(self) -> None:
        if len(self.words) > 1:
            self.add(lambda x: x @ x.mT, [*self.words[:-1], self.words[-2]])

    def _softmax(self) -> None:
        self.add(lambda x: x.softmax(-1), self.words)

    def _causal(self) -> None:
        if self.words[-2:] == [("T",), ("T",)]:
            self.add(
                lambda x: x.masked_fill(torch.arange(x.shape[-1]) > torch.arange(x.shape[-2])[:, None], -9.0),
                self.words,
            )

    def _sdpa(self) -> None:
        if len(self.words) == 4:
            self.add(lambda x: F.scaled_dot_product_attention(x, x, x), self.words)

    def _cat_and_back(self) -> None:
        spots = self.spots(bool)
        if spots:
            i = self.pick(spots)
            self.add(lambda x: aten.slice(torch.cat([aten.slice(x, i, 0, 1), x], i), i, 1, x.shape[i] + 1), self.words)

    def _twice(self) -> None:
        self.add(lambda x: torch.cat([x, x]), [("P", *self.words[0]), *self.words[1:]])

    def _stack(self) -> None:
        if len(self.words) < 6:
            i = self.pick([*range(len(self.words) + 1)])
            self.add(lambda x: torch.stack([x, -x], i), [*self.words[:i], ("P",), *self.words[i:]])

    def _reduce(self) -> None:
        if len(self.words) > 1:
            i, keep = self.pick([*range(len(self.words))]), self.draw(st.booleans())
            self.add(lambda x: x.sum(i, keepdim=keep), [*self.words[:i], *([()] if keep else []), *self.words[i + 1 :]])

    def _select(self) -> None:
        if len(self.words) > 1:
            i = self.pick([*range(len(self.words))])
            self.add(lambda x: x.select(i, -1), [*self.words[:i], *self.words[i + 1 :]])

    def _embedding(self) -> None:
        if len(self.words) < 5:
            self.add(lambda x: F.embedding((x > 0).long(), torch.ones(2, SIZES["C"])), [*self.words, ("C",)])

    def _where(self) -> None:
        self.add(lambda x: torch.where(x > 0, x, torch.zeros_like(x)).cumsum(-1), self.words)


OPERATORS = sorted(n for n in vars(Walk) if n.startswith("_") and not n.startswith("__"))
SIZES = {"B": 2, "C": 6, "H": HEADS, "D": 3, "K": 6, "P": 2}


def _size(word: tuple[str, ...]) -> int:
    total = 1
    for letter in word:
        total *= SIZES[letter]
    return total


def _run(steps: list[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    out = []
    for step in steps:
        x = step(x)
        out.append(x)
    return out


@settings(max_examples=150)
@given(st.data())
def test_random_graphs_count_tokens_where_the_result_really_grows_with_them(data: st.DataObject) -> None:
    """T equals the width (6), the batch (2) or the heads (2), or none: only what an operator does can tell."""
    walk = Walk(data.draw)
    for _ in range(data.draw(st.integers(1, 10))):
        walk.grow()
    if not walk.steps:
        return
    tokens = data.draw(st.sampled_from([2, 3, 6, 12]))
    program = traced(lambda x: _run(walk.steps, x), torch.rand(2, tokens, 6))
    longer = _run(walk.steps, torch.rand(2, tokens * 5, 6))
    axes = infer(program.graph)
    token = axes.dim(next(iter(program.graph.nodes)), 1)
    assert not axes.unknown
    assert not axes.context.conflicts
    for node, grown in zip(results(program), longer, strict=True):
        sizes = node.meta["val"].shape
        grows = [i for i, (a, b) in enumerate(zip(sizes, grown.shape, strict=True)) if a != b]
        assert axes.where(node, token) == grows, program.gm.code
