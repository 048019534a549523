"""Axes of the operators that merge tokens."""

from __future__ import annotations

import torch
from graphs import calls, traced
from torch import Tensor

from tokcompile.axes import resolve

tokred = torch.ops.tokred
N = 4  # every dimension is this long: size can tell nothing


def test_merged_tokens_are_on_the_axis_of_those_that_stand_for_them() -> None:
    def merge(x: Tensor, keys: Tensor, among: Tensor) -> Tensor:
        source = tokred.strided_tokens(among, N)
        assigned = tokred.nearest_tokens(keys, source, among)
        return tokred.mix_tokens(x, source, tokred.merge_weights(assigned, source, "sum"))

    program = traced(merge, torch.zeros(N, N, N), torch.zeros(N, N, N), torch.ones(N, N, dtype=torch.bool))
    axes, (x, keys, among) = program.axes, program.inputs()
    source, assigned, weights, out = (
        calls(program, getattr(tokred, name).default)[0]
        for name in ("strided_tokens", "nearest_tokens", "merge_weights", "mix_tokens")
    )
    rows, old, channels = axes.of(x)
    new = axes.of(source)[1]
    assert axes.of(source) == [rows, new] and new != old
    assert resolve(new[0].origin) == old and new[0].via is source
    assert axes.of(keys)[:2] == axes.of(among) == axes.of(assigned) == [rows, old]
    assert axes.of(weights) == [rows, new, old]
    assert axes.of(out) == [rows, new, channels]
    assert not axes.context.conflicts and not axes.unknown


def test_a_matrix_that_rows_share_leads_from_one_grid_to_another() -> None:
    def pool(x: Tensor, source: Tensor) -> Tensor:
        return tokred.mix_tokens(x, source, tokred.pool_matrix(x, 2, 2, 2, 2))

    program = traced(pool, torch.zeros(N, N, N), torch.zeros(N, N, dtype=torch.long))
    axes, (x, source) = program.axes, program.inputs()
    (weights,), (out,) = (calls(program, op.default) for op in (tokred.pool_matrix, tokred.mix_tokens))
    rows, old, channels = axes.of(x)
    assert axes.of(source)[0] == rows
    assert axes.of(weights) == [(), axes.of(source)[1], old]
    assert axes.of(out) == [rows, axes.of(source)[1], channels]
    assert not axes.context.conflicts


def test_labels_are_numbers_of_old_tokens_and_their_first_members_stand_for_new_ones() -> None:
    def cluster(x: Tensor) -> Tensor:
        labels = tokred.kmeans_assign(x, N, 2, 0)
        source = tokred.first_members(labels, N)
        return tokred.mix_tokens(x, source, tokred.merge_weights(labels, source, "average"))

    program = traced(cluster, torch.zeros(N, N, N))
    axes, (x,) = program.axes, program.inputs()
    (labels,) = calls(program, tokred.kmeans_assign.default)
    (source,) = calls(program, tokred.first_members.default)
    (out,) = calls(program, tokred.mix_tokens.default)
    assert axes.of(labels) == axes.of(x)[:2]
    assert resolve(axes.of(source)[1][0].origin) == axes.of(x)[1]
    assert axes.of(out) == [axes.of(x)[0], axes.of(source)[1], axes.of(x)[2]]
