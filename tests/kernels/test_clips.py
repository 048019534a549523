"""The merging of the frames of clips: against loops over tokens, with the released code's quantile."""

from __future__ import annotations

from fractions import Fraction

import clips_naive
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokcompile.kernels  # noqa: F401
from tokcompile.passes.clips import staying

ops = torch.ops.tokred
OPTIONS = (1.5, 0.1, 2)
RATIOS = [Fraction(1, 10), Fraction(3, 10), Fraction(2, 5), Fraction(1, 2), Fraction(9, 10), Fraction(0)]
TIE = 1e-4
"""Values nearer to each other than this may be ordered otherwise in float32."""


def video(seed: int, batch: int, frames: int, chosen: int, cells: int, channels: int = 6) -> tuple[Tensor, Tensor]:
    """Tokens of frames [N, F, cells, C], and which of them are chosen, [N, F, m], ascending."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, frames, cells, channels, generator=rng)
    order = torch.rand(batch, frames, cells, generator=rng).argsort(-1)[..., :chosen]
    return x, order.sort(-1).values


def run(x: Tensor, chosen: Tensor, clip: int, count: int, options: tuple = OPTIONS) -> tuple[Tensor, Tensor, Tensor]:
    """The three operators as a pass puts them together: content, places and what stays."""
    batch, frames, cells, channels = x.shape
    tokens = x.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, channels))
    stays = ops.clip_stays(tokens, clip, count, *options)
    source = ops.clip_source(chosen, stays, cells, clip, count)
    picked = ops.gather_tokens(x.flatten(1, 2), source, 1, 0)
    return ops.merge_clips(picked, tokens, stays, 1, 0, clip, count, *options), source, stays


def room(frames: int, clip: int, chosen: int, cells: int, count: int) -> bool:
    """Whether no clip becomes longer."""
    lengths = [len(part) for part in clips_naive.cut(frames, clip)]
    return all(length == 1 or 2 * chosen + (length - 1) * count <= length * cells for length in lengths)


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "batch": st.integers(1, 3),
        "frames": st.integers(1, 7),
        "clip": st.integers(1, 5),
        "chosen": st.integers(1, 5),
        "more": st.integers(0, 4),
        "ratio": st.sampled_from(RATIOS),
        "steps": st.integers(1, 3),
        "spread": st.sampled_from([0.8, 1.5]),
        "temperature": st.sampled_from([0.1, 0.4]),
    }
)


@settings(max_examples=120, deadline=None)
@given(cases)
def test_clips_equal_the_loop(case):
    """Content, places and the tokens that stay; the count is that of the released code's quantile."""
    cells, count = case["chosen"] + case["more"], staying(case["ratio"], case["chosen"])
    assume(room(case["frames"], case["clip"], case["chosen"], cells, count))
    x, chosen = video(case["seed"], case["batch"], case["frames"], case["chosen"], cells)
    options = (case["spread"], case["temperature"], case["steps"])
    content, source, stays = run(x, chosen, case["clip"], count, options)
    for b in range(case["batch"]):
        out, spots = [], []
        for part in clips_naive.cut(case["frames"], case["clip"]):
            tokens = torch.stack([x[b, f][chosen[b, f]] for f in part])
            made, kept, gap = clips_naive.merged(tokens, case["ratio"], *options)
            assume(gap > TIE)
            assert all(len(one) == count for one in kept)
            assert stays[b, part].tolist() == [
                [i in one for i in range(case["chosen"])] for one in [list(range(case["chosen"])), *kept]
            ]
            out.append(made)
            own = clips_naive.places([chosen[b, f].tolist() for f in part], kept, cells)
            spots += [part[0] * cells + i for i in own]
        assert source[b].tolist() == spots and len(set(spots)) == len(spots)
        torch.testing.assert_close(content[b].double(), torch.cat(out), rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True), st.sampled_from(RATIOS))
def test_so_many_values_are_below_their_quantile(values, ratio):
    """ceil(ratio * (m - 1)) of values of which no two are alike; none of values that are all alike."""
    below = clips_naive.below([float(v) for v in values], ratio)
    assert len(below) == staying(ratio, len(values))
    assert clips_naive.below([1.0] * len(values), ratio) == []


def test_token_counts_of_the_paper():
    """27 of 196 tokens a frame, 8 clips of 4 frames, 0.3: 8 * (54 + 3 * 8) = 624 of 6272."""
    x, chosen = video(0, 1, 32, 27, 196, channels=4)
    count = staying(Fraction(3, 10), 27)
    content, source, _ = run(x, chosen, 4, count)
    assert count == 8 and content.shape == (1, 624, 4) and source.shape == (1, 624)
    assert source.max() < 6272 and source.unique().numel() == 624


def test_a_clip_of_one_frame_is_there_once():
    x, chosen = video(1, 2, 3, 4, 9)
    content, source, stays = run(x, chosen, 1, 2)
    picked = x.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, 6))
    assert torch.equal(content, picked.flatten(1, 2)) and stays.all()
    assert torch.equal(source, (chosen + 9 * torch.arange(3)[:, None]).flatten(1))


