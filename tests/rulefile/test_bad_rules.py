"""Every kind of wrong rule file: the error names file and line, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokcompile.errors import RuleError
from tokcompile.rulefile import load_rule

GOOD = """\
rule: mine
about: Drop what matters least.
paper: {title: A paper, arxiv: "2403.06764"}
params:
  layer: {type: int, default: 2, min: 1, max: 9, about: decoder layer}
  keep: {type: ratio_or_count, default: 0.5, about: tokens kept}
steps:
  - tap: {name: seen, at: "decoder.${layer}.attention", what: k}
  - score: {name: like, by: cosine, of: seen, to: mean}
  - select: {name: kept, by: topk, scores: like, keep: "${keep}"}
  - select: {name: wide, by: neighbours, of: kept}
  - drop: {at: "decoder.${layer}.input", keep: wide}
"""

# old text, new text, line of the error, piece of the cause, piece of the remedy
BAD = {
    "unknown key at the top": ("mine\nabout:", "mine\nabot:", 2, "'abot'", "did you mean 'about'"),
    "unknown key of a step": ("keep: wide", "keep: wide, position: keep", 12, "'position'", "'positions'"),
    "unknown key of a parameter": ("min: 1", "minimum: 1", 5, "'minimum'", "known:"),
    "unknown verb": ("- select: {name: wide", "- selct: {name: wide", 11, "no verb 'selct'", "did you mean 'select'"),
    "verb of a later version": ("- drop", "- draft", 12, "'draft' is not available", "tap, score, select, drop"),
    "two verbs in a step": (
        '  - drop: {at: "decoder.${layer}.input", keep: wide}', "  - drop: {}\n    tap: {}", 12, "one verb", "-",
    ),
    "a verb without fields": ("{name: wide, by: neighbours, of: kept}", "wide", 11, "its fields", "known: name"),
    "missing field": (', keep: "${keep}"}', "}", 10, "needs 'keep'", "add keep: how many"),
    "missing name": ("{name: wide, by", "{by", 11, "'name' is missing", "add name"),
    "field of another by": ("of: kept", "of: kept, keep: 3", 11, "does not use 'keep'", "topk, fill"),
    "unknown by": ("by: topk", "by: topk2", 10, "'topk2'", "did you mean 'topk'"),
    "unknown word": ('keep: "${keep}"', 'keep: 3, among: images', 10, "'images'", "did you mean 'image'"),
    "bad queries": (
        "by: cosine, of: seen, to: mean",
        "by: attention_received, at: decoder.2.attention, queries: last:0",
        9, "'last:0'", "last:N",
    ),
    "bad budget": ('"${keep}"', "1.5", 10, "not a number of tokens", '"1/3"'),
    "bad address": ("decoder.${layer}.input", "decoder.${layer}.inputs", 12, "'inputs'", "did you mean 'input'"),
    "every block at once": ("decoder.${layer}.input", "decoder.*.input", 12, "every block", "one block"),
    "a drop at an attention": ("decoder.${layer}.input", "decoder.2.attention", 12, "not a place for a drop", ".input"),
    "two steps of one name": ("name: wide", "name: kept", 11, "two steps are named 'kept'", "rename"),
    "unknown reference": ("of: kept", "of: kpet", 11, "names no selection", "did you mean 'kept'"),
    "selection used as a score": (
        "by: neighbours, of: kept", "by: topk, scores: kept, keep: 3", 11, "is a selection", "like",
    ),
    "score used as a selection": ("of: kept", "of: like", 11, "is a score", "kept"),
    "unknown name in an expression": ('"${keep}"', '"${kep}"', 10, "unknown name 'kep'", "did you mean 'keep'"),
    "a bad expression": ('"${keep}"', '"${keep ** 2}"', 10, "operator", "+ - * / //"),
    "a ratio used as a number": ("decoder.${layer}.input", "decoder.${keep}.input", 12, "ratio_or_count", "in keep of"),
    "default out of range": ("default: 2", "default: 12", 5, "above its maximum 9", "at least 1 and at most 9"),
    "default of another type": ("default: 2", "default: two", 5, "not a whole number", "at least 1"),
    "default of an unknown fact": (
        "default: 2", 'default: "${vision.dept}"', 5, "not a fact", "did you mean 'vision.depth'",
    ),
    "unknown type": ("type: int", "type: integer", 5, "'integer'", "int"),
    "range of a ratio": ("default: 0.5", "default: 0.5, min: 0", 6, "do not apply", "remove"),
    "a moment of a later version": ("paper:", "when: decode\npaper:", 3, "not available in this version", "prefill"),
    "an unknown moment": ("paper:", "when: noon\npaper:", 3, "'noon'", "prefill"),
    "a number for a text": ('"2403.06764"', "2403.06764", 3, "'arxiv'", "in quotes"),
    "a duplicate key": ("keep: wide", "keep: wide, keep: wide", 12, "stands twice (first in line 12)", "remove"),
    "an alias": ("of: kept", "of: *kept", 11, "anchors and aliases", "quote"),
    "an anchor": ("of: kept", "of: &kept kept", 11, "anchors and aliases", "quote"),
    "a tag": ("of: kept", "of: !!python/object/apply:os.system ['true']", 11, "tag", "plain values"),
    "broken YAML": ("of: kept}", "of: kept", 12, "not YAML", "check"),
    "a parameter named like an option": ("  layer: {", "  rule: {", 5, "cannot be the name", "another name"),
    "no drop": ('  - drop: {at: "decoder.${layer}.input", keep: wide}\n', "", 7, "no step changes", "drop"),
    "deep nesting": ("A paper", "[" * 40 + "]" * 40, 3, "nested deeper", "depth"),
}  # fmt: skip


def _load(text: str, tmp_path: Path) -> tuple[Path, RuleError]:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RuleError) as caught:
        load_rule(path)
    return path, caught.value


def test_the_good_file_is_good(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    rule = load_rule(path)
    assert rule.warnings == ()
    assert [step.line for step in rule.steps] == [8, 9, 10, 11, 12]


KEPT = "  keep: {type: ratio_or_count, default: 0.5, about: tokens kept}"
BUDGETED = GOOD.replace(KEPT, "budget:\n  layer: '${keep}'")
# text of the budget, new text, piece of the cause, piece of the remedy
BAD_BUDGET = {
    "of no parameter": ("  layer: '", "  layr: '", "which is no parameter", "did you mean 'layer'"),
    "that does not depend on keep": ("${keep}'", "${vision.depth}'", "does not depend on 'keep'", "${keep // 2}"),
    "that is no expression": ("'${keep}'", "keep", "does not depend on 'keep'", "${keep // 2}"),
    "of a wrong expression": ("${keep}'", "${keep ** 2}'", "operator", "isqrt"),
    "of an unknown fact": ("${keep}'", "${keep + image.token}'", "not a fact", "did you mean 'image.tokens'"),
    "that is not text": ("'${keep}'", "3", "'layer' of 'budget'", ""),
    "beside a parameter keep": ("budget:", f"{KEPT}\nbudget:", "a parameter of that", "one"),
}


@pytest.mark.parametrize("kind", BAD_BUDGET)
def test_a_wrong_budget(kind: str, tmp_path: Path) -> None:
    old, new, cause, remedy = BAD_BUDGET[kind]
    text = BUDGETED.replace('keep: "${keep}"', "keep: 3")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert load_rule(path).takes_keep
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(RuleError) as caught:
        load_rule(path)
    assert cause in caught.value.cause and remedy in caught.value.remedy, str(caught.value)
    assert caught.value.where[0].startswith(f"{path}:")


@pytest.mark.parametrize("kind", BAD)
def test_error_names_line_and_remedy(kind: str, tmp_path: Path) -> None:
    old, new, line, cause, remedy = BAD[kind]
    assert old in GOOD
    head, _, tail = GOOD.rpartition(old)
    path, error = _load(head + new + tail, tmp_path)
    assert error.where[0] == f"{path}:{line}"
    assert cause in error.cause
    assert remedy in error.remedy


def test_a_score_used_before_it_is_made_names_both_lines(tmp_path: Path) -> None:
    lines = GOOD.splitlines()
    lines[8], lines[9] = lines[9], lines[8]
    path, error = _load("\n".join(lines), tmp_path)
    assert "score 'like' is used before it is made" in error.cause
    assert error.where == [f"{path}:9", f"{path}:10"]
    assert "up" in error.remedy


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (b"", "mapping"),
        (b"- a\n- b\n", "mapping"),
        (b"# " + b"x" * 70_000, "over 64 KiB"),
        (b"rule: \xff\xfe\n", "UTF-8"),
        (b"rule: a\n---\nrule: b\n", "not YAML"),
        (b"rule: \x07\n", "not YAML"),
        (b"rule: mine\nabout: x\nsteps: []\n", "'steps' of the rule file"),
        (b"rule: mine\nabout: x\nsteps: 3\n", "'steps' of the rule file"),
        (b"rule: mine\nabout: x\nsteps: [drop]\n", "one verb"),
        (b"rule: Mine!\nabout: x\nsteps: [drop: {at: projector.input, keep: a}]\n", "not a name"),
        (b"? [a, b]\n: 1\n", "plain word"),
    ],
)
def test_files_that_are_no_rule_files(raw: bytes, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yml"
    path.write_bytes(raw)
    with pytest.raises(RuleError) as caught:
        load_rule(path)
    assert cause in caught.value.cause
    assert str(path) in caught.value.where[0]
    assert caught.value.remedy


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(RuleError, match="cannot read the file"):
        load_rule("nowhere/mine.yaml")


def test_unused_names_are_warnings(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace("keep: wide", "keep: kept").replace('"${keep}"', "3"))
    warnings = load_rule(path).warnings
    assert warnings == (
        f"{path}:11: selection 'wide' is never used",
        f"{path}:6: parameter 'keep' is never used",
    )
