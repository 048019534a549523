"""The verb rotate: other frequencies, phases by content, and digits, at every layout of rotary tables."""

from __future__ import annotations

import json
import math
from typing import Any

import fleet
import pytest
import torch
from graphs import traced
from harness import difference, greedy, prune, refusal
from rulecases.carope import parameters
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from turned import content, text_of, turned
from turntoys import (
    AXIS,
    HEADS,
    KEY_HEADS,
    LAYOUTS,
    TOKENS,
    WIDTH,
    added,
    by_angles,
    captured,
    edit,
    inputs,
    model,
    queries_and_keys,
    two_kinds,
    with_sinks,
)

import tokcompile
from tokcompile import EditError, RuleError, Weights
from tokcompile.rope.digitencoder import DigitEncoder, digits_of
from tokcompile.rulefile import load_rule
from tokcompile.sites import find_sites
from tokcompile.sites.turns import find_turns

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
FLAT = [layout for layout in LAYOUTS if layout not in AXIS]
STEPS = 4


def ran(program: Any, layout: str, dtype: torch.dtype = torch.float32, **parameters: Tensor) -> Tensor:
    """What an edited toy computes, with parameters of the rule `mine`."""
    named = {f"tokred_mine_{name}": value for name, value in parameters.items()}
    return functional_call(program.gm, named, inputs(layout, dtype))


@pytest.mark.parametrize(
    ("layout", "products"), [*((layout, False) for layout in LAYOUTS), *((layout, True) for layout in FLAT)]
)
def test_tables_are_known_by_what_they_hold(layout: str, products: bool) -> None:
    program = captured(layout, products)
    (found,) = find_turns(program, find_sites(program), "decoder")
    pairs = LAYOUTS[layout][0]
    assert (found.pairs, found.coordinates) == (pairs, 3 if layout in AXIS else 1)
    assert {turn.wave for turn in found.turns} == {"cos", "sin"}
    for turn in found.turns:
        assert set(turn.pairs) == set(range(pairs)) and turn.scale == 1
        if layout in AXIS:
            assert list(turn.coordinates[:pairs]) == AXIS[layout]


@each_layout
def test_the_own_base_changes_no_bit(layout: str) -> None:
    program = captured(layout)
    edit(program, "rotate", by="base", base=100)
    x, positions, inverse, weight = inputs(layout)
    own = 1 / (100.0 ** (torch.arange(0, 2 * len(inverse), 2).float() / (2 * len(inverse))))
    assert difference(ran(program, layout), model(layout)(x, positions, own, weight)) == 0


def _stretched(pairs: int, scaling: str, factor: float, trained: int = 64) -> tuple[Tensor, float]:
    """Frequencies of base 100 by the papers, in float64 loops, and how strong tables are."""
    width, out = 2 * pairs, []
    for i in range(pairs):
        f = 100.0 ** (-2 * i / width)
        if scaling == "linear":
            f /= factor
        if scaling == "ntk":
            f = (100.0 * factor ** (width / (width - 2))) ** (-2 * i / width)
        if scaling == "yarn":
            ends = [width * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(100.0)) for turns in (32, 1)]
            low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), width - 1)
            ramp = min(max((i - low) / (high - low), 0), 1)
            f = f / factor * ramp + f * (1 - ramp)
        out.append(f)
    return torch.tensor(out), 0.1 * math.log(factor) + 1 if scaling == "yarn" else 1.0


@each_layout
@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_frequencies_are_stretched_as_the_papers_say(layout: str, scaling: str) -> None:
    program = captured(layout)
    edit(program, "rotate", by="base", base=100, scaling=scaling, factor=4, trained=64)
    x, positions, inverse, weight = inputs(layout)
    made, strength = _stretched(len(inverse), scaling, 4)
    rows = positions.permute(1, 2, 0)[..., AXIS[layout]] if layout in AXIS else positions[..., None]
    angles = (rows * made)[:, None]
    expected = by_angles(layout, x, angles, weight, strength)
    assert difference(ran(program, layout), expected) <= 2e-5


