"""How each ATen operator aligns the dimensions of its inputs and outputs: one small function per operator.

A rule takes the node and returns the dimensions of its result (a list of them per result for operators with several).
An operator without a rule gives fresh atoms; that matters only when an edit reaches it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes.atoms import Atom, Dim, fresh, product, regroup, resolve, same, size_of, unify

aten = torch.ops.aten
Dims = list[Dim]
MAX = 2**62  # slice ends at or past this mean "to the end"


class Context:
    """What a rule sees of the graph: the dimensions found so far, and arguments by schema name."""

    def __init__(self) -> None:
        self.dims: dict[Node, Any] = {}
        self.conflicts: list[tuple[Node, str]] = []

    def of(self, node: Any) -> Dims:
        """Dimensions of a tensor node, most significant first; [] for anything else."""
        return self.dims.get(node, []) if isinstance(node, Node) else []

    def unify(self, node: Node, left: Dim, right: Dim) -> None:
        """Unify and remember a conflict with the node that asked for it."""
        if not unify(left, right):
            self.conflicts.append((node, f"{resolve(left)} against {resolve(right)}"))


def arg(node: Node, position: int, name: str, default: Any = None) -> Any:
    """One argument of an operator call, however it was passed."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def shape(node: Node) -> list[Any]:
    """Sizes of a node's (first) result as ints or expressions."""
    value = node.meta["val"]
    return [size_of(s) for s in value.shape]


def wrap(dim: int, rank: int) -> int:
    """Give a negative dimension its positive number."""
    return dim + rank if dim < 0 else dim


def pointwise(ctx: Context, node: Node) -> Dims:
    """Operators that broadcast their tensor inputs from the right."""
    sizes = shape(node)
    out: Dims = [() for _ in sizes]
    for value in node.all_input_nodes:
        dims = ctx.of(value)
        for offset in range(1, len(dims) + 1):
            if offset > len(sizes) or not dims[-offset]:
                continue
            if out[-offset]:
                ctx.unify(node, out[-offset], dims[-offset])
            else:
                out[-offset] = dims[-offset]
    return [dim or fresh(size) for dim, size in zip(out, sizes, strict=True)]


def like_first(ctx: Context, node: Node) -> Dims:
    """Operators whose result has the dimensions of their first argument."""
    return list(ctx.of(node.args[0]))


def norm(ctx: Context, node: Node) -> Dims:
    """layer_norm and rms_norm: weights align with the normalised dimensions."""
    dims = list(ctx.of(node.args[0]))
    for weight in node.all_input_nodes[1:]:
        for offset in range(1, len(ctx.of(weight)) + 1):
            ctx.unify(node, dims[-offset], ctx.of(weight)[-offset])
    return dims


def view(ctx: Context, node: Node) -> Dims:
    """view, reshape, flatten, unflatten: the same atoms, grouped anew."""
    return regroup(ctx.of(node.args[0]), shape(node))


def linear(ctx: Context, node: Node) -> Dims:
    """[..., in] x [out, in] -> [..., out]."""
    left, weight = ctx.of(node.args[0]), ctx.of(node.args[1])
    ctx.unify(node, left[-1], weight[-1])
    return [*left[:-1], *weight[:-1]]


def addmm(ctx: Context, node: Node) -> Dims:
    """[n, k] x [k, m] plus a broadcast term."""
    left, right = ctx.of(node.args[1]), ctx.of(node.args[2])
    ctx.unify(node, left[-1], right[0])
    return [left[0], right[1]]


def matmul(ctx: Context, node: Node) -> Dims:
    """Batched matrix product with broadcast leading dimensions."""
    left, right = ctx.of(node.args[0]), ctx.of(node.args[1])
    if len(left) == 1 or len(right) == 1:
        ctx.unify(node, left[-1], right[-2] if len(right) > 1 else right[0])
        return [*left[:-1], *(right[:-2] if len(right) > 1 else []), *(right[-1:] if len(right) > 1 else [])]
    ctx.unify(node, left[-1], right[-2])
    rank = max(len(left), len(right)) - 2
    batch: Dims = []
    for offset in range(rank, 0, -1):
        pair = [dims[-2 - offset] for dims in (left, right) if len(dims) >= 2 + offset]
        pair = [dim for dim in pair if dim] or [()]
        for other in pair[1:]:
            ctx.unify(node, pair[0], other)
        batch.append(pair[0])
    return [*batch, left[-2], right[-1]]


