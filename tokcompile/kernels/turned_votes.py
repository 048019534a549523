"""turned_votes: what all heads think of keys that are turned first, which are read once; no pass inserts it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _library
from .key_votes import reference as key_votes
from .turn_pairs import reference as turn_pairs


def reference(
    query: Tensor,
    key: Tensor,
    here: Tensor,
    there: Tensor,
    frequencies: Tensor,
    start: int,
    neighbours: bool,
    coordinate: Sequence[int] | None,
    valid: Tensor | None,
    first: int,
    last: int,
) -> Tensor:
    """Turn keys from their positions to others, and let each head share out one vote among them.

    Args:
        query, valid, first, last: as for `key_votes`.
        key, here, there, frequencies, start, neighbours, coordinate: as for `turn_pairs`.

    Returns:
        float32 [B, 1, N], as `key_votes`.

    Raises:
        ValueError: shapes that do not fit.
    """
    turned = turn_pairs(key, here, there, frequencies, start, neighbours, coordinate)
    return key_votes(query, turned, valid, first, last)


_library.define_kernel(
    "turned_votes(Tensor query, Tensor key, Tensor here, Tensor there, Tensor frequencies, int start, "
    "bool neighbours, int[]? coordinate, Tensor? valid, int first, SymInt last) -> Tensor",
    reference,
    triton="triton_turned_votes",
)
