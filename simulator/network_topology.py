"""Where the ranks of a group lie on a cluster: nodes, shares of a mesh, groups that do not tile.

Groups of n ranks, `stride` apart, fill blocks of n * stride places; the blocks tile the cluster
where their length divides it. On a switch a rank has its whole bandwidth for any partner. In a
mesh of point-to-point links it has those to its own group only: of c_ij links between i and j,

    share = min over groups, over members i of  sum over members j of c_ij / links of i

A group that no link joins goes over PCI Express.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

import numpy as np

from hwmodels.cluster import Cluster, LinkLevel
from hwmodels.errors import InputError
from workloads.axis_order import Lattice, Spacing
from workloads.numeric import Num, is_scalar

COMPLETE: Final = ("fully_connected", "fully_connected_direct")
"""Topologies in which every pair of a level has the same links."""
LINK_COUNTS: Final = "link_counts"
"""Fact of a cluster (`Cluster.extra`): links between each two accelerators of a node."""
PCIE: Final = "pcie"


def mesh_frac(on: Cluster, level: LinkLevel, num_ranks: Num, stride: Spacing) -> Num:
    """Share of an accelerator's links of a level that lead to others of its group; 1 on a switch.

    `num_ranks` ranks of the group lie inside one group of the level, `stride` apart.

    >>> from hwmodels import catalog
    >>> node = catalog.cluster("mi300x-8")
    >>> [round(mesh_frac(node, node.levels[0], n, 1), 3) for n in (2, 4, 8)]
    [0.143, 0.429, 1.0]
    """
    counts = _link_counts(on, level)
    if counts is None:
        return 1.0
    least = _pcie_frac(on, level)
    if isinstance(stride, Lattice):
        return _lattice_frac(counts, num_ranks, stride, least)
    table = _shares(counts)
    if is_scalar(num_ranks, stride):
        return max(table.get((int(num_ranks), int(stride)), 1.0), least)
    members, apart = np.broadcast_arrays(np.asarray(num_ranks), np.asarray(stride))
    found = [
        table.get((int(n), int(s)), 1.0) for n, s in zip(members.flat, apart.flat, strict=True)
    ]
    shares: Num = np.maximum(np.array(found).reshape(members.shape), least)
    return shares


def _lattice_frac(
    counts: tuple[tuple[int, ...], ...], num_ranks: Num, lattice: Lattice, least: float
) -> Num:
    fields = np.broadcast_arrays(
        *(np.asarray(x) for x in (num_ranks, lattice.near, lattice.inner, lattice.far))
    )
    found = [
        _run_share(counts, *(int(x) for x in one))
        for one in zip(*(f.flat for f in fields), strict=True)
    ]
    if is_scalar(num_ranks, lattice.near, lattice.inner, lattice.far):
        return max(found[0], least)
    shares: Num = np.maximum(np.array(found).reshape(fields[0].shape), least)
    return shares


@lru_cache(maxsize=4096)
def _run_share(
    counts: tuple[tuple[int, ...], ...], num_ranks: int, near: int, inner: int, far: int
) -> float:
    return _least_share(counts, _members_of(len(counts), num_ranks, near, inner, far))


def check_tiles(on: Cluster, num_ranks: int, stride: int = 1) -> None:
    """Refuse groups that do not tile the cluster."""
    total = on.num_accelerators
    if num_ranks * stride > total or total % (num_ranks * stride):
        raise InputError(
            f"groups of {num_ranks} ranks, {stride} apart, do not tile the {total} accelerators of "
            f"{on.id}: ranks times stride must divide them; change one of them, or the nodes"
        )


def _link_counts(on: Cluster, level: LinkLevel) -> tuple[tuple[int, ...], ...] | None:
    """Links between each two accelerators of a mesh; None where a switch joins them all."""
    if not math.isfinite(level.size):
        return None
    size = int(level.size)
    if level.topology in COMPLETE:
        return tuple(tuple(int(i != j) for j in range(size)) for i in range(size))
    stated = on.extra.get(LINK_COUNTS) if level is on.levels[0] else None
    if not isinstance(stated, Sequence):
        return None
    return tuple(tuple(int(c) for c in row) for row in stated)


@lru_cache(maxsize=32)
def _shares(counts: tuple[tuple[int, ...], ...]) -> Mapping[tuple[int, int], float]:
    """(ranks, stride) -> the least share of its links that any rank has in its group."""
    size = len(counts)
    return {
        (n, stride): _least_share(counts, _members_of(size, n, stride, n, n * stride))
        for stride in range(1, size)
        for n in range(2, size // stride + 1)
    }


def _members_of(
    size: int, num_ranks: int, near: int, inner: int, far: int
) -> tuple[tuple[int, ...], ...]:
    """Every whole group among `size` places: runs of `inner` ranks `near` apart, `far` apart."""
    inner = min(inner, num_ranks)
    runs, length = max(num_ranks // inner, 1), near * inner
    if runs == 1:
        far = length
    return tuple(
        tuple(block + gap + start + run * far + i * near for run in range(runs)
              for i in range(inner))
        for block in range(0, size - runs * far + 1, runs * far)
        for gap in range(0, far, length)
        for start in range(near)
    )  # fmt: skip


def _least_share(counts: tuple[tuple[int, ...], ...], groups: tuple[tuple[int, ...], ...]) -> float:
    """The least share of its links that a rank has in its group; 1 where there is no group."""
    links = [sum(row) for row in counts]
    shares = [
        sum(counts[i][j] for j in group) / links[i]
        for group in groups if len(group) > 1 for i in group
    ]  # fmt: skip
    return min(shares, default=1.0)


def _pcie_frac(on: Cluster, level: LinkLevel) -> float:
    """What PCI Express is of the level's bandwidth: the way of those that no link joins."""
    ways = [x.bytes_per_s for x in on.side_levels if x.name == PCIE] or [
        x.bytes_per_s for x in on.device.links if x.name == PCIE
    ]
    return max(ways, default=0.0) / level.bytes_per_s


def node_size(on: Cluster) -> float:
    """Accelerators that one collective kernel of a node spans: a node, or a wider link domain."""
    return max(on.levels[0].size, on.accelerators_per_node)


def one_hop_s(on: Cluster, levels: Sequence[LinkLevel]) -> float:
    """The longest published latency of the levels; 0 where none is."""
    return max((x.latency_s or 0.0 for x in levels), default=0.0)