def test_the_first_frame_is_there_as_it_was_and_as_it_has_become():
    x, chosen = video(2, 1, 4, 3, 9)
    content, _, _ = run(x, chosen, 4, 1)
    assert torch.equal(content[0, :3], x[0, 0][chosen[0, 0]])
    assert not torch.isclose(content[0, -3:], content[0, :3]).all(-1).any()


def test_identical_tokens_stay_as_they_are():
    """How well they fit is all the same: the tokens of lowest index stay, where the released code lets none."""
    token = torch.randn(6, generator=torch.Generator().manual_seed(3))
    x, chosen = token.expand(2, 5, 9, 6), video(3, 2, 5, 3, 9)[1]
    content, _, stays = run(x, chosen, 4, 1)
    torch.testing.assert_close(content, token.expand(content.shape), rtol=1e-6, atol=1e-6)
    assert stays[:, 1:4].tolist() == [[[True, False, False]] * 3] * 2


@pytest.mark.parametrize("frames", [5, 8])
def test_videos_and_clips_do_not_see_each_other(frames):
    x, chosen = video(5, 3, frames, 4, 9)
    content, source, stays = run(x, chosen, 4, 2)
    for b in range(3):
        start = 0
        for part in clips_naive.cut(frames, 4):
            one = slice(b, b + 1), slice(part[0], part[-1] + 1)
            alone, there, own = run(x[one], chosen[one], 4, 2)
            end = start + alone.shape[1]
            assert torch.equal(stays[one], own)
            assert torch.equal(source[one[0], start:end], there + part[0] * 9)
            torch.testing.assert_close(content[one[0], start:end], alone, rtol=1e-6, atol=1e-6)
            start = end
        assert start == content.shape[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_choice_is_made_in_float32(dtype):
    x, _ = video(7, 2, 8, 9, 9, channels=16)
    rounded = x.to(dtype)
    assert torch.equal(ops.clip_stays(rounded, 4, 3, *OPTIONS), ops.clip_stays(rounded.float(), 4, 3, *OPTIONS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_of_half_precision_are_merged_in_float32(dtype):
    x, chosen = (each if i else each.to(dtype) for i, each in enumerate(video(8, 2, 4, 4, 9)))
    content, _, stays = run(x, chosen, 4, 1)
    exact, _, same = run(x.float(), chosen, 4, 1)
    assert content.dtype == dtype and torch.equal(stays, same) and torch.equal(content, exact.to(dtype))


def test_other_tokens_of_a_video_stay_around_its_clips():
    """Two videos in a row, two tokens before the frames of each and one after."""
    x, chosen = video(9, 4, 5, 3, 9)
    tokens = x.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, 6))
    content, source, stays = run(x, chosen, 4, 1)
    picked = ops.gather_tokens(x.flatten(1, 2), source, 1, 0)
    around = torch.randn(4, 3, 6)
    wide = torch.cat([around[:, :2], picked, around[:, 2:]], 1).reshape(2, -1, 6)
    got = ops.merge_clips(wide, tokens, stays, 2, 2, 4, 1, *OPTIONS).reshape(4, -1, 6)
    assert torch.equal(got, torch.cat([around[:, :2], content, around[:, 2:]], 1))


def test_what_makes_no_sense_is_refused():
    x, chosen = video(11, 1, 4, 3, 4)
    stays = ops.clip_stays(x[:, :, :3], 4, 2, *OPTIONS)
    with pytest.raises(ValueError, match="a clip of 4 frames of 3 tokens cannot become 15"):
        ops.clip_source(torch.arange(3).expand(1, 4, 3).clone(), torch.ones_like(stays), 3, 4, 3)
    with pytest.raises(ValueError, match=r"x must be float \[N, F, m, C\]"):
        ops.clip_stays(x[0], 4, 1, *OPTIONS)
    with pytest.raises(ValueError, match="cannot be cut into clips of 0"):
        ops.clip_stays(x, 0, 1, *OPTIONS)
    with pytest.raises(RuntimeError, match="cannot select k=9"):
        ops.clip_stays(x, 4, 9, *OPTIONS)
    with pytest.raises(ValueError, match="stays must be bool"):
        ops.merge_clips(x[0], x, stays, 1, 0, 4, 1, *OPTIONS)
    with pytest.raises(ValueError, match=r"chosen must be \[N, F, m\]"):
        ops.clip_source(chosen, stays.int(), 4, 4, 1)


def test_merged_tokens_have_gradients():
    x, chosen = video(13, 1, 4, 3, 9)
    x.requires_grad_()
    content, _, _ = run(x, chosen, 4, 1)
    (grad,) = torch.autograd.grad(content[:, -3:].square().sum(), x)
    assert grad.isfinite().all() and grad[0, 1:].abs().max() > 0
