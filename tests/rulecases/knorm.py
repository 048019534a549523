"""The prompt's caches under knorm."""

from rulecases._evictions import case

CASE = case(lambda keep: {"budget": keep})
