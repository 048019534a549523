"""Parameters that rules bring: named, shared, saved and loaded, and no way for a file to run code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokcompile import RuleError, Weights


def _filled() -> Weights:
    weights = Weights()
    weights.of("registers", "tokens", (2, 3), lambda: torch.arange(6.0).reshape(2, 3))
    weights.of("phases", "bias", (4,), lambda: torch.ones(4))
    return weights


def test_a_parameter_is_made_once_and_named_by_its_rule() -> None:
    weights = _filled()
    again = weights.of("registers", "tokens", (2, 3), lambda: torch.zeros(2, 3))
    assert torch.equal(again, torch.arange(6.0).reshape(2, 3))
    assert again is weights.of("registers", "tokens", (2, 3), lambda: torch.zeros(2, 3))
    assert set(weights.state_dict()) == {"registers.tokens", "phases.bias"}
    assert sum(p.numel() for p in weights.parameters()) == 10


def test_a_parameter_of_another_shape_is_refused() -> None:
    with pytest.raises(RuleError, match="does not fit this model") as caught:
        _filled().of("registers", "tokens", (2, 4), lambda: torch.zeros(2, 4))
    assert "(2, 3)" in caught.value.found and "(2, 4)" in caught.value.found


def test_a_rule_with_the_name_of_a_module_s_own_is_refused() -> None:
    with pytest.raises(RuleError, match="'training'"):
        Weights().of("training", "tokens", (1,), lambda: torch.zeros(1))


def test_a_file_gives_the_same_parameters_back(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    _filled().save(path)
    back = Weights.load(path)
    assert {k: v.tolist() for k, v in back.state_dict().items()} == {
        k: v.tolist() for k, v in _filled().state_dict().items()
    }


def test_a_model_saves_and_loads_them_as_its_own() -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    model.add_module("tokred", _filled())
    other.add_module("tokred", Weights())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.tokred.of("phases", "bias", (4,), lambda: torch.zeros(4)), torch.ones(4))


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    torch.save({"registers.tokens": torch.zeros(1)}, path)
    with pytest.raises(RuleError, match="cannot be read"):
        Weights.load(path)


def test_a_state_that_is_no_rule_s_is_refused() -> None:
    with pytest.raises(RuleError, match=r"'a\.b\.c' names no parameter"):
        Weights().load_state_dict({"a.b.c": torch.zeros(1)})
