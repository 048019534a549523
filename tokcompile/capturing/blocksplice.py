"""Features of images put among text by the number of their image and their place in it, written as the scatter it is.

SmolVLM of transformers 5.17 counts the image tokens of a row so far, and looks each one's feature up: image
`images of earlier rows + count // P` of P features, at `count % P`. With P tokens for each image, which the model asks
for, that is one feature after the other: `masked_scatter(embeddings, mask, features)`, as other models write it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
_LOOK_UP, _COUNT = aten.index.Tensor, aten.cumsum.default
_BY_ZEROS = ([], ["constant"], ["constant", None], ["constant", 0.0])
"""How a padding by zeros goes on after its widths."""
_PUTS = {aten.index_put_.default, aten.index_put.default}


def scatter_blocks(graph: Graph, chosen: Node) -> bool:
    """Replace `where(mask, zeros with features at mask, embeddings)`; False, and nothing is done, where it is another.

    Args:
        chosen: a node of `aten.where.self`.
    """
    wide, put, embeddings = chosen.args
    found = _features(wide, put, embeddings)
    if found is None:
        return False
    for rows in put.args[2].args[1]:
        _drop_checks(graph, rows)
    with graph.inserting_before(chosen):
        scattered = graph.call_function(aten.masked_scatter.default, (embeddings, wide, found))
    scattered.meta = dict(chosen.meta)
    chosen.replace_all_uses_with(scattered)
    _erase(graph, chosen)
    return True


def _features(wide: Any, put: Any, embeddings: Any) -> Node | None:
    """The features, [images, P, C], where these are the parts of such an assignment among zeros."""
    if not (_is(wide, aten.unsqueeze.default) and isinstance(put, Node) and put.target in _PUTS):
        return None
    mask, (zeros, places, rows, *more) = wide.args[0], put.args
    if (
        list(places) != [mask]
        or any(more)
        or not _is(zeros, aten.zeros_like.default)
        or zeros.args[0] is not embeddings
    ):
        return None
    if not _is(rows, _LOOK_UP) or len(rows.args[1]) != 2 or mask.meta["val"].dtype != torch.bool:
        return None
    features, picked = rows.args[0], rows.args[1]
    if not all(_is(index, _LOOK_UP) and list(index.args[1]) == [mask] for index in picked):
        return None
    of_image, place = (index.args[0] for index in picked)
    shape = features.meta["val"].shape
    fits = len(shape) == 3 and isinstance(shape[1], int) and mask.meta["val"].ndim == 2
    return features if fits and _are_counted(of_image, place, mask, shape[1]) else None


def _are_counted(of_image: Node, place: Node, mask: Node, each: int) -> bool:
    """Whether images and places in them are those of the tokens under a mask, one after the other."""
    if not _is(of_image, aten.add.Tensor) or not _is(place, aten.remainder.Scalar) or place.args[1] != each:
        return False
    before, whole = of_image.args
    divided = _is(whole, aten.floor_divide.default) and whole.args[1] == each
    return divided and _counts(whole.args[0], mask) and _counts(place.args[0], mask) and _of_rows(before, mask, each)


def _counts(value: Any, mask: Node) -> bool:
    """`mask.cumsum(-1) - 1`."""
    if not _is(value, aten.sub.Tensor) or value.args[1] != 1:
        return False
    total = value.args[0]
    return _is(total, _COUNT) and total.args[0] is mask and total.args[1] in (-1, 1)


def _of_rows(value: Any, mask: Node, each: int) -> bool:
    """`pad((mask.sum(1) // P).cumsum(0), (1, 0))[:-1, None]`: the images of earlier rows."""
    chain = ((aten.unsqueeze.default, (1,)), (aten.slice.Tensor, (0, 0, -1)), (aten.pad.default, ([1, 0],)))
    chain += ((_COUNT, (0,)), (aten.floor_divide.default, (each,)), (aten.sum.dim_IntList, ([1],)))
    for target, wanted in chain:
        if not _is(value, target) or [*value.args[1 : 1 + len(wanted)]] != [*wanted]:
            return False
        if target is aten.pad.default and ([*value.args[2:]] not in _BY_ZEROS or value.kwargs):
            return False
        value = value.args[0]
    return value is mask


def _is(value: Any, target: object) -> bool:
    return isinstance(value, Node) and value.target is target


def _drop_checks(graph: Graph, rows: Node) -> None:
    """Take out what checks that a mask picks no fewer rows than none and no more than all."""
    for size in [u for u in rows.users if u.target is aten.sym_size.int]:
        tests = list(size.users)
        for test in tests:
            for check in [u for u in test.users if u.target is aten._assert_scalar.default]:
                graph.erase_node(check)
            _erase(graph, test)  # and the size with the last of them
        if not tests:
            graph.erase_node(size)


def _erase(graph: Graph, node: Node) -> None:
    """Take out a node that nobody reads, and what nobody reads then."""
    if node.users or node.op != "call_function":
        return
    above = node.all_input_nodes
    graph.erase_node(node)
    for each in above:
        _erase(graph, each)
