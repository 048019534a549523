"""The `tokred` command. Each command is a few lines that call a module; all of them take `--json`."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tokcompile.errors import RuleError, TokredError

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
Image = Annotated[
    str | None,
    typer.Option(metavar="HEIGHTxWIDTH", help="Pixels of the example image, of a model that takes any size: 448x672."),
]

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
    from tokcompile.pages import rulepages

    found = rulepages.library()
    if as_json:
        print_json([rulepages.summary(rule) for rule in found])
    else:
        print_page(rulepages.render_library(found, is_plain()))


@app.command()
@shows_errors
def show(
    rule: RuleName,
    source: Annotated[bool, typer.Option("--source", help="Print the file, with its comments.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a rule: where it comes from, its options, its steps."""
    from tokcompile import rulefile
    from tokcompile.pages import rulepages

    loaded = rulefile.load_rule(rule)
    if as_json:
        print_json(rulepages.page(loaded))
    else:
        print_page(rulepages.render_page(loaded, is_plain(), source))


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


@app.command()
@shows_errors
def models(as_json: AsJson = False) -> None:
    """List the models that zoo:NAME names: small ones, nearly all with random weights, one a family."""
    from tokcompile.models import listing
    from tokcompile.pages import sitepages

    found = [asdict(line) for line in listing.lines()]
    if as_json:
        print_json(found)
    else:
        print_page(sitepages.render_models(found, is_plain()))


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="zoo:NAME (see `tokred models`), or a Hugging Face folder or id.")
]
Options = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Options of the rule.")]


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something long goes on; nothing where output is no terminal."""
    with progress() as bar:
        bar.add_task(what, total=None)
        yield


def progress() -> Progress:
    """Return a progress bar on standard error, silent unless both outputs are terminals."""
    console = Console(stderr=True)
    quiet = is_plain() or not console.is_terminal
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=quiet, transient=True)


@app.command()
@shows_errors
def sites(model: Model, as_json: AsJson = False) -> None:
    """List what a rule may address in a model: stacks, blocks, heads, tokens, positions, windows, caches."""
    with waiting(f"capturing {model}"):
        from tokcompile import modelsource
        from tokcompile.pages import sitepages

        source, programs = modelsource.capture_source(modelsource.load_source(model))
        data = sitepages.sites_data(source.name, programs)
    if as_json:
        print_json(data)
    else:
        print_page(sitepages.render_sites(data, is_plain()))


@app.command()
@shows_errors
def explain(
    model: Model,
    rule: RuleName,
    options: Options = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of the example batch.", min=1)] = 1,
    image: Image = None,
    as_json: AsJson = False,
) -> None:
    """Show what a rule changes in a model: tokens, FLOPs and KV cache of each block, before and after."""
    from tokcompile.rulefile import load_rule

    instance = load_rule(rule).bind(**key_values(options or []))
    with waiting(f"capturing {model}"):
        from tokcompile import exampleinputs, modelsource

        source = modelsource.load_source(model, batch, exampleinputs.image_size(image))
        explanation = modelsource.explain_source(source, [instance])
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(explanation.to_html(), encoding="utf-8")
    if as_json:
        print_json(explanation.to_dict())
    else:
        print_page(explanation.to_table(is_plain()))
        if html is not None:
            typer.echo(f"wrote {html}")


@app.command()
@shows_errors
def lint(
    model: Model,
    rule: Annotated[str | None, typer.Argument(metavar="[RULE]", help="A rule to look at, by name or path.")] = None,
    options: Options = None,
    context: Annotated[
        list[str] | None,
        typer.Option(metavar="N", help="Largest position: N, or STACK=N, or STACK.COORDINATE=N; may be repeated."),
    ] = None,
    eps: Annotated[float, typer.Option(help="Coherence that the slowest frequency keeps, between 0 and 1.")] = 0.95,
    exact_d: Annotated[bool, typer.Option("--exact-d", help="Bounds with the rotary dimension.")] = False,
    tables: Annotated[bool, typer.Option(help="Build the tables of all positions.")] = True,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="A second opinion: how far alike tokens are favoured.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Advise on rotary bases for a length, and on work that a rule does for nothing. Never fails on what it finds."""
    from tokcompile.rulefile import load_rule

    rules = [load_rule(rule).bind(**key_values(options or []))] if rule is not None else []
    with waiting(f"capturing {model}"):
        from tokcompile import lint as run
        from tokcompile import modelsource
        from tokcompile.pages import lintpages

        lengths = run.Lengths.parse(context or [])
        source = modelsource.load_source(model)
        asked = {"eps": eps, "exact_d": exact_d, "tables": tables, "similarity": similarity}
        found = run.lint(source, lengths, rules=rules, **asked)
    if as_json:
        print_json(found.to_dict())
    else:
        print_page(lintpages.render(found, is_plain()))


