"""route by frequencies: which pairs a calibration finds, and which keys they choose, against runs by hand."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import cached
import fleet
import pytest
import routed
import torch
from harness import difference, prune, refusal
from test_route import PADS, build, by_hand, example, generated, question
from torch import Tensor, nn

import tokcompile
from tokcompile import Weights
from tokcompile.calibration import agreement
from tokcompile.models import families
from tokcompile.sites.pairing import Pairing

pytestmark = pytest.mark.usefixtures("one_thread")
slow = pytest.mark.slow
BUDGET, PAIRS, KEYS = 9, 3, 5


def pairing(pairs: int, start: int = 0, neighbours: bool = False) -> Pairing:
    return Pairing(None, tuple(range(pairs)), frozenset({0}), start, neighbours)


def agreement_by_hand(query: Tensor, key: Tensor, layout: routed.Layout, keys: int) -> list[list[Fraction]]:
    """Mean contextual agreement of each pair, for each query head, over the queries that see more than `keys`."""
    out = []
    for head in range(query.shape[0]):
        own, shares = key[head // (query.shape[0] // key.shape[0])], [[] for _ in layout.frequencies]
        for t in range(keys, query.shape[1]):
            whole = [float(query[head, t] @ own[j]) for j in range(t + 1)]
            best = set(sorted(range(t + 1), key=lambda j: (-whole[j], j))[:keys])
            for i, share in enumerate(shares):
                a, b = layout.pair(i)
                alone = [float(query[head, t, a] * own[j, a] + query[head, t, b] * own[j, b]) for j in range(t + 1)]
                share.append(Fraction(len(best & set(sorted(range(t + 1), key=lambda j: (-alone[j], j))[:keys])), keys))
        out.append([sum(share) / len(share) for share in shares])
    return out


@pytest.mark.parametrize(("start", "neighbours"), [(0, False), (2, True)])
def test_agreement_of_each_pair(start: int, neighbours: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 14, 10, generator=rng), torch.randn(2, 14, 10, generator=rng)
    total, count = agreement(query, key, pairing(4, start, neighbours), 4, 99)
    assert count == 10
    expected = agreement_by_hand(query, key, routed.Layout([1.0] * 4, start, neighbours), 4)
    assert [[Fraction(n, 4 * count) for n in row] for row in total.tolist()] == expected


def test_planted_frequencies_are_found() -> None:
    """All energy in pairs 3 and 7: they come first, and of a head that is one pair alone the agreement is whole."""
    rng = torch.Generator().manual_seed(1)
    query, key = torch.randn(1, 40, 20, generator=rng), torch.randn(1, 40, 20, generator=rng)
    energy = torch.tensor([1.0 if d % 10 in (3, 7) else 1e-3 for d in range(20)])
    total, count = agreement(query * energy, key * energy, pairing(10), 6, 99)
    assert set(total[0].topk(2).indices.tolist()) == {3, 7}
    lone = torch.tensor([1.0 if d % 10 == 3 else 0.0 for d in range(20)])
    total, count = agreement(query * lone, key * lone, pairing(10), 6, 99)
    assert count == 34
    assert total[0, 3] == 6 * count


def test_queries_are_spread_evenly() -> None:
    query = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(2))
    some, count = agreement(query, query, pairing(2), 5, 5)
    assert count == 5
    ends = [(t, t + 1) for t in (5, 10, 15, 20, 25)]
    each = [agreement(query[:, :end], query[:, :end], pairing(2), 5, 99)[0] for pair in ends for end in pair]
    chosen = sum(after - before for before, after in zip(each[::2], each[1::2], strict=True))
    assert torch.equal(some, chosen)


def table_by_hand(
    model: nn.Module, inputs: dict[str, Tensor], layout: routed.Layout, per: str
) -> list[list[list[int]]]:
    """For each layer and head its pairs, from the queries and keys that the attention is given."""
    with cached.observed(model) as calls, torch.no_grad():
        model(**inputs)
    valid, out = inputs["attention_mask"].bool(), []
    for seen in calls:
        heads, group = seen.query.shape[1], seen.query.shape[1] // seen.key.shape[1]
        sums = [[Fraction(0)] * len(layout.frequencies) for _ in range(heads)]
        for row in range(valid.shape[0]):
            places = valid[row].nonzero()[:, 0]
            if len(places) <= KEYS:
                continue
            found = agreement_by_hand(seen.query[row][:, places], seen.key[row][:, places], layout, KEYS)
            for head, shares in enumerate(found):
                sums[head] = [s + share * (len(places) - KEYS) for s, share in zip(sums[head], shares, strict=True)]
        if per == "kv_head":
            sums = [[sum(column) for column in zip(*sums[h : h + group], strict=True)] for h in range(0, heads, group)]
        out.append([sorted(sorted(range(len(each)), key=lambda i: (-each[i], i))[:PAIRS]) for each in sums])
    return out


def calibrated(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Weights:
    return tokcompile.calibrate(model, [inputs], "fasa", keys=KEYS, queries=999, pairs=PAIRS, **options)


def options(weights: Weights, **more: Any) -> dict[str, Any]:
    return {"rule": "fasa", "budget": BUDGET, "pairs": PAIRS, "weights": weights, **more}


@pytest.mark.parametrize(
    ("name", "per", "more"),
    [
        ("llama", "kv_head", {}),
        pytest.param("llama", "query_head", {"sinks": 1, "recent": 2}, marks=slow),
        pytest.param("qwen2", "kv_head", {"sinks": 2}, marks=slow),
    ],
)
def test_generate_equals_a_run_that_ranks_by_frequencies(name: str, per: str, more: dict[str, int]) -> None:
    model = build(name)
    inputs = example(model)
    counted = cached.continued(inputs, inputs["input_ids"][:, :0])
    layout = routed.Layout(model.get_decoder().rotary_emb.inv_freq.tolist())
    table = table_by_hand(model, counted, layout, per)
    weights = calibrated(model, counted, per=per)
    assert weights.state_dict()["fasa.pairs"].tolist() == table
    assert weights.state_dict()["fasa.pairs"].dtype == torch.int16
    assert not [p for p in weights.parameters() if p.requires_grad]
    logits, tokens = generated(model, inputs, **options(weights, per=per, **more))
    naive = routed.Frequencies(layout, table, BUDGET, per=per, **more)
    assert difference(logits, by_hand(model, inputs, tokens, naive)) <= 2e-5
    assert {row for _, row, _ in naive.chosen} == {0, 1}


@pytest.mark.parametrize("name", [pytest.param("cohere", marks=slow), "glm", pytest.param("gpt_neox", marks=slow)])
def test_other_layouts(name: str) -> None:
    """Pairs side by side, and heads of which a part is turned: the rest of such a head always counts."""
    neighbours, turned = {"cohere": (True, 8), "glm": (True, 4), "gpt_neox": (False, 2)}[name]
    model = families.decoder(name, fleet.TEXT | {"head_dim": 16, "num_hidden_layers": 2}).eval()
    inputs = example(model)
    weights = tokcompile.calibrate(model, [inputs], "fasa", keys=KEYS, pairs=2)
    table = weights.state_dict()["fasa.pairs"].tolist()
    logits, tokens = generated(model, inputs, **options(weights, pairs=2))
    layout = routed.Layout([1.0] * turned, neighbours=neighbours)
    naive = routed.Frequencies(layout, table, BUDGET, rest=tuple(range(2 * turned, 16)))
    assert difference(logits, by_hand(model, inputs, tokens, naive)) <= 2e-5
    assert naive.chosen


@slow
def test_a_question_of_several_tokens(tmp_path: Path) -> None:
    """The mean of its queries chooses, and each of its tokens sees those before it; the table comes from a file."""
    model = build("llama")
    inputs = example(model)
    weights = calibrated(model, inputs)
    weights.save(tmp_path / "table.safetensors")
    held = Weights.load(tmp_path / "table.safetensors")
    tokens = torch.tensor([[3, 4, 62, 8, 9]]).repeat(3, 1)
    got = question(model, inputs, tokens, **options(held))
    layout = routed.Layout(model.get_decoder().rotary_emb.inv_freq.tolist())
    naive = routed.Frequencies(layout, held.state_dict()["fasa.pairs"].tolist(), BUDGET)
    assert difference(got, by_hand(model, inputs, tokens, naive, whole=True)[:, 1:]) <= 2e-5


@slow
def test_a_table_does_not_depend_on_how_prompts_are_batched() -> None:
    model = build("llama")
    inputs = cached.continued(example(model), torch.zeros(3, 0, dtype=torch.long))
    together = calibrated(model, inputs).state_dict()["fasa.pairs"]
    rows = [fleet.row(inputs, row, pad) for row, pad in enumerate(PADS)]
    apart = tokcompile.calibrate(model, rows, "fasa", keys=KEYS, queries=999, pairs=PAIRS).state_dict()["fasa.pairs"]
    assert torch.equal(together, apart)


def test_without_a_table_the_error_says_how_to_make_one() -> None:
    model = build("llama")
    with pytest.raises(Exception, match="needs a table of pairs") as caught:
        prune(model, rule="fasa", pairs=PAIRS)(**example(model, 1, ()))
    assert "tokred calibrate MODEL --rule fasa --out FILE" in refusal(caught.value).remedy


@pytest.mark.parametrize(
    ("shape", "value", "why"),
    [((2, 2, PAIRS), 8, "names pairs that this model does not have"), ((2, 4, PAIRS), 0, "does not fit this model")],
)
def test_a_table_of_another_model_is_refused(shape: tuple[int, ...], value: int, why: str) -> None:
    model, weights = build("llama"), Weights()
    weights.of("fasa", "pairs", shape, lambda: torch.full(shape, value, dtype=torch.int16))
    with pytest.raises(Exception, match=why):
        prune(model, **options(weights))(**example(model, 1, ()))


def test_models_without_rotations_are_refused() -> None:
    model = build("gpt2")
    inputs = example(model, 1, ())
    with pytest.raises(Exception, match="no rotary attention") as caught:
        calibrated(model, inputs)
    assert refusal(caught.value).remedy
    with pytest.raises(Exception, match="cannot be ranked by frequencies"):
        prune(model, rule="fasa", pairs=PAIRS)(**inputs)


@pytest.mark.parametrize(
    ("given", "why"),
    [({"keys": 60}, "saw more keys"), ({"pairs": 9}, "fewer pairs"), ({"rule": "tokenselect"}, "no table")],
)
def test_calibrations_that_cannot_be(given: dict[str, Any], why: str) -> None:
    model = build("llama")
    with pytest.raises(tokcompile.RuleError, match=why):
        tokcompile.calibrate(model, [example(model, 1, ())], **{"rule": "fasa", "keys": KEYS, **given})


def test_more_pairs_than_there_are_is_an_error() -> None:
    model = build("llama")
    with pytest.raises(Exception, match="fewer pairs than are to be chosen"):
        prune(model, rule="fasa", pairs=9)(**example(model, 1, ()))


def test_a_table_of_all_pairs_lists_them_in_order() -> None:
    model = build("llama")
    inputs = example(model, 2, (0, 3))
    weights = tokcompile.calibrate(model, [inputs], "fasa", keys=KEYS, pairs=8)
    assert weights.state_dict()["fasa.pairs"].tolist() == [[list(range(8))] * 2] * 2
