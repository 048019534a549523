"""The digits task: scans split before use, the same canvases for the same seed, labels that fit what is drawn."""

from __future__ import annotations

import torch

from tokcompile.models import digits


def test_no_scan_is_in_both_splits() -> None:
    split = digits.split_indices()
    assert not set(split["train"]) & set(split["test"])
    assert len(split["train"]) + len(split["test"]) == 1797
    train, test = (digits.scans(name)[0].flatten(1) for name in ("train", "test"))
    same = (torch.cdist(test, train) == 0).any(1)
    assert not same.any()


def test_a_seed_decides_a_canvas() -> None:
    one, again, other = (digits.canvases("test", 3, seed).pixel_values for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert (one - other).abs().mean() > 0.1


def test_train_canvases_are_distorted_and_test_canvases_are_not() -> None:
    test, mild = (digits.canvases(*args) for args in (("test", 2, 1, 1.0), ("test", 2, 1, 0.0)))
    assert torch.equal(test.pixel_values, mild.pixel_values)
    strong, weak = (digits.canvases("train", 2, 1, d).pixel_values for d in (1.0, 0.5))
    assert not torch.equal(strong, weak)


def test_patch_labels_stand_where_their_colour_is() -> None:
    canvases = digits.canvases("test", 16, 0)
    rgb = canvases.pixel_values * digits.STD + digits.MEAN
    patches = rgb.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3).amax((-1, -2))  # [n, 3, 196]
    labelled = canvases.patch_labels
    for colour, channel in ((0, 0), (1, 1), (2, 2)):
        mine = labelled // 10 == colour
        assert mine.any(1).all(), "every digit covers some patch"
        own = patches[:, channel].masked_select(mine).mean()
        background = patches[:, channel].masked_select(labelled == digits.BACKGROUND).mean()
        assert own > background + 0.1
    answers = canvases.labels.gather(1, canvases.asked[:, None])[:, 0]
    assert torch.equal(canvases.answers, answers)


def test_labels_name_the_digit_of_their_owner() -> None:
    for canvases in (digits.canvases("train", 4, 2), digits.crowded(4, 2)):
        count = canvases.labels.shape[1]
        drawn = canvases.owners < count
        assert torch.equal(drawn, canvases.patch_labels < digits.BACKGROUND)
        owner = canvases.owners.clamp(max=count - 1)
        wanted = canvases.colours.gather(1, owner) * 10 + canvases.labels.gather(1, owner)
        assert torch.equal(canvases.patch_labels[drawn], wanted[drawn])


def test_digits_do_not_overlap() -> None:
    for canvases in (digits.canvases("test", 32, 3), digits.crowded(8, 3)):
        left, top, right, bottom = canvases.boxes.unbind(-1)
        for one in range(canvases.boxes.shape[1]):
            for other in range(one):
                apart = (right[:, one] <= left[:, other]) | (right[:, other] <= left[:, one])
                apart |= (bottom[:, one] <= top[:, other]) | (bottom[:, other] <= top[:, one])
                assert apart.all()


def test_a_prompt_ends_with_its_colour() -> None:
    ids = digits.prompts(torch.tensor([0, 3]))
    assert ids.shape == (2, 1 + digits.IMAGE_TOKENS + 4)
    assert ids[:, -1].tolist() == [digits.TOKEN["red"], digits.TOKEN["yellow"]]
    assert (ids == digits.IMAGE).sum(1).tolist() == [digits.IMAGE_TOKENS] * 2
