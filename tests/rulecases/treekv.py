"""Caches under treekv."""

from rulecases._evictions import case

CASE = case(lambda keep: {"budget": keep, "sinks": 1, "recent": 2, "window": 8})