def attention(ctx: Context, node: Node) -> Dims:
    """Fused attention: key tokens align with value tokens, mask rows with queries, mask columns with keys."""
    query, key, value = (ctx.of(a) for a in node.args[:3])
    ctx.unify(node, query[-1], key[-1])
    ctx.unify(node, key[-2], value[-2])
    for position in range(len(query) - 2):
        if same(product(query[position]), product(key[position])):
            ctx.unify(node, query[position], key[position])
        ctx.unify(node, key[position], value[position])
    mask = ctx.of(arg(node, 3, "attn_mask"))
    if node.target is not aten.scaled_dot_product_attention.default:  # the two-dimensional padding mask
        ctx.unify(node, mask[0], query[0])
        if mask and same(product(mask[-1]), product(key[-2])):
            ctx.unify(node, mask[-1], key[-2])
    elif mask:
        ctx.unify(node, mask[-1], key[-2])
        if len(mask) > 1:
            ctx.unify(node, mask[-2], query[-2])
        if len(mask) > 3:
            ctx.unify(node, mask[0], query[0])
    return [*query[:-1], value[-1]]


def transpose(ctx: Context, node: Node) -> Dims:
    """Swap two dimensions."""
    dims = list(ctx.of(node.args[0]))
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        one, two = (-2, -1) if len(dims) > 1 else (0, 0)
    else:
        one, two = node.args[1], node.args[2]
    dims[one], dims[two] = dims[two], dims[one]
    return dims


def permute(ctx: Context, node: Node) -> Dims:
    """Reorder dimensions."""
    dims = ctx.of(node.args[0])
    return [dims[i] for i in node.args[1]]


def unsqueeze(ctx: Context, node: Node) -> Dims:
    """Insert a dimension of size 1."""
    dims = list(ctx.of(node.args[0]))
    dims.insert(wrap(node.args[1], len(dims) + 1), ())
    return dims


def squeeze(ctx: Context, node: Node) -> Dims:
    """Remove dimensions of size 1."""
    dims = ctx.of(node.args[0])
    which = arg(node, 1, "dim")
    rank = len(dims)
    chosen = range(rank) if which is None else [wrap(d, rank) for d in ([which] if isinstance(which, int) else which)]
    return [dim for i, dim in enumerate(dims) if not (i in chosen and same(product(dim), 1))]


def select(ctx: Context, node: Node) -> Dims:
    """Take one index of a dimension."""
    dims = list(ctx.of(node.args[0]))
    del dims[node.args[1]]
    return dims


def slice_(ctx: Context, node: Node) -> Dims:
    """Take a range of a dimension: a whole segment of a concatenation is known by its own atom."""
    dims = list(ctx.of(node.args[0]))
    where = wrap(arg(node, 1, "dim", 0), len(dims))
    start, end, step = (_bound(arg(node, i, name)) for i, name in ((2, "start"), (3, "end"), (4, "step")))
    dims[where] = sub_range(dims[where], start, end, 1 if step is None else step, shape(node)[where])
    return dims


def _bound(value: Any) -> Any:
    """A bound of a range as an int or expression; None for an open one."""
    value = value.meta["val"] if isinstance(value, Node) else value
    return None if value is None else size_of(value)


def sub_range(dim: Dim, start: Any, end: Any, step: Any, size: Any) -> Dim:
    """Dimension of `[start:end:step]` of a dimension, given the size of the result."""
    dim = resolve(dim)
    if same(product(dim), size):
        return dim
    if len(dim) != 1 or step != 1 or not isinstance(start or 0, int):
        return fresh(size)
    atom, start = dim[0], start or 0
    end = None if end is None or (isinstance(end, int) and end >= MAX) else end
    segment = _segment(atom, start, end)
    if segment is not None:
        return segment
    key = (start, end if isinstance(end, int) or end is None else str(end))
    if key not in atom.slices:
        made = fresh(size)
        if not made:
            return ()
        atom.slices[key] = made[0]
    return (atom.slices[key],)


def _segment(atom: Atom, start: int, end: Any) -> Dim | None:
    if atom.segments is None:
        return None
    sizes = [product(s) for s in atom.segments]
    offset = 0
    for index, size in enumerate(sizes):
        if not isinstance(offset, int):
            return None
        last = index == len(sizes) - 1
        if offset == start and ((end is None and last) or (end is not None and same(offset + size, end))):
            return resolve(atom.segments[index])
        offset = offset + size
    return None


def cat(ctx: Context, node: Node) -> Dims:
    """Concatenate: other dimensions align; the joined one remembers its segments."""
    values = [v for v in node.args[0] if not _legacy_empty(v)]
    where = wrap(arg(node, 1, "dim", 0), len(ctx.of(values[0])))
    out = list(ctx.of(values[0]))
    for value in values[1:]:
        for position, dim in enumerate(ctx.of(value)):
            if position != where:
                ctx.unify(node, out[position], dim)
                out[position] = out[position] or dim
    if len(values) > 1:
        out[where] = _joined([ctx.of(v)[where] for v in values], shape(node)[where])
    return out


