"""Spellings that are brought to one before anything is matched: what they compute stays, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tokcompile.capturing.capture import capture
from tokcompile.program import Program

ROWS, TOKENS, WIDTH = 2, 6, 4


def assigned(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    h = h.clone()
    h[mask] = h[mask] + features
    return h


def assigned_with_features_first(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    h = h.clone()
    h[mask, :] = features + h[mask, :]
    return h


def scattered(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    wide = mask.unsqueeze(-1).expand_as(h)
    return h.masked_scatter(wide, h[wide] + features.reshape(-1))


def read_before(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """Another reader of the value before it is changed: left as it is."""
    h = h.clone()
    before = h.sum()
    h[mask] = h[mask] + features
    return h + before


def put_in_place_of(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """No sum: left as it is."""
    h = h.clone()
    h[mask] = features
    return h


class Model(nn.Module):
    """A function of three tensors as a model."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.function(**inputs)


def example(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(ROWS, TOKENS, generator=rng) < 0.5
    h = torch.randn(ROWS, TOKENS, WIDTH, generator=rng)
    h[0, 0] = -0.0
    return {"h": h, "mask": mask, "features": torch.randn(int(mask.sum()), WIDTH, generator=rng)}


def targets(program: Program) -> set[str]:
    return {str(node.target) for node in program.graph.nodes}


def ran(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    """What a graph says; a size among its inputs is the number of tokens."""
    places = [n for n in program.graph.nodes if n.op == "placeholder"]
    names = [n.name.removeprefix("l_inputs_").strip("_") for n in places]
    (out,) = program.gm(*[inputs.get(name, TOKENS) for name in names])
    return out


def bits(value: Tensor) -> Tensor:
    return value.view(torch.int32)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [assigned, assigned_with_features_first, scattered])
def test_rows_increased_under_a_mask_are_a_sum(function: Callable[..., Tensor], dynamic: bool) -> None:
    model, inputs = Model(function), example()
    if dynamic:
        for name in ("h", "mask"):
            torch._dynamo.mark_dynamic(inputs[name], 1)
    (program,) = capture(model, inputs)
    assert not {"aten.index.Tensor", "aten.index_put_.default"} & targets(program)
    assert torch.equal(bits(ran(program, inputs)), bits(model(**inputs)))


@pytest.mark.parametrize("function", [read_before, put_in_place_of])
def test_other_assignments_stay(function: Callable[..., Tensor]) -> None:
    model, inputs = Model(function), example()
    (program,) = capture(model, inputs)
    assert "aten.index_put_.default" in targets(program)
    assert torch.equal(bits(ran(program, inputs)), bits(model(**inputs)))


def test_rows_that_are_flattened_before_they_are_joined_are_the_value_flattened() -> None:
    model = Model(lambda x, sizes: torch.cat([p.reshape(-1, 3) for p in torch.split(x, sizes.tolist())]) * 2)
    inputs = {"x": torch.randn(7, 2, 3), "sizes": torch.tensor([3, 4])}
    (program,) = capture(model, inputs)
    assert "aten.cat.default" not in targets(program)
    assert torch.equal(ran(program, inputs), model(**inputs))
    assert program.output.args[0][0].meta["val"].shape == (14, 3)


def _joined(x: Tensor, sizes: Tensor, order: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
    return torch.cat(order(list(torch.split(x, sizes.tolist()))))


@pytest.mark.parametrize(("turned", "gone"), [(False, True), (True, False)])
def test_a_value_split_and_joined_again_is_itself(turned: bool, gone: bool) -> None:
    order = (lambda parts: parts[::-1]) if turned else (lambda parts: parts)
    model = Model(lambda x, sizes: _joined(x, sizes, order) * 2)
    inputs = {"x": torch.randn(7, 3), "sizes": torch.tensor([3, 4])}
    (program,) = capture(model, inputs)
    assert ("aten.cat.default" not in targets(program)) == gone
    assert torch.equal(ran(program, inputs), model(**inputs))
    if gone:
        assert program.output.args[0][0].meta["val"].shape == inputs["x"].shape


def looked_up(h: Tensor, mask: Tensor, features: Tensor, each: int = 2, first: int = 0, step: int = 1) -> Tensor:
    """Each token under a mask looks up the feature of its image and its place in it, `each` tokens to an image."""
    earlier = nn.functional.pad((mask.sum(dim=1) // 2).cumsum(dim=0), (1, 0), value=first)[:-1]
    so_far = mask.cumsum(dim=-1)
    image, place = earlier.unsqueeze(1) + (so_far - step) // each, (so_far - 1) % each
    put = torch.zeros_like(h)
    put[mask] = features[image[mask], place[mask], :]
    return torch.where(mask.unsqueeze(-1), put, h)


def looked_up_among_others(h: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """The rest is of another text."""
    return torch.where(mask.unsqueeze(-1), looked_up(h, mask, features), h * 2)


def with_images(rows: int = ROWS) -> dict[str, Tensor]:
    mask = torch.tensor([[False, True, True, False, False, False], [True, True, False, True, True, False]])[:rows]
    return example() | {"mask": mask, "features": torch.randn(6, 2, WIDTH, generator=torch.Generator().manual_seed(1))}


def test_features_that_are_looked_up_one_after_the_other_are_scattered() -> None:
    model, inputs = Model(looked_up), with_images()
    (program,) = capture(model, inputs)
    assert "aten.masked_scatter.default" in targets(program)
    gone = {"aten.index.Tensor", "aten.index_put_.default", "aten.cumsum.default", "aten.where.self"}
    assert not gone & targets(program)
    assert torch.equal(bits(ran(program, inputs)), bits(model(**inputs)))


@pytest.mark.parametrize(
    "function",
    [partial(looked_up, each=1), partial(looked_up, first=1), partial(looked_up, step=0), looked_up_among_others],
    ids=["of one", "from the second image", "from the next image", "among others"],
)
def test_features_that_are_looked_up_otherwise_stay(function: Callable[..., Tensor]) -> None:
    model, inputs = Model(function), with_images()
    (program,) = capture(model, inputs)
    assert ("aten.where.self" in targets(program)) and torch.equal(bits(ran(program, inputs)), bits(model(**inputs)))
