"""Atoms: the letters that token-axis inference spells dimensions with.

A dimension of a value is a tuple of atoms, most significant first: `()` is size 1, `(T,)` counts tokens, `(B, T)` is
batch and tokens flattened together. Two dimensions that an operator aligns are unified, as types are in type
inference; a `view` that splits one atom refines that atom everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

Size = Any  # int or sympy expression: never a SymInt, whose comparison would add a guard


def size_of(value: int | torch.SymInt) -> Size:
    """Return a dimension's size as an int or a sympy expression, adding no guard."""
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        return int(expr) if expr.is_number else expr
    return int(value)


@dataclass(eq=False)
class Atom:
    """One indivisible factor of a dimension.

    `parts` is set when the atom was refined into a product; `segments` when it is a concatenation; `origin` and `via`
    when it is another atom after an edit: `via` is the node [B, T'] that holds, for each new token, the old index.
    """

    size: Size
    link: Atom | None = None
    parts: tuple[Atom, ...] | None = None
    segments: tuple[tuple[Atom, ...], ...] | None = None
    origin: tuple[Atom, ...] | None = None
    via: torch.fx.Node | None = None
    slices: dict[tuple[Any, Any], Atom] = field(default_factory=dict)

    def root(self) -> Atom:
        """Follow links to the representative, shortening the path."""
        atom = self
        while atom.link is not None:
            if atom.link.link is not None:
                atom.link = atom.link.link
            atom = atom.link
        return atom

    def __repr__(self) -> str:
        return f"<{self.root().size}#{id(self.root()) % 9973}>"


Dim = tuple[Atom, ...]


def resolve(dim: Dim) -> Dim:
    """Replace each atom by its representative, refined ones by their parts."""
    if len(dim) == 1:  # by far the most frequent case
        atom = dim[0].root()
        return (atom,) if atom.parts is None else resolve(atom.parts)
    out: list[Atom] = []
    for atom in dim:
        out.extend(resolve((atom,)))
    return tuple(out)


def product(dim: Dim) -> Size:
    """Size of a dimension."""
    total: Size = 1
    for atom in dim:
        total = total * atom.root().size
    return total


def same(left: Size, right: Size) -> bool:
    """Whether two sizes are equal as expressions."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return sympy.expand(left - right) == 0


def divide(left: Size, right: Size) -> Size | None:
    """Return `left / right` when that is a whole size, else None."""
    if isinstance(left, int) and isinstance(right, int):
        return left // right if right and left % right == 0 else None
    ratio = sympy.cancel(sympy.sympify(left) / right)
    numerator, denominator = ratio.as_numer_denom()
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_number else numerator


def fresh(size: Size) -> Dim:
    """Return a new dimension of the given size, `()` for 1."""
    return () if isinstance(size, int) and size == 1 else (Atom(size),)


def refine(atom: Atom, parts: Dim) -> bool:
    """Make one atom the product of others; False when it occurs among them."""
    parts = resolve(parts)
    atom = atom.root()
    if atom in parts:
        return parts == (atom,)
    if len(parts) == 1:
        return union(atom, parts[0])
    atom.parts = parts
    return True


def union(left: Atom, right: Atom) -> bool:
    """Make two atoms one; False when their static sizes differ."""
    left, right = left.root(), right.root()
    if left is right:
        return True
    if isinstance(left.size, int) and isinstance(right.size, int) and left.size != right.size:
        return False
    if not isinstance(left.size, int) and isinstance(right.size, int):
        left, right = right, left
    if left.origin is None and right.origin is not None:
        left.origin, left.via = right.origin, right.via
    if left.segments is None:
        left.segments = right.segments
    elif right.segments is not None and len(right.segments) == len(left.segments):
        for one, other in zip(left.segments, right.segments, strict=True):
            unify(one, other)
    for key, atom in right.slices.items():
        if key in left.slices:
            union(left.slices[key], atom)
        else:
            left.slices[key] = atom
    right.link = left
    return True


def unify(left: Dim, right: Dim) -> bool:
    """Align two dimensions; size 1 aligns with anything and says nothing. False when they cannot be aligned."""
    left, right = resolve(left), resolve(right)
    if left == right or not left or not right:
        return True
    while left and right and left[0] is right[0]:
        left, right = left[1:], right[1:]
    while left and right and left[-1] is right[-1]:
        left, right = left[:-1], right[:-1]
    if not left or not right:
        return not left and not right
    if len(left) == 1 and len(right) == 1:
        return union(left[0], right[0])
    if not same(product(left), product(right)):
        return False
    if len(left) == 1:
        return refine(left[0], right)
    if len(right) == 1:
        return refine(right[0], left)
    return _unify_products(left, right)


def _unify_products(left: Dim, right: Dim) -> bool:
    head, other = left[0], right[0]
    if same(head.size, other.size):
        return union(head, other) and unify(left[1:], right[1:])
    rest = divide(head.size, other.size)
    if rest is not None:
        return refine(head, (other, *fresh(rest))) and unify(left, right)
    rest = divide(other.size, head.size)
    if rest is not None:
        return refine(other, (head, *fresh(rest))) and unify(left, right)
    return False


def regroup(dims: list[Dim], sizes: list[Size]) -> list[Dim]:
    """Give the dimensions of a row-major view: the same atoms in the same order, cut at the new sizes."""
    queue = [atom for dim in dims for atom in resolve(dim)]
    out: list[Dim] = []
    for position, size in enumerate(sizes):
        if isinstance(size, int) and size == 1:
            out.append(())
            continue
        taken = _take(queue, size)
        if taken is None:  # sizes that do not factor: nothing can be said from here on
            return out + [fresh(s) for s in sizes[position:]]
        out.append(taken)
    return out


def _take(queue: list[Atom], size: Size) -> Dim | None:
    taken: list[Atom] = []
    while True:
        if taken and same(product(tuple(taken)), size):
            return tuple(taken)
        if not queue:
            return None
        need = divide(size, product(tuple(taken)))
        atom = queue.pop(0)
        if need is None:
            return None
        if divide(need, atom.size) is None:
            rest = divide(atom.size, need)
            if rest is None:
                return None
            first, second = Atom(need), Atom(rest)
            refine(atom, (first, second))
            queue.insert(0, second)
            atom = first
        taken.append(atom)
