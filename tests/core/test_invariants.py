"""What must hold of every rule on every model that it fits: DESIGN's five invariants, against runs by hand."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import fleet
import naive
import pytest
import torch
import torch._dynamo
from harness import Pruned, difference, pairwise, prune, refusal
from rulecases import CASES, IN_TEXT, RULES
from torch import Tensor, nn

import tokcompile
from tokcompile.models.catalogue import family
from tokcompile.rulefile import load_rule

PADS = {"none": (), "left": (2, 0, 1)}
CORE = {"fastv", "hiprune", "tome", "pospad"}
"""Rules that drop late and early, merge, and mark: `make test` asks of them most of what `make test-slow` asks."""
COMPILED, DYNAMIC = {"hiprune", "pospad"}, {"fastv", "tome"}
"""Those that `make test` compiles by Inductor and for all lengths, which takes long."""
USUAL = 2
"""Cases of the matrix that `make test` runs of every other rule."""


def options(rule: str, model: nn.Module, keep: Any) -> dict[str, Any]:
    """Options of the backend for a rule with a budget."""
    return {"rule": rule, **CASES[rule].options(model, keep)}


def _matrix() -> list[Any]:
    cases = []
    for rule in RULES:
        axes = {
            "name": CASES[rule].models,
            "keep": CASES[rule].keeps,
            "batch": (1, 3),
            "pads": ("none", "left"),
            "cache": (True, False),
            "dtype": (torch.float32, torch.bfloat16),
            "attention": ("sdpa", "eager"),
        }
        for number, case in enumerate(pairwise(axes)):
            label = "-".join(str(v).removeprefix("torch.") for v in case.values())
            marks = () if rule in CORE or number < USUAL else (pytest.mark.slow,)
            cases.append(pytest.param(rule, case, id=f"{rule}-{label}", marks=marks))
    return cases


def _each(rules: Iterable[str], *more: Any, core: Collection[str] = CORE) -> list[Any]:
    """Rules as cases of a test, those beyond the core marked as slow."""
    return [pytest.param(rule, *more, marks=() if rule in core else (pytest.mark.slow,)) for rule in rules]


def _checked(pruned: Pruned, out: Any, ran: naive.Ran, tolerance: float) -> None:
    assert pruned.kept == ran.kept
    if ran.filled is None:
        assert difference(out.logits, ran.logits) <= tolerance
        return
    assert out.logits.isfinite().all()
    assert difference(out.logits[ran.filled], ran.logits[ran.filled]) <= tolerance


@pytest.mark.parametrize(("rule", "case"), _matrix())
def test_a_rule_equals_the_run_by_hand(rule: str, case: dict[str, Any]) -> None:
    """On target eager, the same bits: float32 and bfloat16 alike, since the same kernels see the same tokens."""
    known = CASES[rule]
    model = fleet.shared(case["name"], case["dtype"], case["attention"])
    inputs = fleet.example(model, case["batch"], PADS[case["pads"]][: case["batch"]])
    keep = 1.0 if case["keep"] == "all" else case["keep"]
    pruned = prune(model, **options(rule, model, keep))
    out = pruned(**inputs, use_cache=case["cache"])
    if case["keep"] == "all":
        near = known.near[case["dtype"] == torch.bfloat16]
        with torch.no_grad():
            assert difference(out.logits, model(**inputs, use_cache=case["cache"]).logits) <= near
        return
    ran = known.run(model, inputs, keep)
    _checked(pruned, out, ran, known.tolerance if case["dtype"] == torch.float32 else known.coarse)
    assert (out.past_key_values is not None) == case["cache"]
    if case["cache"]:
        assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == ran.lengths
    if known.drops:
        _protected(inputs, pruned.kept[-1], fleet.images(model) > 0)


def _protected(inputs: dict[str, Tensor], kept: list[list[int]], has_image: bool) -> None:
    """Text tokens stay where only image tokens may go; else no padding is kept while a real token goes."""
    for ids, valid, row in zip(inputs["input_ids"], inputs["attention_mask"], kept, strict=True):
        gone = set(range(len(ids))) - set(row)
        if has_image:
            assert all(ids[i] == fleet.IMAGE for i in gone)
        elif any(valid[i] for i in gone):
            assert all(valid[i] for i in row)
        assert row == sorted(set(row))


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, attention) for name in ("gpt2", "opt") for attention in ("sdpa", "eager")), ("gemma2", "eager")],
)
def test_other_decoders_keep_their_bits_and_no_padding(name: str, attention: str) -> None:
    model = fleet.shared(name, attention=attention)
    inputs = fleet.example(model, 3, PADS["left"])
    with torch.no_grad():
        expected = model(**inputs).logits
    assert difference(prune(model, rule="random", among="all", keep=1.0)(**inputs).logits, expected) == 0
    torch._dynamo.reset()
    positions = "keep" if name in ("gpt2", "opt") else "compact"  # learned ones cannot be renumbered
    pruned = prune(model, rule="random", among="all", keep=5, seed=3, positions=positions)
    assert pruned(**inputs, use_cache=False).logits.shape == (3, 5, 64)
    valid = inputs["attention_mask"].bool()
    assert all(valid[row][kept].all() for row, kept in enumerate(pruned.kept[0]))


def test_a_window_that_the_edit_leaves_too_short_is_refused() -> None:
    """Gemma 2 caches the last tokens of a window: fewer than these are no cache of its shape."""
    model = fleet.shared("gemma2", attention="eager")
    pruned = prune(model, rule="random", among="all", keep=5, seed=3)
    with pytest.raises(Exception, match="more tokens from one end than the edit leaves") as caught:
        pruned(**fleet.example(model, text=20))
    assert "use_cache=False" in refusal(caught.value).remedy


@pytest.mark.parametrize("called_before", [False, True])
def test_compiling_leaves_eager_calls_as_they_were(called_before: bool) -> None:
    """transformers installs hooks at a first call; installing them twice would record each hidden state twice."""
    model = fleet.build("llava")
    inputs = fleet.example(model)
    ran = naive.run(model, inputs)
    with torch.no_grad():
        if called_before:
            assert difference(model(**inputs).logits, ran.logits) == 0
        pruned = prune(model, **options("fastv", model, 5))
        assert difference(pruned(**inputs).logits, naive.run(model, inputs, [naive.fastv(2, 5)]).logits) == 0
        assert difference(model(**inputs).logits, ran.logits) == 0


@pytest.mark.parametrize("rule", _each(rule for rule in IN_TEXT if CASES[rule].chooses and not CASES[rule].slots))
def test_rows_do_not_see_each_other(rule: str) -> None:
    """A padded batch selects and computes what each row does alone."""
    model = fleet.shared("llava")
    pads = PADS["left"]
    batch = fleet.example(model, 3, pads)
    together = prune(model, **options(rule, model, 6))
    logits, kept = together(**batch).logits, together.kept[-1]
    alone = prune(model, dynamic=True, **options(rule, model, 6))
    for number, pad in enumerate(pads):
        # Random scores hash the token's index, so that padding in front makes another, equally random choice.
        strip = 0 if rule == "random" else pad
        out = alone(**fleet.row(batch, number, strip))
        assert [i + strip for i in alone.kept[-1][0]] == kept[number][strip:]
        real = [new for new, old in enumerate(kept[number]) if old >= pad]
        assert difference(logits[number][real], out.logits[0, -len(real) :]) <= 1e-5
    assert len(alone.report.graphs) == 1


@pytest.mark.parametrize("rule", _each(IN_TEXT))
def test_a_replayed_recording_equals_the_run(rule: str) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS["left"])
    pruned = prune(model, **options(rule, model, "1/3"))
    out = pruned(**inputs)
    torch._dynamo.reset()
    ideal = prune(model, replay=pruned.recording, **options(rule, model, "1/3"))
    assert difference(ideal(**inputs).logits, out.logits) == 0


@pytest.mark.parametrize("rule", _each(rule for rule in IN_TEXT if CASES[rule].chooses))
def test_a_replay_needs_a_recording_that_fits(rule: str) -> None:
    model = fleet.shared("llava")
    ideal = prune(model, replay=tokcompile.Recording(), **options(rule, model, 5))
    with pytest.raises(Exception, match="no recorded selection fits"):
        ideal(**fleet.example(model))


@pytest.mark.slow
def test_a_replay_takes_a_recording_of_as_many_images_as_the_data_tell() -> None:
    """The graph of SmolVLM counts its tiles only when it runs: those of zeros are none."""
    known = family("smolvlm")
    model = known.build()
    inputs = known.example(model)
    given = {"rule": "hiprune", "keep": "1/3"}
    pruned = prune(model, **given)
    out = pruned(**inputs)
    torch._dynamo.reset()
    ideal = prune(model, replay=pruned.recording, **given)
    assert difference(ideal(**inputs).logits, out.logits) == 0


STATIC = {
    "pyramidkv": "known when the graph is compiled",  # with a budget that some prompt may be shorter than
    "treekv": "known when the graph is compiled",
}
"""Rules that one graph of all lengths is refused for, and why."""
SHAPES = ((2, (1, 0), 7), (2, (0, 3), 11), (2, (), 47), (4, (2, 0, 1), 7))


@pytest.mark.parametrize("rule", _each(IN_TEXT, core=DYNAMIC))
def test_one_dynamic_graph_serves_all_lengths(rule: str) -> None:
    """Among the lengths is one that makes the sequence as long as the stream is wide.

    LLaVA's own code splits features by image, so that Dynamo makes a graph for each number of images, pruned or not.
    """
    model = fleet.shared("llava")
    pruned = prune(model, dynamic=True, **options(rule, model, 5))
    if rule in STATIC:
        with pytest.raises(Exception, match=STATIC[rule]):
            pruned(**fleet.example(model, *SHAPES[0][:2], text=SHAPES[0][2]))
        return
    for batch, pads, text in SHAPES:
        inputs = fleet.example(model, batch, pads, text=text, seed=text)
        _checked(pruned, pruned(**inputs), CASES[rule].run(model, inputs, 5), max(1e-5, CASES[rule].tolerance))
    assert len(pruned.report.graphs) == len({batch for batch, _, _ in SHAPES})


@pytest.mark.parametrize("rule", _each(IN_TEXT))
def test_a_marked_length_alone_is_dynamic(rule: str) -> None:
    model = fleet.shared("llava-siglip-qwen2", attention="eager")
    pruned = prune(model, **options(rule, model, "1/3"))
    for text in (9, 7, 47):
        inputs = fleet.example(model, 3, PADS["left"], text=text)
        for name in ("input_ids", "attention_mask"):
            torch._dynamo.mark_dynamic(inputs[name], 1)
        _checked(pruned, pruned(**inputs, use_cache=False), CASES[rule].run(model, inputs, "1/3"), tolerance=1e-5)
    assert len(pruned.report.graphs) == 1


def test_a_dynamic_image_size_is_refused_where_the_grid_counts() -> None:
    """SigLIP takes images of any size, and then nobody knows how many tokens a third of them are."""
    model = fleet.shared("llava-siglip-qwen2")
    pruned = prune(model, dynamic=True, **options("hiprune", model, 5))
    with pytest.raises(Exception, match="number of image tokens is not known") as caught:
        pruned(**fleet.example(model, 2))
    assert "static image size" in refusal(caught.value).remedy


@pytest.mark.parametrize("name", fleet.DECODERS)
@pytest.mark.parametrize("keep", ["1/3", 5])
def test_a_share_of_a_symbolic_length_follows_it(name: str, keep: Any) -> None:
    """In a decoder without images the number of tokens to choose from is itself symbolic."""
    model = fleet.shared(name)
    pruned = prune(model, dynamic=True, **options("random", model, keep))
    for batch, pads, text in SHAPES:
        inputs = fleet.example(model, batch, pads, text=text)
        _checked(pruned, pruned(**inputs), CASES["random"].run(model, inputs, keep), tolerance=1e-5)
    assert len(pruned.report.graphs) == 1


@pytest.mark.parametrize(("rule", "target"), [*_each(IN_TEXT, "inductor", core=COMPILED), ("fastv", "aot_eager")])
def test_compiled_targets_equal_the_run_by_hand(rule: str, target: str) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS["left"])
    pruned = prune(model, target, **options(rule, model, "1/3"))
    _checked(pruned, pruned(**inputs), CASES[rule].run(model, inputs, "1/3"), tolerance=1e-4)


@pytest.mark.parametrize("rule", _each(IN_TEXT))
def test_a_second_call_with_other_inputs_is_pruned_by_its_own_scores(rule: str) -> None:
    model = fleet.shared("llava")
    pruned = prune(model, **options(rule, model, 5))
    for seed in (0, 1):
        inputs = fleet.example(model, 3, PADS["left"], seed=seed)
        _checked(pruned, pruned(**inputs), CASES[rule].run(model, inputs, 5), CASES[rule].tolerance)
    assert len(pruned.report.graphs) == 1


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_hiprune_then_fastv_is_one_after_the_other_by_hand(dynamic: bool | None) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS["left"])
    pruned = prune(
        model,
        dynamic=dynamic,
        rules=[{"rule": "hiprune", "keep": 10, "alpha": 1.0}, {"rule": "fastv", "layer": 2, "keep": 4}],
    )
    ran = naive.run(model, inputs, [naive.fastv(2, 4)], naive.hiprune(10, 1.0))
    _checked(pruned, pruned(**inputs), ran, tolerance=1e-5 if dynamic else 0)


@pytest.mark.parametrize("name", ["llava", "qwen2"])
def test_random_twice_is_random_of_random_by_hand(name: str) -> None:
    model = fleet.shared(name)
    among = "image" if fleet.images(model) else "all"
    inputs = fleet.example(model, 3, PADS["left"])
    rules = [{"rule": "random", "keep": keep, "seed": seed, "among": among} for keep, seed in (("2/3", 0), (3, 1))]
    pruned = prune(model, rules=rules)
    cuts = [naive.random("2/3", 0, among), naive.random(3, 1, among)]
    _checked(pruned, pruned(**inputs), naive.run(model, inputs, cuts), tolerance=0)


@pytest.mark.parametrize("rule", _each(IN_TEXT))
def test_hidden_states_have_the_lengths_that_the_layers_saw(rule: str) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS["left"])
    pruned = prune(model, **options(rule, model, 5))
    out = pruned(**inputs, output_hidden_states=True)
    ran = CASES[rule].run(model, inputs, 5)
    _checked(pruned, out, ran, CASES[rule].tolerance)
    # Evictions shorten what layers leave behind, not what they see.
    whole = [inputs["input_ids"].shape[1]] * len(ran.lengths)
    seen = whole if any(step.verb == "evict" for step in load_rule(rule).steps) else ran.lengths
    assert [h.shape[1] for h in out.hidden_states] == [*seen, seen[-1]]


@pytest.mark.parametrize("rule", _each(IN_TEXT))
def test_the_last_logits_alone_are_those_of_the_run_by_hand(rule: str) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS["left"])
    pruned = prune(model, **options(rule, model, 5))
    out = pruned(**inputs, logits_to_keep=1)
    ran = CASES[rule].run(model, inputs, 5)
    assert pruned.kept == ran.kept
    # One row of the head instead of all: another matrix kernel, so the sums are ordered otherwise.
    assert difference(out.logits, ran.logits[:, -1:]) <= 1e-5


def test_a_loss_over_dropped_tokens_is_refused() -> None:
    """Which label a token has whose next token is gone is the caller's to say."""
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS["left"])
    pruned = prune(model, **options("fastv", model, 5))
    with pytest.raises(Exception, match="cross_entropy_loss") as caught:
        pruned(**inputs, labels=inputs["input_ids"])
    assert "axes/rules.py" in refusal(caught.value).remedy
