"""The prompt's caches under dapq."""

from rulecases._evictions import case

CASE = case(lambda keep: {"budget": keep, "count": 3, "lead": 1}, tolerance=1e-5, coarse=0.05, near=(1e-5, 0.05))
