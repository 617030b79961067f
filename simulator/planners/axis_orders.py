"""The planner's space with every useful order of the axes, without those that are the same.

Of the 24 orders three are searched, what is exchanged more often inside:

    tp-cp-dp-pp    the usual: stages lie on different nodes, replicas side by side
    tp-cp-pp-dp    stages side by side: sends inside a node, replicas on different nodes
    tp-pp-cp-dp    stages inside the ranks of a sequence too

tp comes first: its collectives wait in every layer, carry most, and fit a node (rule 2 of
`parallelism`). cp comes before dp: it exchanges in every layer of every micro-batch, dp once a
step, or (ZeRO 2 and 3) over both axes together, whose ranks are the same in either order. An order
that puts them otherwise gains only where a group half in a node, half beside it uses the links of
both at once. Any order may be pinned.

Two orders of a mesh are one where every group has the same ranks inside every link level, and lies
alike in its node: nothing else enters its price (`network`), but for a byte of rounding where
levels as fast as each other share a buffer. Then the first of the table is kept.

    Implemented in: `with_orders`, `places`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hwmodels.cluster import Cluster
from hwmodels.errors import InputError
from simulator.distinct import distinct
from simulator.kernel_time.collective import over_cards
from simulator.network import members_in
from simulator.network_topology import LINK_COUNTS, node_size
from workloads.axis_order import AxisOrder, Spacing, numbers_of, span_of
from workloads.models.config import TransformerConfig
from workloads.models.experts import expert_replicas
from workloads.numeric import Num, where
from workloads.placement import (
    axis_strides,
    expert_spacing,
    misplaced_experts,
    replica_spacing,
)
from workloads.plan import Plan

USEFUL: Final = (AxisOrder.TP_CP_DP_PP, AxisOrder.TP_CP_PP_DP, AxisOrder.TP_PP_CP_DP)
"""Orders that are searched, the simplest first."""
MESH: Final = ("dp", "tp", "pp", "cp", "ep", "etp", "ulysses")
"""Fields that decide which groups there are."""
MORE_THAN_A_BRIDGE: Final = 3
"""Cards that a bridge joins are two; more of them meet on PCI Express."""


def with_orders(
    plans: Plan, *, on: Cluster, cfg: TransformerConfig, order: int | None = None
) -> Plan:
    """`plans` in each useful order that is not the same as one before, or in the `order` pinned."""
    meshes, index = distinct(plans, MESH)
    assert index is not None
    parts, seen = [], list[NDArray[np.float64]]()
    for one in USEFUL if order is None else (AxisOrder(order),):
        there = replace(meshes, order=float(one))
        keep = np.ones(np.shape(meshes.dp), dtype=bool)
        reasons = misplaced_experts(there) if cfg.moe else []
        for bad, _ in reasons:
            keep &= ~bad
        own = np.array([np.broadcast_to(c, keep.shape) for c in places(there, on)])
        for other in seen:
            keep &= np.any(own != other, axis=0)
        seen.append(np.where(keep, own, np.nan))
        if order is not None and not keep.any():
            raise InputError(f"order {one.label}: {reasons[0][1]}")
        parts.append(_chosen(plans, np.flatnonzero(keep[index]), one))
    return Plan(
        **{f.name: np.concatenate([np.asarray(getattr(p, f.name)) for p in parts])
           for f in fields(Plan)}
    )  # fmt: skip


def _chosen(plans: Plan, index: NDArray[np.intp], order: AxisOrder) -> Plan:
    picked = {f.name: np.asarray(getattr(plans, f.name))[index] for f in fields(Plan)}
    return Plan(**picked | {"order": np.full(index.size, float(order))})


def places(plans: Plan, on: Cluster) -> list[Num]:
    """Numbers that are the same for two orders of a mesh in which no group has another price."""
    return [number for n, spaced in groups(plans) for number in _place(n, spaced, on)]


def groups(plan: Plan) -> Iterator[tuple[Num, Spacing]]:
    """Every group that exchanges: its ranks, and where they lie."""
    at, etp, replicas = axis_strides(plan), plan.expert_tp, expert_replicas(plan)
    yield plan.tp, at.tp
    yield plan.cp, at.cp
    yield plan.ulysses, at.cp
    yield plan.cp / plan.ulysses, at.cp * plan.ulysses
    yield plan.pp, at.pp
    yield plan.dp * plan.cp, replica_spacing(plan)
    yield etp, expert_spacing(plan, 1, etp)
    yield plan.ep, expert_spacing(plan, etp, plan.ep)
    yield replicas, expert_spacing(plan, etp * plan.ep, replicas)


def _place(num_ranks: Num, spaced: Spacing, on: Cluster) -> Iterator[Num]:
    """Ranks inside each level; inside a node how they lie, where links differ there."""
    several, size = np.greater(num_ranks, 1), node_size(on)
    whole = np.less_equal(span_of(num_ranks, spaced), size)
    for within in boundaries(on):
        yield where(several, members_in(num_ranks, within, spaced), 0)
    yield where(several & whole, 1, 0)
    if strides_matter(on):
        together = several & (whole | np.greater(members_in(num_ranks, size, spaced), 1))
        for number in numbers_of(spaced):
            yield where(together, number, 0)


def boundaries(on: Cluster) -> list[float]:
    """Sizes of the groups of links that it makes a difference to lie in.

    A network level whose next one is as fast is none: what leaves it pays no more (`network`).
    """
    size = node_size(on)
    found = {size, *(x.size for x in on.levels if x.size <= size)}
    for level, wider in pairwise(on.levels):
        one, other = (
            (x.bytes_per_s / x.oversubscription, x.latency_s or 0.0, x.in_network_reduction)
            for x in (level, wider)
        )
        if level.size > size and (one != other or level.in_network_reduction):
            found.add(level.size)
    return sorted(found)


def strides_matter(on: Cluster) -> bool:
    """Is it not all one to ranks of a node which of its others they talk to?

    Not on a switch, nor where each has as many links to every other.
    """
    return LINK_COUNTS in on.extra or bool(over_cards(MORE_THAN_A_BRIDGE, on.device))
