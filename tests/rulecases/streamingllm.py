"""Caches under streamingllm."""

from rulecases._evictions import case

CASE = case(lambda keep: {"budget": keep, "sinks": 2})
