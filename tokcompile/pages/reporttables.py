"""What a terminal shows of an explanation, and of a model's sites."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tokcompile.pages.rulepages import table
from tokcompile.pages.units import amount, bytes_of, change
from tokcompile.report import SECTIONS, Explanation, Measure, Part, Row


def render(explanation: Explanation, plain: bool) -> RenderableType:
    """The page of `tokred explain`."""
    shapes = ", ".join(f"{name} {shape}" for name, shape in explanation.inputs.items())
    rules = ", then ".join(map(repr, explanation.rules))
    graphs = "one graph" if explanation.whole else f"{len(explanation.parts)} graphs"
    made = ", ".join(f"{name} {version}" for name, version in explanation.versions.items())
    head = [
        Text(f"{explanation.model}: {rules}", style="bold"),
        Text(f"inputs {shapes}"),
        Text(f"captured as {graphs} in {explanation.capture_milliseconds:.0f} ms; {made}"),
    ]
    if explanation.note:
        head.append(Text(explanation.note, style="yellow"))
    body: list[RenderableType] = []
    for number, part in enumerate(explanation.parts):
        title = "" if explanation.whole else f"graph {number}: {part.before.nodes} calls"
        body += [Text(title), *_part(part, plain)]
    return Group(*head, *body)


def _part(part: Part, plain: bool) -> list[RenderableType]:
    if part.refused:
        return [_blocks(part, plain), Text(f"no rule was applied: {part.refused}", style="yellow")]
    return [
        _blocks(part, plain),
        Text(),
        _totals(part, plain),
        Text(),
        _steps(part, plain),
        Text(),
        *map(Text, attention_lines(part)),
    ]


def _blocks(part: Part, plain: bool) -> RenderableType:
    result = table("block", "tokens", "after", "", "FLOPs", "after", "", "KV cache", "after", "attention", plain=plain)
    after = part.after.rows if part.after else part.before.rows
    for old, new in zip(part.before.rows, after, strict=True):
        if not old.live:
            result.add_row(f"{old.stack}.{old.index}", "–", "", "", "–", "", "", "", "", "no output reads it")
            continue
        result.add_row(
            f"{old.stack}.{old.index}",
            str(old.tokens),
            str(new.tokens),
            change(old.tokens, new.tokens),
            amount(old.flops),
            amount(new.flops),
            change(old.flops, new.flops),
            bytes_of(old.kv_bytes),
            bytes_of(new.kv_bytes),
            attention_word(old, new),
        )
    return result


def attention_word(old: Row, new: Row) -> str:
    """What became of a block's attention call."""
    if new.fused:
        return "fused"
    return "no longer fused" if old.fused else "written out by the model"


def _totals(part: Part, plain: bool) -> RenderableType:
    result = table("in all", "before", "after", "", plain=plain)
    for name, old, new in totals(part):
        show = bytes_of if name == "KV cache" else amount
        result.add_row(name, show(old), show(new), change(old, new))
    return result


def totals(part: Part) -> list[tuple[str, int, int]]:
    """Name, before and after of each section that costs something, of all, and of the cache."""
    old, new = part.before, part.after or part.before
    rows = [
        (_title(name), old.totals[name], new.totals[name]) for name in SECTIONS if old.totals[name] or new.totals[name]
    ]
    return [*rows, ("FLOPs in all", old.flops, new.flops), ("KV cache", old.kv_bytes, new.kv_bytes)]


def _title(section: str) -> str:
    return {"rule": "scoring, selecting, moving", "rest": "embeddings, head, rest"}.get(section, section)


def _steps(part: Part, plain: bool) -> RenderableType:
    result = table("rule", "step", "what it did", plain=plain)
    for rule, verb, text in steps(part):
        result.add_row(rule, verb, Text(text))
    return result


def steps(part: Part) -> list[tuple[str, str, str]]:
    """Rule, verb and description of each step, and a line of counts per rule."""
    out = []
    for applied in part.applied:
        out += [(applied.rule, record.get("verb", ""), _described(record)) for record in applied.steps]
        counts = ", ".join(f"{count} {name}" for name, count in sorted(applied.counts.items())) or "nothing changed"
        out.append((applied.rule, "", f"nodes: {counts}; {applied.milliseconds:.0f} ms"))
    return out


def _described(record: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.items() if key != "verb" and value not in ("", None))


def attention_lines(part: Part) -> list[str]:
    """Which attention calls stay fused, and which attention matrices exist."""
    after = part.after or part.before
    live = [(old, new) for old, new in zip(part.before.rows, after.rows, strict=True) if new.live]
    kept = sum(new.fused for old, new in live if old.fused)
    lines = [f"attention: {kept} of {sum(old.fused for old, _ in live)} fused calls stay fused"]
    lines.append(matrices_line(part.before, after))
    lines += [f"cost not known, counted as 0: {name}" for name in after.unknown]
    lines += kernel_lines(part)
    lines.append(
        f"graph: {part.before.nodes} calls before, {after.nodes} after, rewritten and verified in "
        f"{part.milliseconds:.0f} ms"
    )
    return lines


def kernel_lines(part: Part) -> list[str]:
    """Which operators of the rules run as Triton kernels and which as references, by the reason."""
    groups: dict[tuple[bool, str], Counter[str]] = {}
    for choice in part.kernels:
        groups.setdefault((choice.kernel, choice.reason), Counter())[choice.op] += 1
    lines = []
    for (kernel, reason), ops in groups.items():
        names = ", ".join(op if count == 1 else f"{count} {op}" for op, count in ops.items())
        lines.append(f"{'Triton kernels' if kernel else 'references'} ({reason}): {names}")
    return lines


def matrices_line(before: Measure, after: Measure) -> str:
    """Whether any value [.., H, N, N] beyond 256 tokens exists."""
    own = {each["node"] for each in before.matrices}
    made = [each for each in after.matrices if each["node"] not in own]
    if made:
        return "attention matrices made by the rule: " + "; ".join(f"{m['node']} {m['shape']}" for m in made)
    longest = max((row.tokens for row in before.rows), default=0)
    of_model = f"; the model itself makes {len(after.matrices)}" if after.matrices else ""
    return f"no attention matrix [B, H, N, N] with N > 256 was made by the rule (longest sequence: {longest}){of_model}"
