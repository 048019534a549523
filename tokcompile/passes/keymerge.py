"""merge, at caches: pour keys and values that were not chosen into those that stay; an eviction then frees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.editing.edit import Editor
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.keychoice import BlockKeys, KeySelection
from tokcompile.passes.keyscores import KeyScores
from tokcompile.program import place
from tokcompile.sites import Attention, resolve_caches
from tokcompile.sites.cache import Cache
from tokcompile.sites.rotation import Rotation, find_rotations
from tokcompile.steps import Merge

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True, eq=False)
class _Turned:
    """Keys without their positions, float32 [B, H, T, D], and the tables that turn them, [B or 1, H or 1, T, W]."""

    plain: Node
    cos: Node
    sin: Node
    neighbours: bool


@dataclass(frozen=True, eq=False)
class BlockMerge:
    """What becomes of one block's keys that are not chosen.

    Attributes:
        cache: its keys and values.
        classes: int64 [B, H, T], as `tokred::assign_keys` says; weights: float32 [B, H, T].
        turned: the keys that are averaged, where it is not the cache's own.
        keys: whether keys are averaged.
    """

    cache: Cache
    classes: Node
    weights: Node
    turned: _Turned | None
    keys: bool

    @property
    def sources(self) -> list[Node]:
        """What `shortened` reads."""
        turned = [self.turned.plain, self.turned.cos, self.turned.sin] if self.turned else []
        return [self.classes, self.weights, *turned]

    def shortened(self, editor: Editor, node: Node, index: Node) -> Node:
        """What stays of a block's keys or values, [B, H, k, D], by int64 [B, H, k]."""
        is_key = node is self.cache.key
        if not is_key and node is not self.cache.value:
            raise EditError(
                "the cache that this block hands back is not keys and values that can be merged",
                where=[place(node)],
                found=f"'{node.name}' {tuple(node.meta['val'].shape)}",
                remedy="evict without a merge",
            )
        if is_key and not self.keys:
            return editor.call(tokred.gather_keys.default, node, index)
        turned = self.turned if is_key else None
        tables = (turned.plain, turned.cos, turned.sin, turned.neighbours) if turned else (None, None, None, False)
        return editor.call(tokred.merge_keys.default, node, index, self.classes, self.weights, *tables)


@dataclass(frozen=True, eq=False)
class KeyMerge:
    """What becomes of the keys that are not chosen, by number of the block; blocks where all stay are left out."""

    blocks: dict[int, BlockMerge]


def merge_keys(ctx: Context, step: Merge) -> None:
    """Find the key that stays which each other one is merged into, for every cache that was chosen from.

    Raises:
        EditError: keys are to be merged without their positions, and what turns them is not known; or the scores
            that tokens are weighed by may be negative.
    """
    selection: KeySelection = ctx.values[step.keep]
    scores: KeyScores = ctx.values[step.scores]
    if not scores.amounts:
        raise EditError(
            f"'{step.scores}' may be below 0, and what is merged is weighed by it",
            remedy="weigh by attention received, or by scores joined of such",
        )
    if any(chosen.owners is not None for chosen in selection.blocks.values()):
        raise EditError(
            "keys cannot be merged where all heads of a block share one budget: a key is like others of its head alone",
            found=f"heads: joint in '{step.keep}'",
            remedy="heads: each",
        )
    left = {index: chosen for index, chosen in selection.blocks.items() if chosen.index is not None}
    rotations = _rotations(ctx, step) if left else {}
    made = {}
    for index, block, cache in resolve_caches(ctx.sites, step.at):
        if index in left:
            rotation = rotations.get(block.attention)
            made[index] = _merged(ctx, step, cache, left[index], selection, scores.blocks[index].node, rotation)
    ctx.values[step.name] = KeyMerge(made)
    record = {"verb": "merge", "name": step.name, "at": step.at, "by": step.by, "keep": step.keep, "blocks": len(made)}
    ctx.log.append(record)


def _rotations(ctx: Context, step: Merge) -> dict[Attention, Rotation]:
    """What turns the keys of each block; nothing where they are merged as the cache has them."""
    if step.space == "turned":
        return {}
    try:
        return find_rotations(ctx.program, ctx.sites, step.address.stack, of="key")
    except EditError as error:
        raise EditError(
            f"keys cannot be merged without their positions: {error.cause}",
            where=error.where,
            found=error.found,
            remedy="merge them as the cache has them: space: turned",
        ) from error


def _merged(
    ctx: Context,
    step: Merge,
    cache: Cache,
    chosen: BlockKeys,
    selection: KeySelection,
    weights: Node,
    rotation: Rotation | None,
) -> BlockMerge:
    shapes = [node.meta["val"].shape for node in (cache.key, cache.value)]
    if cache.key is cache.value or shapes[0][1] != shapes[1][1]:
        raise EditError(
            "keys and values that every step makes from one cache cannot be merged apart",
            where=[place(cache.key)],
            found=f"{tuple(shapes[0])}",
            remedy="evict without a merge",
        )
    sources = [cache.key, cache.value, weights, chosen.index, chosen.valid, chosen.among]
    sources += [rotation.cos, rotation.sin] if rotation is not None else []
    with ctx.editor.after([node for node in sources if node is not None]):
        turned = None if rotation is None else _unturned(ctx, cache.key, rotation)
        keys = cache.key if turned is None else turned.plain
        among = (chosen.valid, chosen.among, selection.first, selection.last)
        limits = (float(step.alike), float(step.spare))
        classes = ctx.editor.call(
            tokred.assign_keys.default, keys, cache.value, weights, chosen.index, *among, *limits, name="classes"
        )
    return BlockMerge(cache, classes, weights, turned, step.merge_keys is True)


def _unturned(ctx: Context, keys: Node, rotation: Rotation) -> _Turned:
    """A cache's keys as they were before they were turned."""
    if rotation.lead != 0:
        raise EditError(
            "keys cannot be merged without their positions: another part of a head than its first is turned",
            where=[place(rotation.cos)],
            remedy="merge them as the cache has them: space: turned",
        )
    cos, sin = (_table(ctx.editor, table, keys, rotation) for table in (rotation.cos, rotation.sin))
    plain = ctx.editor.call(tokred.unturn_keys.default, keys, cos, sin, rotation.neighbours)
    return _Turned(plain, cos, sin, rotation.neighbours)


def _table(editor: Editor, table: Node, keys: Node, rotation: Rotation) -> Node:
    """[B or 1, H or 1, T, W], with a column for each number that is turned."""
    call, made, rank = editor.call, table, table.meta["val"].ndim
    if rank == 2:
        made = call(aten.unsqueeze.default, made, 0)
    if rank < 4:
        made = call(aten.unsqueeze.default, made, 1)
    elif rotation.heads == 2:
        made = call(aten.transpose.int, made, 1, 2)
    shape = made.meta["val"].shape
    fits = same(size_of(shape[2]), size_of(keys.meta["val"].shape[2])) and shape[1] in (1, keys.meta["val"].shape[1])
    if not fits:
        raise EditError(
            "keys cannot be merged without their positions: rotary tables have other rows than one for each key",
            where=[place(table)],
            found=f"{tuple(table.meta['val'].shape)} for {tuple(keys.meta['val'].shape)}",
            remedy="merge them as the cache has them: space: turned",
        )
    if not rotation.apart:
        return made
    if rotation.neighbours:
        return call(aten.repeat_interleave.self_int, made, 2, -1)
    return call(aten.cat.default, [made, made], -1)
