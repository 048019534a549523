"""What is changed in Dynamo so that it sees a model as one graph: no value, and no other function's graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tokcompile.capturing.dynamo import prepare
from tokcompile.models import catalogue


def whole(function: Callable[[Tensor], Tensor], x: Tensor, dynamic: bool = False) -> Tensor:
    """Run a function as one graph.

    Raises:
        Unsupported: Dynamo would split it.
    """
    prepare()
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)(x)


def halved(x: Tensor) -> Tensor:
    """Branches on the product of the sizes, as a model that checks its crops does."""
    return x / 2 if np.prod(x.shape) % 6 == 0 else x


def test_a_product_of_sizes_by_numpy_is_a_number() -> None:
    x, other = torch.rand(2, 3), torch.rand(2, 4)
    assert torch.equal(whole(halved, x), x / 2) and torch.equal(whole(halved, other), other)
    assert torch.equal(whole(lambda x: x * np.prod([2, 3]), x), x * 6)


def test_other_products_by_numpy_stay_what_they_were() -> None:
    x = torch.rand(2, 3)
    assert torch.equal(whole(lambda x: x + np.prod([[2, 3], [4, 5]], axis=0)[1], x), x + 15)
    assert torch.equal(whole(lambda x: torch.as_tensor(np.prod(x.numpy())), x), torch.as_tensor(np.prod(x.numpy())))


def test_a_product_of_sizes_that_are_symbols_splits_as_before() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent branching"):
        whole(halved, torch.rand(2, 3), dynamic=True)


def test_prepare_changes_nothing_a_second_time() -> None:
    prepare()
    numpy_variable = torch._dynamo.variables.misc.NumpyVariable
    call = numpy_variable.call_function
    prepare()
    assert numpy_variable.call_function is call


def test_a_text_with_a_size_that_only_values_tell_splits_nothing() -> None:
    def told(x: Tensor) -> tuple[Tensor, str]:
        large = x[x > 1]
        return large * 2, f"{large.shape[0]} of {x.shape[0]} are large, {x.shape[0]:03d}"

    doubled, text = whole(told, torch.arange(5.0))
    assert torch.equal(doubled, torch.tensor([4.0, 6.0, 8.0])) and text == "3 of 5 are large, 005"


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_under_a_mask_of_a_batch_that_only_values_tell_splits_nothing(heads: int) -> None:
    """As a model attends within the images of a row that are not empty."""

    def attended(x: Tensor) -> Tensor:
        real = x[x.sum((1, 2)) != 0].unflatten(-1, (heads, -1)).transpose(1, 2)
        mask = (real[:, :1, :, 0] > 0.1)[:, :, None].expand(-1, -1, x.shape[1], -1)
        return torch.nn.functional.scaled_dot_product_attention(real, real, real, attn_mask=mask)

    x = torch.rand(3, 5, 8)
    x[1] = 0
    assert torch.equal(whole(attended, x), attended(x))


def test_a_multiple_of_a_length_is_the_least_of_larger_ones_without_a_guard() -> None:
    """As attention asks for its layout: a guard would let an exported length be none but the one that was seen."""
    prepare()
    env = ShapeEnv()
    length = FakeTensorMode(shape_env=env).from_tensor(torch.empty(5)).shape[0]
    assert torch.sym_min(16 * length, 32 * length) == 16 * length
    assert not torch.sym_min(16 * length, 32 * length) != 16 * length
    assert not env.guards


def test_other_questions_for_such_a_size_still_split() -> None:
    with pytest.raises(torch._dynamo.exc.UserError, match="Eq\\(u0, 1\\)"):
        whole(lambda x: x + 1 if x[x > 1].shape[0] == 1 else x, torch.arange(5.0))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "layers"), [("t5", "num_decoder_layers"), ("bart", "decoder_layers"), ("whisper", "decoder_layers")]
)
def test_a_cache_that_is_made_from_a_copied_configuration_splits_nothing(name: str, layers: str) -> None:
    """As models of an encoder and a decoder make it; called twice, for what a call leaves on the copy."""
    family = catalogue.family(name)
    model = family.model_copy(update={"config": {**family.config, layers: 2}}).build()
    inputs, before = family.example(model, batch=1), model.config.to_dict()
    prepare()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(**inputs)
        for out in (compiled(**inputs), compiled(**inputs)):
            assert torch.equal(out.logits, expected.logits)
            assert len(out.past_key_values.self_attention_cache.layers) == 2
    assert model.config.to_dict() == before


@pytest.mark.usefixtures("one_thread")
def test_a_model_with_other_settings_of_its_configuration_has_a_cache_of_its_own() -> None:
    family = catalogue.family("bart")
    for layers in (1, 2):
        model = family.model_copy(update={"config": {**family.config, "decoder_layers": layers}}).build()
        out = whole(model, family.example(model, batch=1)["input_ids"])
        assert len(out.past_key_values.self_attention_cache.layers) == layers
