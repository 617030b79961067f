"""Groups for sequences as a record: what the tables, `--json` and the chart share."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from cli.quantity import count_text
from hwmodels.errors import InfeasibleError, InputError

if TYPE_CHECKING:
    from hwmodels.cluster import Cluster
    from simulator.planners.group_placement import GroupPlan
    from simulator.planners.sequence_groups import StepPlan
    from simulator.variable_length import GroupCost, Ints
    from workloads.models.config import TransformerConfig

HBM_FRAC: Final = 0.92
MOST_DOUBLINGS: Final = 14


def micro_batches(step: StepPlan, held: Ints, cost: GroupCost) -> list[dict[str, Any]]:
    """Every micro-batch with its groups; sequences by their place in the input, from 0."""
    places: dict[int, list[int]] = defaultdict(list)
    for place in range(len(held) - 1, -1, -1):
        places[int(held[place])].append(place)
    found = []
    for part, plan in step.micro_batches:
        own = np.array([places[int(length)].pop() for length in part])
        found.append({
            "seconds": plan.seconds, "lower_s": plan.lower_s, "gap_frac": plan.gap_frac,
            "shape": str(plan), "num_sequences": len(part), "num_tokens": int(part.sum()),
            "groups": _groups(part, own, plan, cost),
        })  # fmt: skip
    return found


def _groups(part: Ints, own: Ints, plan: GroupPlan, cost: GroupCost) -> list[dict[str, Any]]:
    found = []
    for group, degree in enumerate(plan.degrees):
        here = plan.owners == group
        if not here.any():
            continue
        found.append({
            "degree": degree, "seconds": cost.group_s(part[here], degree),
            "num_tokens": int(part[here].sum()), "longest": int(part[here].max()),
            "sequences": own[here].tolist(),
        })  # fmt: skip
    return found


def cost_or_refusal(
    cfg: TransformerConfig, system: Cluster, held: Ints, lines: Ints | None, limit: int | None
) -> GroupCost:
    """The groups' cost; refused where a sequence fits none: which one, and what would fit it."""
    from simulator.variable_length import predicted_cost

    longest = int(np.argmax(held))
    length = int(held[longest])
    where = f"line {lines[longest]}: " if lines is not None else ""
    if limit is not None and length > limit:
        raise InputError(
            f"{where}{length} tokens are more than --seq = {limit}; raise --seq or leave it out"
        )
    try:
        cost = predicted_cost(cfg, on=system, len_max=limit or length, hbm_frac=HBM_FRAC)
        cost.least_degree(float(length))
    except InfeasibleError as error:
        if limit is not None and limit > length and _fits(cfg, system, length, 1):
            raise
        nodes = _nodes_for(cfg, system, length)
        most, way = _most(cfg, system), "no number of nodes tried holds it"
        if nodes:
            way = f"--nodes {nodes} would hold it"
        here = (
            f"or give at most {count_text(most)} tokens" if most else "the states alone fill these"
        )
        raise InfeasibleError(
            f"{where}a sequence of {length} tokens of {cfg.name} fits no group of up to "
            f"{system.num_accelerators} x {system.device.id} with every layer recomputed; {way}, "
            f"{here}"
        ) from error
    return cost


def _fits(cfg: TransformerConfig, system: Cluster, length: int, times: int) -> bool:
    """Does one sequence fit the largest group of so many times the ranks?"""
    from simulator.variable_length import memory_of_rank

    ranks = system.num_accelerators * times
    room = HBM_FRAC * system.device.hbm.capacity_bytes
    try:
        tokens = memory_of_rank(cfg, num_ranks=ranks, len_max=length, room=room)[1]
    except InfeasibleError:
        return False
    return bool(length <= tokens * (1 << (ranks.bit_length() - 1)))


def _nodes_for(cfg: TransformerConfig, system: Cluster, length: int) -> int | None:
    """The least doubling of the nodes at which one sequence fits."""
    for times in (1 << i for i in range(1, MOST_DOUBLINGS)):
        if _fits(cfg, system, length, times):
            return times * int(system.num_nodes)
    return None


def _most(cfg: TransformerConfig, system: Cluster) -> int:
    """Tokens of the longest sequence that fits, by bisection."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(cfg, system, middle, 1) else (low, middle)
    return low
