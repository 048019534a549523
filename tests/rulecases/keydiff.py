"""The prompt's caches under keydiff."""

from rulecases._evictions import case

CASE = case(lambda keep: {"budget": keep})
