"""Commands of the `tokred` command line that write ONNX files and run them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tokcompile.cli import AsJson, Model, Options, RuleName, app, key_values, print_json, shows_errors, waiting


@app.command()
@shows_errors
def export(
    model: Model,
    rule: RuleName,
    options: Options = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The ONNX file.")] = Path("model.onnx"),
    decode: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another one, for the steps after the prompt.")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 or later.")] = 18,
    target: Annotated[str, typer.Option(help="What the file is for: onnx.")] = "onnx",
    fixed: Annotated[bool, typer.Option("--fixed", help="Fix rows and lengths at those of the example.")] = False,
    batch: Annotated[int, typer.Option(help="Rows of the example; two at least for open dimensions.", min=1)] = 2,
    as_json: AsJson = False,
) -> None:
    """Write a model under a rule as an ONNX file of standard operators."""
    from tokcompile.onnx_export.export import export_onnx
    from tokcompile.onnx_export.extra import NEEDED, needs

    needs(*NEEDED)
    words = key_values(options or [])
    with waiting(f"exporting {model}"):
        from tokcompile import modelsource

        source = modelsource.with_weights(model, batch)
        given = {"decode": decode, "dynamic": not fixed, "opset": opset, "target": target}
        made = export_onnx(source.model, source.inputs, out, rule, **given, **words)
    files = [made] if made.decode is None else [made, made.decode]
    if as_json:
        print_json({"ok": True, "files": [_data(file) for file in files]})
        return
    for file in files:
        typer.echo(f"wrote {file.path}: {sum(file.operators.values())} operators of opset {file.opset}")
        for title, values in (("takes", file.inputs), ("returns", file.outputs)):
            typer.echo(f"  {title} {', '.join(f'{name} {_shape(shape)}' for name, shape in values.items())}")
        for text in file.unchecked:
            typer.echo(f"  does not check: {text}")


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
