"""Grids as directed acyclic graphs, and what a recurrence on the edges of one costs step by step.

A linear recurrence on the line graph of a DAG (pLSTM, Poeppel et al. 2025, arXiv 2506.11997,
section 3) keeps a matrix state on every edge. An edge takes in the states of the edges that lead
to its first node, one transition for each, that is for each edge of the line graph; a node adds to
the edges that leave it (source) and reads those that enter it (mark).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx

RIGHT, DOWN = "right", "down"


@dataclass(frozen=True, slots=True)
class Traversal:
    """What a pass over a graph in topological order does.

    `num_transitions` are pairs of edges that follow each other, `depth` the nodes of the longest
    path: those steps wait for each other, whatever runs beside them.
    """

    num_nodes: int
    num_edges: int
    num_transitions: int
    depth: int

    def flops(self, key_dim: int, value_dim: int) -> int:
        """Of states of key_dim x value_dim, each of its numbers: 2 flops a transition; 2 a source
        and 2 a mark of every edge; 5 a node for k v^T, for taking it in directly, for the query.

        >>> traversal(grid_graph(2, 2)).flops(1, 1)  # 2 transitions, 4 edges, 4 nodes
        40
        """
        states = 2 * (self.num_transitions + 2 * self.num_edges)
        return key_dim * value_dim * (states + 5 * self.num_nodes)


def grid_graph(width: int, height: int = 1) -> nx.DiGraph:
    """Nodes (row, column), an edge to the right and one down; `direction` tells which.

    >>> sorted(grid_graph(2, 2).edges)
    [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 1)), ((1, 0), (1, 1))]
    """
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from((y, x) for y in range(height) for x in range(width))
    for y, x in list(graph.nodes):
        if x + 1 < width:
            graph.add_edge((y, x), (y, x + 1), direction=RIGHT)
        if y + 1 < height:
            graph.add_edge((y, x), (y + 1, x), direction=DOWN)
    return graph


def traversal(graph: nx.DiGraph) -> Traversal:
    """Counts of any directed acyclic graph.

    >>> traversal(grid_graph(4, 3))
    Traversal(num_nodes=12, num_edges=17, num_transitions=22, depth=6)
    """
    import networkx as nx

    return Traversal(
        num_nodes=graph.number_of_nodes(),
        num_edges=graph.number_of_edges(),
        num_transitions=nx.line_graph(graph).number_of_edges(),
        depth=nx.dag_longest_path_length(graph, weight=None) + 1,
    )
