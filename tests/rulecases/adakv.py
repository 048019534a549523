"""The prompt's caches under adakv: of the budget's size, whatever heads keep of it."""

from rulecases._evictions import case

CASE = case(lambda keep: {"budget": keep, "window": 2, "kernel": 3})
