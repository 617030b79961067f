"""Many accelerators: link levels from the inside out, as data and as a networkx graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hwmodels.device import Device
from hwmodels.errors import UnsupportedError
from hwmodels.frozen import FrozenDict

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLevel:
    """One level of links: groups of `size` accelerators (math.inf: the rest of the cluster).

    `bytes_per_s` is per direction per accelerator. `nics_per_node` and `bytes_per_s_per_node`
    are given at the level that leaves the node. `in_network_reduction` says that switches of
    this level can reduce (NVLink SHARP). `latency_s` is a one-hop alpha; None: unpublished.
    """

    name: str
    topology: str
    size: float
    bytes_per_s: float
    latency_s: float | None = None
    links_per_accelerator: int | None = None
    nics_per_node: int | None = None
    bytes_per_s_per_node: float | None = None
    oversubscription: float = 1.0
    in_network_reduction: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`num_nodes` nodes of `accelerators_per_node` devices.

    `levels` are the levels collectives use, innermost first, each wider than the one before;
    `side_levels` (PCIe to the host, C2C) carry other traffic; `host_memory_bytes` is what the hosts
    of a node have, None where no vendor's figure belongs to the system. `measured` holds published
    collective measurements (bus bandwidths), each with its `kind` and `source`; `extra` holds
    facts that no model field carries (switch counts, torus shapes).
    """

    id: str
    name: str
    device: Device
    accelerators_per_node: int
    num_nodes: int
    levels: tuple[LinkLevel, ...]
    sources: Mapping[str, str]
    side_levels: tuple[LinkLevel, ...] = ()
    measured: tuple[Mapping[str, object], ...] = ()
    doubts: tuple[str, ...] = ()
    max_accelerators: int | None = None
    host_memory_bytes: float | None = None
    extra: Mapping[str, object] = field(default_factory=FrozenDict)

    @property
    def num_accelerators(self) -> int:
        """All accelerators of the cluster."""
        return self.num_nodes * self.accelerators_per_node

    def level_spanning(self, num_ranks: int) -> LinkLevel:
        """The innermost level whose groups hold `num_ranks` consecutive ranks."""
        for level in self.levels:
            if num_ranks <= level.size:
                return level
        widest = self.levels[-1]
        raise UnsupportedError(
            f"{self.id} has no link level for {num_ranks} accelerators; "
            f"its widest, {widest.name}, joins {widest.size:g}"
        )

    @property
    def graph(self) -> nx.DiGraph[str]:
        """Link levels as a graph: 'accelerator' -> level -> wider level.

        Edges carry `bytes_per_s`, `latency_s` and `group_size`. Side levels hang off
        'accelerator'. All accelerators are alike, so one stands for all of them.
        """
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph(cluster=self.id, num_accelerators=self.num_accelerators)
        graph.add_node("accelerator", device=self.device.id, group_size=1)
        inner = "accelerator"
        for level in self.levels:
            self._join(graph, inner, level)
            inner = level.name
        for level in self.side_levels:
            self._join(graph, "accelerator", level)
        return graph

    def _join(self, graph: nx.DiGraph[str], inner: str, level: LinkLevel) -> None:
        size = int(min(level.size, self.num_accelerators))
        graph.add_node(level.name, group_size=size, topology=level.topology)
        graph.add_edge(
            inner,
            level.name,
            bytes_per_s=level.bytes_per_s,
            latency_s=level.latency_s,
            group_size=size,
        )
