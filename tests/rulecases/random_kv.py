"""The prompt's caches under random_kv."""

from rulecases._evictions import case

CASE = case(lambda keep: {"budget": keep, "seed": 3})
