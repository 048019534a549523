"""Patches that are merged to features: scores of patches become scores of features, choices of features of patches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.editing.edit import Editor, add, length_value, sub
from tokcompile.editing.shapes import contains
from tokcompile.editing.tokenmap import TokenMap, make_map
from tokcompile.passes.context import Context, Selection
from tokcompile.sites.features import Fold, Sequence, Shuffle

aten = torch.ops.aten
tokred = torch.ops.tokred


def scores_of_features(editor: Editor, scores: Node, fold: Fold) -> Node:
    """The mean of each feature's patches: from [B, patches] to [B, features]."""
    means = editor.call(aten.mean.dim, by_feature(editor, scores, fold), [2])
    if fold.shuffle is None:
        return means
    back = editor.call(aten.argsort.default, fold.shuffle.numbers)
    means = editor.call(aten.index.Tensor, means, [None, back])
    return editor.call(aten.reshape.default, means, [-1, product(fold.features)])


def by_feature(editor: Editor, values: Node, fold: Fold) -> Node:
    """Values of patches [B, patches], feature by feature or group by group: [B, features, patches of one]."""
    groups = fold.features if fold.shuffle is None else fold.shuffle.axis
    factors = (*groups, *(atom for atom in fold.patches if atom not in groups))
    order = [1 + fold.patches.index(atom) for atom in factors]
    wide = editor.call(aten.reshape.default, values, [-1, *(atom.size for atom in fold.patches)])
    wide = editor.call(aten.permute.default, wide, [0, *order])
    return editor.call(aten.reshape.default, wide, [-1, product(groups), fold.members])


def of_patches(editor: Editor, values: Node, fold: Fold) -> Node:
    """Values of features [B, features], each given to all of its patches: [B, patches]."""
    kept = [atom for atom in fold.patches if atom in fold.features]
    wide = editor.call(aten.reshape.default, values, [-1, *(atom.size for atom in fold.features)])
    wide = editor.call(aten.permute.default, wide, [0, *(1 + fold.features.index(atom) for atom in kept)])
    ones = [atom.size if atom in fold.features else 1 for atom in fold.patches]
    wide = editor.call(aten.reshape.default, wide, [-1, *ones])
    wide = editor.call(aten.expand.default, wide, [-1, *(atom.size for atom in fold.patches)])
    return editor.call(aten.reshape.default, wide, [-1, product(fold.patches)])


def folded_map(ctx: Context, selection: Selection, at: Sequence, fold: Fold, positions: str) -> TokenMap:
    """The map of a sequence of patches of which those of the chosen features stay, feature by feature.

    Args:
        at: the sequence at the place of the drop; class tokens among it stay.
    """
    features = make_map(ctx.editor, selection.mask, fold.features, at.rows, selection.size, selection.count, positions)
    if fold.shuffle is not None:
        return _shuffled(ctx, features, fold.shuffle)
    if contains(at.axis, fold.features):  # the patches of a feature stand side by side
        return features
    features = replace(features, thin=True)
    patches = _patches(ctx, features, fold)
    if resolve(at.axis) == fold.patches:
        return patches
    return _among_class_tokens(ctx, patches, at.axis)


def _shuffled(ctx: Context, features: TokenMap, shuffle: Shuffle) -> TokenMap:
    """The map of groups of patches that stand in another order than the features they become."""
    editor, call = ctx.editor, ctx.editor.call
    total = product(shuffle.axis)
    counted = call(aten.arange.default, total, device=features.source.meta["val"].device)
    first = call(aten.slice.Tensor, counted, 0, 0, total, length_value(features.old))
    chosen = call(aten.add.Tensor, features.source, call(aten.unsqueeze.default, first, 1))
    none = call(aten.zeros_like.default, counted, dtype=torch.bool)
    flat = call(aten.scatter.value, none, 0, call(aten.reshape.default, chosen, [-1]), True)
    ranks = call(aten.argsort.default, call(aten.argsort.default, shuffle.numbers))
    keep = call(aten.unsqueeze.default, call(aten.index.Tensor, flat, [ranks]), 0)
    new = editor.arithmetic(lambda n, rows: n * rows, features.new, editor.size(features.keep, 0))
    source = call(tokred.kept_indices.default, keep, new)
    return replace(
        features,
        axis=shuffle.axis,
        rows=(),
        source=source,
        keep=keep,
        old=total,
        new=new,
        folded=features,
        shuffle=shuffle,
        numbers=call(aten.index.Tensor, shuffle.numbers, [call(aten.squeeze.dim, source, 0)]),
    )


def _patches(ctx: Context, features: TokenMap, fold: Fold) -> TokenMap:
    editor = ctx.editor
    count = editor.call(aten.arange.default, product(fold.patches), device=features.source.meta["val"].device)
    members = editor.call(aten.squeeze.dim, by_feature(editor, editor.call(aten.unsqueeze.default, count, 0), fold), 0)
    chosen = editor.call(aten.index.Tensor, members, [features.source])
    return replace(
        features,
        axis=fold.patches,
        source=editor.call(aten.flatten.using_ints, chosen, 1, 2),
        keep=of_patches(editor, features.keep, fold),
        old=product(fold.patches),
        new=editor.arithmetic(lambda n: n * fold.members, features.new),
        thin=False,
        folded=features,
    )


def _among_class_tokens(ctx: Context, patches: TokenMap, axis: Dim) -> TokenMap:
    """The map of class tokens and patches, given that of the patches."""
    editor = ctx.editor
    start, end = ctx.segment_bounds(axis, patches.axis)
    total = product(resolve(axis))
    keep = ctx.align(patches.keep, patches.axis, axis, fill=True)
    source = editor.call(aten.add.Tensor, patches.source, start)
    parts = [_counted(editor, patches, 0, start), source, _counted(editor, patches, end, total)]
    return replace(
        patches,
        axis=resolve(axis),
        source=editor.call(aten.cat.default, [part for part in parts if part is not None], 1),
        keep=keep,
        old=total,
        new=editor.arithmetic(add, patches.new, editor.arithmetic(sub, total, patches.old)),
    )


def _counted(editor: Editor, patches: TokenMap, start: int, end: int) -> Node | None:
    """The class tokens from `start` to `end`, in each row."""
    if start == end:
        return None
    count = editor.call(aten.arange.start, start, end, device=patches.source.meta["val"].device)
    return editor.call(aten.expand.default, count, [editor.size(patches.source, 0), end - start])
