"""Routes on families of different attention: each step attends to the keys that the method's naive form picks.

The whole model is run by hand on the prompt and the steps, and each query after the prompt sees what the naive form
of `routed` picks from the model's own queries and keys. Keys have the positions of the text.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import cached
import pytest
import routed
import torch
from core.test_family_evict import STEPS, Whole, extended, generated, whole
from harness import difference, prune, refusal
from torch import Tensor

import tokcompile

pytestmark = pytest.mark.usefixtures("one_thread")
VOTED = {"first": 2, "middle": 4, "last": 3}
BUDGET, PAIRS, KEYS = 9, 2, 5
TRIED = {
    "tokenselect": "llama gpt2 gemma2 phi3 gpt_oss qwen2_vl mistral",
    "fasa": "llama gpt2 gemma2 cohere qwen2_vl",
}
"""Shared heads and heads of their own, biases, caps, windows, sinks, positions in space, pairs side by side."""
NEIGHBOURS = ("cohere",)
"""Families that turn numbers side by side."""
NOT_ROUTED: dict[tuple[str, str], str] = {
    ("mistral", "tokenselect"): "every block attends in a window",
    ("gpt2", "fasa"): "cannot be ranked by frequencies",
}
"""Why a route is refused on some families."""
USUAL = {("gemma2", "tokenselect")}
CELLS = [
    pytest.param(name, rule, marks=() if (name, rule) in USUAL else (pytest.mark.slow,), id=f"{name}-{rule}")
    for rule, names in TRIED.items()
    for name in names.split()
]


def naive_form(of: Whole, rule: str) -> tuple[dict[str, Any], routed.Votes | routed.Frequencies]:
    """Options of a rule, and what it picks on lists."""
    if rule == "tokenselect":
        return {"rule": rule, "positions": "keep", **VOTED}, routed.Votes(None, **VOTED)
    weights = tokcompile.calibrate(of.it.model, [of.it.inputs], rule, keys=KEYS, pairs=PAIRS)
    pairs = of.caches[of.full[0]][0].shape[-1] // 2
    layout = routed.Layout([1.0] * pairs, neighbours=of.it.family.name in NEIGHBOURS)
    table = weights.state_dict()[f"{rule}.pairs"].tolist()
    return {"rule": rule, "budget": BUDGET, "pairs": PAIRS, "weights": weights}, routed.Frequencies(
        layout, table, BUDGET
    )


def picked(of: Whole, real: Tensor, naive: Any, call: int, query: Tensor, key: Tensor) -> Tensor:
    """What the queries of a block see beside the mask of the model; [B, H, T, T]."""
    rows, heads, tokens, _ = query.shape
    seen = torch.ones(rows, heads, tokens, tokens, dtype=torch.bool)
    block = of.own[call]
    for at in range(of.tokens, tokens) if block in of.full else ():
        for row in range(rows):
            places = real[row, : at + 1].nonzero()[:, 0]
            made = naive(routed.Step(block, row, query[row, :, at : at + 1], key[row, :, places]))
            for head, keys in enumerate(made.keys):
                seen[row, head, at] = False
                seen[row, head, at, places[keys]] = True
    return seen


@pytest.mark.parametrize(("name", "rule"), CELLS)
def test_steps_attend_to_the_keys_of_the_naive_form_or_the_rule_is_refused(name: str, rule: str) -> None:
    of = whole(name, 0)
    if (name, rule) in NOT_ROUTED:
        given = {"pairs": PAIRS} if rule == "fasa" else VOTED
        with pytest.raises(Exception, match="ttention|frequenc") as caught:
            prune(of.it.model, rule=rule, **given)(**of.it.inputs)
        error = refusal(caught.value)
        assert NOT_ROUTED[name, rule] in f"{error.cause} {error.found}"
        assert error.where
        return
    given, naive = naive_form(of, rule)
    got, more = generated(of, **given)
    inputs = extended(of.it, more[:, : STEPS - 1])
    sight = partial(picked, of, inputs["attention_mask"].bool(), naive)
    with cached.observed(of.it.model, sight=sight), torch.no_grad():
        expected = of.it.model(**inputs, use_cache=False).logits[:, -STEPS:]
    assert naive.chosen
    assert difference(got, expected) <= 1e-4
