"""The digits task: four coloured handwritten digits on a cluttered canvas, and a question about one colour.

The digits are the 1,797 real 8 x 8 scans bundled with scikit-learn. They are split into train and test scans
before anything else, so no canvas of the test split holds a scan that any stage of training has seen.
A canvas shows one digit in each of four colours; the question names a colour, the answer is its digit.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Split = Literal["train", "test"]

IMAGE_SIZE = 112
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
IMAGE_TOKENS = GRID * GRID
MEAN, STD = 0.5, 0.25
"""Pixel values are (rgb - MEAN) / STD, the same for the three channels."""

COLOURS = ("red", "green", "blue", "yellow")
_RGB = ((0.90, 0.14, 0.14), (0.14, 0.76, 0.20), (0.16, 0.28, 0.96), (0.95, 0.86, 0.14))

DIGITS = tuple("0123456789")
VOCABULARY = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", *DIGITS, *COLOURS, "which", "digit", "is")
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
PAD, BOS, EOS, UNK, IMAGE = (TOKEN[word] for word in VOCABULARY[:5])

BACKGROUND = len(DIGITS) * len(COLOURS)
"""The patch label of a patch with no digit; a digit d in colour c has the label 10 * c + d."""

SPLIT_SEED = 20240
TEST_FRACTION = 0.2
SCAN_PATCHES = 3
"""Patches across a scan: 8 x 8 values are drawn about 24 pixels wide."""
CROWD = 3
"""Digits along each side of a crowded canvas."""
_SPLIT_NUMBER = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Canvases:
    """A batch of n canvases of k digits: four, one in each colour in the order of COLOURS, or nine in any colours.

    pixel_values: float32 [n, 3, 112, 112], normalised as the model expects.
    labels: int64 [n, k], the digits shown.
    colours: int64 [n, k], the colour of each.
    boxes: float32 [n, k, 4], the box of each digit's ink in pixels, (left, top, right, bottom), right and bottom
        exclusive.
    patch_labels: int64 [n, 196], 10 * colour + digit where a digit's ink box covers at least half of the patch,
        otherwise BACKGROUND.
    owners: int64 [n, 196], which of the k digits a patch is labelled for; k for background.
    asked: int64 [n], the colour that each canvas's question asks about.
    """

    pixel_values: Tensor
    labels: Tensor
    colours: Tensor
    boxes: Tensor
    patch_labels: Tensor
    owners: Tensor
    asked: Tensor

    @property
    def answers(self) -> Tensor:
        """int64 [n]: the digit in the colour asked about."""
        return self.labels.gather(1, self.asked[:, None])[:, 0]

    @property
    def input_ids(self) -> Tensor:
        """int64 [n, 201]: each canvas's question as a prompt."""
        return prompts(self.asked)

    def __len__(self) -> int:
        return len(self.labels)


@functools.cache
def split_indices() -> dict[str, np.ndarray]:
    """Indices into scikit-learn's digits, by split: stratified by digit and fixed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    target = load_digits().target
    train, test = train_test_split(
        np.arange(len(target)), test_size=TEST_FRACTION, random_state=SPLIT_SEED, stratify=target
    )
    return {"train": np.sort(train), "test": np.sort(test)}


@functools.cache
def scans(split: Split) -> tuple[Tensor, Tensor]:
    """The scans of a split: ink float32 [m, 8, 8] in 0..1 and digits int64 [m]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = split_indices()[split]
    ink = torch.from_numpy(data.images[chosen] / 16.0).float()
    return ink, torch.from_numpy(data.target[chosen].astype(np.int64))


def prompts(asked: Tensor) -> Tensor:
    """int64 [n, 201]: `<bos> <image> x 196 which digit is COLOUR` for the colours asked, int64 [n]."""
    words = torch.tensor([BOS] + [IMAGE] * IMAGE_TOKENS + [TOKEN["which"], TOKEN["digit"], TOKEN["is"]])
    colour = asked[:, None] + TOKEN[COLOURS[0]]
    return torch.cat([words.expand(len(asked), -1), colour], dim=1)


def canvases(split: Split, n: int, seed: int, distort: float = 1.0) -> Canvases:
    """n canvases made of the scans of `split`, the same for the same arguments.

    Training canvases distort the scans (rotation, shear, stretch, contrast, noise) by `distort` times the full
    strength; test canvases only vary the place and the size of the untouched scans. Both draw the background in the
    same way.
    """
    rng = torch.Generator().manual_seed(2 * seed + _SPLIT_NUMBER[split])
    count = len(COLOURS)
    chosen = torch.randint(len(scans(split)[0]), (n, count), generator=rng)
    colours = torch.arange(count).expand(n, count)
    return _paint(split, chosen, colours, _places(n, rng), distort if split == "train" else 0.0, rng)


