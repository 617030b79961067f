"""A DAG of named ops: what runs, how often, and what waits for what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workloads.numeric import Num
from workloads.op import Op
from workloads.work import Work

if TYPE_CHECKING:
    import networkx as nx

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One op in a workload: `count` times the same op, in one `phase`, belonging to one `part`.

    `part` groups nodes for reports: 'attention', 'mlp', 'moe', 'norm', 'embedding', 'head'.
    """

    name: str
    op: Op
    part: str
    phase: str = FORWARD
    count: Num = 1
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """Named ops with their dependencies; the order of `nodes` is a valid execution order."""

    nodes: tuple[Node, ...]
    name: str = ""
    _index: dict[str, Node] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index: dict[str, Node] = {}
        for node in self.nodes:
            missing = [a for a in node.after if a not in index]
            if missing:
                raise ValueError(f"{node.name} waits for {missing[0]}, which does not precede it")
            if node.name in index:
                raise ValueError(f"two nodes are called {node.name}")
            index[node.name] = node
        object.__setattr__(self, "_index", index)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, name: str) -> Node:
        return self._index[name]

    def select(self, *, phase: str | None = None, part: str | None = None) -> tuple[Node, ...]:
        """The nodes of one phase and/or one part, in order."""
        return tuple(n for n in self.nodes if phase in (None, n.phase) and part in (None, n.part))

    def work(self, fast_bytes: Num) -> Work:
        """All nodes' counts added up, each tiled for the same fast memory."""
        total = Work(launches=0)
        for node in self.nodes:
            total = total + node.op.work(fast_bytes).times(node.count)
        return total

    @property
    def graph(self) -> nx.DiGraph[str]:
        """The DAG as networkx: node attributes `op`, `count`, `phase`, `part`."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph(name=self.name)
        for n in self.nodes:
            graph.add_node(n.name, op=n.op, count=n.count, phase=n.phase, part=n.part)
            graph.add_edges_from((a, n.name) for a in n.after)
        return graph


def chain(name: str, nodes: Iterable[Node]) -> Workload:
    """A workload whose nodes without `after` wait for the node before them."""
    linked: list[Node] = []
    for node in nodes:
        after = node.after or ((linked[-1].name,) if linked else ())
        linked.append(
            Node(
                name=node.name,
                op=node.op,
                part=node.part,
                phase=node.phase,
                count=node.count,
                after=after,
            )
        )
    return Workload(tuple(linked), name)
