"""Seconds of one collective on a cluster of link levels: the bandwidth bound with known latencies.

A group of n ranks, `stride` ranks apart, has m_i = gcd(n, size_i / stride) members inside one
group of level i (min of the two where one divides the other; a group that straddles is as slow as
its worst part), so k_i = m_i / m_(i-1) parties meet at level i. A group that another axis cuts
(`workloads.axis_order.Lattice`) has the members of a run times its runs where whole runs are
inside. All-reduce, all-gather, reduce-scatter and broadcast run hierarchically: level i handles a
1 / m_(i-1) share of the buffer between k_i parties, every accelerator on its own link. All-to-all
is flat: level i carries what is addressed beyond level i-1. Send-receive shifts a ring: each rank
sends to the next, so that some rank's buffer crosses every level the ring spans. Levels work at the
same time in `lower_s` and one after another in `upper_s`; what a rank sends to a wider network
level passes its port, so that it counts at the narrower ones as well (one port: leaf and spine do
not add up to two). A hop costs the level's `latency_s` where one is published and nothing where
none is. Protocols, chunking and contention are ignored: links run at wire rate.

A level's bandwidth is each rank's own: all groups of a plan communicate at the same time, so that
whole nodes have all ports of their nodes, and a group with one rank a node has that rank's. In a
mesh of point-to-point links a group has those among its members (`network_topology.mesh_frac`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from hwmodels.cluster import Cluster, LinkLevel
from hwmodels.errors import UnsupportedError
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from simulator.network_topology import mesh_frac, node_size, one_hop_s
from workloads.axis_order import Lattice, Spacing, apart_of, span_of
from workloads.numeric import (
    Condition,
    Num,
    any_true,
    ceil_div,
    is_scalar,
    maximum,
    minimum,
    where,
)
from workloads.ops.collective import Collective
from workloads.ops.collective_transfer import (
    KINDS,
    ClusterCollective,
    CollectiveTransfer,
    StagedCollective,
)

LIBRARY: Final = "nccl"
"""Label of the communication library's kernels."""
STAGED: Final = "host memory"
"""How the topology of a level says that messages go through the host's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveEstimate:
    """Seconds of a collective by link level; broadcasts over the collective's arrays.

    `passing_s`: what a network level carries besides, on its way to wider levels.
    """

    seconds_by_level: Mapping[str, Num]
    passing_s: Mapping[str, Num] = field(default_factory=dict)

    @property
    def lower_s(self) -> Num:
        """All levels busy at once: the slowest one."""
        longest: Num = 0.0
        for name, t in self.seconds_by_level.items():
            longest = maximum(longest, t + self.passing_s.get(name, 0.0))
        return longest

    @property
    def upper_s(self) -> Num:
        """One level after another."""
        return sum(self.seconds_by_level.values(), start=0.0)

    @property
    def seconds(self) -> Num:
        """The rung's answer; on the bound rung, `lower_s`."""
        return self.lower_s


def estimate_collective(
    collective: Collective, *, on: Cluster, stride: Spacing = 1
) -> CollectiveEstimate:
    """Bound-rung seconds of `collective` over ranks that lie `stride` apart on `on`.

    >>> from hwmodels import catalog
    >>> node = catalog.cluster("dgx-a100-80gb")
    >>> ring = Collective(kind="all_reduce", num_bytes=2**30, num_ranks=8)
    >>> round(estimate_collective(ring, on=node).lower_s * 1e3, 2)  # 2 * 7/8 * 2**30 / 300e9
    6.26
    """
    span, widest = span_of(collective.num_ranks, stride), on.levels[-1]
    if any_true(np.greater(span, widest.size) & np.greater(collective.num_ranks, 1)):
        raise UnsupportedError(
            f"{on.id} joins {widest.size:g} accelerators at its widest level, {widest.name}; "
            f"{collective.kind} spans {float(np.max(span)):g}"
        )
    loads: list[_Load] = []
    inside: Num = 1
    for index, level in enumerate(on.levels):
        last = index == len(on.levels) - 1
        n = collective.num_ranks
        alone = last or on.num_accelerators <= level.size
        members = n if alone else members_in(n, level.size, stride)
        share = mesh_frac(on, level, members, stride) if index == 0 else 1.0
        loads.append(_load(collective, level, inside, members, share))
        inside = members
    return CollectiveEstimate(
        seconds_by_level={
            level.name: load.seconds for level, load in zip(on.levels, loads, strict=True)
        },
        passing_s=_passing(collective, loads, on),
    )


