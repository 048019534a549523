"""score: give each token of a sequence a number."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product
from tokcompile.errors import EditError, RuleError
from tokcompile.passes.context import Context, Scores, class_tokens
from tokcompile.passes.keyscores import score_keys
from tokcompile.program import place as node_place
from tokcompile.sites import Attention, Place, resolve_address
from tokcompile.sites.features import sequence, text_rows
from tokcompile.steps import Score

aten = torch.ops.aten
tokred = torch.ops.tokred


def score(ctx: Context, step: Score) -> None:
    """Insert the computation of one score.

    Attention received is a side output of one attention site: it is recomputed from that site's queries and keys for
    the rows that the rule names, so that every layer keeps its fused attention.
    """
    if step.of_caches:
        score_keys(ctx, step)
        return
    if step.of is not None:
        tapped = ctx.values[step.of]
        place = Place(f"tap {step.of}", tapped.node, owner=tapped.owner)
    else:
        place = resolve_address(ctx.sites, step.at)
    made = _received(ctx, step, place) if step.by == "attention_received" else _valued(ctx, step, place)
    if not step.largest:
        with ctx.editor.after([made.node]):
            made = replace(made, node=ctx.editor.call(aten.neg.default, made.node))
    made.node.meta["scores"] = step.name
    ctx.values[step.name] = made
    ctx.log.append({"verb": "score", "name": step.name, "by": step.by, "at": place.address})


def _received(ctx: Context, step: Score, place: Place) -> Scores:
    site = place.attention
    if site is None:
        raise EditError("attention received is counted at an attention site", found=place.address)
    if site.partial:
        raise EditError(
            "attention received cannot be counted where the model adds several masks to its scores",
            where=[node_place(site.node)],
            remedy="score by something else, or load the model with fused attention",
        )
    axes = ctx.program.axes
    with ctx.editor.before(site.node):
        key = ctx.editor.call(aten.transpose.int, site.key, -2, -1) if site.key_transposed else site.key
        axis = axes.of(site.key)[-1 if site.key_transposed else -2]
        mask, sinks = ctx.attention_mask(site), ctx.attention_sinks(site)
        rows = axes.of(site.query)[-2]
        if step.queries in ("last", "cls"):
            index = _row_index(ctx, site, place, step, rows)
            node = ctx.editor.call(
                tokred.attention_row.default,
                site.query,
                key,
                mask,
                index,
                site.scale,
                site.is_causal,
                site.softcap,
                step.heads,
                *sinks,
            )
        else:
            counted = _rows(ctx, site, place, step, rows)
            node = ctx.editor.call(
                tokred.attention_received.default,
                site.query,
                key,
                mask,
                counted,
                site.scale,
                site.is_causal,
                site.softcap,
                step.heads,
                step.reduce,
                *sinks,
            )
        node, axis = _rowwise(ctx, node, axis)
    return Scores(node, axis, place.owner)


def _rowwise(ctx: Context, scores: Node, axis: Dim) -> tuple[Node, Dim]:
    """Scores [1, n] of packed rows as [B, T], and the axis of one row."""
    rows = text_rows(ctx.program, ctx.sites)
    if not rows or axis[: len(rows)] != rows:
        return scores, axis
    return ctx.editor.call(aten.reshape.default, scores, [-1, product(axis[len(rows) :])]), axis[len(rows) :]


def _row_index(ctx: Context, site: Attention, place: Place, step: Score, rows: tuple) -> Node:
    """int64 [B]: the row of the CLS token (the first), or of each sequence's last real token."""
    query = site.query
    device = query.meta["val"].device
    if step.queries == "cls" and place.owner.startswith("vision") and not class_tokens(ctx.program, ctx.sites):
        raise EditError(
            "this vision tower has no class token whose attention could be counted",
            where=[node_place(site.node)],
            remedy="use `queries: all`",
        )
    valid = ctx.valid_mask(rows) if step.queries == "last" else None
    if valid is not None:
        return ctx.editor.call(tokred.last_valid.default, valid)
    fill = 0 if step.queries == "cls" else ctx.editor.arithmetic(lambda n: n - 1, ctx.editor.size(query, 2))
    return ctx.editor.call(aten.full.default, [ctx.editor.size(query, 0)], fill, dtype=torch.int64, device=device)


def _rows(ctx: Context, site: Attention, place: Place, step: Score, rows: tuple) -> Node | None:
    """bool [B, Tq]: the query rows that count; None for all."""
    valid = ctx.valid_mask(rows)
    if step.queries == "all":
        return valid
    if step.queries == "text":
        image = ctx.editor.call(aten.logical_not.default, ctx.image_mask(rows))
        return image if valid is None else ctx.editor.call(aten.logical_and.default, image, valid)
    count = int(str(step.queries).removeprefix("last:"))
    if valid is None:
        shape = [ctx.editor.size(site.query, 0), ctx.editor.size(site.query, 2)]
        valid = ctx.editor.call(aten.full.default, shape, True, dtype=torch.bool, device=site.query.meta["val"].device)
    seen = ctx.editor.call(aten.flip.default, valid, [1])
    seen = ctx.editor.call(aten.flip.default, ctx.editor.call(aten.cumsum.default, seen, 1), [1])
    recent = ctx.editor.call(aten.le.Scalar, seen, count)
    return ctx.editor.call(aten.logical_and.default, recent, valid)


def _valued(ctx: Context, step: Score, place: Place) -> Scores:
    node = place.node
    at = sequence(ctx.program, ctx.sites, node)
    if at is None:
        raise EditError(
            "a score needs a value [B, T, C], or the packed patches [n, C] of rows with as many each",
            where=[node_place(node)],
            found=f"{tuple(node.meta['val'].shape)}",
        )
    with ctx.editor.after(_sources(ctx, step, node)):
        if at.packed:
            node = ctx.editor.call(aten.reshape.default, node, [-1, product(at.axis), node.meta["val"].shape[-1]])
        if step.by == "norm":
            made = ctx.editor.call(tokred.token_norm.default, node, float(step.p))
        elif step.by == "random":
            flat = ctx.editor.call(aten.select.int, node, -1, 0)
            made = ctx.editor.call(tokred.random_scores.default, flat, int(step.seed))
        elif step.by == "cosine":
            made = ctx.editor.call(tokred.token_cosine.default, node, _reference(ctx, step, node, at.axis))
        else:
            raise RuleError(f"no way to score is called '{step.by}'")
    return Scores(made, at.axis, place.owner)


def _sources(ctx: Context, step: Score, node: Node) -> list[Node]:
    reference = ctx.values.get(step.to) if step.to else None
    return [node, reference.node] if reference is not None else [node]


def _reference(ctx: Context, step: Score, node: Node, axis: Dim) -> Node:
    """[B, C] or [B, R, C]: what the tokens of a value [B, T, C] are compared with."""
    if step.to in ctx.values:
        return ctx.values[step.to].node
    if step.to == "mean":
        return ctx.editor.call(aten.mean.dim, node, [1])
    if step.to == "cls":
        return ctx.editor.call(aten.select.int, node, 1, 0)
    valid = ctx.valid_mask(axis)
    if valid is None:
        return ctx.editor.call(aten.select.int, node, 1, -1)
    index = ctx.editor.call(tokred.last_valid.default, valid)
    index = ctx.editor.call(aten.unsqueeze.default, index, 1)
    return ctx.editor.call(tokred.gather_tokens.default, node, index, 1, 0)