def _joined(dims: list[Dim], size: Any) -> Dim:
    first = resolve(dims[0])
    if first and all(resolve(d) == first for d in dims):  # n pieces with the same axis: an outer count and that axis
        return (Atom(len(dims)), *first)
    made = fresh(size)
    if made:
        made[0].segments = tuple(dims)
    return made


def _legacy_empty(value: Node) -> bool:
    return tuple(value.meta["val"].shape) == (0,)


def stack(ctx: Context, node: Node) -> Dims:
    """Stack along a new dimension."""
    values = list(node.args[0])
    dims = list(ctx.of(values[0]))
    for value in values[1:]:
        for one, other in zip(dims, ctx.of(value), strict=True):
            ctx.unify(node, one, other)
    dims.insert(wrap(arg(node, 1, "dim", 0), len(dims) + 1), fresh(len(values)))
    return dims


def pieces(ctx: Context, node: Node) -> list[Dims]:
    """split, chunk and unbind: one list of dimensions per result."""
    dims = ctx.of(node.args[0])
    unbind = node.target is aten.unbind.int
    where = wrap(arg(node, 1 if unbind else 2, "dim", 0), len(dims))
    if unbind:
        return [[*dims[:where], *dims[where + 1 :]] for _ in node.meta["val"]]
    out, offset = [], 0
    whole = resolve(dims[where])
    for value in node.meta["val"]:
        size = size_of(value.shape[where])
        inner = whole[1:] if len(whole) > 1 and same(product(whole[1:]), size) else None
        piece = inner or sub_range(whole, offset, offset + size, 1, size)
        out.append([*dims[:where], piece, *dims[where + 1 :]])
        offset = offset + size
    return out


def getitem(ctx: Context, node: Node) -> Dims:
    """Take one result of an operator with several."""
    return list(ctx.dims[node.args[0]][node.args[1]])


def expand(ctx: Context, node: Node) -> Dims:
    """Broadcast dimensions of size 1 to given sizes."""
    sizes = shape(node)
    dims = ctx.of(node.args[0])
    dims = [()] * (len(sizes) - len(dims)) + list(dims)
    return [dim or fresh(size) for dim, size in zip(dims, sizes, strict=True)]


def reduce(ctx: Context, node: Node) -> Dims:
    """Reductions over some dimensions or all."""
    dims = list(ctx.of(node.args[0]))
    which = arg(node, 1, "dim")
    keep = arg(node, 2, "keepdim", False)
    if isinstance(which, bool) or not isinstance(which, (int, Sequence)):
        which = []
    gone = {wrap(d, len(dims)) for d in ([which] if isinstance(which, int) else which)} or set(range(len(dims)))
    if len(shape(node)) == len(dims):
        keep = True
    return [() if i in gone else dim for i, dim in enumerate(dims) if keep or i not in gone]


def embedding(ctx: Context, node: Node) -> Dims:
    """Look rows of a table up."""
    return [*ctx.of(node.args[1]), ctx.of(node.args[0])[-1]]