def _passing(collective: Collective, loads: Sequence[_Load], on: Cluster) -> dict[str, Num]:
    """Seconds of every network level for what only passes it, to and from wider ones.

    A rank has one port for all of them. A rank's send goes one way: it is counted where it crosses.
    """
    found: dict[str, Num] = {}
    wider: Num = 0.0
    for level, load in reversed(list(zip(on.levels, loads, strict=True))):
        if level.size <= node_size(on) or collective.kind == "send_recv":
            break
        if not is_scalar(wider) or wider:
            found[level.name] = wider / load.bytes_per_s
        wider = wider + load.wire_bytes
    return found


def bound_seconds(collective: Collective, *, on: Cluster, stride: Spacing = 1) -> Num:
    """The rung's answer of `estimate_collective`."""
    return estimate_collective(collective, on=on, stride=stride).lower_s


def calibrated_seconds(collective: Collective, *, on: Cluster, stride: Spacing = 1) -> Num:
    """Seconds as the communication library takes them: on one node, or over several.

    Kinds and devices that no model knows are at the bound, which nothing between nodes beats.
    """
    bound = bound_seconds(collective, on=on, stride=stride)
    n = collective.num_ranks
    if collective.kind not in KINDS or not any_true(np.greater(n, 1)):
        return bound
    inside = np.less_equal(span_of(n, stride), node_size(on))
    try:
        seconds = _predicted(on_node(collective, on=on, stride=stride), on)
        if not np.all(inside):
            far = _predicted(over_nodes(collective, on=on, stride=stride), on)
            seconds = where(inside, seconds, maximum(far, bound))
    except UnsupportedError:
        return bound
    return where(np.greater(n, 1), seconds, 0.0)


def on_node(collective: Collective, *, on: Cluster, stride: Spacing = 1) -> CollectiveTransfer:
    """The collective as an op of one node; two ranks stand for groups that leave it."""
    n = collective.num_ranks
    inside = np.less_equal(span_of(n, stride), node_size(on)) & np.greater(n, 1)
    ranks, apart = where(inside, n, 2), where(inside, apart_of(n, stride), 1)
    share = mesh_frac(on, on.levels[0], ranks, _where_inside(inside, stride))
    return CollectiveTransfer(
        kind=collective.kind,
        num_bytes=ceil_div(maximum(collective.num_bytes, 1), 1),
        num_ranks=ranks,
        stride=apart,
        mesh_frac=share,
    )


def over_nodes(collective: Collective, *, on: Cluster, stride: Spacing = 1) -> ClusterCollective:
    """The collective as an op of several nodes; one over two stands for groups inside one."""
    n, size = collective.num_ranks, node_size(on)
    away = np.greater(span_of(n, stride), size)
    each = where(away, members_in(n, size, stride), 1)
    ranks = where(away, n, 2)
    crossed = [x for x in on.levels if x.size > size]
    ports = [x.bytes_per_s / x.oversubscription for x in crossed]
    staged = any(STAGED in x.topology for x in crossed)
    return (StagedCollective if staged else ClusterCollective)(
        kind=collective.kind,
        num_bytes=ceil_div(maximum(collective.num_bytes, 1), 1),
        num_ranks=ranks,
        num_nodes=ranks / each,
        stride=where(away & np.greater(each, 1), apart_of(each, stride), 1),
        mesh_frac=mesh_frac(on, on.levels[0], each, stride),
        port_bytes_per_s=min(ports),
        hop_s=one_hop_s(on, crossed),
    )


