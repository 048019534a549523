"""Write docs/results.md from a demo's report: `python -m tokcompile.pages.demo_results build/demo/report.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD = (
    "rule",
    "image tokens",
    "accuracy",
    "decoder MFLOP",
    "KV KiB",
    "eager ms",
    "inductor ms",
    "tokred ms",
    "ideal ms",
    "tokred / ideal",
    "inductor / tokred",
    "difference to ideal",
)


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: one row unpruned, one per rule and budget."""
    plain = report["unpruned"]
    rows = [
        (
            "unpruned",
            plain["image_tokens"],
            f"{plain['accuracy']:.1%}",
            _mega(plain["flops"]),
            _kib(plain["kv_bytes"]),
            _ms(plain["latency_ms"]["eager"]),
            _ms(plain["latency_ms"]["inductor"]),
            *[""] * 5,
        )
    ]
    rows += [_row(f"{rule} {keep}", case) for rule, cases in report["rules"].items() for keep, case in cases.items()]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (HEAD, ["---"] * len(HEAD), *rows)]
    return "\n".join([*_intro(report), "", *lines, "", *_notes(report)]) + "\n"


def _intro(report: Mapping[str, Any]) -> list[str]:
    machine, found = report["machine"], report["versions"]
    names = ", ".join(f"{name} {version}" for name, version in found.items())
    return [
        "# Results of the demo",
        "",
        f"`{report['model']}` on {report['images']} test images, measured {report['date'][:10]} on "
        f"{machine['cores']} CPU cores ({names}) with `make demo`; this page is `make results`. "
        "On a GPU: not yet measured.",
    ]


def _notes(report: Mapping[str, Any]) -> list[str]:
    return [
        f"FLOPs {report['flops_are']}; KV bytes {report['kv_bytes_are']}. Milliseconds are {report['latency_is']}, "
        f"batch {report['batch']}, {report['rounds']} rounds: only their ratios mean something. *Ideal* is the "
        "same rewritten graph with its selections given as constants. The difference is the largest of any logit "
        "on the `inductor` target; on the `eager` target it was "
        f"{max(c['max_abs_diff_to_ideal_eager'] for r in report['rules'].values() for c in r.values()):g}."
    ]


def _row(name: str, case: Mapping[str, Any]) -> tuple[Any, ...]:
    times, ratios = case["latency_ms"], case["ratios"]
    return (
        name,
        case["image_tokens"],
        f"{case['accuracy']:.1%}",
        _mega(case["flops"]),
        _kib(case["kv_bytes"]),
        _ms(times["eager"]),
        _ms(times["inductor"]),
        _ms(times["tokred"]),
        _ms(times["ideal"]),
        f"{ratios['tokred/ideal']:.2f}",
        f"{ratios['inductor/tokred']:.2f}",
        f"{case['max_abs_diff_to_ideal']:.1e}",
    )


def _mega(flops: int) -> str:
    return f"{flops / 1e6:.0f}"


def _kib(count: int) -> str:
    return f"{count / 1024:.0f}"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f}"


if __name__ == "__main__":
    print(to_markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
