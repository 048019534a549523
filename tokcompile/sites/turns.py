"""Where rotary tables turn queries and keys: the products with cosines and sines, and what each column of these holds.

What a table holds is found by running the few operators between the angles and a product on numbers that name each
frequency, with cosine and sine left out. So half rotations, neighbouring pairs, a part of each head, and sections of
coordinates are one case.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.errors import EditError
from tokcompile.program import Program, place
from tokcompile.sites.find import Sites
from tokcompile.sites.reach import Reach

aten = torch.ops.aten
_CASTS = {aten.to.dtype, aten.to.device, aten._to_copy.default}
_MOVES = _CASTS | {
    aten.unsqueeze.default,
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten.clone.default,
    aten.contiguous.default,
}
_WAVES = {aten.cos.default: "cos", aten.sin.default: "sin"}
_GATHER = torch.ops.tokred.gather_tokens.default
_LAYER = torch.ops.tokred.flagged_tokens.default


@dataclass(frozen=True, eq=False)
class Turn:
    """A product of queries or keys with a table of cosines or sines.

    Attributes:
        node: the product.
        table, value: its factors; the value is [B, H, T, W] or [B, T, H, W].
        wave: `cos` or `sin`.
        coordinates, pairs: for each column of the table the coordinate that its position is of, and its frequency.
        scale: what all cosines and sines are multiplied by.
        via: `source` of the token maps that the table went through, in order.
    """

    node: Node
    table: Node
    value: Node
    wave: str
    coordinates: tuple[int, ...]
    pairs: tuple[int, ...]
    scale: float
    via: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Frequencies:
    """Angles that are products of positions and frequencies.

    Attributes:
        positions: integers, or floats that hold some, [.., T, ..] with sizes of 1 beside rows, tokens and coordinates.
        tokens: dimension of `positions` that counts tokens.
        inverse: the frequencies, floats [P].
        angles: their product.
        coordinates: how many positions each token has, 3 for time, height and width.
        turns: the products that read them, in graph order.
        layers: readers that belong to layers of rules, which are no turns of the stack's own.
    """

    positions: Node
    tokens: int
    inverse: Node
    angles: Node
    coordinates: int = 1
    turns: list[Turn] = field(default_factory=list)
    layers: list[Node] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        """How many frequencies there are."""
        return int(self.inverse.meta["val"].shape[0])


def find_turns(program: Program, sites: Sites, stack: str) -> list[Frequencies]:
    """All frequencies that turn the queries of a stack, and where they do.

    Raises:
        EditError: tables reach queries in a way that is not known.
    """
    found = []
    for rotary in sites.rotary.get(stack, []):
        nodes = sorted(_products(rotary.positions), key=sites.reach.order.__getitem__)
        products = [_product(node, rotary.positions, sites.reach) for node in nodes]
        if not products or None in products:
            raise EditError(
                "rotary tables are not made of products of positions and frequencies",
                where=[place(rotary.tables[0])],
                found=f"positions {tuple(rotary.positions.meta['val'].shape)}",
            )
        found += products
    for each in found:
        _trace(each, sites, stack)
    return [each for each in found if each.turns]


def heads_of(turn: Turn) -> int:
    """The dimension of a product's value that counts heads: where its table [.., 1, ..] has none."""
    table, value = turn.table.meta["val"].shape, turn.value.meta["val"].shape
    if len(table) != 4 or len(value) != 4:
        return 1
    free = [dim for dim in (1, 2) if same(size_of(table[dim]), 1)]
    wide = [dim for dim in free if not same(size_of(value[dim]), 1)]
    return (wide or free or [1])[0]


def _products(positions: Node) -> set[Node]:
    """The products of positions with something else, views and casts apart."""
    found, todo, seen = set(), [positions], set()
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if user.target in _MOVES:
                todo.append(user)
            elif user.target in (aten.mul.Tensor, aten.matmul.default, aten.bmm.default) and _floats(user):
                found.add(user)
    return found


def _floats(node: Node) -> bool:
    values = [a.meta.get("val") for a in node.args if isinstance(a, Node)]
    return len(values) == 2 and all(isinstance(v, torch.Tensor) and v.dtype.is_floating_point for v in values)


def _product(node: Node, positions: Node, reach: Reach) -> Frequencies | None:
    """Tell positions from frequencies, which are a list once views are taken off."""
    for own, other in (node.args, node.args[::-1]):
        inverse = _list(other)
        if inverse is None or reach.above(positions, other) or not reach.above(positions, own):
            continue
        value, count = own.meta["val"], inverse.meta["val"].shape[0]
        first = node.target is not aten.mul.Tensor and other is node.args[0]
        column = value.ndim - (1 if first else 2)
        beside = value.shape[value.ndim - (2 if first else 1)]
        if column < 0 or not (isinstance(beside, int) and beside == 1) or not isinstance(count, int):
            return None
        coordinates = value.shape[0] if value.ndim == 4 else 1
        if value.ndim > 4 or not isinstance(coordinates, int):
            return None
        return Frequencies(_uncast(own), column, inverse, node, coordinates)
    return None


def _list(node: Node) -> Node | None:
    """The value [P] that another is a view of; None for any other."""
    while node.meta["val"].ndim > 1 and node.target in _MOVES:
        node = node.args[0]
    return node if node.meta["val"].ndim == 1 else None