@app.command()
@shows_errors
def calibrate(
    model: Model,
    options: Options = None,
    rule: Annotated[str, typer.Option(help="Rule that reads the table, by name or path.")] = ...,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the table goes, a .safetensors file.")] = ...,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text that the model reads.")] = None,
    samples: Annotated[int, typer.Option(help="Pieces of the text.", min=1)] = 4,
    length: Annotated[int, typer.Option(help="Tokens of each piece.", min=2)] = 4096,
    keys: Annotated[int, typer.Option(help="Keys of a query that are compared.", min=1)] = 256,
    as_json: AsJson = False,
) -> None:
    """Find the pairs of each head of a model that rank its keys, and write them for a rule that routes by them."""
    with waiting(f"reading with {model}"):
        from tokcompile import calibration, modelsource

        loaded, batches = modelsource.samples(model, text, samples, length)
        words = key_values(options or [])
        weights = calibration.calibrate(loaded, batches, rule, keys=keys, **words)
    out.parent.mkdir(parents=True, exist_ok=True)
    weights.save(out)
    tables = {name: list(value.shape) for name, value in weights.state_dict().items()}
    if as_json:
        print_json({"ok": True, "path": str(out), "tables": tables})
    else:
        typer.echo(f"wrote {out}: {', '.join(f'{name} {shape}' for name, shape in tables.items())}")


def key_values(words: list[str]) -> dict[str, Any]:
    """Read `key=value` words; values as YAML has them, so that 64, 0.5 and 1/3 mean what they mean in a rule file."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise RuleError(f"'{word}' is not an option of a rule", remedy="KEY=VALUE, such as keep=1/3")
        if key in found:
            raise RuleError(f"option '{key}' is given twice", found=word, remedy="give it once")
        found[key] = yaml.safe_load(value) if value else ""
    return found


@app.command()
@shows_errors
def demo(
    images: Annotated[int, typer.Option(help="Test images.", min=1)] = 512,
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path("build/demo"),
    batch: Annotated[int, typer.Option(help="Images in a batch.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Timed rounds, all variants in each.", min=2)] = 20,
    as_json: AsJson = False,
) -> None:
    """Prune a small model trained on real digits by three rules: accuracy, cost, time, and how far from ideal."""
    from tokcompile import demo as run
    from tokcompile.pages import demo_page

    settings = run.Settings(images=images, batch=batch, rounds=rounds)
    with progress() as bar:
        result = run.run(settings, bar)
    demo_page.write(result, out)
    if as_json:
        print_json(result.report)
    else:
        print_page(demo_page.render(result.report, is_plain()))
        typer.echo(f"wrote {out / 'report.html'} and {out / 'report.json'}")


@app.command()
@shows_errors
def sweep(
    rules: Annotated[
        list[str] | None, typer.Option(help="Rules, by name or path, with commas between; all that have `keep`.")
    ] = None,
    keeps: Annotated[list[str] | None, typer.Option(help="Budgets, with commas between.")] = None,
    images: Annotated[int, typer.Option(help="Test images.", min=1)] = 1000,
    batch: Annotated[int, typer.Option(help="Images in a batch.", min=1)] = 32,
    target: Annotated[str, typer.Option(help="eager, aot_eager or inductor.")] = "eager",
    out: Annotated[Path, typer.Option(help="Folder for sweep.json, sweep.md and sweep.svg.")] = Path("build/sweep"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the cells that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure rules by budgets on a small trained model: accuracy and tokens. Goes on where it was interrupted."""
    from tokcompile import sweep as run
    from tokcompile.pages import plots, sweep_page

    plots.needs_matplotlib()
    words = {"rules": _commas(rules), "keeps": _commas(keeps) or run.KEEPS}
    settings = run.Settings(**words, images=images, batch=batch, target=target)
    with progress() as bar:
        found = run.run(settings, run.Store(out / sweep_page.CELLS, fresh), bar)
    written = sweep_page.write(found, out)
    if as_json:
        print_json(found.to_dict())
    else:
        print_page(sweep_page.render(found, is_plain()))
        typer.echo(f"wrote {out / sweep_page.CELLS}, {' and '.join(map(str, written))}")


@app.command()
@shows_errors
def retrieval(
    rules: Annotated[
        list[str] | None, typer.Option(help="Rules, by name or path, with commas between; all that evict.")
    ] = None,
    budgets: Annotated[list[str] | None, typer.Option(help="Shares of the keys, with commas between.")] = None,
    texts: Annotated[int, typer.Option(help="Test texts.", min=1)] = 128,
    questions: Annotated[int, typer.Option(help="Questions before the compression, about each text.", min=1)] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.", min=8)] = 512,
    batch: Annotated[int, typer.Option(help="Prompts in a batch.", min=1)] = 32,
    target: Annotated[str, typer.Option(help="eager, aot_eager or inductor.")] = "eager",
    out: Annotated[Path, typer.Option(help="Folder for the cells, the page and its plots.")] = Path("build/retrieval"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the cells that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure rules that evict keys: needles found and perplexity by budget. Goes on where it was interrupted."""
    from tokcompile import retrieval as run
    from tokcompile.pages import plots, retrieval_page

    plots.needs_matplotlib()
    words = {"rules": _commas(rules), "budgets": _commas(budgets) or run.BUDGETS}
    numbers = {"texts": texts, "questions": questions, "length": length, "batch": batch}
    settings = run.Settings(**words, **numbers, target=target)
    with progress() as bar:
        found = run.run(settings, run.Store(out / retrieval_page.CELLS, fresh, run.Cell), bar)
    written = retrieval_page.write(found, out)
    if as_json:
        print_json(found.to_dict())
    else:
        print_page(retrieval_page.render(found, is_plain()))
        typer.echo(f"wrote {out / retrieval_page.CELLS}, {' and '.join(map(str, written))}")


def _commas(words: list[str] | None) -> tuple[str, ...]:
    return tuple(part.strip() for word in words or () for part in word.split(",") if part.strip())


from tokcompile import cli_bench, cli_export  # noqa: E402, F401  add their commands


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