@pytest.mark.parametrize("layout", FLAT)
@pytest.mark.parametrize("first", [0, 1])
def test_phases_turn_each_key_head_by_its_own(layout: str, first: int) -> None:
    program = captured(layout)
    edit(program, "rotate", by="content", base=100, first=first)
    x, positions, inverse, weight = inputs(layout)
    rng = torch.Generator().manual_seed(5)
    w, b = torch.randn(KEY_HEADS, x.shape[-1], generator=rng) / 8, torch.randn(KEY_HEADS, generator=rng)
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    expected = by_angles(layout, x, content(w, b, valid, first)(x, positions, inverse), weight)
    assert difference(ran(program, layout, weight=w, bias=b), expected) <= 2e-5


@pytest.mark.parametrize("layout", FLAT)
def test_untrained_phases_are_the_usual_rotation(layout: str) -> None:
    program = captured(layout)
    edit(program, "rotate", by="content", base=100)
    x, _, inverse, weight = inputs(layout)
    usual = by_angles(layout, x, torch.arange(TOKENS)[None, None, :, None] * inverse, weight)
    assert difference(ran(program, layout), usual) <= 2e-5


def test_a_logit_of_zero_is_another_base() -> None:
    program = captured("half")
    edit(program, "rotate", by="content", base=100)
    x, _, inverse, weight = inputs("half")
    other = torch.arange(TOKENS)[:, None] * 0.590616 ** torch.arange(len(inverse))
    zeros = {"weight": torch.zeros(KEY_HEADS, x.shape[-1]), "bias": torch.zeros(KEY_HEADS)}
    assert difference(ran(program, "half", **zeros), by_angles("half", x, other[None, None], weight)) <= 2e-5


