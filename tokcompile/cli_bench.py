"""The command of the `tokred` command line that times kernels on a GPU, and whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokcompile.cli import AsJson, Image, app, is_plain, key_values, print_json, print_page, progress, shows_errors
from tokcompile.errors import LowerError, known

DTYPES = ("bfloat16", "float16", "float32")


@app.command()
@shows_errors
def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="With --end-to-end: zoo:NAME, a folder or an id.")
    ] = None,
    rule: Annotated[str | None, typer.Argument(metavar="[RULE]", help="With --end-to-end: a rule.")] = None,
    options: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Options of the rule.")] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Time each Triton kernel against its reference.")] = False,
    targets: Annotated[
        bool, typer.Option("--targets", help="Time what kernels have to reach; 1 if one is missed.")
    ] = False,
    ops: Annotated[list[str] | None, typer.Option("--op", metavar="NAME", help="Only these operators.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Timed calls: 30 of a kernel, 3 of a model.", min=1)] = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option("--size", metavar="MB", help="Megabytes that a call moves; small ones and beyond L2 by default."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw gains and bandwidths as an SVG.")] = None,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write from which size on kernels win; see docs/performance.md.")
    ] = None,
    ends: Annotated[bool, typer.Option("--end-to-end", help="Time MODEL as it is and under RULE.")] = False,
    device: Annotated[str, typer.Option(help="With --end-to-end: cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help=f"With --end-to-end: {', '.join(DTYPES)}.")] = "bfloat16",
    prompt: Annotated[int, typer.Option(metavar="N", help="With --end-to-end: words after the example.", min=0)] = 64,
    image: Image = None,
    new: Annotated[int, typer.Option(metavar="N", help="With --end-to-end: tokens after the first one.", min=1)] = 32,
    as_json: AsJson = False,
) -> None:
    """Time kernels on a GPU against their references, or a model under a rule against itself and the rule's ideal."""
    if kernels + ends + targets != 1:
        each = "tokred bench --kernels, tokred bench --targets, or tokred bench --end-to-end MODEL RULE"
        raise LowerError(
            "two things to time were named" if kernels + ends + targets else "nothing to time was named", remedy=each
        )
    if ends:
        _ends(model, rule, options or [], device, dtype, prompt, image, new, rounds or 3, as_json)
    elif targets:
        _targets(rounds or 30, as_json)
    else:
        _kernels(ops or [], rounds or 30, sizes or [], plot, table, as_json)


def _ends(
    model: str | None,
    rule: str | None,
    options: list[str],
    device: str,
    dtype: str,
    words: int,
    image: str | None,
    steps: int,
    rounds: int,
    as_json: bool,
) -> None:
    if model is None or rule is None:
        raise LowerError("a model and a rule are needed", remedy="tokred bench --end-to-end MODEL RULE [KEY=VALUE]…")
    if dtype not in DTYPES:
        raise LowerError(f"no weights are of '{dtype}'", remedy=known(dtype, DTYPES))
    import torch

    from tokcompile import exampleinputs, modelsource
    from tokcompile.bench import endbench, kernelbench
    from tokcompile.rulefile import load_rule

    if device != "cpu":
        kernelbench.needs_gpu("models")
    given: dict[str, Any] = key_values(options)
    load_rule(rule).bind(**given)
    with progress() as bar:
        source = modelsource.load_source(model, image=exampleinputs.image_size(image))
        sizes = {"words": words, "steps": steps, "rounds": rounds}
        found = endbench.bench_ends(source, rule, given, device=device, dtype=getattr(torch, dtype), bar=bar, **sizes)
    if as_json:
        print_json(found.to_dict())
    else:
        print_page(endbench.render(found, is_plain()))


def _targets(rounds: int, as_json: bool) -> None:
    from tokcompile.bench import kernelbench, kerneltargets

    kernelbench.needs_gpu()
    import torch

    sizes = kernelbench.default_sizes()[len(kernelbench.SMALL) :]
    clock, name = kernelbench.CudaClock(rounds), torch.cuda.get_device_name()
    with progress() as bar:
        found = kerneltargets.measure(kerneltargets.targets(sizes=sizes), clock, "cuda", name, bar)
    if as_json:
        print_json(found.to_dict())
    else:
        print_page(kerneltargets.render(found, is_plain()))
    if not found.hold:
        raise typer.Exit(1)


def _kernels(
    ops: list[str], rounds: int, sizes: list[int], plot: Path | None, table: Path | None, as_json: bool
) -> None:
    from tokcompile.bench import kernelbench
    from tokcompile.bench.kernelplot import plot as picture
    from tokcompile.pages.plots import needs_matplotlib

    names = kernelbench.names(ops)
    kernelbench.needs_gpu()
    if plot is not None:
        needs_matplotlib()
    import torch

    clock = kernelbench.CudaClock(rounds)
    with progress() as bar:
        device = torch.cuda.get_device_name()
        asked = [size * 10**6 for size in sizes] or kernelbench.default_sizes()
        found = kernelbench.bench(names, asked, clock, "cuda", device, bar)
    if table is not None:
        kernelbench.write_table(found, table)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_text(picture(found), encoding="utf-8")
    if as_json:
        print_json(found.to_dict())
        return
    print_page(kernelbench.render(found, is_plain()))
    for name, why in found.skipped.items():
        typer.echo(f"not measured: {name}: {why}")
    for path in (table, plot):
        if path is not None:
            typer.echo(f"wrote {path}")