def crowded(n: int, seed: int, distort: float = 1.0) -> Canvases:
    """n training canvases of nine digits in any colours: more digits to learn from than questions need."""
    rng = torch.Generator().manual_seed(2 * seed)
    count = CROWD * CROWD
    chosen = torch.randint(len(scans("train")[0]), (n, count), generator=rng)
    colours = torch.randint(len(COLOURS), (n, count), generator=rng)
    room = GRID - 1 - (SCAN_PATCHES + 1) * (CROWD - 1) - SCAN_PATCHES + 1
    slack = torch.randint(room + 1, (2, n, CROWD), generator=rng).sort(-1).values  # so that every place is seen
    rows, columns = slack + (SCAN_PATCHES + 1) * torch.arange(CROWD)
    cell = torch.stack([columns[:, None, :].expand(n, CROWD, CROWD), rows[:, :, None].expand(n, CROWD, CROWD)], -1)
    cell = cell.flatten(1, 2)
    return _paint("train", chosen, colours, _centres(cell.float(), rng), distort, rng)


def _paint(
    split: Split, chosen: Tensor, colours: Tensor, place: Tensor, distort: float, rng: torch.Generator
) -> Canvases:
    """Draw the chosen scans [n, k] in colours [n, k] around places [n, k, 2] on fresh backgrounds."""
    ink, digits = scans(split)
    n, count = chosen.shape
    drawn = _vary(ink[chosen], distort, rng) if distort else ink[chosen]
    masks = _render(drawn, place, distort, rng)
    grey = _background(n, rng) + _fragments(ink, n, rng)
    tint = 1 + 0.06 * (torch.rand(n, 3, 1, 1, generator=rng) - 0.5)
    colour = torch.tensor(_RGB)[colours] + 0.12 * (torch.rand(n, count, 3, generator=rng) - 0.5)
    image = grey.clamp(0.03, 0.85)[:, None] * tint * (1 - masks.sum(1, keepdim=True))
    image = image + torch.einsum("nkhw,nkc->nchw", masks, colour)
    image = (image + 0.03 * torch.randn(image.shape, generator=rng)).clamp(0, 1)
    boxes, labels = _ink_boxes(masks), digits[chosen]
    owners = patch_owners(boxes)
    asked = torch.randint(len(COLOURS), (n,), generator=rng)
    labelled = patch_labels(labels, colours, owners)
    return Canvases((image - MEAN) / STD, labels, colours, boxes, labelled, owners, asked)


def patch_owners(boxes: Tensor) -> Tensor:
    """int64 [n, 196] from boxes [n, k, 4]: the digit whose box covers half of a patch or more; k where none does."""
    edge = torch.arange(GRID, dtype=torch.float32) * PATCH_SIZE
    low, high = boxes[..., :2, None], boxes[..., 2:, None]
    overlap = (torch.minimum(high, edge + PATCH_SIZE) - torch.maximum(low, edge)).clamp(min=0)
    area = overlap[..., 1, :, None] * overlap[..., 0, None, :]
    best, owner = area.flatten(2).max(dim=1)
    return torch.where(best >= PATCH_SIZE**2 / 2, owner, boxes.shape[1])


def patch_labels(labels: Tensor, colours: Tensor, owners: Tensor) -> Tensor:
    """int64 [n, 196] from labels and colours [n, k] and owners [n, 196]: 10 * colour + digit, or BACKGROUND."""
    each = torch.cat([colours * len(DIGITS) + labels, torch.full((len(labels), 1), BACKGROUND)], dim=1)
    return each.gather(1, owners)


def _uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)


