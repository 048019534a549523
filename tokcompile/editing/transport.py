"""Apply a token map: cut a sequence at one value and let everything downstream follow.

Values after the cut live on the new axis: their shape literals are repaired. Values that were made on the old axis and
enter the region from outside (masks on rows and columns, rotary tables, embeddings at the splice) are gathered by the
map's source indices, once each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve, size_of
from tokcompile.axes.atoms import same
from tokcompile.axes.infer import broadcasts
from tokcompile.axes.views import SPLITS
from tokcompile.editing import inserted, positional
from tokcompile.editing.edit import Editor
from tokcompile.editing.gathering import gather_dim, gather_flat, rows_apart
from tokcompile.editing.positions import positions_of, renumber
from tokcompile.editing.shapes import contains, repair, takes_apart
from tokcompile.editing.standins import of_images, without_stand_ins
from tokcompile.editing.tokenmap import TokenMap
from tokcompile.errors import EditError
from tokcompile.program import SIZES, place
from tokcompile.sites import Sites

aten = torch.ops.aten
tokred = torch.ops.tokred
WHOLE = "tokred_whole"
"""Marks a reader of a stream that goes on reading all of its tokens when some are cut there."""


def _writes(user: Node, value: Node) -> bool:
    """Whether a user changes a value in place."""
    return (
        isinstance(user.target, torch._ops.OpOverload)
        and user.target._schema.is_mutable
        and bool(user.args)
        and user.args[0] is value
    )


class Transport:
    """One application of a token map to a graph."""

    def __init__(self, editor: Editor, sites: Sites) -> None:
        self.editor = editor
        self.axes = editor.program.axes
        self.sites = sites
        self.splice = sites.splice
        self.rotary = {r.positions for tables in sites.rotary.values() for r in tables}
        self.edited: dict[Node, list[TokenMap]] = {}
        self.derived: dict[tuple[Any, ...], TokenMap] = {}
        self.thin: set[Dim] = set()
        self.texts: dict[TokenMap, TokenMap] = {}
        self.cloned: dict[int, dict[Node, Node]] = {}
        self.values: dict[tuple[Any, ...], torch.Tensor] = {}
        self._dims: dict[Node, list[Dim]] = {}
        self.until: Node | None = None
        self.parted: dict[Node, TokenMap] = {}
        self.borders: dict[Node, int] = {}
        self.originals: dict[tuple[Node, TokenMap], Node] = {}
        self._moved: dict[tuple[Node, int, tuple[int, int], str], Node] = {}

    def of(self, node: Node) -> list[Dim]:
        """Dimensions of a value on the old axes."""
        return [resolve(d) for d in self._dims[node]] if node in self._dims else self.axes.of(node)

    def where(self, node: Node, axis: Dim) -> list[int]:
        """Dimensions of a value that contain an axis, or a factor of one of rows and columns."""
        return [i for i, dim in enumerate(self.of(node)) if self.counts(dim, axis)]

    def counts(self, dim: Dim, axis: Dim) -> bool:
        """Whether a dimension counts tokens of an axis."""
        wanted = resolve(axis)
        return contains(dim, wanted) or (wanted in self.thin and any(atom in dim for atom in wanted))

    def apply(self, cut: Node, token_map: TokenMap, content: Node | None = None, until: Node | None = None) -> Node:
        """Cut at a value and rewrite everything that depends on it.

        Args:
            cut: the value at which tokens are taken out; it holds the map's axis once.
            content: what stands in its place, with the new axis where it holds the old one; the tokens that the map
                names, by default.
            until: the value from which on fresh tokens are gone again; they stay to the end by default.

        Returns:
            The value after the cut.

        Raises:
            EditError: something downstream cannot follow; the error names it.
        """
        spots = self.where(cut, token_map.axis)
        if len(spots) != 1:
            raise EditError(
                "the place of the edit does not hold the token axis once",
                where=[place(cut)],
                found=f"{product(token_map.axis)} tokens in a value {tuple(cut.meta['val'].shape)}",
            )
        users = [u for u in cut.users if u not in self.editor.made and WHOLE not in u.meta]
        if content is None:
            with self.editor.after([cut, token_map.source]):
                content, _, _ = self.move_dim(cut, token_map, spots[0])
        early = [u for u in users if u._sort_key < content._sort_key]
        if early:
            raise EditError(
                "tokens would be dropped before they are chosen",
                where=[place(early[0])],
                found="the scores are computed after the place of the drop",
                remedy="drop later, or score earlier",
            )
        for user in users:
            self.editor.swap_input(user, cut, content)
        self.mark(content, token_map, self.axes.of(cut))
        self.until = until
        if until is cut:
            inserted.take_out(self, content, token_map)
        else:
            self.walk(content)
        return content

    def mark(self, node: Node, token_map: TokenMap, dims: list[Dim] | None = None) -> None:
        """Note that a value lives on the new axis of a map."""
        self.edited.setdefault(node, []).append(token_map)
        if dims is not None:
            self._dims[node] = dims

    def mark_old(self, node: Node, like: Node) -> None:
        """Note that a value has the dimensions that another one had before the edit."""
        self._dims[node] = self.of(like)

    def walk(self, start: Node, end: Node | None = None) -> None:
        """Rewrite what depends on edited values, from after one node to another, or to the end of the graph."""
        order = list(self.editor.program.graph.nodes)
        for node in order[order.index(start) + 1 :]:
            if (
                node.op != "output"
                and node not in self.editor.made
                and any(a in self.edited for a in node.all_input_nodes)
            ):
                self._visit(node)
            if node is self.until:
                for token_map in self.edited.get(node, []):
                    inserted.take_out(self, node, token_map)
            if node is end:
                return

    def _visit(self, node: Node) -> None:
        if node.target in SIZES:
            self._old_size(node)
            return
        if node in self.axes.unknown:
            raise EditError(
                f"no axis rule for '{node.target}', which the edit reaches",
                where=[place(node)],
                remedy="add a rule for it to tokcompile/axes/rules.py",
            )
        if positional.makes_values(node):  # reads only the dtype of its input
            return
        for token_map in dict.fromkeys(m for a in node.all_input_nodes for m in self.edited.get(a, [])):
            self._follow(node, token_map)

    def _follow(self, node: Node, token_map: TokenMap) -> None:
        """Bring one operator to the new axis."""
        with self.editor.before(node):
            token_map = self._merged(node, self._of_text(node, token_map))
            derived = positional.follow(self, node, token_map)
            if derived is None:
                for value in list(node.all_input_nodes):
                    if token_map not in self.edited.get(value, []) and not self._inserted(node, value, token_map):
                        self.bring(node, value, token_map)
        for each in dict.fromkeys((token_map, derived or token_map)):
            if self._holds(node, each.axis):
                self.mark(node, each)
        if derived is None:
            repair(self, node, token_map)

    def _of_text(self, node: Node, token_map: TokenMap) -> TokenMap:
        """Where features are put among tokens, the map of those that follows from the features'."""
        if node.target is not aten.masked_scatter.default or token_map not in self.edited.get(node.args[2], []):
            return token_map
        if token_map.fresh is not None:
            raise EditError(
                "tokens that a rule put among features would be spliced into a text, which has no place for them",
                where=[place(node)],
                remedy="take them out before, with `until: projector.input` or `until: splice.input`",
            )
        if self.splice is not None and node is self.splice.node:
            self.texts[token_map] = positional.spliced(self, node, token_map)
        if token_map not in self.texts:
            raise EditError("features are put among tokens before they are spliced into a text", where=[place(node)])
        return self.texts[token_map]

    def _merged(self, node: Node, token_map: TokenMap) -> TokenMap:
        """Where patches are taken apart to rows and columns to become features, the map of those."""
        folded = token_map.folded
        if folded is None or node.target in SPLITS or not takes_apart(self, node, token_map):
            return token_map
        self.thin.add(resolve(folded.axis))
        for value in node.all_input_nodes:
            if token_map in self.edited.get(value, []):
                self.mark(value, folded)
        return folded

    def _inserted(self, node: Node, value: Node, token_map: TokenMap) -> bool:
        """Whether a value is features that are put among the tokens of a map, and fits them."""
        return node.target is aten.masked_scatter.default and value is node.args[2] and self.fits(node, token_map)

    def fits(self, node: Node, token_map: TokenMap) -> bool:
        """Whether features fit the tokens that they are put among: they were cut as these were, or are of others."""
        if token_map.spliced is None:
            return token_map.fresh is not None  # which stand at no place of a feature
        others = self.splice is not None and any(node is each.node for each in self.splice.further)
        return others or token_map.spliced in self.edited.get(node.args[2], [])

    def _holds(self, node: Node, axis: Dim) -> bool:
        if isinstance(node.meta.get("val"), torch.Tensor):
            return bool(self.where(node, axis))
        lists = self.axes.context.dims.get(node, [])
        return any(self.counts(resolve(d), axis) for dims in lists for d in dims)

    def bring(self, user: Node, value: Node, token_map: TokenMap) -> None:
        """Let a value from outside the region follow the map before its user reads it."""
        if not isinstance(value.meta.get("val"), torch.Tensor) or not self.where(value, token_map.axis):
            return
        if token_map.reordered:
            raise EditError(
                "a value that was made for all tokens meets tokens in another order",
                where=[place(user)],
                found=f"'{value.name}' {tuple(value.meta['val'].shape)}",
                remedy="drop tokens further down",
            )
        if any(resolve(m.axis) == resolve(token_map.axis) for m in self.edited.get(value, [])):
            raise EditError(
                "tokens meet that an edit and the model put in different places",
                where=[place(user)],
                found=f"'{value.name}' {tuple(value.meta['val'].shape)}",
                remedy="drop tokens further down",
            )
        if any(_writes(u, value) for u in value.users):
            raise EditError(
                "a value that the model writes in place cannot be gathered",
                where=[place(user)],
                found=f"'{value.name}' {tuple(value.meta['val'].shape)}",
                remedy="drop tokens further down",
            )
        aligned, kind = self.align(user, value, token_map), inserted.kind(self, user, value, token_map)
        self.editor.swap_input(user, value, self.brought(value, token_map, aligned, kind))

    def align(self, user: Node, value: Node, token_map: TokenMap) -> tuple[int, int]:
        """How a value's dimensions meet the batch rows of its user's result.

        Returns:
            How many dimensions of size 1 the value needs in front, and then its batch dimension; -1 when there is
            nothing to align: a batch of one row, or rows and tokens flattened together.
        """
        rows, dims = resolve(token_map.rows), self.of(value)
        if not rows:
            return 0, -1
        for position, dim in enumerate(dims):
            if contains(dim, rows):
                return 0, position if dim == rows else -1
        if any(rows_apart(dims, spot, token_map) is not None for spot in self.where(value, token_map.axis)):
            return 0, -1
        result = self.of(user)
        at = next((i for i, dim in enumerate(result) if dim == rows), None)
        if at is None or not broadcasts(user):
            raise EditError(
                "a value that rows share cannot be gathered row by row",
                where=[place(user)],
                found=f"'{value.name}' {tuple(value.meta['val'].shape)} has no batch dimension",
            )
        index = at - (len(result) - len(dims))
        if index >= 0 and dims[index]:
            raise EditError(
                "a value that rows share cannot be gathered row by row",
                where=[place(user)],
                found=f"'{value.name}' {tuple(value.meta['val'].shape)} has no place for a batch dimension",
            )
        return max(-index, 0), max(index, 0)

    def brought(
        self, value: Node, token_map: TokenMap, aligned: tuple[int, int], kind: inserted.Kind = inserted.Kind.LIKE
    ) -> Node:
        """A value on the new axis; made once for all who read it.

        Args:
            aligned: what `align` says.
            kind: what fresh tokens have of it.
        """
        key = (value, id(token_map), aligned, kind.value)
        if key not in self._moved:
            self._moved[key] = self._move(value, token_map, aligned, kind)
            lead, batch = aligned
            dims = [()] * lead + self.of(value)
            if batch >= 0:
                dims[batch] = resolve(token_map.rows)
            if token_map.stand_ins is not None and of_images(value, self.splice):
                spots = [i for i, dim in enumerate(dims) if self.counts(dim, token_map.axis)]
                self._moved[key] = without_stand_ins(self.editor, self._moved[key], token_map, spots, batch)
            self.mark(self._moved[key], token_map, dims)
        return self._moved[key]

    def _move(self, value: Node, token_map: TokenMap, aligned: tuple[int, int], kind: inserted.Kind) -> Node:
        lead, batch = aligned
        if token_map.placed is not None and token_map.positions == "keep" and self._is_position(value, token_map):
            token_map = replace(token_map, source=token_map.placed)
        compacts = token_map.positions == "compact" and value.meta["val"].dtype.is_floating_point
        if kind is inserted.Kind.COUNTED or (compacts and token_map.fresh is None):
            positions = positions_of(self, value, token_map)
            if positions is not None:
                return self._renumbered(value, positions, token_map, aligned)
        if kind is inserted.Kind.SUM:
            return inserted.moved_sum(self, value, token_map, aligned)
        inside = value.target is aten.unsqueeze.default and value.args[1] % len(self.of(value)) != 0
        if inside and batch <= 0 and not lead and self.of(value.args[0])[:1] in ([()], [resolve(token_map.rows)]):
            # One gather for a table that every layer unsqueezes.
            inner = self.brought(value.args[0], token_map, aligned, kind)
            return self.editor.clone(value, {value.args[0]: inner})
        moved, spots = value, self.where(value, token_map.axis)
        if batch < 0:
            for spot in spots:
                moved, _, _ = self.move_dim(moved, token_map, spot, self.of(value))
            return inserted.finish(self, value, moved, token_map, aligned, kind)
        for _ in range(lead):
            moved = self.editor.call(aten.unsqueeze.default, moved, 0)
        dims = [()] * lead + self.of(value)
        dims[batch] = resolve(token_map.rows)
        for spot in (each + lead for each in spots):
            if dims[spot] == resolve(token_map.axis):
                moved = self.editor.call(tokred.gather_tokens.default, moved, token_map.source, spot, batch)
            else:
                moved = gather_flat(self.editor, moved, token_map, spot, dims)
        return inserted.finish(self, value, moved, token_map, aligned, kind)

    def _is_position(self, value: Node, token_map: TokenMap) -> bool:
        """Whether a value is rotary positions, or a table computed from positions."""
        return value in self.rotary or positions_of(self, value, token_map) is not None

    def _renumbered(self, value: Node, positions: Node, token_map: TokenMap, aligned: tuple[int, int]) -> Node:
        """A position table computed again; its rows must stand where its user has them."""
        made = renumber(self, value, positions, token_map)
        lead, batch = aligned
        fits = made.meta["val"].ndim == value.meta["val"].ndim and not lead
        if batch >= 0 and not (
            fits and same(size_of(made.meta["val"].shape[batch]), size_of(token_map.source.meta["val"].shape[0]))
        ):
            raise EditError(
                "a position table that rows share cannot be renumbered row by row",
                where=[place(value)],
                found=f"{tuple(made.meta['val'].shape)} from {tuple(value.meta['val'].shape)}",
            )
        return made

    def move_dim(
        self, value: Node, token_map: TokenMap, spot: int, dims: list[Dim] | None = None
    ) -> tuple[Node, int, int]:
        """Gather one dimension of a value by the map; see `gather_dim`."""
        return gather_dim(self.editor, value, token_map, spot, dims or self.of(value))

    def _old_size(self, node: Node) -> None:
        """A size that the model reads keeps its old value: what is made from it is gathered like everything else."""
        if not node.users:
            return
        value = node.args[0]
        for token_map in self.edited[value]:
            if node.target is aten.sym_size.int and node.args[1] not in self.where(value, token_map.axis):
                continue
            if isinstance(node.meta["val"], int):
                self.editor.fix(node, node.meta["val"])
                return
            alone = node.target is aten.sym_size.int and self.of(value)[node.args[1]] == resolve(token_map.axis)
            if not alone or not isinstance(token_map.old, Node):
                raise EditError("the model computes with a size that the edit changes", where=[place(node)])
            self.editor.replace(node, token_map.old)
