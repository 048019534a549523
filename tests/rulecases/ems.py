"""The prompt's caches under ems."""

from rulecases._evictions import case

CASE = case(lambda keep: {"budget": keep, "window": 2})