def test_tokens_in_front_change_no_score_between_the_others() -> None:
    """Only differences of phases enter: the first layer's scores of old tokens stay."""
    rng = torch.Generator().manual_seed(5)
    x, _, inverse, weight = inputs("half")
    w, b = torch.randn(KEY_HEADS, x.shape[-1], generator=rng) / 8, torch.randn(KEY_HEADS, generator=rng)

    def scores(stream: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(stream, w, b)
        phases = torch.ops.tokred.phase_scan(logits, None, None, len(inverse), 0).repeat(1, 1, 1, 2)
        q, k, _ = queries_and_keys(stream, weight)
        turn = LAYOUTS["half"][2]
        key = turn(k, phases.cos(), phases.sin()).repeat_interleave(2, 1)
        phases = phases.repeat_interleave(2, 1)
        return turn(q, phases.cos(), phases.sin()) @ key.transpose(2, 3)

    longer = torch.cat([torch.randn(2, 3, x.shape[-1], generator=rng), x], 1)
    assert difference(scores(longer)[:, :, 3:, 3:], scores(x)) <= 1e-4


def test_phases_take_the_place_of_two_kinds_of_tables_in_whatever_order_these_are_computed() -> None:
    """Layers share tables of phases, which are made in front of the first layer, not of the first angles."""
    given = inputs("half")
    x, positions, inverse, weight = given
    program = traced(two_kinds, *given, inverse / 8)
    edit(program, "rotate", by="content", base=100)
    program.graph.lint()
    rng = torch.Generator().manual_seed(5)
    w, b = torch.randn(KEY_HEADS, x.shape[-1], generator=rng) / 8, torch.randn(KEY_HEADS, generator=rng)
    angles = content(w, b, torch.ones(x.shape[:2], dtype=torch.bool))(x, positions, inverse)
    expected = by_angles("half", by_angles("half", x, angles, weight), angles, weight)
    got = functional_call(program.gm, {"tokred_mine_weight": w, "tokred_mine_bias": b}, (*given, inverse / 8))
    assert difference(got, expected) <= 1e-4


@pytest.mark.parametrize("layout", list(AXIS))
def test_content_does_not_replace_several_coordinates(layout: str) -> None:
    with pytest.raises(EditError, match="several coordinates"):
        edit(captured(layout), "rotate", by="content")


def _parameters(how: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(8)
    return {
        "q": torch.randn(50, HEADS, WIDTH, generator=rng).to(dtype),
        "k": torch.randn(50, KEY_HEADS, WIDTH, generator=rng).to(dtype),
    }


def _by_digits(layout: str, how: str, q: Tensor, k: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The method's three forms, with a matrix of scores; sinks [H] are logits beside those of the keys."""
    x, positions, _, weight = inputs(layout)
    queries, keys, values = queries_and_keys(x, weight)
    pq, pk = (table[positions].transpose(1, 2) for table in (q, k))
    if how == "mul":
        queries, keys = queries * pq, keys * pk
    if how == "add":
        queries, keys = queries + pq, keys + pk
    scores = queries @ keys.repeat_interleave(2, 1).transpose(2, 3)
    if how == "scalar":
        scores = scores + pq @ pk.repeat_interleave(2, 1).transpose(2, 3)
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    weights = (scores / WIDTH**0.5).masked_fill(hidden, -math.inf).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    return added(x, weights / total @ values.repeat_interleave(2, 1))


@pytest.mark.parametrize("layout", FLAT)
@pytest.mark.parametrize("how", ["mul", "add", "scalar"])
def test_what_positions_say_takes_the_place_of_the_rotation(layout: str, how: str) -> None:
    program = captured(layout)
    edit(program, "rotate", by="digits", how=how, length=50)
    given = _parameters(how)
    assert difference(ran(program, layout, **given), _by_digits(layout, how, **given)) <= 2e-5
    program.graph.eliminate_dead_code()
    left = [n for n in program.graph.nodes if n.target in (torch.ops.aten.cos.default, torch.ops.aten.sin.default)]
    assert not left


@pytest.mark.parametrize("how", ["mul", "add", "scalar"])
def test_what_positions_say_meets_attention_with_sinks(how: str) -> None:
    """Positions add to the scores of keys; the share that sinks take is of the scores that this makes."""
    sinks = torch.tensor([1.0, -2.0, 0.5, 3.0])
    program = traced(with_sinks, *inputs("half"), sinks)
    edit(program, "rotate", by="digits", how=how, length=50)
    given = _parameters(how)
    named = {f"tokred_mine_{name}": value for name, value in given.items()}
    got = functional_call(program.gm, named, (*inputs("half"), sinks))
    assert difference(got, _by_digits("half", how, **given, sinks=sinks)) <= 2e-5


@pytest.mark.parametrize("how", ["mul", "add", "scalar"])
def test_untrained_tables_are_no_positions_at_all(how: str) -> None:
    program = captured("half")
    edit(program, "rotate", by="digits", how=how, length=50)
    x, _, _, weight = inputs("half")
    plain = added(x, scaled_dot_product_attention(*queries_and_keys(x, weight), is_causal=True, enable_gqa=True))
    assert difference(ran(program, "half"), plain) <= 1e-6


def test_the_same_word_of_all_positions_is_none() -> None:
    """A score that is the same for all keys of a row changes nothing."""
    program = captured("half")
    edit(program, "rotate", by="digits", how="scalar", length=50)
    same = {name: table[:1].expand_as(table) for name, table in _parameters("scalar").items()}
    x, _, _, weight = inputs("half")
    plain = added(x, scaled_dot_product_attention(*queries_and_keys(x, weight), is_causal=True, enable_gqa=True))
    assert difference(ran(program, "half", **same), plain) <= 2e-5


def test_a_position_past_the_tables_is_an_error() -> None:
    program = captured("half")
    edit(program, "rotate", by="digits", length=20)  # positions go up to 39
    with pytest.raises((RuntimeError, IndexError), match="past the 20|out of range"):
        ran(program, "half")


@pytest.mark.parametrize(("by", "how"), [("content", None), ("digits", "mul"), ("digits", "add"), ("digits", "scalar")])
def test_gradients_of_parameters(by: str, how: str | None) -> None:
    program = captured("partial", dtype=torch.float64)
    fields = {"by": by} | ({"how": how, "length": 50} if how else {"base": 100})
    edit(program, "rotate", **fields)
    rng = torch.Generator().manual_seed(9)
    names = ("q", "k") if how else ("weight", "bias")
    held = program.weights.mine
    values = [
        (held[n].detach() + torch.randn(held[n].shape, generator=rng) / 4).double().requires_grad_() for n in names
    ]

    def call(*parameters: Tensor) -> Tensor:
        out = ran(program, "partial", torch.float64, **dict(zip(names, parameters, strict=True)))
        return out[:, -1, :3]

    assert gradcheck(call, values, fast_mode=True)


@pytest.mark.parametrize(("position", "digits"), [(7, [0, 0, 0, 0, 7]), (12345, [1, 2, 3, 4, 5])])
def test_digits(position: int, digits: list[int]) -> None:
    assert digits_of(torch.tensor([[position]]), 5).tolist() == [digits]


def test_digits_of_rows_and_columns() -> None:
    assert digits_of(torch.tensor([[2, 3]]), 2).tolist() == [[0, 2, 0, 3]]


@pytest.mark.parametrize("position", [100, -1])
def test_a_position_with_too_many_digits_is_an_error(position: int) -> None:
    encoder = DigitEncoder(2, 1, 4, digits=2)
    assert encoder(torch.tensor([99]))[0].shape == (1, 2, 4)
    with pytest.raises(ValueError, match="do not fit in 2 digits"):
        encoder(torch.tensor([0, position]))


def test_an_encoder_fills_tables_row_by_row() -> None:
    torch.manual_seed(0)
    encoder = DigitEncoder(HEADS, KEY_HEADS, WIDTH, digits=2)
    weights = encoder.fill(Weights(), "mine", 50)
    with torch.no_grad():
        for position in (0, 7, 49):
            q, k = encoder(torch.tensor([position]))
            assert difference(weights.mine["q"][position], q[0]) <= 1e-6
            assert difference(weights.mine["k"][position], k[0]) <= 1e-6
    with pytest.raises(ValueError, match="do not fit"):
        encoder.fill(Weights(), "mine", 101)


def test_axes_are_told_apart() -> None:
    torch.manual_seed(0)
    encoder = DigitEncoder(2, 1, 4, digits=2, coordinates=2)
    said = encoder(torch.tensor([[2, 3], [3, 2], [2, 3]]))[0]
    assert torch.equal(said[0], said[2]) and not torch.allclose(said[0], said[1])


WEIGHTS = {"carope": ("weight", "bias"), "seqpe": ("q", "k")}


def _brought(rule: str, options: dict[str, Any], model: Any) -> Weights:
    """Parameters that say something."""
    weights, rng = Weights(), torch.Generator().manual_seed(2)
    heads, keys, width = 4, model.config.num_key_value_heads, 16
    shapes = {"weight": (keys, 64), "bias": (keys,), "q": (64, heads, width), "k": (64, keys, width)}
    for name in WEIGHTS.get(rule, ()):
        weights.of(rule, name, shapes[name], lambda name=name: torch.randn(shapes[name], generator=rng) / 2)
    return weights


CONTINUED = [
    ("carope", {}),
    ("rope_scaling", {"factor": 2.0}),
    ("seqpe", {"how": "mul", "length": 64}),
    ("seqpe", {"how": "scalar", "length": 64}),
]


@pytest.mark.parametrize(("rule", "options"), CONTINUED, ids=lambda v: v if isinstance(v, str) else v.get("how", ""))
def test_steps_from_a_cache_are_the_whole_run(rule: str, options: dict[str, Any]) -> None:
    """Left-padded rows; each step's logits are those of all tokens run at once, which the matrix compares by hand."""
    model = fleet.build("qwen2")
    given = fleet.example(model, 2, (2, 0))
    tokcompile.compile(model, rule=rule, target="eager", weights=_brought(rule, options, model), **options)
    out = model.generate(**given, **greedy(STEPS))
    for step, logits in enumerate(out.logits):
        ids = out.sequences[:, : given["input_ids"].shape[1] + step]
        mask = torch.cat([given["attention_mask"], torch.ones(2, step, dtype=torch.long)], 1)
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert difference(logits, whole[:, -1]) <= 2e-5


def test_phases_follow_beams() -> None:
    """With beams, the cache's rows change places; so must the phases. The winner's score is that of its own tokens."""
    model = fleet.build("llama")
    given = fleet.example(model, 1)
    tokcompile.compile(model, rule="carope", target="eager", weights=_brought("carope", {}, model))
    out = model.generate(
        **given, max_new_tokens=6, num_beams=4, do_sample=False, pad_token_id=0, eos_token_id=None, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    ids, start = out.sequences, given["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.log_softmax(-1)
    score = logits[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum()
    assert abs(score - out.sequences_scores[0]) <= 1e-4


def test_plain_compilation_goes_on_from_no_phases() -> None:
    model = fleet.build("llama")
    model.compile(backend="tokred", options={"rule": "carope", "target": "eager"})
    with pytest.raises(Exception, match="which its inputs do not tell") as caught:
        model.generate(**fleet.example(model, 1), **greedy(2))
    assert "tokcompile.compile" in refusal(caught.value).remedy


def test_a_cache_of_another_model_is_refused() -> None:
    model, other = fleet.build("llama"), fleet.build("llama")
    given = fleet.example(model, 1)
    tokcompile.compile(model, rule="carope", target="eager")
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        longer = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
        model(**longer, past_key_values=cache, use_cache=True)
        foreign = other(**given, use_cache=True).past_key_values
        with pytest.raises(tokcompile.TokredError, match="no prompt of this compiled model"):
            model(**longer, past_key_values=foreign, use_cache=True)


def test_parameters_are_trained_through_a_compiled_model() -> None:
    model = fleet.build("llama")
    given = fleet.example(model, 2)
    tokcompile.compile(model, rule="carope", target="aot_eager")
    model(**given, labels=given["input_ids"], use_cache=False).loss.backward()
    gradients = {name: p.grad for name, p in model.tokred.named_parameters()}
    assert set(gradients) == {"carope.weight", "carope.bias"}
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())


def test_phases_count_tokens_that_are_dropped_later() -> None:
    """A drop before and one after the step are alike: phases are of the whole sequence, and go with the tokens."""
    model = fleet.shared("llama")
    given = fleet.example(model, 2, (2, 0), text=12)
    weight, bias = parameters(model, 1)

    def logits(*rules: Any) -> tuple[Tensor, Any]:
        torch._dynamo.reset()
        weights = Weights()
        weights.of("carope", "weight", tuple(weight.shape), lambda: weight)
        weights.of("carope", "bias", tuple(bias.shape), lambda: bias)
        pruned = prune(model, rules=list(rules), weights=weights)
        return pruned(**given, use_cache=False).logits, pruned.kept

    luck = {"rule": "random", "among": "all", "keep": 7, "positions": "keep"}
    (before, kept), (after, same) = logits(luck, "carope"), logits("carope", luck)
    assert kept == same
    assert difference(before, after) <= 1e-6
    chosen = torch.tensor(kept[0])
    angles = content(weight, bias, given["attention_mask"].bool())
    embedded = model.get_input_embeddings()(given["input_ids"])
    whole = angles(embedded, None, text_of(model).rotary_emb.inv_freq)
    short = torch.stack([t[:, rows] for t, rows in zip(whole, chosen, strict=True)])
    stream = torch.stack([t[rows] for t, rows in zip(embedded, chosen, strict=True)])
    mask = given["attention_mask"].gather(1, chosen)
    with torch.no_grad(), turned(model, lambda x, p, i: short):
        expected = model(inputs_embeds=stream, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    assert difference(before[real], expected[real]) <= 2e-5


@pytest.mark.parametrize("rule", ["carope", "rope_scaling", "seqpe"])
def test_a_model_without_rotary_tables_is_refused(rule: str) -> None:
    pruned = prune(fleet.shared("gpt2"), rule=rule)
    with pytest.raises(Exception, match="has no rotary tables") as caught:
        pruned(**fleet.example(fleet.shared("gpt2")))
    assert "decoder.0..2.input" in refusal(caught.value).found


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"by": "phase"}, "no way to rotate is called"),
        ({"by": "base", "length": 3}, "does not use 'length'"),
        ({"by": "digits"}, "needs 'length'"),
        ({"by": "base", "scaling": "yarn", "factor": 2}, "needs 'trained'"),
        ({"by": "base", "base": 1}, "out of range"),
        ({"by": "base", "factor": 0.5}, "out of range"),
        ({"by": "content", "first": 2}, "out of range"),
        ({"by": "base", "at": "decoder.0.input"}, "not a place for a rotation"),
    ],
)
def test_wrong_steps(fields: dict[str, Any], cause: str, tmp_path: Any) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"rule: mine\nabout: A test.\nsteps:\n  - rotate: {json.dumps(fields)}\n")
    with pytest.raises(RuleError, match=cause):
        load_rule(path)
