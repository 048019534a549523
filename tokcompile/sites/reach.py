"""Reachability in a graph, as one bit set per node: cheap enough to ask for every site of an 80-layer model."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator

from torch.fx import Graph, Node


class Reach:
    """Order and ancestry of the nodes of a graph at one moment."""

    def __init__(self, graph: Graph) -> None:
        self.order: dict[Node, int] = {node: i for i, node in enumerate(graph.nodes)}
        self._above: dict[Node, int] = {}
        for node, position in self.order.items():
            bits = 1 << position
            for parent in node.all_input_nodes:
                bits |= self._above[parent]
            self._above[node] = bits

    def above(self, ancestor: Node, node: Node) -> bool:
        """Whether `ancestor` is `node` or one of its ancestors."""
        return bool(self._above[node] >> self.order[ancestor] & 1)

    def ancestors(self, nodes: Iterable[Node]) -> set[Node]:
        """The nodes and all their ancestors."""
        bits = 0
        for node in nodes:
            bits |= self._above[node]
        return {node for node, i in self.order.items() if bits >> i & 1}

    def any_above(self, node: Node, candidates: Iterable[Node]) -> bool:
        """Whether any of the candidates is an ancestor of the node."""
        bits = self._above[node]
        return any(bits >> self.order[c] & 1 for c in candidates)

    def forward(self, start: Node, stop: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
        """Walk the descendants of a node in graph order; users of a node for which `stop` holds are not visited."""
        queue, seen = [(self.order[start], start)], {start}
        while queue:
            _, node = heapq.heappop(queue)
            yield node
            if stop(node):
                continue
            for user in node.users:
                if user not in seen:
                    seen.add(user)
                    heapq.heappush(queue, (self.order[user], user))
