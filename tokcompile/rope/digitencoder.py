"""A position as its decimal digits, read by a small transformer: the tables of `rotate` by digits.

The encoder is a function of positions alone, so that a model never runs it: it fills tables once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokcompile.weights import Weights


def digits_of(positions: Tensor, count: int) -> Tensor:
    """Decimal digits, the most significant first, with zeros in front.

    Args:
        positions: integers [..., A], A coordinates.
        count: digits of each coordinate.

    Returns:
        int64 [..., A * count].

    Raises:
        ValueError: a position is below 0, or has more digits.
    """
    if positions.numel() and (positions.min() < 0 or positions.max() >= 10**count):
        raise ValueError(f"positions {int(positions.min())} to {int(positions.max())} do not fit in {count} digits")
    powers = 10 ** torch.arange(count - 1, -1, -1, device=positions.device)
    return (positions.long()[..., None] // powers % 10).flatten(-2)


class _Block(nn.Module):
    """A transformer block with norms in front: causal attention and a GELU network four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, S, C] to the same."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class DigitEncoder(nn.Module):
    """What SeqPE (2025), section 3.1, says of a position, and its map to queries and keys.

    Args:
        heads, key_heads, head_dim: of the attention that positions meet.
        digits: of each coordinate; positions below 10^digits.
        coordinates: 1 for text, 2 for rows and columns.
        width, layers: of the encoder.
    """

    def __init__(
        self,
        heads: int,
        key_heads: int,
        head_dim: int,
        digits: int = 5,
        coordinates: int = 1,
        width: int = 64,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.digits, self.coordinates, self.shape = digits, coordinates, (heads, key_heads, head_dim)
        self.digit, self.slot = nn.Embedding(10, width), nn.Embedding(digits * coordinates, width)
        self.axis = nn.Embedding(coordinates, width) if coordinates > 1 else None
        self.cls = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.Sequential(*(_Block(width, max(width // 64, 1)) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, heads * head_dim)
        self.map = nn.Linear(heads * head_dim, (heads + key_heads) * head_dim)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What positions say to queries and to keys.

        Args:
            positions: integers [N], or [N, A] of A coordinates.

        Returns:
            [N, H, D] and [N, Hkv, D].

        Raises:
            ValueError: a position is below 0 or has too many digits.
        """
        places = positions[:, None] if positions.ndim == 1 else positions
        symbols = digits_of(places, self.digits)
        index = torch.arange(symbols.shape[1], device=symbols.device)
        x = self.digit(symbols) + self.slot(index)
        if self.axis is not None:
            x = x + self.axis(index // self.digits)
        x = torch.cat([x, self.cls.expand(len(x), 1, -1)], 1)
        said = self.head(self.norm(self.blocks(x))[:, -1])
        heads, key_heads, width = self.shape
        both = self.map(said).unflatten(-1, (heads + key_heads, width))
        return both[:, :heads], both[:, heads:]

    @torch.no_grad()
    def fill(self, weights: Weights, rule: str, length: int) -> Weights:
        """Fill the tables of a rule for positions 0 to length - 1.

        Raises:
            ValueError: the last position has too many digits.
        """
        said = self(torch.arange(length, device=self.cls.device))
        for name, table in zip(("q", "k"), said, strict=True):
            weights.of(rule, name, tuple(table.shape), lambda table=table: table.clone()).copy_(table)
        return weights
