"""Collectives over several nodes as NCCL estimates them: every algorithm and protocol it has.

n ranks on N nodes of r = n / N, B bytes, link rate L a rank, node rate P = ports * rate. NCCL's own
model (src/graph/tuning.cc; its constants are hwmodels/data/nccl.toml), with the shares of both
rates that its transfers reach as corrections:

    T = base + steps inside * hop + steps between * net hop + B max(c / (net P s), i / (link L s))

    algorithm    steps inside          steps between     c: leaves a node    i: a rank sends inside
    ring         k (n - 1) - between   k (N - 1)         k (n - 1) / n       k (n - 1) / n
    tree         2 (r - 1)             2 ceil(log2 N)    min(N, 4) / 2       2
    nvls tree    the switch, once      2 ceil(log2 N)    min(N, 4) / 2       r / ((r - 1) eff)
    direct       -                     N > 1             r (N - 1) / N       (r - 1) / n

k = 2 for an all-reduce, 1 otherwise; a broadcast's ring is a chain. s: the protocol's share (LL
sends half flags and no more than an absolute rate, LL128 a flag a line, Simple none), for trees
with NCCL's correction by size, for a large message on a ring with its plateau. `direct` is what
all-to-all and plain sends do. nvls tree: the switch of a node reduces (NVLink SHARP), the nodes'
ranks of one rail are a tree; Simple only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np

from hwmodels import catalog
from hwmodels.device import Device
from simulator.kernel_time.terms import larger, real, smaller
from workloads.numeric import Num, any_true, where
from workloads.ops.collective import Collective
from workloads.ops.collective_transfer import ClusterCollective

LL, LL128, SIMPLE = "LL", "LL128", "Simple"
PROTOCOLS: Final = (LL, LL128, SIMPLE)
RING, TREE, NVLS_TREE, DIRECT = "ring", "tree", "nvls tree", "direct"
Way: TypeAlias = tuple[str, str]
"""Algorithm and protocol."""
LEAST_BYTES: Final = 64.0
"""Size of the first entry of the tree's corrections."""
PLATEAU_BYTES: Final = 64.0
"""Bytes of a channel and a rank from which a ring between nodes reaches its plateau."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Rates of a group's links, bytes per second, already cut to what transfers reach.

    `link` of one rank inside the node, `node` of all ports that the group has at a node.
    """

    link: Num
    node: Num
    over_pcie: Any = False
    switch_efficiency: float = 0.0


@lru_cache(maxsize=1)
def _table() -> Mapping[str, Any]:
    return catalog.nccl_constants()


def switch_efficiency(device: Device) -> float:
    """NCCL's share of the link for sums made in the NVLink switch; 0 where there is none.

    >>> [switch_efficiency(catalog.device(d)) for d in ("a100-sxm4-80gb", "h100-sxm", "b200-sxm")]
    [0.0, 0.85, 0.74]
    """
    major = (device.compute_capability or "").split(".")[0]
    switched = any(link.name == "nvlink" for link in device.links)
    if not switched or (device.form_factor or "").startswith("PCIe"):
        return 0.0
    name = {"9": "nvls_efficiency_hopper", "10": "nvls_efficiency_blackwell"}.get(major)
    return float(_table()[name]) if name else 0.0


@lru_cache(maxsize=8)
def first_switched_rank(efficiency: float) -> int:
    """The least number of ranks from which the switch's sums beat a ring on one node.

    In bytes of the buffer per second over the link's rate, the switch gives e (n - 1) / n and the
    ring n / (2 (n - 1)): NCCL takes the switch from 5 ranks on Hopper, 6 on Blackwell, which is
    where measured bandwidths part (hwmodels/data/clusters/hgx-h200.toml, hgx-b200.toml).

    >>> first_switched_rank(0.85), first_switched_rank(0.74)
    (5, 6)
    """
    if efficiency <= 0:
        return 2**31
    return next(n for n in range(3, 2**16) if efficiency * (n - 1) / n > n / (2 * (n - 1)))


def ways(op: ClusterCollective, reach: Reach, *, may_reduce: bool = True) -> dict[Way, Num]:
    """Seconds of every algorithm and protocol that can run the collective.

    `may_reduce`: the switch adds numbers of that format.
    """
    if op.kind in ("all_to_all", "send_recv"):
        return {(DIRECT, p): _direct(op, reach, i) for i, p in _protocols(reach)}
    found = {(RING, p): _ring(op, reach, i) for i, p in _protocols(reach)}
    if op.kind == "all_reduce":
        found |= {(TREE, p): _tree(op, reach, i) for i, p in _protocols(reach)}
        if reach.switch_efficiency and may_reduce and any_true(np.greater(op.ranks_per_node(), 1)):
            found[NVLS_TREE, SIMPLE] = _nvls_tree(op, reach)
    return found


def _protocols(reach: Reach) -> list[tuple[int, str]]:
    """LL128 needs NVLink inside the node."""
    carded = bool(any_true(reach.over_pcie))
    return [(i, p) for i, p in enumerate(PROTOCOLS) if not (carded and p == LL128)]


