"""Vision towers run by hand on some of their patches, those of features that stay, where patches become features.

The tower's blocks see the patches of these features alone, feature by feature. Behind the tower they stand in their
places again, among zeros, so that the model's own code merges them; what it makes of zeros is dropped with the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import byhand
import families
import naive
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Grid:
    """The patches of one image.

    Attributes:
        height, width: in patches.
        side: so many rows and columns of patches are one feature.
        front: class tokens in front of them.
        packed: the patches of all images are one sequence; those of a feature then follow each other if `near`.
    """

    height: int
    width: int
    side: int = 1
    front: int = 0
    packed: bool = False
    near: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.front + self.height * self.width

    @property
    def columns(self) -> int:
        """Features in a row of them."""
        return self.width // self.side

    def patches(self, feature: int) -> list[int]:
        """The tokens of a feature, row by row."""
        if self.near:
            return [self.front + feature * self.side**2 + i for i in range(self.side**2)]
        row, column = divmod(feature, self.columns)
        inside = [(y, x) for y in range(self.side) for x in range(self.side)]
        return [self.front + (row * self.side + y) * self.width + column * self.side + x for y, x in inside]

    def kept(self, features: byhand.Kept) -> byhand.Kept:
        """The tokens that stay in each row of the tower's sequence, given the features that stay of each image."""
        images = [[*range(self.front), *(t for f in row for t in self.patches(f))] for row in features]
        if not self.packed:
            return images
        return [[self.tokens * number + token for number, row in enumerate(images) for token in row]]


GRIDS = {
    "llava": Grid(5, 5, front=1),
    "paligemma": Grid(5, 5),
    "internvl": Grid(10, 10, 2, front=1),
    "gemma3": Grid(10, 10, 2),
    "smolvlm": Grid(10, 10, 2),
    "idefics3": Grid(10, 10, 2),
    "mistral3": Grid(8, 12, 2, packed=True),
    "qwen2_vl": Grid(6, 12, 2, packed=True, near=True),
    "qwen2_5_vl": Grid(6, 12, 2, packed=True, near=True),
    "qwen3_vl": Grid(6, 12, 2, packed=True, near=True),
}


@torch.no_grad()
def read(subject: families.Subject, kept: byhand.Kept) -> list[Tensor]:
    """A model whose text attends to features [tiles of all rows, tokens, C], on some of the tokens of each tile."""
    takes = (m for m in subject.model.modules() if "cross_attention_states" in signature(m.forward).parameters)
    text = next(m for m in takes if hasattr(m, "layers"))

    def shorten(module: nn.Module, args: Any, kwargs: Any) -> Any:
        states, mask = kwargs["cross_attention_states"], kwargs["cross_attention_mask"]
        tokens = states.shape[1]
        by_tile = mask.unflatten(-1, (-1, tokens)).movedim(-2, 1).flatten(0, 1)  # a row for each tile
        less = byhand.take(by_tile, kept, tokens).unflatten(0, (len(mask), -1)).movedim(1, -2).flatten(-2)
        states = byhand.take(states, kept, tokens)
        return args, kwargs | {"cross_attention_states": states, "cross_attention_mask": less}

    hook = text.register_forward_pre_hook(shorten, with_kwargs=True)
    try:
        return families.outputs(subject.model(**subject.inputs))
    finally:
        hook.remove()


def lucky(subject: families.Subject, keep: int) -> byhand.Kept:
    """The features of each image whose patches have the best mean luck; of patches that are features, the tokens."""
    grid = GRIDS[subject.family.name]
    images = len(subject.inputs["input_ids"])
    if subject.inputs["pixel_values"].ndim == 5:  # several a row
        images *= subject.inputs["pixel_values"].shape[1]
    luck = torch.tensor(naive.lucky(grid.tokens, 0)).expand(images, -1)
    if "image_window_index" in subject.inputs:  # one sequence, in an order of its own
        luck = _out_of_windows(subject, torch.tensor(naive.lucky(grid.tokens * images, 0)))
    means = of_features(grid, luck)
    out = [naive.best(row, range(len(row)), keep) for row in means]
    if grid.side > 1:
        return out
    return [[*range(grid.front), *(grid.front + token for token in row)] for row in out]


def of_features(grid: Grid, values: Tensor) -> Tensor:
    """The mean of each feature's patches: from [images, tokens] to [images, features]."""
    count = grid.height * grid.width // grid.side**2
    return torch.stack([values[:, grid.patches(feature)].mean(1) for feature in range(count)], 1)


def _out_of_windows(subject: families.Subject, values: Tensor) -> Tensor:
    """Values [n] of patches that stand in windows, as [images, tokens]."""
    grid, order = GRIDS[subject.family.name], subject.inputs["image_window_index"]
    groups = values.unflatten(0, (-1, grid.side**2))
    return torch.empty_like(groups).index_copy(0, order, groups).reshape(-1, grid.tokens)


