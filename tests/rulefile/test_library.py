"""The rules of the library: their constants, their budgets, and what options do to them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import jsonschema
import numpy
import pytest
import yaml

from tokcompile.budget import Budget
from tokcompile.errors import RuleError
from tokcompile.rulefile import LIBRARY, Rule, RuleInstance, json_schema, load_rule, parse_rules, rule_names
from tokcompile.steps import Step

OTHER = {
    "tome": {"pairs": 3},
    "v2pe": {"delta": "1/8"},
    "carope": {"base": 500.0},
    "rope_scaling": {"factor": 2.0},
    "seqpe": {"length": 7},
    "tokenflex": {"n": 8, "mlp": "gated"},
    "visionzip": {"dominant": 20},
    "vqtoken": {"codes": 12},
    "svit_sta": {"cell": 4},
    "image": {"tokens": 4},
    "meta_tokens": {"share": 0.25, "layers": 2},
    "hita": {"queries": 4},
    "aot_video": {"anchors": 54},
    "snapkv": {"budget": "1/7", "kernel": 7},
    "adakv": {"budget": 99, "floor": 0.5, "floor_by": "reserve"},
    "pyramidkv": {"budget": 99},
    "h2o": {"budget": 99, "recent": 5},
    "knorm": {"budget": 99},
    "keydiff": {"budget": 99},
    "random_kv": {"budget": 99},
    "dapq": {"budget": 99, "count": 5, "content": "random"},
    "ems": {"budget": 99, "alike": 0.5, "combine": "sum"},
    "streamingllm": {"budget": 99, "sinks": 2},
    "tova": {"budget": 99},
    "treekv": {"budget": 99, "recent": 20, "shared": True},
    "tokenselect": {"middle": 99, "positions": "keep", "reuse": 0.9},
    "fasa": {"budget": 99, "pairs": 8, "per": "query_head"},
}
"""Options of rules that have no `keep`."""
FACTS = {"vision.depth": 24, "decoder.depth": 32, "grid.height": 24}
TOWER = FACTS | {"vision.used": 23, "vision.class_tokens": 1, "image.tokens": 576}
SCHEMA = Path(__file__).parents[2] / "docs" / "rule.schema.json"


def _step(rule: Rule, name: str) -> Step:
    return next(step for step in rule.steps if getattr(step, "name", None) == name)


@pytest.mark.parametrize("name", rule_names())
class TestEveryRule:
    def test_loads_without_warnings_under_its_own_name(self, name: str) -> None:
        rule = load_rule(name)
        assert rule.name == name
        assert rule.warnings == ()
        assert rule.path == f"tokcompile/rules/{name}.yaml"

    def test_fits_the_json_schema(self, name: str) -> None:
        jsonschema.validate(yaml.safe_load((LIBRARY / f"{name}.yaml").read_text()), json_schema())

    def test_prints_back_as_an_equal_rule(self, name: str, tmp_path: Path) -> None:
        self._prints_back(load_rule(name).bind(**OTHER.get(name, {"keep": "1/7"})), tmp_path)

    @pytest.mark.parametrize("keep", [9, "1/7"])
    def test_with_a_budget_prints_back_as_an_equal_rule(self, name: str, keep: object, tmp_path: Path) -> None:
        rule = load_rule(name)
        if rule.takes_keep:
            self._prints_back(rule.bind(keep=keep), tmp_path)
        else:
            with pytest.raises(RuleError, match="no option 'keep'"):
                rule.bind(keep=keep)

    @staticmethod
    def _prints_back(instance: RuleInstance, tmp_path: Path) -> None:
        path = tmp_path / "back.yaml"
        path.write_text(instance.as_yaml())
        back = load_rule(path).bind()
        assert back == instance
        assert hash(back) == hash(instance)
        assert back.fingerprint() == instance.fingerprint()

    def test_resolves_to_steps_without_expressions(self, name: str) -> None:
        resolved = load_rule(name).bind().resolve(FACTS)
        for step in resolved.steps:
            assert "${" not in "".join(str(value) for key, value in step.given().items() if key != step.budgeted)
            assert step.line > 0


def test_the_published_schema_is_up_to_date() -> None:
    assert json.loads(SCHEMA.read_text()) == json_schema(), "run: make schema"


@pytest.mark.parametrize(
    "bad", [{"steps": []}, {"abot": 1}, {"rule": "No!"}, {"when": "decode"}, {"steps": [{"merge": {}}]}]
)
def test_the_schema_can_fail(bad: dict) -> None:
    data = yaml.safe_load((LIBRARY / "fastv.yaml").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, **bad}, json_schema())


@pytest.mark.parametrize(("budget", "anchors"), [(192, 4), (128, 3), (64, 1), (32, 1), (25, 0)])
def test_hiprune_anchors(budget: int, anchors: int) -> None:
    rule = load_rule("hiprune")
    instance = rule.bind(keep=budget)
    assert instance.budget(_step(rule, "anchors"), 576, FACTS) == anchors
    assert instance.budget(_step(rule, "kept"), 576, FACTS) == budget


def test_hiprune_places() -> None:
    resolved = load_rule("hiprune").bind().resolve(FACTS)
    assert [step.at for step in resolved.steps if hasattr(step, "at")] == [
        "vision.8.attention",
        "vision.features.attention",
        "projector.input",
    ]
    assert resolved.params["object_layer"] == 9
    assert resolved.params["alpha"] == Fraction(1, 10)
    assert resolved.budget(resolved.steps[4], 576) == 192


@pytest.mark.parametrize(
    ("tokens", "keep", "kept"), [(576, 0.25, 144), (575, 0.5, 288), (577, 0.5, 288), (576, 1.0, 576)]
)
def test_fastv_budget(tokens: int, keep: float, kept: int) -> None:
    rule = load_rule("fastv")
    assert rule.bind(keep=keep).budget(_step(rule, "kept"), tokens, FACTS) == kept


def test_fastv_places() -> None:
    resolved = load_rule("fastv").bind(layer=3).resolve(FACTS)
    assert resolved.steps[0].address.index == 2
    assert resolved.steps[2].at == "decoder.3.input"
    assert resolved.steps[2].positions == "keep"


@pytest.mark.parametrize(
    ("name", "keep", "sets"),
    [
        ("tome", 192, {"pairs": 17}),  # 23 blocks, 384 patches to merge away: 16 a block leave 208
        ("tome", "100%", {"pairs": 0}),
        ("visionzip", 64, {"dominant": 54, "contextual": 10}),
        ("visionzip", 128, {"dominant": 108, "contextual": 20}),
        ("visionzip", "1/3", {"dominant": 162, "contextual": 30}),
        ("vqtoken", 12, {"codes": 12}),
        ("vqtoken", 1000, {"codes": 576}),
        ("vqtoken", "0.1%", {"codes": 1}),
        ("tokenflex", "25%", {"n": 12}),
        ("tokenflex", 63, {"n": 7}),
    ],
)
def test_keep_sets_what_a_rule_has_instead(name: str, keep: object, sets: dict[str, int]) -> None:
    rule = load_rule(name)
    instance = rule.bind(keep=keep)
    resolved = instance.resolve(TOWER)
    assert {key: resolved.params[key] for key in sets} == sets
    assert instance == rule.bind(keep=keep) != rule.bind()
    with pytest.raises(RuleError, match="needs 'image.tokens'"):
        instance.resolve(FACTS)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"keep": 0}, "not a number of tokens"),
        ({"keep": 64, "dominant": 5}, "'keep' of rule 'visionzip' sets 'dominant'"),
    ],
)
def test_wrong_keep(options: dict, cause: str) -> None:
    with pytest.raises(RuleError, match=cause) as caught:
        load_rule("visionzip").bind(**options)
    assert caught.value.where[0].startswith("tokcompile/rules/visionzip.yaml:") and caught.value.remedy


def test_random_among() -> None:
    assert load_rule("random").bind(among="all", seed=7).resolve({}).steps[1].among == "all"
    assert load_rule("random").bind(seed=7).resolve({}).steps[0].seed == 7


@pytest.mark.parametrize(
    ("options", "cause", "remedy"),
    [
        ({"kep": 3}, "no option 'kep'", "did you mean 'keep'"),
        ({"keep": 0}, "not a number of tokens", "image tokens kept"),
        ({"layer": 0}, "below its minimum 1", "at least 1"),
        ({"layer": 2.0}, "not a whole number", "at least 1"),
        ({"layer": True}, "not a whole number", "decoder layer"),
        ({"layer": "${nothing}"}, "not a fact", "decoder.depth"),
        ({"layer": "${1 / 0}"}, "divides by zero", "divisor"),
    ],
)
def test_wrong_options(options: dict, cause: str, remedy: str) -> None:
    with pytest.raises(RuleError) as caught:
        load_rule("fastv").bind(**options)
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy
    assert caught.value.where[0].startswith("tokcompile/rules/fastv.yaml:")


def test_wrong_choice_lists_the_choices() -> None:
    with pytest.raises(RuleError, match="known: all, image, text"):
        load_rule("random").bind(among="video")


def test_a_missing_fact_names_the_parameter_and_what_the_model_has() -> None:
    with pytest.raises(RuleError) as caught:
        load_rule("hiprune").bind().resolve({"decoder.depth": 4})
    assert "'object_layer' needs 'vision.depth'" in caught.value.cause
    assert "decoder.depth = 4" in caught.value.found


def test_an_expression_may_be_given_as_an_option() -> None:
    instance = load_rule("fastv").bind(layer="${decoder.depth // 2}")
    assert instance.resolve(FACTS).params["layer"] == 16
    with pytest.raises(RuleError, match="below its minimum"):
        load_rule("fastv").bind(layer="${decoder.depth - 32}").resolve(FACTS)


def test_options_of_torch_compile() -> None:
    (one,) = parse_rules({"rule": "hiprune", "keep": 192, "target": "eager"}, reserved={"target"})
    assert (one.name, one.params["keep"]) == ("hiprune", Budget(192))
    several = parse_rules({"rules": ["hiprune", {"rule": "random", "keep": 0.5}, LIBRARY / "fastv.yaml"]})
    assert [instance.name for instance in several] == ["hiprune", "random", "fastv"]
    assert parse_rules({"rules": several}) == several
    assert parse_rules({"rule": str(LIBRARY / "fastv.yaml")})[0].params["layer"] == 2
    assert parse_rules({"rule": "fastv", "layer": numpy.int64(3)})[0].params["layer"] == 3


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({}, "name no rule"),
        ({"keep": 3}, "name no rule"),
        ({"rule": "fastv", "rules": []}, "both"),
        ({"rules": []}, "not a list of rules"),
        ({"rules": 3}, "not a list of rules"),
        ({"rules": [3]}, "names no rule"),
        ({"rules": ["fastv"], "keep": 3}, "belongs to no rule"),
        ({"rule": "fastw"}, "no rule 'fastw'"),
        ({"rule": "fastv", "target": "eager"}, "no option 'target'"),
    ],
)
def test_wrong_options_of_torch_compile(options: dict, cause: str) -> None:
    with pytest.raises(RuleError, match=cause) as caught:
        parse_rules(options)
    assert caught.value.remedy


def test_instances_are_keys() -> None:
    rule = load_rule("fastv")
    assert rule.bind() == load_rule("fastv").bind(keep="1/2", layer=2)
    assert len({rule.bind(), rule.bind(keep=0.5), rule.bind(keep=0.25)}) == 2


@pytest.mark.parametrize(
    ("keep", "cause"),
    [
        ("${1 / 3}", "not a count"),
        ("${layer - 5}", "not a count"),
        ("${image.tokens // 2}", "needs 'image.tokens'"),
    ],
)
def test_a_budget_that_is_no_count(keep: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((LIBRARY / "fastv.yaml").read_text().replace("keep: ${keep}", f"keep: {keep}"))
    rule = load_rule(path)
    with pytest.raises(RuleError, match=cause) as caught:
        rule.bind().budget(_step(rule, "kept"), 100, {})
    assert caught.value.where == [f"{path}:{_step(rule, 'kept').line}"]


def test_a_fact_may_be_part_of_a_budget(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((LIBRARY / "fastv.yaml").read_text().replace("keep: ${keep}", "keep: ${image.tokens * 0.5}"))
    rule = load_rule(path)
    assert rule.bind().budget(_step(rule, "kept"), 575, {"image.tokens": 575}) == 288
