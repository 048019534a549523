"""The prompt's caches under h2o."""

from rulecases._evictions import case

CASE = case(lambda keep: {"budget": keep, "recent": 2})
