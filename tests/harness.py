"""Compile a model under rules, and what tests ask of the result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import fleet
import pytest
import torch
from torch import Tensor, nn

import tokcompile
from tokcompile import Recording, TokredError
from tokcompile.backend import Report, tokred


def greedy(steps: int) -> dict[str, Any]:
    """Arguments of `generate` for a number of tokens, each the likeliest, with the logits of each step."""
    return {
        "max_new_tokens": steps,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_logits": True,
    }


@dataclass
class Pruned:
    """A compiled model, what it selected in its last call, and what was done to its graphs."""

    call: Any
    recording: Recording = field(default_factory=Recording)
    report: Report = field(default_factory=Report)

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        return self.call(**inputs)

    @property
    def kept(self) -> list[list[list[int]]]:
        """The token maps of the last call, as the hand-run lists them."""
        return [held.tolist() for held in self.recording.maps.values()]


def prune(model: nn.Module, target: str = "eager", dynamic: bool | None = None, **options: Any) -> Pruned:
    """Compile a model; the model itself stays as it is."""
    pruned = Pruned(None)
    extra = {"record": pruned.recording} if "replay" not in options else {}
    pruned.call = torch.compile(
        model, backend=tokred, dynamic=dynamic, options={**options, **extra, "target": target, "report": pruned.report}
    )
    return pruned


def refusal(error: BaseException) -> TokredError:
    """The error of ours behind one of Dynamo's.

    Raises:
        AssertionError: there is none.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, TokredError):
        inner = getattr(seen, "inner_exception", None)
        seen = inner if inner is not None else seen.__cause__
    assert isinstance(seen, TokredError), f"not an error of tokcompile: {error!r}"
    return seen


def difference(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference of two tensors of one shape; shapes that broadcast are no match."""
    assert left.shape == right.shape, f"{tuple(left.shape)} against {tuple(right.shape)}"
    return (left.double() - right.double()).abs().max().item()


def cases(usual: int, **axes: tuple[Any, ...]) -> list[Any]:
    """Cases of `pairwise` as parameters of a test; those after the first few are marked as slow."""
    marks = [() if number < usual else (pytest.mark.slow,) for number, _ in enumerate(pairwise(axes))]
    ids = ("-".join(str(value) for value in case.values()) for case in pairwise(axes))
    return [pytest.param(c, id=i, marks=m) for c, i, m in zip(pairwise(axes), ids, marks, strict=True)]


def pairwise(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Cases in which every value of an axis meets every value of every other axis at least once."""
    names = list(axes)
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]

    def pairs(case: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}

    missing = set().union(*map(pairs, every))
    while missing:
        case = max(every, key=lambda c: len(pairs(c) & missing))
        missing -= pairs(case)
        yield case


def check_rows_alone(
    model: nn.Module, rules: list[dict[str, Any]], inputs: dict[str, Tensor], pads: tuple[int, ...], steps: int
) -> Any:
    """Check that each row of a padded batch generates what it does alone; return what the batch did.

    Args:
        pads: how many tokens of padding each row has.
    """
    greedily = {**greedy(steps), "suppress_tokens": [fleet.IMAGE]}

    def generate(given: dict[str, Tensor]) -> Any:
        torch._dynamo.reset()
        tokcompile.compile(model, rules=rules, target="eager")
        out = model.generate(**given, **greedily)
        tokcompile.restore(model)
        return out

    both = generate(inputs)
    for row, pad in enumerate(pads):
        alone = generate(fleet.row(inputs, row, pad))
        assert torch.equal(alone.sequences[0, -steps:], both.sequences[row, -steps:])
        assert difference(torch.stack(alone.logits, 1)[0], torch.stack(both.logits, 1)[row]) <= 2e-5
    return both
