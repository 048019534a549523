"""Apply a token map to a stretch of a graph: fewer tokens go in, and as many as before come out again."""

from __future__ import annotations

from torch.fx import Node

from tokcompile.editing.tokenmap import TokenMap
from tokcompile.editing.transport import Transport
from tokcompile.errors import EditError
from tokcompile.program import place
from tokcompile.sites.reach import Reach


def apply_within(transport: Transport, start: Node, end: Node, token_map: TokenMap, content: Node) -> None:
    """Let what leads from one value to another see the new tokens alone.

    The caller brings the result back to the old axis: the readers of `end` must not see it as it is.

    Args:
        start: the value before the stretch; readers that do not lead to `end` keep it.
        end: the last value that holds new tokens.
        content: what stands in the place of `start` within the stretch.

    Raises:
        EditError: a value within the stretch is read from outside, or cannot follow.
    """
    reach = Reach(transport.editor.program.graph)
    for user in list(start.users):
        if user not in transport.editor.made and reach.above(user, end):
            transport.editor.swap_input(user, start, content)
    transport.mark(content, token_map, transport.axes.of(start))
    transport.walk(content, end)
    last = reach.order[end]
    for node in list(transport.edited):
        outside = [u for u in node.users if reach.order.get(u, -1) > last]
        if node is not end and outside:
            raise EditError(
                "a value within an attention is read from outside of it",
                where=[place(outside[0])],
                found=f"'{node.name}' {tuple(node.meta['val'].shape)}",
                remedy="call the model without asking for attention weights",
            )