def _predicted(op: CollectiveTransfer, on: Cluster) -> Num:
    return predict(op, on=on.device, conditions=Conditions(kernel=LIBRARY)).seconds


def members_within(num_ranks: Num, level: LinkLevel, stride: Spacing, on: Cluster) -> Num:
    """Ranks of a group, `stride` apart, that surely share one group of a link level."""
    if on.num_accelerators <= level.size:
        return num_ranks
    return members_in(num_ranks, level.size, stride)


def members_in(num_ranks: Num, size: float, stride: Spacing) -> Num:
    """Ranks of every group that surely share one group of a level of that size.

    Groups lie side by side, so those of 3 ranks over nodes of 8 straddle: only the greatest
    common divisor of the group and of the ranks a node takes is inside in each of them. A stride
    that does not divide the node puts neighbours anywhere: none are. Of a lattice, runs that are
    whole inside are as many as their begins.
    """
    if isinstance(stride, Lattice):
        return _members_of_runs(num_ranks, size, stride)
    if is_scalar(num_ranks, stride):
        per_node = size / stride
        return math.gcd(int(num_ranks), int(per_node)) if per_node == int(per_node) else 1
    per_node = np.asarray(size / stride)
    whole = per_node == np.floor(per_node)
    inside = np.gcd(np.asarray(num_ranks, dtype=np.int64), per_node.astype(np.int64))
    return np.where(whole, inside, 1).astype(np.float64)


def _members_of_runs(num_ranks: Num, size: float, lattice: Lattice) -> Num:
    alike = members_in(num_ranks, size, lattice.near)
    of_run = members_in(lattice.inner, size, lattice.near)
    runs = members_in(num_ranks / lattice.inner, size, lattice.far)
    cut = where(np.equal(of_run, lattice.inner), of_run * runs, of_run)
    return where(lattice.is_even, alike, cut)


def _where_inside(inside: Condition, stride: Spacing) -> Spacing:
    """The spacing of the groups inside a node; neighbours stand for the others."""
    if not isinstance(stride, Lattice):
        return where(inside, stride, 1)
    return Lattice(
        near=where(inside, stride.near, 1),
        inner=where(inside, stride.inner, 2),
        far=where(inside, stride.far, 2),
    )


@dataclass(frozen=True, slots=True)
class _Load:
    """What a rank sends at one level, how fast, and the time of its hops."""

    wire_bytes: Num
    bytes_per_s: Num
    hops_s: Num

    @property
    def seconds(self) -> Num:
        return self.wire_bytes / self.bytes_per_s + self.hops_s


def _load(collective: Collective, level: LinkLevel, inside: Num, members: Num, share: Num) -> _Load:
    """What one level carries, where groups of `inside` ranks become groups of `members` over that
    share of their links.
    """
    n, size = collective.num_ranks, collective.num_bytes
    parties = members / inside
    bandwidth = share * level.bytes_per_s / level.oversubscription
    if collective.kind == "all_to_all":
        wire = size * (members - inside) / n
        hops: Num = where(parties > 1, 1, 0)
    elif collective.kind == "send_recv":
        crosses = parties > 1
        wire, hops = where(crosses, size, 0.0), where(crosses, 1, 0)
    else:
        part = Collective(
            kind=collective.kind,
            num_bytes=size / inside,
            num_ranks=parties,
            algorithm=collective.algorithm,
        )
        wire, hops = part.wire_bytes(), part.num_steps()
        if collective.kind == "all_reduce" and level.in_network_reduction:
            in_switch = Collective(
                kind="all_reduce", num_bytes=size / inside, num_ranks=parties, algorithm="nvls"
            )
            hops = where(in_switch.wire_bytes() < wire, in_switch.num_steps(), hops)
            wire = minimum(wire, in_switch.wire_bytes())
    return _Load(wire, bandwidth, hops * (level.latency_s or 0.0))
