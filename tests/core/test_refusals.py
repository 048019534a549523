"""Impossible requests: one clear error that names the place and the remedy, and no compiled graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import naive
import pytest
import torch
import torch._dynamo
from harness import difference, prune, refusal
from torch import Tensor, nn
from transformers import StaticCache

from tokcompile import AddressError, CaptureError, EditError, LowerError, RuleError, TokredError
from tokcompile.backend import tokred
from tokcompile.models import catalogue, families

SCORE = "{name: s, by: norm, at: %s}"


def rule_file(folder: Path, *steps: str) -> str:
    """Write a rule of these steps; the path of its file."""
    path = folder / "mine.yaml"
    lines = [
        "rule: mine",
        "about: A rule of a test.",
        "params:",
        "  keep: {type: ratio_or_count, default: 4, about: n}",
        "steps:",
        *(f"  - {step}" for step in steps),
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def refused(model: nn.Module, inputs: dict[str, Tensor], kind: type[TokredError], **options: Any) -> TokredError:
    """Compile and call; the error, once it is sure that nothing was compiled."""
    pruned = prune(model, **options)
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011  Dynamo wraps what a backend raises
        pruned(**inputs)
    error = refusal(caught.value)
    assert type(error) is kind, error
    assert pruned.report.graphs == [] and pruned.recording.maps == {}
    assert error.remedy
    return error


def test_a_layer_that_is_not_there() -> None:
    model = fleet.shared("llava")
    error = refused(model, fleet.example(model), AddressError, rule="fastv", layer=99)
    assert "decoder.98.attention" in str(error) and "fastv.yaml" in str(error)
    assert "decoder has 3 blocks, 0 to 2" in error.cause
    assert "decoder.0..2.input" in error.found


def test_a_drop_at_a_layer_that_is_not_there(tmp_path: Path) -> None:
    model = fleet.shared("llava")
    path = rule_file(
        tmp_path,
        "score: {name: s, by: norm, at: decoder.1.input}",
        "select: {name: k, by: topk, scores: s, keep: '${keep}'}",
        "drop: {at: decoder.99.input, keep: k}",
    )
    error = refused(model, fleet.example(model), AddressError, rule=path)
    assert "'decoder.99.input' matches nothing" in error.cause
    assert any("mine.yaml:8" in place for place in error.where)


@pytest.mark.parametrize("name", fleet.DECODERS)
def test_a_rule_for_vision_on_a_decoder_alone(name: str) -> None:
    model = fleet.shared(name)
    error = refused(model, fleet.example(model), RuleError, rule="hiprune")
    assert "vision.depth" in error.cause and "hiprune.yaml" in str(error)


def test_a_rule_for_vision_on_a_decoder_alone_names_the_stack() -> None:
    model = fleet.shared("llama")
    error = refused(model, fleet.example(model), AddressError, rule="hiprune", object_layer=1, keep=4)
    assert "no vision stack" in error.cause and "decoder.0..2.attention" in error.found


@pytest.mark.parametrize("rule", ["fastv", "random"])
def test_image_tokens_in_a_prompt_without_an_image(rule: str) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model)
    del inputs["pixel_values"]
    inputs["input_ids"] = inputs["input_ids"].clamp(max=fleet.IMAGE - 1)
    error = refused(model, inputs, EditError, rule=rule)
    assert error.cause == "no image tokens in this graph"
    assert f"{rule}.yaml" in str(error) and "select" in str(error)


def test_a_drop_before_its_score(tmp_path: Path) -> None:
    model = fleet.shared("llava")
    path = rule_file(
        tmp_path,
        "score: {name: s, by: attention_received, at: decoder.2.attention, queries: last}",
        "select: {name: k, by: topk, scores: s, keep: '${keep}'}",
        "drop: {at: decoder.1.input, keep: k}",
    )
    error = refused(model, fleet.example(model), EditError, rule=path)
    assert "dropped before they are chosen" in error.cause
    assert any("mine.yaml:8" in place for place in error.where)


class InPieces(nn.Module):
    """A LLaVA that Dynamo splits between its vision tower and its decoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Any:
        embeddings = self.model.get_input_embeddings()(input_ids)
        features = self.model.get_image_features(pixel_values).pooler_output
        torch._dynamo.graph_break()
        features = torch.cat(list(features)).to(embeddings.dtype)
        mask = (input_ids == fleet.IMAGE)[..., None].expand_as(embeddings)
        return self.model.model.language_model(
            inputs_embeds=embeddings.masked_scatter(mask, features), attention_mask=attention_mask
        )


def test_a_rule_whose_sites_are_in_two_pieces_names_the_break() -> None:
    model = fleet.shared("llava")
    pruned = prune(InPieces(model), rule="hiprune")
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011  Dynamo wraps what a backend raises
        pruned(**fleet.example(model))
    error = refusal(caught.value)
    assert "one piece of a model that came apart" in str(error)
    assert "test_refusals.py" in str(error) and "hiprune.yaml" in str(error)


@pytest.mark.parametrize(("rule", "cut"), [("fastv", naive.fastv(2, 5)), ("random", naive.random(5))])
def test_a_rule_whose_sites_are_in_one_piece_is_applied_there(rule: str, cut: naive.Cut) -> None:
    """The other piece stays as it is, and a warning says so and where the model came apart."""
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, (2, 0, 1))
    pruned = prune(InPieces(model), rule=rule, keep=5)
    with pytest.warns(UserWarning, match=f"{rule}: nothing to do in a graph with vision.*came apart"):
        hidden = pruned(**inputs).last_hidden_state
    ran = naive.run(model, inputs, [cut])
    with torch.no_grad():
        assert difference(model.lm_head(hidden), ran.logits) == 0
    assert pruned.kept == ran.kept


