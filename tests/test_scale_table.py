"""The page of times: what it says follows from the figures."""

from __future__ import annotations

import scale_table
from scale import SUBJECTS, Times


def _times(layers: int) -> Times:
    return Times(layers, nodes=100 + 60 * layers, axes=0.001 * layers, sites=0.0, rewrite=0.1, verify=0.002 * layers)


def test_a_line_is_linear() -> None:
    times = [_times(layers) for layers in (4, 8, 32, 80)]
    assert round(scale_table.per_layer(times, 8, 80), 6) == 3
    text = scale_table.page({"decoder": times}, "today")
    assert SUBJECTS["decoder"].about in text and "What `make scale` measured: today." in text
    assert "| 80 | 4900 | 0.080 | 0.000 | 0.100 | 0.160 | 0.340 | 69 |" in text
    assert "3.0 ms from 8 to 32 layers, and 3.0 ms from 32 to 80: 1.00 times as much" in text