@torch.no_grad()
def received(subject: families.Subject, block: int) -> Tensor:
    """Attention that each feature's patches receive in a block, summed over rows, mean over heads: [images, features].

    The weights are those of a model of the same family whose tower writes them out, image by image.
    """
    model = subject.family.build()
    blocks = families.blocks_of(model, subject.sites, "vision")
    tower = next(m for m in model.modules() if blocks in m.modules() and _is_tower(m))
    seen: list[Tensor] = []

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
        if attention_mask is not None:
            hidden = torch.zeros_like(scores)
            if attention_mask.dtype == torch.bool:
                attention_mask = hidden.masked_fill(~attention_mask, -torch.inf)
            scores = scores + attention_mask
        weights = scores.softmax(-1)
        if module in blocks[block].modules():
            seen.append(weights.float().mean(1).sum(1))
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("recorded", attend)
    AttentionMaskInterface.register("recorded", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for part in tower.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation_internal = "recorded"
    model(**subject.inputs)
    grid = GRIDS[subject.family.name]
    if "image_window_index" in subject.inputs:
        return of_features(grid, _out_of_windows(subject, torch.cat(seen, 1)[0]))
    return of_features(grid, torch.cat([one.reshape(-1, grid.tokens) for one in seen]))


@contextmanager
def shortened(
    subject: families.Subject, features: byhand.Kept, block: int = 1, before: byhand.Kept | None = None
) -> Iterator[None]:
    """Let the blocks of a tower, from one on, see the patches of some features of each image alone.

    Args:
        before: the features that blocks further up are left with, of which these are some.
    """
    kept, length = _tokens(subject, features)
    inner, shorter = kept, length
    if before is not None:
        longer, _ = _tokens(subject, before)
        inner = [[all_.index(token) for token in row] for row, all_ in zip(kept, longer, strict=True)]
        shorter = len(longer[0])
    blocks = families.blocks_of(subject.model, subject.sites, "vision")

    def shorten(module: nn.Module, args: Any, kwargs: Any) -> Any:
        del module
        args, kwargs = tree_map_only(Tensor, lambda v: _take(v, inner, shorter), (args, kwargs))
        bounds = {k: _fewer(v, inner[0]) for k, v in kwargs.items() if k == "cu_seqlens"}
        return args, kwargs | bounds

    def spread(value: Tensor) -> Tensor:
        dims = [i for i, size in enumerate(value.shape) if size == len(kept[0])]
        return value if not dims else _spread(value, kept, length, dims[0])

    tower = next(m for m in subject.model.modules() if blocks in m.modules() and _is_tower(m))
    mergers = [m for name, m in tower.named_modules() if _merges(name)]
    with ExitStack() as stack:
        for each in list(blocks)[block:]:
            stack.callback(each.register_forward_pre_hook(shorten, with_kwargs=True).remove)
        for each in mergers:
            hook = lambda module, args: tree_map_only(Tensor, spread, args)  # noqa: E731
            stack.callback(each.register_forward_pre_hook(hook).remove)
        if not mergers:
            hook = lambda module, args, out: tree_map_only(Tensor, spread, out)  # noqa: E731
            stack.callback(tower.register_forward_hook(hook).remove)
        yield


def _in_windows(tokens: list[int], order: list[int], size: int) -> list[int]:
    """The patches that stay, where groups of a size stand in another order: which group each place holds."""
    stay = {token // size for token in tokens}
    return [place * size + i for place, group in enumerate(order) if group in stay for i in range(size)]


def _tokens(subject: families.Subject, features: byhand.Kept) -> tuple[byhand.Kept, int]:
    """The tokens of a tower's sequence that belong to some features, and how long the whole sequence is."""
    grid = GRIDS[subject.family.name]
    if grid.side == 1:  # the class tokens are not listed with the features
        features = [[token - grid.front for token in row if token >= grid.front] for row in features]
    kept = grid.kept(features)
    if "image_window_index" in subject.inputs:
        kept = [_in_windows(kept[0], subject.inputs["image_window_index"].tolist(), grid.side**2)]
    return kept, grid.tokens * (len(features) if grid.packed else 1)


def _is_tower(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return config is not None and not hasattr(config, "vision_config")


def _merges(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] == "merger" or (len(parts) > 1 and parts[-2] == "deepstack_merger_list")


def _fewer(bounds: Tensor, kept: list[int]) -> Tensor:
    """Bounds of images, or of windows, as far as their patches stay."""
    return torch.tensor([sum(token < bound for token in kept) for bound in bounds.tolist()])


def _take(value: Tensor, kept: byhand.Kept, length: int) -> Tensor:
    flat = bool(value.shape) and value.shape[0] == length
    return byhand.take(value, kept, length).squeeze(0) if flat else byhand.take(value, kept, length)


def _spread(value: Tensor, kept: byhand.Kept, length: int, dim: int) -> Tensor:
    shape = list(value.shape)
    shape[dim] = length
    wide = value.new_zeros(shape)
    if dim == 0:
        wide[kept[0]] = value
        return wide
    for number, row in enumerate(kept):
        wide[number, row] = value[number]
    return wide