def _hops(op: ClusterCollective, reach: Reach, shape: str, i: int) -> tuple[Num, Num]:
    """One step inside the node, and one between nodes."""
    nvlink, pcie = (_table()[f"{name}_hop_{shape}_s"][i] for name in ("nvlink", "pcie"))
    inside = where(reach.over_pcie, pcie, nvlink)
    if PROTOCOLS[i] == LL:
        several = np.greater(op.num_nodes, 1)
        inside = inside * where(several, _table()["latency_scale_ll_inside_nodes"], 1.0)
    between = _table()[f"net_hop_{shape}_s"][i]
    return inside, max(op.hop_s, between)


def _cut(op: ClusterCollective, rate: Num, i: int, share: Num) -> Num:
    """A rate as one protocol uses it."""
    if PROTOCOLS[i] == LL:
        two, more = _table()["ll_bytes_per_s_two_nodes"], _table()["ll_bytes_per_s_more_nodes"]
        return smaller(rate * share, where(np.greater(op.num_nodes, 2), more, two))
    if PROTOCOLS[i] == LL128:
        alone = np.less(op.ranks_per_node(), 2)
        return rate * where(alone, _table()["ll128_share_one_rank_a_node"], share)
    return rate * share


def _ring(op: ClusterCollective, reach: Reach, i: int) -> Num:
    share = _table()["ring_share"][i]
    steps, between = op.num_steps(), op.num_rounds()
    hop, net_hop = _hops(op, reach, "ring", i)
    latency: Num = _table()["base_latency_ring_s"][i] + (steps - between) * hop
    latency = latency + between * net_hop
    if PROTOCOLS[i] == SIMPLE and op.kind == "all_reduce":
        high = np.greater(real(op.num_bytes) / op.num_ranks, PLATEAU_BYTES)
        crosses = np.greater(op.num_nodes, 1)
        latency = latency * where(high & crosses, _table()["ring_plateau"], 1.0)
    return latency + _moved(op, reach, i, share, op.crossing_bytes(), op.wire_bytes())


def _tree(op: ClusterCollective, reach: Reach, i: int) -> Num:
    share = _table()["tree_share"][i] * _correction(op.num_bytes, i)
    hop, net_hop = _hops(op, reach, "tree", i)
    steps = 2 * (op.ranks_per_node() - 1) * hop + _depth(op) * net_hop
    moved = _moved(op, reach, i, share, op.crossing_bytes("tree"), 2 * op.num_bytes)
    latency: Num = _table()["base_latency_tree_s"][i] + steps
    return latency + moved


def _nvls_tree(op: ClusterCollective, reach: Reach) -> Num:
    i, each = PROTOCOLS.index(SIMPLE), op.ranks_per_node()
    inside = each / larger(each - 1, 1e-9) * op.num_bytes / reach.switch_efficiency
    latency = _table()["nvls_s"] + _depth(op) * max(_table()["net_nvls_tree_s"], op.hop_s)
    share = _correction(op.num_bytes, i)
    moved = _moved(op, reach, i, share, op.crossing_bytes("tree"), inside)
    return where(np.greater(each, 1), latency + moved, np.inf)


def _direct(op: ClusterCollective, reach: Reach, i: int) -> Num:
    hop, net_hop = _hops(op, reach, "ring", i)
    latency: Num = _table()["base_latency_ring_s"][i]
    latency = latency + where(np.greater(op.num_nodes, 1), net_hop, hop)
    each = op.ranks_per_node()
    stays = np.greater(op.num_nodes, 1) & (op.kind == "send_recv")
    inside = op.num_bytes * (1 + op.skew) * (each - 1) / op.num_ranks
    inside = where(stays, 0.0, inside if op.kind == "all_to_all" else op.num_bytes)
    return latency + _moved(op, reach, i, _table()["ring_share"][i], op.crossing_bytes(), inside)


def _depth(op: ClusterCollective) -> Num:
    """Steps up the tree of the nodes and down again."""
    return Collective("all_reduce", 1, op.num_nodes, "tree").num_steps()


def _moved(
    op: ClusterCollective, reach: Reach, i: int, share: Num, crossing: Num, inside: Num
) -> Num:
    """Seconds of the slower of network and links, which work at the same time."""
    inside = where(np.greater(op.ranks_per_node(), 1), inside, 0.0)
    return larger(crossing / _cut(op, reach.node, i, share),
                  inside / _cut(op, reach.link, i, share))  # fmt: skip


def _correction(num_bytes: Num, i: int) -> Num:
    """NCCL's correction of a tree's bandwidth, between its entries by the size's logarithm."""
    values = _table()[f"tree_correction_{PROTOCOLS[i].lower()}"]
    place = np.log2(np.maximum(real(num_bytes) / LEAST_BYTES, 1.0))
    found = np.interp(place, np.arange(len(values)), values)
    return found if isinstance(num_bytes, np.ndarray) else float(found)


def best(found: Mapping[Way, Num]) -> Num:
    """Seconds of the fastest way."""
    least: Num | None = None
    for seconds in found.values():
        least = seconds if least is None else smaller(least, seconds)
    assert least is not None
    return least


def chosen(found: Mapping[Way, Num]) -> Way:
    """The fastest way of one collective."""
    return min(found, key=lambda way: float(found[way]))
