"""variable_positions, slot_positions and phase_scan against loops written from the descriptions of the methods."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from turned import variable

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred


def _units(images: list[list[bool]], strides: list[int], denominator: int = 256) -> list[list[int]]:
    positions = torch.arange(len(images[0]))[None]
    return ops.variable_positions(positions, torch.tensor(images), strides, denominator).tolist()


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), max_size=3, min_size=1)
    ),
    st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 3, 100]), min_size=1, max_size=4),
)
def test_positions_are_those_of_a_walk_over_tokens(images: list[list[bool]], strides: list[int]) -> None:
    expected = variable(images, [Fraction(s, 256) for s in strides])
    # A walk starts at 0 with a token of text; with an image's it starts one stride after -1.
    assert _units(images, strides) == [[int(p * 256) for p in row] for row in expected]


@given(st.data(), st.lists(st.sampled_from(["text", "image"]), min_size=1, max_size=6), st.integers(1, 4))
def test_gaps_close_within_each_image(data: st.DataObject, kinds: list[str], size: int) -> None:
    """A walk: images of one size, side by side or with text between, of which any tokens are left."""
    of = [(i, k) for i, kind in enumerate(kinds) for k in range(size if kind == "image" else 1)]
    visual = torch.tensor([[kinds[i] == "image" for i, _ in of]])
    positions = torch.arange(5, 5 + len(of))[None]
    starts = ops.image_starts(positions, visual, size)
    assert starts.tolist() == [[5 + n - k if kinds[i] == "image" else -1 for n, (i, k) in enumerate(of)]]
    kept = sorted(data.draw(st.sets(st.integers(0, len(of) - 1), min_size=1)))
    expected, seen = [], dict.fromkeys(range(len(kinds)), 0)
    for n in kept:
        image = of[n][0]
        expected.append(int(starts[0, n]) + seen[image] if kinds[image] == "image" else 5 + n)
        seen[image] += 1
    assert ops.close_gaps(positions[:, kept], starts[:, kept]).tolist() == [expected]


def test_images_side_by_side_are_one_where_their_size_is_not_known() -> None:
    visual = torch.tensor([[False, True, True, True, True, False, True]])
    assert ops.image_starts(torch.arange(7)[None], visual, 0).tolist() == [[-1, 1, 1, 1, 1, -1, 6]]
    assert ops.image_starts(torch.arange(7)[None], visual, 2).tolist() == [[-1, 1, 1, 3, 3, -1, 6]]


def test_a_token_that_was_put_into_an_image_does_not_begin_it_anew() -> None:
    assert ops.close_gaps(torch.tensor([[0, 3, 9, 4, 7]]), torch.tensor([[-1, 2, -1, 2, -1]])).tolist() == [
        [0, 2, 9, 3, 7]
    ]


def test_the_closed_form_of_one_tile() -> None:
    """[t t <img> 256 visual </img> t] at a pace of 1/4: 0, 1, 2, 2.25 ... 66, 67, 68."""
    (row,) = _units([[False] * 3 + [True] * 256 + [False] * 2], [64])
    assert [u / 256 for u in row] == [0, 1, 2, *(2 + k / 4 for k in range(1, 257)), 67, 68]


@pytest.mark.parametrize(("length", "after"), [(100, 26), (10, 4)], ids=["whole", "rounded-up"])
def test_text_goes_on_at_the_next_whole_number(length: int, after: int) -> None:
    (row,) = _units([[False] + [True] * length + [False]], [64])
    assert row[-1] == after * 256


def test_a_pace_of_one_is_the_usual_position() -> None:
    images = [[False, True, True, False, True, False]]
    assert _units(images, [256]) == [[256 * i for i in range(6)]]


def test_images_have_paces_of_their_own() -> None:
    images = [[False, *[True] * 4, False, *[True] * 4, False]]
    assert [u / 256 for u in _units(images, [64, 128])[0]] == [0, 0.25, 0.5, 0.75, 1, 2, 2.5, 3, 3.5, 4, 5]


def test_a_row_with_padding_is_the_row_alone_moved() -> None:
    row = [False, False, True, True, True, False]
    (alone,), (padded,) = _units([row], [32]), _units([[False] * 3 + row], [32])
    assert [u - 3 * 256 for u in padded[3:]] == alone


def test_positions_far_out_stay_apart() -> None:
    """256 different positions after 123,457 tokens of text; 32-bit floats have 128 at best."""
    images = torch.zeros(1, 123_457 + 256, dtype=torch.bool)
    images[:, 123_457:] = True
    units = ops.variable_positions(torch.arange(images.shape[1])[None], images, [1], 256)
    assert len(set(units[0, 123_457:].tolist())) == 256
    assert len(set((units[0, 123_457:].float() / 256).tolist())) < 256


def test_the_last_position_is_the_sum_of_all_paces() -> None:
    """100 images of one tile at 1/4: 25,600 tokens take 6,400 positions."""
    row = ([False] + [True] * 256) * 100
    (units,) = _units([row], [64])
    assert units[-1] == (100 - 1 + 100 * 64) * 256


def _slots(positions: torch.Tensor, members: torch.Tensor, axes: list[int], slots: list[int]) -> list[list[list[int]]]:
    return [
        [
            [int(positions[b, a, members[b, t, s]]) for a, s in zip(axes, slots, strict=True)]
            for t in range(members.shape[1])
        ]
        for b in range(members.shape[0])
    ]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_slots_look_up_one_member_each(axes: int, batch: int, old: int, new: int, width: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 50, (batch, axes, old), generator=rng)
    members = torch.randint(0, old, (batch, new, width), generator=rng)
    rows = torch.randint(0, axes, (7,), generator=rng).tolist()
    slots = torch.randint(0, width, (7,), generator=rng).tolist()
    assert ops.slot_positions(positions, members, rows, slots).tolist() == _slots(positions, members, rows, slots)


@pytest.mark.parametrize(("axes", "slots"), [([2], [0]), ([0], [3]), ([0, 1], [0])])
def test_slots_out_of_range_are_refused(axes: list[int], slots: list[int]) -> None:
    with pytest.raises(ValueError, match="axes|frequencies"):
        ops.slot_positions(torch.zeros(1, 2, 4).long(), torch.zeros(1, 2, 3).long(), axes, slots)


def _phases(z: torch.Tensor, pairs: int, first: int = 0, valid: torch.Tensor | None = None) -> torch.Tensor:
    batch, tokens, heads = z.shape
    out = torch.zeros(batch, heads, tokens, pairs, dtype=torch.float64)
    for b, h, m, i in (
        (b, h, m, i) for b in range(batch) for h in range(heads) for m in range(tokens) for i in range(pairs)
    ):
        for t in range(m + 1):
            if valid is None or valid[b, t]:
                out[b, h, m, i] += (1 / (math.log1p(math.exp(z[b, t, h].item())) + 1)) ** (i + first)
    return out


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("tokens", [1, 7])
def test_phases_are_sums_of_powers(tokens: int, first: int) -> None:
    z = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(tokens))
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, : tokens // 2] = False
    got = ops.phase_scan(z, valid, None, 4, first)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), _phases(z, 4, first, valid), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_scan_goes_on_where_another_ended(cut: int) -> None:
    z = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1))
    whole = ops.phase_scan(z, None, None, 4, 0)
    start = ops.phase_scan(z[:, :cut], None, None, 4, 0)
    rest = ops.phase_scan(z[:, cut:], None, start[:, :, -1], 4, 0)
    torch.testing.assert_close(torch.cat([start, rest], 2), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("width", "theta", "start"), [(64, 0.749894, -0.926657), (128, 0.865964, -1.787349)])
def test_a_constant_logit_is_a_plain_rotation(width: int, theta: float, start: float) -> None:
    """The paper's base 10,000 at the logits of the description, up to 4,096 tokens."""
    pairs, tokens = width // 2, 4096
    z = torch.full((1, tokens, 1), start, dtype=torch.float64).float()
    got = ops.phase_scan(z, None, None, pairs, 0)[0, 0].double()
    expected = torch.arange(1, tokens + 1).double()[:, None] * 10000 ** (-torch.arange(pairs).double() / pairs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert 10000 ** (-2 / width) == pytest.approx(theta, abs=1e-6)


def test_a_logit_of_zero_is_a_rotation_of_another_base() -> None:
    got = ops.phase_scan(torch.zeros(1, 9, 1), None, None, 8, 0)[0, 0]
    expected = torch.arange(1, 10)[:, None] * 0.590616 ** torch.arange(8)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("z", [-80.0, -30.0, 0.0, 30.0, 80.0])
def test_steps_stay_between_0_and_1(z: float) -> None:
    got = ops.phase_scan(torch.full((1, 1, 1), z), None, None, 3, 0)[0, 0, 0]
    assert got[0] == 1
    assert torch.isfinite(got).all() and (got[1:] > 0).all() and (got[1:] <= 1).all()


def test_half_precision_is_summed_in_single() -> None:
    z = torch.randn(1, 300, 2, generator=torch.Generator().manual_seed(2)).bfloat16()
    torch.testing.assert_close(
        ops.phase_scan(z, None, None, 4, 0), ops.phase_scan(z.float(), None, None, 4, 0), rtol=0, atol=0
    )


def test_gradients_of_phases() -> None:
    z = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    start = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, s: ops.phase_scan(z, None, s, 3, 0), (z, start))