def _uncast(node: Node) -> Node:
    return node.args[0] if node.target in _CASTS and isinstance(node.args[0], Node) else node


def _trace(frequencies: Frequencies, sites: Sites, stack: str) -> None:
    """Find the products that read what is made of angles."""
    reach = sites.reach
    blocks = sites.stacks[stack].blocks
    ends = [n for b in blocks for n in (b.attention.query, b.attention.key)]
    last = max(reach.order[end] for end in ends)
    runs = [_Run(frequencies, float(start)) for start in (1, 2)]
    layers = (n for n in reach.order if n.target is _LAYER)
    frequencies.layers.extend(n for n in layers if _is_table(n.args[0], frequencies, sites, stack))
    order = [n for n, i in reach.order.items() if reach.order[frequencies.angles] < i <= last]
    for node in order:
        # Exported programs check dtypes on the way, and such a check has no value.
        if node.meta.get("val") is None or not any(a in runs[0].values for a in node.all_input_nodes):
            continue
        if node in frequencies.layers:
            continue
        others = [a for a in node.all_input_nodes if a not in runs[0].values and _is_tensor(a)]
        if not others or node.target is _GATHER:
            for run in runs:
                run.step(node)
        elif any(reach.above(node, end) for end in ends):
            frequencies.turns.append(_turn(node, runs, frequencies))


def _is_table(node: Node, frequencies: Frequencies, sites: Sites, stack: str) -> bool:
    """Whether a value is made of angles, and of nothing that the blocks of a stack made."""
    reach = sites.reach
    return reach.above(frequencies.angles, node) and not reach.above(sites.stacks[stack].blocks[0].attention.node, node)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _turn(node: Node, runs: list[_Run], frequencies: Frequencies) -> Turn:
    tables = [a for a in node.args if a in runs[0].values]
    if node.target is not aten.mul.Tensor or len(tables) != 1:
        raise _unknown(node)
    (table,) = tables
    value = node.args[1] if node.args[0] is table else node.args[0]
    one, two = (run.values[table] for run in runs)
    waves = runs[0].waves[table]
    if len(waves) != 1:
        raise _unknown(node)
    columns = one.reshape(-1, one.shape[-1])
    scales = two.reshape(-1, one.shape[-1]) - columns
    scale = scales[0, 0].item()
    if scale == 0 or not torch.allclose(scales, torch.full_like(scales, scale)):
        raise _unknown(node)
    numbers = (columns / scale - 1).round().long()
    if not bool((numbers == numbers[:1]).all()) or not torch.allclose(columns / scale - 1, numbers.double()):
        raise _unknown(node)
    each = numbers[0].tolist()
    pairs = frequencies.pairs
    return Turn(
        node,
        table,
        value,
        next(iter(waves)),
        tuple(n // pairs for n in each),
        tuple(n % pairs for n in each),
        scale,
        runs[0].via[table],
    )


def _unknown(node: Node) -> EditError:
    return EditError(
        "rotary tables turn queries and keys in a way that is not known",
        where=[place(node)],
        found="something else than a product with cosines or with sines, each of one frequency",
    )


class _Run:
    """The operators after the angles, run on numbers that name each coordinate and frequency, from a start on."""

    def __init__(self, frequencies: Frequencies, start: float) -> None:
        angles, pairs = frequencies.angles, frequencies.pairs
        sizes = _sizes(angles.meta["val"])
        turned = angles.target is not aten.mul.Tensor and _list(angles.args[0]) is frequencies.inverse
        names = start + torch.arange(pairs, dtype=torch.float64)
        names = names[:, None] if turned else names
        if frequencies.coordinates > 1:
            rows = pairs * torch.arange(frequencies.coordinates, dtype=torch.float64)
            names = names + rows.view(-1, *[1] * (len(sizes) - 1))
        self.values: dict[Node, Any] = {angles: names.expand(sizes).clone()}
        self.waves: dict[Node, frozenset[str]] = {angles: frozenset()}
        self.via: dict[Node, tuple[Node, ...]] = {angles: ()}

    def step(self, node: Node) -> None:
        """Run one operator."""
        given = [a for a in node.all_input_nodes if a in self.values]
        self.waves[node] = frozenset().union(*(self.waves[a] for a in given))
        self.via[node] = max((self.via[a] for a in given), key=len)
        if node.target in _WAVES:
            self.waves[node] = frozenset({_WAVES[node.target]})
            self.values[node] = self.values[given[0]].clone()
        elif node.target in _CASTS or node.target in (aten.lift_fresh_copy.default, aten.detach.default):
            self.values[node] = self.values[given[0]]
        elif node.target is _GATHER:
            dim = node.args[2]
            self.via[node] = (*self.via[node], node.args[1])
            self.values[node] = self.values[given[0]].narrow(dim, 0, 1).expand(_sizes(node.meta["val"])).clone()
        else:
            args, kwargs = map_arg((node.args, node.kwargs), self._known)
            with torch.no_grad():
                self.values[node] = node.target(*args, **kwargs)

    def _known(self, node: Node) -> Any:
        return self.values[node] if node in self.values else _hint(node.meta["val"])


def _sizes(value: torch.Tensor) -> list[int]:
    return [_hint(size) for size in value.shape]


def _hint(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat) else size
