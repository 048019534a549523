"""What the demo shows: a table, and a folder with report.json and one self-contained page with pictures."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor

from tokcompile.demo import Case, Result
from tokcompile.models import digits
from tokcompile.pages.html import page
from tokcompile.pages.rulepages import table
from tokcompile.pages.units import amount, bytes_of

_DIM = 0.16
_PAPER = 0.93
_SCALE = 2


def render(report: dict[str, Any], plain: bool) -> RenderableType:
    """The table of `tokred demo`."""
    result = table(
        "",
        "accuracy",
        "image tokens",
        "decoder FLOPs",
        "KV cache",
        "eager ms",
        "inductor ms",
        "tokred ms",
        "ideal ms",
        "tokred/ideal",
        "inductor/tokred",
        "|diff| to ideal",
        plain=plain,
    )
    base = report["unpruned"]
    ms = base["latency_ms"]
    result.add_row(
        "unpruned",
        f"{base['accuracy']:.1%}",
        str(base["image_tokens"]),
        amount(base["flops"]),
        bytes_of(base["kv_bytes"]),
        f"{ms['eager']:.1f}",
        f"{ms['inductor']:.1f}",
        "",
        "",
        "",
        "",
        "",
    )
    for rule, keep, case in _cases(report):
        ms, ratio = case["latency_ms"], case["ratios"]
        result.add_row(
            f"{rule} {keep}",
            f"{case['accuracy']:.1%}",
            str(case["image_tokens"]),
            amount(case["flops"]),
            bytes_of(case["kv_bytes"]),
            *(f"{ms[n]:.1f}" for n in ("eager", "inductor", "tokred", "ideal")),
            f"{ratio['tokred/ideal']:.2f}",
            f"{ratio['inductor/tokred']:.2f}",
            f"{case['max_abs_diff_to_ideal']:.1e}",
        )
    machine = report["machine"]
    result.caption = (
        f"{report['model']}, {report['images']} test images; times are medians of {report['rounds']} "
        f"interleaved rounds of {report['batch']} images on {machine['threads']} threads"
    )
    return result


def _cases(report: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(rule, keep, case) for rule, budgets in report["rules"].items() for keep, case in budgets.items()]


def write(result: Result, out: Path, pictures: int = 4) -> None:
    """Write report.json and report.html."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(result.report, indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(as_html(result, pictures), encoding="utf-8")


def as_html(result: Result, pictures: int = 4) -> str:
    """The page: figures, bars of time and accuracy, and which patches were kept of some test images."""
    report = result.report
    rows = [{"name": f"{rule} {keep}", **case} for rule, keep, case in _cases(report)]
    slowest = max(report["unpruned"]["latency_ms"]["eager"], *(row["latency_ms"]["eager"] for row in rows))
    count = min(pictures, len(result.questions))
    return page(
        "demo.html.j2",
        report=report,
        rows=rows,
        scale=560 / slowest,
        versions=report["versions"],
        columns=[f"{case.rule} {case.keep}" for case in result.cases],
        pictures=[_picture_row(result, number) for number in range(count)],
    )


def _picture_row(result: Result, number: int) -> dict[str, Any]:
    questions = result.questions
    ids = questions.input_ids[number]
    answer = int(questions.answers[number])
    whole = kept_everything(result, number)
    cells = [_cell(result, number, whole, int(result.answers[number]), answer)]
    for case in result.cases:
        kept = kept_patches(case, ids, number, result.image_token)
        cells.append(_cell(result, number, kept, int(case.answers[number]), answer))
    asked = " ".join(questions.word(int(token)) for token in ids if int(token) > digits.IMAGE)
    return {"question": asked, "answer": questions.word(answer), "cells": cells}


def _cell(result: Result, number: int, kept: Tensor, said: int, answer: int) -> dict[str, Any]:
    return {
        "image": draw(result.questions.pixel_values[number], kept),
        "said": result.questions.word(said),
        "right": said == answer,
        "kept": int(kept.sum()),
    }


def kept_everything(result: Result, number: int) -> Tensor:
    """bool [patches], all True."""
    count = int((result.questions.input_ids[number] == result.image_token).sum())
    return torch.ones(count, dtype=torch.bool)


def kept_patches(case: Case, ids: Tensor, row: int, image_token: int) -> Tensor:
    """bool [patches]: which patches of an image were kept, from the recorded token map.

    The first map of a drop is that of the place where it stands: patches before the splice, the tokens `ids` of the
    prompt, images among them, in the decoder.
    """
    image = ids == image_token
    source = next(iter(case.kept.values()))[row]
    on_patches = case.drop["at"].startswith(("vision", "projector", "splice.input"))
    kept = torch.zeros(int(image.sum()) if on_patches else len(ids), dtype=torch.bool)
    kept[source] = True
    return kept if on_patches else kept[image]


def draw(pixels: Tensor, kept: Tensor) -> str:
    """A data URI of an image [3, height, width] as the model sees it, its dropped patches faded."""
    from PIL import Image

    side = int(len(kept) ** 0.5)
    image = (pixels * digits.STD + digits.MEAN).clamp(0, 1)
    height, width = image.shape[1:]
    mask = kept.view(1, 1, side, side).float()
    mask = torch.nn.functional.interpolate(mask, size=(height, width), mode="nearest")[0]
    image = torch.where(mask > 0, image, image * _DIM + _PAPER * (1 - _DIM))
    array = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    stream = io.BytesIO()
    picture = Image.fromarray(array).resize((width * _SCALE, height * _SCALE), Image.Resampling.NEAREST)
    picture.quantize(128).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
