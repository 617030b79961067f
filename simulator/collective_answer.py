"""One collective on a cluster, explained: level, algorithm and protocol, and what the others take.

The widest level that the group crosses is where it runs at that level's rate; algorithm and
protocol are the fastest of those that the communication library has for the group, as the kernel
model times them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from hwmodels.cluster import Cluster
from hwmodels.errors import UnsupportedError
from simulator import nccl
from simulator.kernel_time import collective as one_node
from simulator.kernel_time import collective_nodes
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import Prediction, predict
from simulator.kernel_time.rates import rates_of
from simulator.kernel_time.registry import model_of
from simulator.network import (
    LIBRARY,
    CollectiveEstimate,
    estimate_collective,
    on_node,
    over_nodes,
)
from simulator.network_topology import check_tiles, node_size
from workloads.numeric import Num
from workloads.ops.collective import Collective
from workloads.ops.collective_transfer import KINDS, ClusterCollective, CollectiveTransfer

NO_WAY: Final = ("", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveAnswer:
    """Seconds of a collective and what decides them.

    `level` is the widest that the group crosses; `seconds_by_way` all ways that the group can take
    with the same floor, the fastest of which is `way`. Without a kernel model for the device
    `prediction` is None, `reason` says why, and the answer is the bound's.
    """

    collective: Collective
    stride: int
    level: str
    num_nodes: int
    bound: CollectiveEstimate
    way: nccl.Way
    seconds_by_way: Mapping[nccl.Way, float]
    prediction: Prediction | None
    reason: str = ""

    @property
    def seconds(self) -> float:
        """The prediction, or the bound, which nothing between nodes beats."""
        bound = float(self.bound.lower_s)
        if self.prediction is None:
            return bound
        found = float(self.prediction.seconds)
        return max(found, bound) if self.num_nodes > 1 else found

    @property
    def bus_bytes_per_s(self) -> float:
        """nccl-tests' bus bandwidth; 0 where nothing moves."""
        if not self.seconds:
            return 0.0
        return float(self.collective.num_bytes / self.seconds * self.collective.bus_factor())


def answer(collective: Collective, *, on: Cluster, stride: int = 1) -> CollectiveAnswer:
    """The collective over ranks that lie `stride` apart, in groups that tile the cluster.

    >>> from hwmodels import catalog
    >>> reduced = Collective("all_reduce", num_bytes=2**28, num_ranks=8)
    >>> found = answer(reduced, on=catalog.cluster("hgx-h100"))
    >>> found.level, found.way
    ('nvlink', ('nvls', 'Simple'))
    """
    n = int(collective.num_ranks)
    check_tiles(on, n, stride)
    span = n * stride
    bound = estimate_collective(collective, on=on, stride=stride)
    level = on.level_spanning(span).name if n > 1 else on.levels[0].name
    inside = span <= node_size(on)
    op = (on_node if inside else over_nodes)(collective, on=on, stride=stride)
    nodes = 1 if inside else int(getattr(op, "num_nodes", 1))
    try:
        if n == 1 or collective.kind not in KINDS:
            raise UnsupportedError("one rank exchanges nothing")
        found = predict(op, on=on.device, conditions=Conditions(kernel=LIBRARY))
        ways = _ways(op, found, on)
    except UnsupportedError as why:
        return CollectiveAnswer(
            collective=collective, stride=stride, level=level, num_nodes=nodes, bound=bound,
            way=NO_WAY, seconds_by_way={}, prediction=None, reason=str(why),
        )  # fmt: skip
    return CollectiveAnswer(
        collective=collective,
        stride=stride,
        level=level,
        num_nodes=nodes,
        bound=bound,
        way=nccl.chosen(ways),
        seconds_by_way=ways,
        prediction=found,
    )


def _ways(op: CollectiveTransfer, found: Prediction, on: Cluster) -> dict[nccl.Way, float]:
    """Seconds by way, floor included; those that the group cannot take are left out."""
    labels = model_of(type(op)).labels(op, Conditions(kernel=LIBRARY))
    constants, rates = found.basis.constants(labels), rates_of(on.device)
    times: Mapping[nccl.Way, Num]
    floor: Num
    if isinstance(op, ClusterCollective):
        times = collective_nodes.ways(op, rates, constants)
        floor = collective_nodes.launch_of(op, constants)
    else:
        times, floor = one_node.ways(op, rates, constants), one_node.launch_of(op, constants)
    return {way: float(floor + s) for way, s in times.items() if np.isfinite(s)}