@pytest.mark.parametrize("rule", ["fastv", "hiprune", "random"])
def test_rows_with_different_numbers_of_images_fail_when_run(rule: str) -> None:
    """Two images in one row and none in the other: a graph of two rows and two images, and no row of one each."""
    model = fleet.shared("llava")
    inputs = fleet.example(model, 2, text=23)
    ids = inputs["input_ids"]
    ids[0, 17:33] = fleet.IMAGE
    ids[1, 1:17] = 7
    pruned = prune(model, rule=rule, keep=5)
    with pytest.raises(RuntimeError, match="different numbers of image tokens"):
        pruned(**inputs)


def test_a_rule_that_needs_the_grid_after_it_is_gone() -> None:
    model = fleet.shared("llava")
    rules = [{"rule": "hiprune", "keep": 9}, {"rule": "hiprune", "keep": 4, "alpha": 1.0}]
    error = refused(model, fleet.example(model), EditError, rules=rules)
    assert "grid" in str(error) and "after hiprune" in str(error)


@pytest.mark.parametrize(
    ("score", "first"),
    [
        ("attention_received, at: decoder.0.attention, queries: last", {"rule": "fastv", "layer": 1, "keep": 9}),
        ("norm, at: projector.input", {"rule": "random", "keep": 9, "seed": 1}),
    ],
    ids=["text", "features"],
)
def test_a_choice_among_tokens_that_an_earlier_rule_dropped(score: str, first: dict[str, Any], tmp_path: Path) -> None:
    model = fleet.shared("llava")
    path = rule_file(
        tmp_path,
        f"score: {{name: s, by: {score}}}",
        "select: {name: k, by: topk, scores: s, among: image, keep: '${keep}'}",
        "drop: {at: decoder.2.input, keep: k}",
    )
    error = refused(model, fleet.example(model), EditError, rules=[first, path])
    assert error.cause == "tokens were chosen among some that an earlier drop removed"
    assert f"after {first['rule']}" in str(error) and "mine.yaml:8" in str(error)


def test_an_unknown_target() -> None:
    model = fleet.shared("llava")
    pruned = prune(model, target="inductr", rule="random")
    with pytest.raises(Exception, match="unknown target 'inductr'") as caught:
        pruned(**fleet.example(model))
    error = refusal(caught.value)
    assert type(error) is LowerError and "did you mean 'inductor'" in error.remedy


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs a rule"),
        ({"rule": "fastvv"}, "fastv"),
        ({"rule": "fastv", "budget": 3}, "no option 'budget'"),
        ({"rule": "fastv", "rules": ["random"]}, "both"),
    ],
)
def test_options_that_name_no_rule(options: dict[str, Any], said: str) -> None:
    model = fleet.shared("llama")
    compiled = torch.compile(model, backend=tokred, options=options)
    with pytest.raises(Exception, match=said) as caught, torch.no_grad():
        compiled(**fleet.example(model))
    assert type(refusal(caught.value)) is RuleError


def test_an_operator_without_a_rule_where_the_edit_reaches_it(tmp_path: Path) -> None:
    """Named: the operator, the place in the model's source, and the file where a rule for it goes."""

    class Odd(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Tensor) -> Tensor:
            return torch.ops.aten.unfold(self.model(**inputs).logits, 1, 2, 1)

    model = fleet.shared("llama")
    error = refused(Odd(model), fleet.example(model), EditError, rule="random", among="all", keep=6)
    assert "aten.unfold.default" in error.cause
    assert "test_refusals.py" in str(error)
    assert "tokcompile/axes/rules.py" in error.remedy


def test_learned_positions_cannot_be_compacted() -> None:
    """They are added to the embeddings before any token is dropped."""
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    model = families.decoder("gpt2", config).eval()
    ids = torch.arange(5, 15)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    error = refused(model, inputs, EditError, rule="random", among="all", keep=4)
    assert "no rotary positions" in error.cause
    assert "positions: keep" in error.remedy and "random.yaml" in str(error)


def test_a_cache_of_a_fixed_size_is_not_taken_for_a_prompt() -> None:
    """Its keys are more than its queries from the first call on; how many tokens it holds is not known."""
    model = fleet.build("llama")
    cache = StaticCache(config=model.config, max_cache_len=32)
    inputs = fleet.example(model, text=12) | {"past_key_values": cache}
    error = refused(model, inputs, CaptureError, rule="random", keep=4, among="all")
    assert "13 queries and 32 keys" in error.found and "DynamicCache" in error.remedy


def test_fewer_keys_of_another_sequence_than_later_steps_mask(recwarn: pytest.WarningsRecorder) -> None:
    """Without a cache the same edit is made; with one, a rule that leaves those keys alone is, without a warning."""
    family = catalogue.family("mllama")
    model = family.build()
    inputs = family.example(model, batch=2, padded=True)
    error = refused(model, inputs, EditError, rule="vqtoken", codes=5)
    assert "15 of 78 keys" in error.found and "use_cache=False" in error.remedy
    assert "vqtoken.yaml" in error.where[0] and "cross_attn" in error.where[1]
    torch._dynamo.reset()
    merged = prune(model, rule="vqtoken", codes=5)
    merged(**inputs, use_cache=False)
    assert [len(tile) for tile in merged.kept[0]] == [5] * 6  # three tiles in each of two rows
    torch._dynamo.reset()
    prune(model, rule="rope_scaling", factor=2.0)(**inputs)
    assert not [w for w in recwarn if "leaves layers with caches" in str(w.message)]
