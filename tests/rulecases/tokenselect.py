"""Prompts under tokenselect."""

from rulecases._routes import case

CASE = case(lambda model: {"first": 1, "middle": 2, "last": 2})
