"""tokred::nearest_distance: how far each token is from the one that is nearest to it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(distances: Tensor, among: Tensor | None) -> Tensor:
    """The least distance of each token to another one.

    Args:
        distances: float [B, T, T]. What stands on the diagonal is not read.
        among: bool [B, T], tokens that count; None for all.

    Returns:
        As distances, [B, T]; infinity for a token that has no other, and for those outside `among`.

    Raises:
        ValueError: shapes that do not fit.
    """
    check(distances, among)
    own = torch.eye(distances.shape[1], dtype=torch.bool, device=distances.device)
    if among is not None:
        own = own | ~(among[:, :, None] & among[:, None, :])
    return torch.where(own, torch.inf, distances).amin(2)


def check(distances: Tensor, among: Tensor | None) -> None:
    """Refuse what is not [B, T, T] with a mask [B, T]. Raises ValueError."""
    if distances.dim() != 3 or distances.shape[1] != distances.shape[2]:
        raise ValueError(f"distances must be [B, T, T], not {list(distances.shape)}")
    if among is not None and (among.dtype != torch.bool or among.shape != distances.shape[:2]):
        wanted = list(distances.shape[:2])
        raise ValueError(f"a token mask must be bool {wanted}, not {among.dtype} {list(among.shape)}")


nearest_distance = _library.define("nearest_distance(Tensor distances, Tensor? among) -> Tensor", reference)
