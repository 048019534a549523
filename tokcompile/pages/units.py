"""Numbers for people."""

from __future__ import annotations


def amount(count: float, unit: str = "") -> str:
    """A count in thousands, millions…: 1.23 G."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {prefix}{unit}"
    return f"{count:g} {unit}".strip()


def bytes_of(count: int) -> str:
    """Bytes in binary units; "–" for none."""
    if not count:
        return "–"
    for size, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= size:
            return f"{count / size:.4g} {name}"
    return f"{count} B"


def change(before: float, after: float) -> str:
    """The change in per cent; "" where there is none."""
    if before == after:
        return ""
    return f"{100 * (after / before - 1):+.0f} %" if before else "new"
