"""The prompt's caches under dapq."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import naive
import torch
from torch import Tensor, nn

from rulecases._evictions import case
from tokcompile.budget import Budget

COUNT, LEAD = 3, 1


def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    """The prompt with copies of its ends behind it, which it does not see."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rows = [own[real.bool()] for own, real in zip(ids, mask, strict=True)]
    ahead = torch.stack([torch.cat([own[:LEAD], own[LEAD - COUNT :]]) for own in rows])
    longer = {"input_ids": torch.cat([ids, ahead], 1), "attention_mask": torch.cat([mask, torch.ones_like(ahead)], 1)}
    ran = naive.run(model, inputs | longer, generated=COUNT)
    tokens = ids.shape[1]
    return replace(ran, logits=ran.logits[:, :tokens], lengths=[Budget.parse(keep).count(tokens)] * len(ran.lengths))


CASE = replace(
    case(lambda keep: {"budget": keep, "count": COUNT, "lead": LEAD}, run=_run),
    keeps=("1/3", 6),
)
