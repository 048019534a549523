"""Plots as SVG: lines that can be told apart, and the same bytes for the same figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from tokcompile.errors import TokredError

# Okabe and Ito's colours, which people tell apart who see colours otherwise; markers and dashes do without colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def needs_matplotlib() -> Any:
    """Import matplotlib.

    Raises:
        TokredError: it is not there; said before hours of cells, not after.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise TokredError(
            "the plot needs matplotlib, which cannot be imported",
            found=str(error),
            remedy="pip install 'tokcompile[demo]'",
        ) from error
    return matplotlib


def looks() -> Iterator[dict[str, Any]]:
    """Keywords of `Axes.errorbar` for one line after the other, without end."""
    for number in count():
        yield {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": DASHES[number % len(DASHES)],
            "linewidth": 1.5,
            "markersize": 10 - 2 * (number % 3),  # hollow and of several sizes: lines that agree lie on each other
            "markerfacecolor": "none",
            "capsize": 2,
            "elinewidth": 0.8,
        }


def svg(draw: Callable[[Any], None], size: tuple[float, float], title: str, label: str) -> str:
    """Draw on a matplotlib figure and return it as SVG, the same bytes for the same drawing.

    Args:
        draw: takes the figure.
        size: width and height, in inches of 72 points.
        title: of the document.
        label: what the picture shows, for those who do not see it.
    """
    matplotlib = needs_matplotlib()
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "tokcompile", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return stream.getvalue().replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
