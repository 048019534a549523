"""Commands of the `tokred` command line that write ONNX files and run them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tokcompile.cli import AsJson, Model, Options, RuleName, app, key_values, print_json, shows_errors, waiting
from tokcompile.errors import RuleError, known


@app.command()
@shows_errors
def export(
    model: Model,
    rule: RuleName,
    options: Options = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file.")] = Path("model.onnx"),
    decode: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another one, for the steps after the prompt.")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 or later; engines have 23.")] = 18,
    target: Annotated[str, typer.Option(help="What to write: onnx, or an engine for tensorrt.")] = "onnx",
    fixed: Annotated[bool, typer.Option("--fixed", help="Fix rows and lengths at those of the example.")] = False,
    batch: Annotated[int, typer.Option(help="Rows of the example; two at least for open dimensions.", min=1)] = 2,
    dtype: Annotated[
        str, typer.Option(help="Type of weights and floating-point inputs: float32, float16 or bfloat16.")
    ] = "float32",
    arch: Annotated[
        list[str] | None, typer.Option(help="GPU architecture of an engine, such as sm89; may be repeated.")
    ] = None,
    ranges: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="NAME=LEAST,USUAL,GREATEST", help="Sizes of an open dimension of an engine."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model under a rule as an ONNX file of standard operators, or as a TensorRT engine."""
    from tokcompile.onnx_export.engine import export_tensorrt
    from tokcompile.onnx_export.export import export_onnx
    from tokcompile.onnx_export.extra import NEEDED, needs

    needs(*NEEDED)
    if target != "tensorrt" and (arch or ranges):
        raise RuleError("--arch and --range are for engines", found=f"--target {target}", remedy="--target tensorrt")
    words = key_values(options or [])
    with waiting(f"exporting {model}"):
        from tokcompile import modelsource

        source = modelsource.with_weights(model, batch)
        kind = _dtype(dtype)
        module, inputs = source.model.to(kind), _as(source.inputs, kind)
        if target == "tensorrt":
            sizes = {"dynamic": bool(ranges), "ranges": _ranges(ranges or [])}
            made = export_tensorrt(module, inputs, out, rule, decode=decode, arch=arch or (), **sizes, **words)
        else:
            given = {"decode": decode, "dynamic": not fixed, "opset": opset, "target": target}
            made = export_onnx(module, inputs, out, rule, **given, **words)
    files = [made] if made.decode is None else [made, made.decode]
    if as_json:
        print_json({"ok": True, "engines" if target == "tensorrt" else "files": [_data(file) for file in files]})
        return
    for file in files:
        (_show_engine if target == "tensorrt" else _show_file)(file)


def _show_file(file: Any) -> None:
    typer.echo(f"wrote {file.path}: {sum(file.operators.values())} operators of opset {file.opset}")
    for title, values in (("takes", file.inputs), ("returns", file.outputs)):
        typer.echo(f"  {title} {', '.join(f'{name} {_shape(shape)}' for name, shape in values.items())}")
    for text in file.unchecked:
        typer.echo(f"  does not check: {text}")


def _show_engine(engine: Any) -> None:
    fused = sum(kernel is not None for kernel in engine.attention.values())
    typer.echo(
        f"wrote {engine.path}: {len(engine.layers)} layers for {', '.join(engine.archs) or 'every architecture'}"
    )
    typer.echo(f"  attention: {fused} of {len(engine.attention)} in one kernel")
    for name in (name for name, kernel in engine.attention.items() if kernel is None):
        typer.echo(f"  not in one kernel: {name}")
    if engine.reason:
        typer.echo(f"  because: {engine.reason}")
    typer.echo(f"  layer by layer: {engine.report}")


def _dtype(name: str) -> Any:
    import torch

    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in kinds:
        raise RuleError(f"unknown type '{name}'", remedy=known(name, kinds))
    return kinds[name]


def _as(inputs: dict[str, Any], dtype: Any) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _ranges(texts: list[str]) -> dict[str, tuple[int, int, int]]:
    found = {}
    for text in texts:
        name, _, sizes = text.partition("=")
        numbers = sizes.split(",")
        if not name or len(numbers) != 3 or not all(number.strip().isdigit() for number in numbers):
            raise RuleError("a range is a name and three sizes", found=text, remedy="--range batch=1,2,8")
        found[name] = tuple(int(number) for number in numbers)
    return found


def _data(file: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(file).items() if name != "decode"}


def _shape(sizes: list[int | str]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


@app.command()
@shows_errors
def run(
    prompt_file: Annotated[Path, typer.Argument(metavar="FILE", help="What `tokred export zoo:llava-digits` wrote.")],
    image: Annotated[Path, typer.Option(help="An image of coloured digits.")],
    prompt: Annotated[str, typer.Option(help="A question, such as 'which digit is red'.")],
    decode: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `--decode` of the same export wrote.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate at most; one without --decode.", min=1)] = 4,
    as_json: AsJson = False,
) -> None:
    """Ask the small model of the demo about an image, by ONNX Runtime alone."""
    from tokcompile.onnx_export import ask

    words = ask.answer(prompt_file, decode, image, prompt, tokens)
    if as_json:
        print_json({"ok": True, "answer": words})
    else:
        typer.echo(" ".join(words))
