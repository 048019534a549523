"""Graphs and caches of the steps after a prompt."""
