"""Routes on families of different attention: each step attends to the keys that the method's naive form picks.

The whole model is run by hand on the prompt and the steps, and each query after the prompt sees what the naive form
of `routed` picks from the model's own queries and keys. Keys have the positions of the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import cached
import pytest
import routed
import torch
from core.test_family_evict import NAMES, OWN_ATTENTION, STEPS, Whole, extended, generated, whole
from harness import difference, prune, refusal
from torch import Tensor
from torch.nn import functional

import tokcompile

pytestmark = pytest.mark.usefixtures("one_thread")
VOTED = {"first": 2, "middle": 4, "last": 3}
BUDGET, PAIRS, KEYS = 9, 2, 5
ROUTES = ("tokenselect", "fasa")
NEIGHBOURS = ("cohere", "glm4", "helium", "ernie4_5")
"""Families that turn numbers side by side."""
NOT_ROUTED: dict[tuple[str, str], str] = {
    ("mistral", "tokenselect"): "every block attends in a window",
    ("starcoder2", "tokenselect"): "every block attends in a window",
    ("mistral", "fasa"): "every block attends in a window",
    ("starcoder2", "fasa"): "every block attends in a window",
    ("gpt2", "fasa"): "cannot be ranked by frequencies",
    ("opt", "fasa"): "cannot be ranked by frequencies",
    ("cohere2", "fasa"): "cannot be ranked by frequencies",
    ("exaone4", "fasa"): "cannot be ranked by frequencies",
    ("smollm3", "fasa"): "cannot be ranked by frequencies",
    ("hunyuan_v1_dense", "fasa"): "between the rotation and the attention",
    ("deepseek_v3", "fasa"): "between the rotation and the attention",
}
"""Why a route is refused on some families."""
USUAL = {("gemma2", "tokenselect")}
CELLS = [
    pytest.param(name, rule, marks=() if (name, rule) in USUAL else (pytest.mark.slow,), id=f"{name}-{rule}")
    for rule in ROUTES
    for name in NAMES
]


def naive_form(of: Whole, rule: str) -> tuple[dict[str, Any], routed.Votes | routed.Frequencies]:
    """Options of a rule, and what it picks on lists."""
    if rule == "tokenselect":
        return {"rule": rule, "positions": "keep", **VOTED}, routed.Votes(None, **VOTED)
    weights = tokcompile.calibrate(of.it.model, [of.it.inputs], rule, keys=KEYS, pairs=PAIRS)
    layout = turned(of)
    table = weights.state_dict()[f"{rule}.pairs"].tolist()
    turning = range(layout.start, layout.start + 2 * len(layout.frequencies))
    rest = tuple(i for i in range(of.caches[of.full[0]][0].shape[-1]) if i not in turning)
    given = {"rule": rule, "budget": BUDGET, "pairs": PAIRS, "weights": weights}
    return given, routed.Frequencies(layout, table, BUDGET, rest=rest)


def turned(of: Whole) -> routed.Layout:
    """Which numbers of a head are turned, and in which pairs, by what the model itself holds."""
    names = {name: value for name, value in of.it.model.named_buffers() if name.endswith("inv_freq")}
    pairs = next(len(value) for name, value in names.items() if "vis" not in name)
    config = of.it.model.config.get_text_config()
    behind = getattr(config, "qk_rope_head_dim", None)  # of latent attention: the last numbers of a key
    start = of.caches[of.full[0]][0].shape[-1] - 2 * pairs if behind else 0
    return routed.Layout([1.0] * pairs, start=start, neighbours=of.it.family.name in NEIGHBOURS)


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


@contextmanager
def sighted(of: Whole, sight: cached.Sight) -> Iterator[None]:
    """Let each query of a model see what `sight` says, beside its own mask."""
    if of.it.family.name not in OWN_ATTENTION:
        with cached.observed(of.it.model, sight=sight):
            yield
        return
    attend, calls = functional.scaled_dot_product_attention, itertools.count()

    def attended(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **more: Any) -> Tensor:
        return attend(query, key, value, attn_mask=attn_mask & sight(next(calls), query, key), **more)

    with mock.patch.object(functional, "scaled_dot_product_attention", attended):
        yield


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
    with sighted(of, sight), torch.no_grad():
        expected = of.it.model(**inputs, use_cache=False).logits[:, -STEPS:]
    assert naive.chosen
    assert difference(got, expected) <= 1e-4
