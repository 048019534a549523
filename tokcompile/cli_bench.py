"""The command of the `tokred` command line that times kernels on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokcompile.cli import AsJson, app, is_plain, print_json, print_page, progress, shows_errors
from tokcompile.errors import LowerError


@app.command()
@shows_errors
def bench(
    kernels: Annotated[bool, typer.Option("--kernels", help="Time each Triton kernel against its reference.")] = False,
    ops: Annotated[list[str] | None, typer.Option("--op", metavar="NAME", help="Only these operators.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed calls, of which the median counts.", min=1)] = 30,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write from which size on kernels win; see docs/performance.md.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time kernels on a GPU: against their references under Inductor, and against a copy of the same bytes."""
    from tokcompile import kernelbench

    if not kernels:
        raise LowerError("nothing to time was named", remedy="tokred bench --kernels")
    names = kernelbench.names(ops or [])
    kernelbench.needs_gpu()
    import torch

    clock = kernelbench.CudaClock(rounds)
    with progress() as bar:
        device = torch.cuda.get_device_name()
        found = kernelbench.bench(names, kernelbench.default_sizes(), clock, "cuda", device, bar)
    if table is not None:
        kernelbench.write_table(found, table)
    if as_json:
        print_json(found.to_dict())
        return
    print_page(kernelbench.render(found, is_plain()))
    for name, why in found.skipped.items():
        typer.echo(f"not measured: {name}: {why}")
    if table is not None:
        typer.echo(f"wrote {table}")
