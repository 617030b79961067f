"""Time of collectives over several nodes: networks that reach accelerators, or hosts only.

`cluster_collective`, ports that read accelerators' memory (GPUDirect RDMA): NCCL's estimate of its
fastest algorithm and protocol (`simulator.nccl`) with the shares of link and ports that transfers
reach.

`staged_collective`, messages copied through host memory. A node of r ranks hands `crossing` bytes
on over p = min(ports, PCI Express switches) paths, of which a message of B bytes fills so many that
each has pieces to overlap,

    paths = 1 + (p - 1) x / (1 + x)                          x = B / (n^2 piece)
    T = launch + net_step rounds + min over
        LL       2 crossing / stage                           half is flags
        Simple   simple + max(crossing / (stage paths), (crossing / paths - buffer) / wire)

where stage = share of PCI Express that a copy to the host and on gets. The last term is that of
TCP, wire = share of a port: what the buffers of both ends do not take up waits for the wire.
"""

from __future__ import annotations

from typing import Final

from hwmodels.errors import UnsupportedError
from simulator import nccl
from simulator.kernel_time.collective import PCIE, link_of, timed
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import larger, smaller
from workloads.numeric import Num, minimum
from workloads.ops.collective_transfer import ClusterCollective, StagedCollective

HOST_PATHS: Final = 4
"""PCI Express switches of a server with eight accelerators, each with its own way to the host
(NVIDIA's DGX A100 and HGX boards: two accelerators and two ports a switch)."""

CLUSTER_CONSTANTS: Final = (
    Constant(name="net_frac", meaning="share of the network ports' bandwidth", unit="1",
             start=0.8, low=0.1, high=1.0, spread=0.2,
             source="4 x 8 H100 over 400 Gbit/s ports: all-reduce at 320 of 400 GB/s a node "
             "(NVIDIA/nccl issue 1221); never fitted"),
    Constant(name="link_frac", meaning="share of the link inside a node", unit="1",
             start=0.8, low=0.1, high=1.0, spread=0.2,
             source="rings on one node: 370 of 450 GB/s on H100 (NVIDIA/nccl-tests issue 212), "
             "235 of 300 on A100 (stas00/ml-engineering); never fitted"),
)  # fmt: skip

STAGED_CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of a collective: launch and first flags", unit="s",
             start=2e-5, low=1e-6, high=1e-4, spread=0.7, by=("kernel",)),
    Constant(name="net_step_s", meaning="one step between nodes", unit="s",
             start=1.5e-5, low=1e-6, high=2e-4),
    Constant(name="simple_s", meaning="set-up of the Simple protocol", unit="s",
             start=3e-5, low=1e-6, high=2e-4, spread=0.7, by=("kernel",)),
    Constant(name="stage_frac", meaning="share of PCI Express that one path to the network gets",
             unit="1", start=0.25, low=0.02, high=1.0, spread=0.5, by=("kernel",)),
    Constant(name="wire_frac", meaning="share of a network port beyond its buffers", unit="1",
             start=0.5, low=0.02, high=1.0, spread=0.7),
    Constant(name="buffer_bytes", meaning="what both ends' buffers take up", unit="B",
             start=4 * 2**20, low=2**16, high=2**28, spread=0.7,
             source="NCCL_BUFFSIZE's default, 4 MiB; fitted from there"),
    Constant(name="piece_bytes", meaning="piece of one step from which more paths are used",
             unit="B", start=2**17, low=2**10, high=2**24),
)  # fmt: skip


def reach_of(op: ClusterCollective, rates: Rates, constants: Constants) -> nccl.Reach:
    """The rates that the group's transfers reach."""
    link, carded = link_of(op, rates)
    return nccl.Reach(
        link=constants["link_frac"] * link,
        node=constants["net_frac"] * op.num_ports() * op.port_bytes_per_s,
        over_pcie=carded,
        switch_efficiency=nccl.switch_efficiency(rates.device),
    )


def cluster_seconds(
    op: ClusterCollective, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one collective over several nodes; sizes and rates broadcast."""
    return timed(op, rates, 0.0, nccl.best(ways(op, rates, constants)))


def ways(op: ClusterCollective, rates: Rates, constants: Constants) -> dict[nccl.Way, Num]:
    """Seconds by algorithm and protocol; through host memory, launch and steps aside."""
    if isinstance(op, StagedCollective):
        return _staged_ways(op, rates, constants)
    floating = not op.dtype.name.startswith("int")
    return nccl.ways(op, reach_of(op, rates, constants), may_reduce=floating)


def staged_seconds(
    op: StagedCollective, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """The same through host memory."""
    floor = launch_of(op, constants)
    return timed(op, rates, floor, nccl.best(ways(op, rates, constants)))


def launch_of(op: ClusterCollective, constants: Constants) -> Num:
    """The floor that all ways of a collective share."""
    if not isinstance(op, StagedCollective):
        return 0.0
    return constants["launch_s"] + constants["net_step_s"] * op.num_rounds()


def _staged_ways(op: StagedCollective, rates: Rates, c: Constants) -> dict[nccl.Way, Num]:
    pcie = next((x.bytes_per_s for x in rates.device.links if x.name == PCIE), None)
    if pcie is None:
        raise UnsupportedError(
            f"{rates.device.id} has no {PCIE} link to the host; give its spec file one"
        )
    crossing = op.crossing_bytes()
    ports = minimum(op.num_ports(), HOST_PATHS)
    x = op.num_bytes / (op.num_ranks**2 * c["piece_bytes"])
    paths = 1 + (ports - 1) * x / (1 + x)
    stage = smaller(c["stage_frac"] * pcie, op.port_bytes_per_s)
    copied = crossing / (stage * paths)
    if op.sockets:
        waits = larger(crossing / paths - c["buffer_bytes"], 0.0)
        copied = larger(copied, waits / (c["wire_frac"] * op.port_bytes_per_s))
    algorithm = nccl.DIRECT if op.kind in ("all_to_all", "send_recv") else nccl.RING
    return {
        (algorithm, nccl.LL): 2 * crossing / stage,
        (algorithm, nccl.SIMPLE): c["simple_s"] + copied,
    }


CLUSTER: Final = KernelModel(
    name="cluster_collective",
    ops=(ClusterCollective,),
    constants=CLUSTER_CONSTANTS,
    timing=cluster_seconds,
)
STAGED: Final = KernelModel(
    name="staged_collective",
    ops=(StagedCollective,),
    constants=STAGED_CONSTANTS,
    timing=staged_seconds,
)
