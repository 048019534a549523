"""The prompt's caches under snapkv."""

from rulecases._evictions import case

CASE = case(lambda keep: {"budget": keep, "window": 2, "kernel": 3})
