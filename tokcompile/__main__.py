"""`python -m tokcompile`: the same as the `tokred` command."""

from tokcompile.cli import main

main()
