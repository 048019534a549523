"""What the queries of an attention see: earlier keys alone, all, or those within a window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.sites.attention import Attention
from tokcompile.sites.concrete import evaluate
from tokcompile.sites.reach import Reach

aten = torch.ops.aten
_COMPARED = {aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.le.Scalar, aten.lt.Scalar}


@dataclass(frozen=True)
class Sight:
    """What queries see when every token is real.

    Attributes:
        causal: no query sees a later key.
        back: how many keys before its own a query sees, at most; None for all.
        ahead: how many keys after its own; None for all.
    """

    causal: bool
    back: int | None = None
    ahead: int | None = None

    @property
    def window(self) -> int | None:
        """Keys that a query sees, its own among them; None without a window."""
        if self.back is None:
            return None
        return self.back + 1 + (0 if self.causal else self.ahead or 0)


def find_sight(site: Attention, reach: Reach) -> Sight | None:
    """What the queries of an attention see; None where the mask's values are not known, or are no window.

    A window longer than the tokens of the capture hides none of them: its length is then the number that the mask's
    places are compared with.
    """
    if site.mask is None:
        return Sight(site.is_causal)
    variants = list(_variants(site.mask, reach))
    hidden = next((h for h in variants if hides_later(h)), variants[0] if variants else None)
    if hidden is None:
        return None
    causal = hides_later(hidden)
    limits = _limits(hidden, causal)
    if limits is None:
        return None
    back, ahead = limits
    if back is None:
        number = _compared_number(site.mask, reach)
        if number is not None and number >= hidden.shape[-1]:
            back, ahead = (number - 1, None) if causal else (number, number)
    return Sight(causal, back, None if causal else ahead)


def window_of(site: Attention, reach: Reach) -> int | None:
    """Keys that a query of an attention with a window sees, also where a step's one query shows too little to tell."""
    sight = find_sight(site, reach)
    if sight is not None and sight.window is not None:
        return sight.window
    return None if site.mask is None else _compared_number(site.mask, reach)


def hidden_by(mask: Node, reach: Reach, zero: Node | None = None) -> torch.Tensor | None:
    """Where a mask hides keys, bool [.., Tq, Tk], when every integer input is 1, but for one that may be 0.

    Returns:
        None when the mask's values cannot be computed, or are no matrix of queries and keys.
    """
    seen = evaluate(mask, reach, zeros={zero})
    if seen is None or seen.ndim < 2 or 1 in seen.shape[-2:]:
        return None
    return seen <= torch.finfo(seen.dtype).min / 2 if seen.dtype.is_floating_point else seen == 0


def _variants(mask: Node, reach: Reach) -> Iterator[torch.Tensor]:
    """What a mask hides when all integer inputs are 1, and when one of them is 0.

    A mask that opens up for some tokens (those of one image see each other) is itself when the input that names these
    tokens names none.
    """
    inputs = [n for n in reach.ancestors([mask]) if n.op == "placeholder" and rows_of_integers(n)]
    for zero in (None, *inputs):
        hidden = hidden_by(mask, reach, zero)
        if hidden is not None:
            yield hidden


def is_causal(site: Attention, reach: Reach) -> bool:
    """Whether no query sees a later key: by the flag, or by the mask's values when every token is real."""
    return site.is_causal or (site.mask is not None and bool(hides_later_keys(site.mask, reach)))


def hides_later_keys(mask: Node, reach: Reach) -> bool | None:
    """Whether a mask hides later keys from queries; None where its values are not known."""
    known = [hides_later(hidden) for hidden in _variants(mask, reach)]
    return any(known) if known else None


def hides_later(hidden: torch.Tensor) -> bool:
    """Whether every later key is hidden, and no query's own."""
    rows, columns = hidden.shape[-2:]
    later = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
    own = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows).tril(columns - rows)
    return bool(later.any() and hidden[..., later].all() and not hidden[..., own].any())


def rows_of_integers(node: Node) -> bool:
    """Whether a value is [B, T] of integers or bools."""
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.ndim == 2 and not value.dtype.is_floating_point


def _limits(hidden: torch.Tensor, causal: bool) -> tuple[int | None, int | None] | None:
    """How far queries see back and ahead, None for all; None instead when what they see is no band."""
    rows, columns = hidden.shape[-2:]
    seen = ~hidden.reshape(-1, rows, columns)
    offset = torch.arange(columns) - torch.arange(rows)[:, None] - (columns - rows)
    if not seen.any():
        return None
    visible = offset[seen.any(0)]
    back, ahead = -int(visible.min()), int(visible.max())
    band = (offset >= -back) & (offset <= ahead)
    if not torch.equal(seen, band.expand_as(seen)):
        return None
    reach_back, reach_ahead = -int(offset.min()), int(offset.max())
    return (back if back < reach_back else None), (ahead if not causal and ahead < reach_ahead else None)


def _compared_number(mask: Node, reach: Reach) -> int | None:
    """The number that differences of places are compared with in a mask, where there is just one."""
    found = set()
    for node in reach.ancestors([mask]):
        if node.target not in _COMPARED:
            continue
        if isinstance(node.args[1], int):
            found |= {node.args[1]} if _is(node.args[0], aten.abs.default) else set()
        for side in node.args:
            if _is(side, aten.sub.Tensor) and isinstance(side.args[1], int):
                found.add(side.args[1])
    return found.pop() if len(found) == 1 else None


def _is(node: object, target: object) -> bool:
    return isinstance(node, Node) and node.target is target
