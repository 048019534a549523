"""attend_chosen in Triton: of keys and values only those that are listed are read, and they are not copied."""

from __future__ import annotations

from torch import Tensor

from . import _attention, _triton_attend, _triton_tiles


def supports(query: Tensor, key: Tensor, value: Tensor, *others: object) -> str | None:
    """Why these arguments need other operators; None where they do not."""
    return _triton_tiles.unfit(query, key, value)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    index: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """What the reference computes, with its arguments and result; contiguous.

    Raises:
        ValueError: numbers of heads that do not divide each other.
    """
    heads, own = query.shape[1], key.shape[1]
    choices = index.shape[1]
    hidden = None if mask is None else _attention.four_d(mask)
    planes = own if choices == 1 else choices
    if heads % planes or planes % own or (hidden is not None and heads % hidden.shape[1]):
        raise ValueError(f"{heads} query heads do not divide among {own} heads of keys and {choices} choices")
    return _triton_attend.attended(query, key, value, hidden, index, scale, softcap, sinks)
