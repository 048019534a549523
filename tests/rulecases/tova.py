"""Caches under tova."""

from rulecases._evictions import case

CASE = case(lambda keep: {"budget": keep})