def _places(n: int, rng: torch.Generator, tries: int = 32) -> Tensor:
    """Centres float32 [n, 4, 2] (x, y in pixels) of digits at least four patches apart: the first good draw.

    A digit lies near the corner of some patch, give or take a pixel and a half.
    """
    count, last = len(COLOURS), GRID - SCAN_PATCHES
    cell = torch.randint(last + 1, (n, tries, count, 2), generator=rng)
    quarter = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])[torch.rand(n, count, generator=rng).argsort(1)]
    spare = quarter * (GRID // 2) + torch.randint(last + 1 - GRID // 2, (n, count, 2), generator=rng)
    spare = torch.minimum(spare, quarter * GRID + GRID // 2 - SCAN_PATCHES - 1)
    cell = torch.cat([cell, spare[:, None]], dim=1)
    apart = (cell[:, :, :, None] - cell[:, :, None]).abs().amax(-1) > SCAN_PATCHES
    good = (apart | torch.eye(count, dtype=torch.bool)).all(-1).all(-1)
    return _centres(cell[torch.arange(n), good.int().argmax(1)].float(), rng)


def _centres(cell: Tensor, rng: torch.Generator) -> Tensor:
    """Centres in pixels of scans whose first patches are `cell` [n, k, 2], give or take a pixel and a half."""
    return (cell + SCAN_PATCHES / 2) * PATCH_SIZE + _uniform(tuple(cell.shape), -1.5, 1.5, rng)


def _vary(ink: Tensor, distort: float, rng: torch.Generator) -> Tensor:
    """Scans [n, k, 8, 8] with another contrast, some with blur, and noise on the inked pixels."""
    n, k = ink.shape[:2]
    gamma = (distort * _uniform((n, k, 1, 1), -0.25, 0.45, rng)).exp()
    blurred = F.avg_pool2d(ink, 3, stride=1, padding=1)
    amount = distort * _uniform((n, k, 1, 1), -0.5, 0.5, rng)
    sharp = torch.lerp(ink, blurred, amount).clamp(0, 1) ** gamma
    noise = distort * _uniform((n, k, 1, 1), 0, 0.15, rng) * torch.randn(ink.shape, generator=rng)
    return (sharp + noise * (blurred > 0.02)).clamp(0, 1)


def _render(ink: Tensor, centre: Tensor, distort: float, rng: torch.Generator) -> Tensor:
    """Opacity [n, k, 112, 112] of scans [n, k, 8, 8] drawn around `centre` [n, k, 2], 23 to 26 pixels wide."""
    n, k = ink.shape[:2]
    angle, shear = torch.zeros(n, k), torch.zeros(n, k)
    width = _uniform((n, k), 23, 26, rng)
    height = width
    if distort:
        angle = distort * _uniform((n, k), -0.17, 0.17, rng)
        shear = distort * _uniform((n, k), -0.17, 0.17, rng)
        width, height = (width * (1 + distort * _uniform((n, k), -0.1, 0.1, rng)) for _ in range(2))
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([cos + shear * sin, sin - shear * cos, -sin, cos], dim=-1).view(n, k, 2, 2)
    scale = IMAGE_SIZE / torch.stack([width, height], dim=-1)
    linear = rows * scale[..., None]
    shift = -(linear @ (2 * centre / IMAGE_SIZE - 1)[..., None])
    theta = torch.cat([linear, shift], dim=-1).view(n * k, 2, 3)
    grid = F.affine_grid(theta, [n * k, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    drawn = F.grid_sample(ink.reshape(n * k, 1, 8, 8), grid, padding_mode="zeros", align_corners=False)
    return (1.25 * drawn).clamp(max=1).view(n, k, IMAGE_SIZE, IMAGE_SIZE)


def _background(n: int, rng: torch.Generator, strokes: int = 9) -> Tensor:
    """Grey canvases [n, 112, 112]: a level, soft blobs, thin lines, thick strokes and dots."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    level = _uniform((n, 1, 1), 0.15, 0.5, rng)
    blobs = F.interpolate(torch.randn(n, 1, 7, 7, generator=rng), size=size, mode="bilinear")[:, 0]
    start = _uniform((n, strokes, 1, 1, 2), 0, IMAGE_SIZE, rng)
    turn = _uniform((n, strokes, 1, 1), 0, 2 * math.pi, rng)
    length = _uniform((n, strokes, 1, 1), 8, 60, rng)
    thick = _uniform((n, strokes, 1, 1), 0.6, 2.2, rng)
    strength = _uniform((n, strokes), 0.12, 0.4, rng) * torch.randn(n, strokes, generator=rng).sign()
    pixel = torch.arange(IMAGE_SIZE) + 0.5
    dx, dy = pixel - start[..., 0], pixel[:, None] - start[..., 1]
    along = dx * turn.cos() + dy * turn.sin()
    across = dy * turn.cos() - dx * turn.sin()
    beyond = along - along.clamp(min=0).minimum(length)
    stroke = (thick + 0.5 - (beyond.square() + across.square()).sqrt()).clamp(0, 1)
    dots = (torch.rand(n, 1, *size, generator=rng) > 0.998).float()
    dots = F.max_pool2d(dots, 3, stride=1, padding=1)[:, 0] * _uniform((n, 1, 1), -0.3, 0.3, rng)
    return level + 0.07 * blobs + torch.einsum("nshw,ns->nhw", stroke, strength) + dots


def _fragments(ink: Tensor, n: int, rng: torch.Generator, count: int = 4) -> Tensor:
    """Grey halves of scans [n, 112, 112], anywhere on the canvas: they look like ink and belong to no colour."""
    chosen = ink[torch.randint(len(ink), (n, count), generator=rng)]
    half = torch.zeros(4, 8, 8)
    half[0, :4], half[1, 4:], half[2, :, :4], half[3, :, 4:] = 1, 1, 1, 1
    chosen = chosen * half[torch.randint(4, (n, count), generator=rng)]
    centre = _uniform((n, count, 2), 8, IMAGE_SIZE - 8, rng)
    drawn = _render(chosen, centre, 1.0, rng)
    strength = _uniform((n, count), 0.15, 0.4, rng) * torch.randn(n, count, generator=rng).sign()
    return torch.einsum("nkhw,nk->nhw", drawn, strength)


def _ink_boxes(masks: Tensor, threshold: float = 0.3) -> Tensor:
    """Boxes float32 [n, k, 4] (left, top, right, bottom) around the pixels of masks [n, k, 112, 112] with ink."""
    inked = masks > threshold
    ends = []
    for axis in (2, 3):
        line = inked.any(axis).int()
        ends.append((line.argmax(-1), IMAGE_SIZE - line.flip(-1).argmax(-1)))
    (left, right), (top, bottom) = ends
    return torch.stack([left, top, right, bottom], dim=-1).float()
