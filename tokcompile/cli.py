"""The `tokred` command. Each command is a few lines that call a module; all of them take `--json`."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType

from tokcompile.errors import TokredError

app = typer.Typer(
    name="tokred",
    help="Compile token reduction into an unmodified transformer, by rule files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, also for errors.")]
RuleName = Annotated[str, typer.Argument(metavar="RULE", help="Name of a library rule, or path of a .yaml file.")]
RulePath = Annotated[str, typer.Argument(metavar="FILE", help="Path of a rule file, or name of a library rule.")]

Command = TypeVar("Command", bound=Callable[..., None])
PIPE_WIDTH = 200


@app.callback()
def _app() -> None:
    """Compile token reduction into an unmodified transformer, by rule files."""


def shows_errors(command: Command) -> Command:
    """Print a TokredError for people, or as JSON where the command was asked for it, and exit with 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except TokredError as error:
            if kwargs.get("as_json"):
                print_json({"ok": False, "error": error_data(error)})
            else:
                Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
            raise typer.Exit(1) from None

    return run


def error_data(error: TokredError) -> dict[str, Any]:
    """Return an error as data."""
    return {
        "type": type(error).__name__,
        "cause": error.cause,
        "where": error.where,
        "found": error.found,
        "remedy": error.remedy,
    }


def print_json(data: Any) -> None:
    """Print data as JSON on standard output."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def is_plain() -> bool:
    """Say whether output goes to a pipe or a file: no frames, no colours, no progress bars."""
    return not sys.stdout.isatty()


def print_page(page: RenderableType) -> None:
    """Print something for people; wide and without colours where it goes to a pipe."""
    Console(width=PIPE_WIDTH if is_plain() else None, highlight=False).print(page)


@app.command()
@shows_errors
def rules(as_json: AsJson = False) -> None:
    """List the rules of the library."""
    from tokcompile import rulepages

    found = rulepages.library()
    if as_json:
        print_json([rulepages.summary(rule) for rule in found])
    else:
        print_page(rulepages.render_library(found, is_plain()))


@app.command()
@shows_errors
def show(rule: RuleName, as_json: AsJson = False) -> None:
    """Show a rule: where it comes from, its options, its steps."""
    from tokcompile import rulefile, rulepages

    loaded = rulefile.load_rule(rule)
    if as_json:
        print_json(rulepages.page(loaded))
    else:
        print_page(rulepages.render_page(loaded, is_plain()))


@app.command()
@shows_errors
def check(file: RulePath, as_json: AsJson = False) -> None:
    """Check a rule file: the first error, with file and line, or what is odd about it."""
    from tokcompile.rulefile import load_rule

    loaded = load_rule(file)
    if as_json:
        print_json({"ok": True, "rule": loaded.name, "path": loaded.path, "warnings": list(loaded.warnings)})
        return
    for warning in loaded.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(f"{loaded.path}: rule '{loaded.name}' is fine")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