def index(ctx: Context, node: Node) -> Dims:
    """Advanced indexing with index tensors that stand side by side."""
    dims, indices = ctx.of(node.args[0]), list(node.args[1])
    used = [i for i, value in enumerate(indices) if value is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return [fresh(s) for s in shape(node)]
    rank = max(len(ctx.of(indices[i])) for i in used)
    middle: Dims = [()] * rank
    for i in used:
        for offset, dim in enumerate(reversed(ctx.of(indices[i])), 1):
            if dim and middle[-offset]:
                ctx.unify(node, middle[-offset], dim)
            middle[-offset] = middle[-offset] or dim
    return [*dims[: used[0]], *middle, *dims[used[-1] + 1 :]]


def like_index(ctx: Context, node: Node) -> Dims:
    """gather: the result has the dimensions of the index."""
    return list(ctx.of(node.args[2]))


def source(ctx: Context, node: Node) -> Dims:
    """Operators that make a value from sizes alone."""
    return [fresh(s) for s in shape(node)]


def conv(ctx: Context, node: Node) -> Dims:
    """Convolutions: the batch goes through, the output channels are the filter's."""
    sizes = shape(node)
    lead = len(sizes) - (len(ctx.of(node.args[1])) - 2) - 1
    return [*ctx.of(node.args[0])[:lead], ctx.of(node.args[1])[0], *(fresh(s) for s in sizes[lead + 1 :])]


def masked_scatter(ctx: Context, node: Node) -> Dims:
    """The splice: the mask aligns with the target, the inserted rows with neither."""
    dims = list(ctx.of(node.args[0]))
    for one, other in zip(reversed(dims), reversed(ctx.of(node.args[1])), strict=False):
        ctx.unify(node, one, other)
    return dims


def gather_tokens(ctx: Context, node: Node) -> Dims:
    """tokred::gather_tokens: one dimension becomes that of the token map."""
    value, chosen, where, batch = node.args[:4]
    dims = list(ctx.of(value))
    dims[where] = ctx.of(chosen)[1]
    if batch != where:
        ctx.unify(node, dims[batch], ctx.of(chosen)[0])
        dims[batch] = dims[batch] or ctx.of(chosen)[0]
    return dims


def kept_indices(ctx: Context, node: Node) -> Dims:
    """tokred::kept_indices: a new axis that remembers the axis it was cut from."""
    batch, old = ctx.of(node.args[0])
    made = fresh(shape(node)[1])
    if made:
        made[0].origin, made[0].via = resolve(old), node
    return [batch, made]


def received(ctx: Context, node: Node) -> Dims:
    """tokred::attention_received and attention_row: one number per key."""
    key = ctx.of(node.args[1])
    return [key[0], key[-2]]


def leading(count: int) -> Callable[[Context, Node], Dims]:
    """Operators that keep only the first dimensions of their first argument."""
    return lambda ctx, node: list(ctx.of(node.args[0])[:count])


RULES: dict[Any, Callable[[Context, Node], Any]] = {operator.getitem: getitem}


def _register(rule: Callable[[Context, Node], Any], *names: str) -> None:
    for name in names:
        packet, _, overload = name.partition(".")
        found = getattr(aten, packet, None)
        for each in [overload] if overload else found.overloads() if found else []:
            RULES[getattr(found, each)] = rule


_register(
    pointwise,
    "where",
    "masked_fill",
    "dropout",
    "clamp",
    "pow",
    "add",
    "sub",
    "mul",
    "div",
    "bitwise_not",
    "__and__",
    "__or__",
    "__xor__",
    "rsub",
    "lerp",
    "floor_divide",
    "remainder",
    "maximum",
    "minimum",
)
_register(
    like_first,
    "to",
    "alias",
    "detach",
    "detach_",
    "clone",
    "contiguous",
    "lift_fresh_copy",
    "_to_copy",
    "softmax",
    "_softmax",
    "log_softmax",
    "cumsum",
    "triu",
    "tril",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "flip",
    "roll",
    "type_as",
    "float",
    "argsort",
    "softplus",
    "alpha_dropout",
    "feature_dropout",
    "normal_",
    "_unsafe_masked_index",
    "gelu",
    "silu",
    "relu",
    "tanh",
    "sigmoid",
    "scatter",
    "index_fill",
    "fill",
)
_register(norm, "layer_norm", "rms_norm", "native_layer_norm.default")
_register(view, "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
_register(linear, "linear")
_register(addmm, "addmm")
_register(matmul, "matmul", "bmm", "mm")
_register(attention, "scaled_dot_product_attention")
_register(transpose, "transpose", "t", "mT", "numpy_T", "swapaxes")
_register(permute, "permute")
_register(unsqueeze, "unsqueeze")
_register(squeeze, "squeeze")
_register(select, "select.int")
_register(slice_, "slice.Tensor")
_register(cat, "cat", "concat")
_register(stack, "stack")
_register(pieces, "split", "split_with_sizes", "chunk", "unbind")
_register(expand, "expand")
_register(reduce, "sum", "mean", "amax", "amin", "any", "all", "prod", "argmax", "argmin", "var", "std", "logsumexp")
_register(embedding, "embedding")
_register(index, "index.Tensor")
_register(like_index, "gather")
_register(
    source,
    "arange",
    "full",
    "zeros",
    "ones",
    "empty",
    "rand",
    "randn",
    "scalar_tensor",
    "eye",
    "linspace",
    "new_ones",
    "new_zeros",
    "new_full",
    "new_empty",
)
_register(conv, "conv1d", "conv2d", "conv3d", "convolution.default")
_register(masked_scatter, "masked_scatter")

OURS: dict[str, Callable[[Context, Node], Any]] = {
    "gather_tokens": gather_tokens,
    "kept_indices": kept_indices,
    "attention_received": received,
    "attention_row": received,
    "attention": attention,
    "topk_mask": pointwise,
    "dilate": like_first,
    "random_scores": like_first,
    "last_valid": leading(1),
    "token_norm": leading(2),
    "token_cosine": leading(2),
    "fill_mask": pointwise,
    "splice_values": like_first,
}
