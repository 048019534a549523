"""Self-contained HTML pages: inline styles and drawings, no script, nothing fetched."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from tokcompile.pages.reporttables import attention_lines, attention_word, steps, totals
from tokcompile.pages.units import amount, bytes_of, change

if TYPE_CHECKING:
    from tokcompile.report import Explanation, Part

_BAR = 24
_WIDTH = 720


def page(template: str, **values: Any) -> str:
    """Fill a template of `tokcompile/templates`."""
    environment = Environment(
        loader=PackageLoader("tokcompile"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"amount": amount, "bytes": bytes_of}
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(date=date, **values)


def explanation_page(explanation: Explanation) -> str:
    """The page of `tokred explain --html`."""
    names = ", then ".join(rule.name for rule in explanation.rules)
    return page(
        "explain.html.j2",
        e=explanation,
        names=names,
        versions=explanation.versions,
        parts=[_part(part) for part in explanation.parts],
    )


def _part(part: Part) -> dict[str, Any]:
    after = part.after or part.before
    shown = [
        {"name": name, "before": _size(name, old), "after": _size(name, new), "change": change(old, new)}
        for name, old, new in totals(part)
    ]
    return {
        "before": part.before,
        "refused": part.refused,
        "cards": _cards(part),
        "chart": _chart(part),
        "totals": shown,
        "steps": steps(part),
        "lines": attention_lines(part),
        "rows": [_row(old, new) for old, new in zip(part.before.rows, after.rows, strict=True)],
    }


def _size(name: str, value: int) -> str:
    return bytes_of(value) if name == "KV cache" else amount(value)


def _cards(part: Part) -> list[dict[str, str]]:
    old, new = part.before, part.after or part.before
    stacks = dict.fromkeys(row.stack for row in old.rows)
    cards = [(f"tokens at the end of {name}", old.tokens(name), new.tokens(name), str) for name in stacks]
    cards.append(("FLOPs in all", old.flops, new.flops, amount))
    if old.kv_bytes:
        cards.append(("KV cache", old.kv_bytes, new.kv_bytes, bytes_of))
    return [
        {"title": title, "before": show(a), "after": show(b), "change": change(a, b)} for title, a, b, show in cards
    ]


def _chart(part: Part) -> dict[str, Any]:
    after = part.after or part.before
    pairs = [(old, new) for old, new in zip(part.before.rows, after.rows, strict=True) if old.live]
    scale = _WIDTH / max((old.tokens for old, _ in pairs), default=1)
    bars, y, stack = [], 0, ""
    for old, new in pairs:
        y += 12 if stack and stack != old.stack else 0
        stack = old.stack
        bars.append(
            {
                "name": f"{old.stack}.{old.index}",
                "y": y,
                "before": old.tokens,
                "after": new.tokens,
                "wide": round(old.tokens * scale, 1),
                "thin": round(new.tokens * scale, 1),
            }
        )
        y += _BAR
    return {"bars": bars, "height": y}


def _row(old: Any, new: Any) -> dict[str, Any]:
    tokens = str(new.tokens) if new.tokens == old.tokens else f"{old.tokens} → {new.tokens}"
    return {
        "name": f"{old.stack}.{old.index}",
        "path": old.path,
        "live": old.live,
        "tokens": tokens,
        "flops": (amount(old.flops), amount(new.flops)),
        "change": change(old.flops, new.flops),
        "kv": (bytes_of(old.kv_bytes), bytes_of(new.kv_bytes)),
        "attention": attention_word(old, new),
    }
