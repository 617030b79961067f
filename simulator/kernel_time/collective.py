"""Time of collectives: the best protocol or algorithm, over the device's links and the network.

With n ranks, B bytes, k = 2 for an all-reduce and 1 otherwise, S dependent steps, link bandwidth
BW per direction and the bytes that a ring's busiest link carries, with its start-up:

    wire = B / n (k (n - 1) + start)

    T = launch + min over
        LL       ll_step S + wire / (ll SMs f) + 2 wire / BW     small messages: half is flags
        LL128    ll128 + |ll128_step S, wire / (ll128 BW)|       a flag every 128 bytes
        Simple   simple + |simple_step S, wire / (simple BW)|    large messages, memory fences
        NVLS     nvls + (n + 1) / n B / (nvls BW)                all-reduce inside the switch

LL, LL128 and Simple are NCCL's protocols, NVLS its in-switch algorithm (NCCL documentation,
NCCL_PROTO and NCCL_ALGO); |a, b| is the 2-norm: steps of later chunks hide behind earlier ones.
A send alone takes one step, by LL or by

        sends    send + wire / (simple BW)

LL128 needs NVLink, NVLS
a Hopper or later GPU on a switch and a floating-point format. `custom_all_reduce`:

        one-shot oneshot + (n - 1) B / (oneshot BW)              every rank reads all buffers
        two-shot twoshot + 2 (n - 1) / n B / (twoshot BW)        reduce-scatter, then gather
        ring     Simple as above                                 what frameworks fall back on

Links: a card (form factor PCIe) is joined to one other at most, so groups of more than two run over
PCI Express, where a step takes `PCIE_STEP` times as long; more than `SOCKET_RANKS` of them sit on
two CPU sockets, between which `SOCKET_FRAC` of the bandwidth is left.

`cluster_collective`, several nodes of r ranks with a network port each:

    T = launch + net_step rounds + |crossing / (r net port), wire / (link BW)|

`expert_exchange`, for dispatch and combine of routed experts: T tokens of h bytes, E experts

    T = launch + E expert + h / row + |wire / (link BW), crossing / (net port)|
"""

from __future__ import annotations

from typing import Final

from hwmodels.device import Device
from hwmodels.errors import UnsupportedError
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import overlap, smaller
from workloads.numeric import Condition, Num, where
from workloads.op import Op
from workloads.ops.collective_transfer import (
    ClusterCollective,
    CollectiveTransfer,
    CustomAllReduce,
)
from workloads.ops.expert_exchange import ExpertExchange

SOCKET_RANKS: Final = 4
"""Cards on one CPU socket of a server with eight."""
SOCKET_FRAC: Final = 0.48
"""Share of PCI Express bandwidth that is left between two sockets: the geometric mean of all Intel
links that NCCL's tables (src/graph/topo.h) list, 6 and 10 GB/s beside a bus of 15.75, 22 and 40
beside one of 63."""
PCIE_STEP: Final = 1.67
"""Steps over PCI Express against NVLink: NCCL's tables (src/graph/tuning.cc), 1.0 to 0.6 us (LL)
and 5.7 to 3.4 us (Simple)."""
PCIE: Final = "pcie"
PCIE_CARD: Final = "PCIe"
"""How the link is called, and how the form factor of a card begins."""
SWITCHED_REDUCTION: Final = ("9", "10")
"""Compute capabilities (major) of parts whose NVLink switch reduces."""

K: Final = ("kernel",)
CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of a collective: launch and first flags", unit="s",
             start=6e-6, low=5e-7, high=6e-5, spread=0.7, by=K),
    Constant(name="ll_step_s", meaning="one step of LL: a flag's way", unit="s",
             start=9e-7, low=1e-7, high=1e-5, spread=0.5, by=K),
    Constant(name="ll_bytes_per_clk", meaning="bytes an SM's share of the channels sends by LL",
             unit="B/clk/SM", start=0.06, low=0.005, high=2.0, spread=0.7, by=K),
    Constant(name="ll128_s", meaning="set-up of LL128", unit="s",
             start=1.5e-6, low=1e-8, high=2e-5, spread=0.7, by=K),
    Constant(name="ll128_step_s", meaning="one step of LL128", unit="s",
             start=1.2e-6, low=1e-7, high=1e-5, spread=0.5, by=K),
    Constant(name="ll128_frac", meaning="share of the link that LL128's payload gets", unit="1",
             start=0.3, low=0.05, high=0.95, spread=0.4, by=K),
    Constant(name="simple_s", meaning="set-up of the Simple protocol", unit="s",
             start=1.2e-5, low=1e-6, high=1e-4, spread=0.7, by=K),
    Constant(name="simple_step_s", meaning="one step of Simple: a memory fence", unit="s",
             start=2e-6, low=1e-7, high=4e-5, spread=0.7, by=K),
    Constant(name="simple_frac", meaning="share of the link that Simple's payload gets", unit="1",
             start=0.75, low=0.1, high=1.0, spread=0.2, by=K),
    Constant(name="send_s", meaning="set-up of a plain send", unit="s",
             start=5e-6, low=1e-7, high=5e-5, spread=0.7),
    Constant(name="start", meaning="steps' worth of traffic of starting and ending a ring",
             unit="1", start=0.4, low=0.01, high=3.0, spread=0.5, by=K),
    Constant(name="nvls_s", meaning="set-up of the reduction inside the switch", unit="s",
             start=2.5e-5, low=1e-6, high=2e-4, spread=0.7,
             source="NCCL's tables, src/graph/tuning.cc, 25 us; fitted from there"),
    Constant(name="nvls_frac", meaning="share of the link that the switch's reduction gets",
             unit="1", start=0.6, low=0.1, high=1.0, spread=0.2),
)  # fmt: skip

CUSTOM_CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of an all-reduce kernel: launch, barrier", unit="s",
             start=4e-6, low=5e-7, high=3e-5, spread=0.7, by=K),
    Constant(name="rank_s", meaning="one more rank at the barrier", unit="s",
             start=1e-7, low=1e-9, high=2e-6),
    Constant(name="oneshot_frac", meaning="share of the link of a one-shot all-reduce", unit="1",
             start=0.5, low=0.02, high=1.0, spread=0.6, by=K),
    Constant(name="twoshot_s", meaning="the second barrier of a two-shot all-reduce", unit="s",
             start=4e-6, low=1e-7, high=4e-5, by=K),
    Constant(name="twoshot_frac", meaning="share of the link of a two-shot all-reduce", unit="1",
             start=0.5, low=0.02, high=1.0, spread=0.6, by=K),
    Constant(name="ring_s", meaning="set-up of the library's ring", unit="s",
             start=1.5e-5, low=1e-6, high=1e-4, spread=0.7),
    Constant(name="ring_step_s", meaning="one step of the library's ring", unit="s",
             start=2e-6, low=1e-7, high=4e-5, spread=0.7),
    Constant(name="ring_frac", meaning="share of the link of the library's ring", unit="1",
             start=0.75, low=0.1, high=1.0, spread=0.2),
    Constant(name="start", meaning="steps' worth of traffic of starting and ending a ring",
             unit="1", start=0.4, low=0.01, high=3.0, spread=0.5),
)  # fmt: skip

CLUSTER_CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of a collective: launch and first flags", unit="s",
             start=2e-5, low=1e-6, high=1e-4, spread=0.7, by=K),
    Constant(name="net_step_s", meaning="one step between nodes", unit="s",
             start=1.5e-5, low=1e-6, high=2e-4, by=K),
    Constant(name="net_frac", meaning="share of the network ports' bandwidth", unit="1",
             start=0.6, low=0.01, high=1.0, spread=0.7, by=K),
    Constant(name="link_frac", meaning="share of the link inside a node", unit="1",
             start=0.7, low=0.1, high=1.0, spread=0.3),
)  # fmt: skip

EXPERT_CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of an exchange: launch, counts, barrier", unit="s",
             start=2e-5, low=1e-6, high=1e-4, spread=0.7, by=K),
    Constant(name="expert_s", meaning="one expert's counter and its flag", unit="s",
             start=1e-8, low=1e-10, high=3e-7, by=K),
    Constant(name="row_bytes_per_s", meaning="rate at which one block moves one token", unit="B/s",
             start=2e9, low=1e8, high=1e12, by=K),
    Constant(name="link_frac", meaning="share of the link that tokens get", unit="1",
             start=0.5, low=0.02, high=1.0, spread=0.6, by=K),
    Constant(name="net_frac", meaning="share of the network port's bandwidth", unit="1",
             start=0.7, low=0.02, high=1.0, spread=0.5, by=K),
    Constant(name="net_step_s", meaning="latency of the network, once", unit="s",
             start=1e-5, low=1e-7, high=2e-4, by=K),
)  # fmt: skip


def collective_seconds(
    op: CollectiveTransfer, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one collective of a library on one node; sizes and rates broadcast."""
    c = constants
    link, carded = _link(op.num_ranks, rates)
    wire, steps = _wire(op, c["start"]), _slower(op.num_steps(), carded)
    sent = wire / (c["ll_bytes_per_clk"] * rates.sm_clocks_per_s) + 2 * wire / link
    best = c["ll_step_s"] * steps + sent
    whole = wire / (c["simple_frac"] * link)
    if op.kind == "send_recv":
        best = smaller(best, c["send_s"] + whole)
        return _timed(op, rates, c["launch_s"], best)
    best = smaller(best, c["simple_s"] + _pair(c["simple_step_s"] * steps, whole))
    ll128 = _pair(c["ll128_step_s"] * steps, wire / (c["ll128_frac"] * link))
    best = smaller(best, where(carded, best, c["ll128_s"] + ll128))
    if op.kind == "all_reduce" and _reduces_in_switch(op, rates):
        gathered = (op.num_ranks + 1) / op.num_ranks * op.num_bytes
        switched = c["nvls_s"] + gathered / (c["nvls_frac"] * link)
        best = smaller(best, where(op.num_ranks > 2, switched, best))
    return _timed(op, rates, c["launch_s"], best)


def custom_seconds(
    op: CustomAllReduce, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of a framework's own all-reduce; sizes and rates broadcast."""
    c = constants
    link, carded = _link(op.num_ranks, rates)
    steps = _slower(op.num_steps(), carded)
    ring = c["ring_s"] + _pair(
        c["ring_step_s"] * steps, _wire(op, c["start"]) / (c["ring_frac"] * link)
    )
    barrier = c["rank_s"] * _slower(op.num_ranks, carded)
    own = barrier + smaller(
        op.one_shot_bytes() / (c["oneshot_frac"] * link),
        c["twoshot_s"] + op.two_shot_bytes() / (c["twoshot_frac"] * link),
    )
    return _timed(op, rates, c["launch_s"], smaller(own, ring))


def cluster_seconds(
    op: ClusterCollective, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one collective over several nodes; sizes and rates broadcast."""
    c = constants
    each = op.num_ranks / op.num_nodes
    link, _ = _link(each, rates)
    crossing = op.crossing_bytes() / (each * c["net_frac"] * op.port_bytes_per_s)
    inside = where(each > 1, op.wire_bytes(), 0.0) / (c["link_frac"] * link)
    network = c["net_step_s"] * op.num_rounds()
    return _timed(op, rates, c["launch_s"] + network, _pair(crossing, inside))


def expert_seconds(
    op: ExpertExchange, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one dispatch or combine; sizes and rates broadcast."""
    c = constants
    link, _ = _link(op.num_ranks / op.num_nodes, rates)
    floor = c["launch_s"] + c["expert_s"] * op.num_experts + op.row_bytes() / c["row_bytes_per_s"]
    away = where(op.num_nodes > 1, c["net_step_s"], 0.0)
    moved = _pair(
        op.wire_bytes() / (c["link_frac"] * link),
        op.crossing_bytes() / (c["net_frac"] * op.port_bytes_per_s),
    )
    return _timed(op, rates, floor + away, moved)


def _timed(op: Op, rates: Rates, launch: Num, link: Num) -> KernelTime:
    """Launch, then the link, which own memory must keep up with."""
    memory = op.work(0.0).bytes / rates.hbm_bytes_per_s
    terms = {"launch": launch, "link": link, "hbm": memory}
    return KernelTime(launch + overlap(link, memory), terms)


def _wire(op: CollectiveTransfer, start: Num) -> Num:
    """Bytes of the busiest link, with what starting and ending the ring is worth."""
    return op.wire_bytes() + start * op.num_bytes / op.num_ranks


def _pair(a: Num, b: Num) -> Num:
    """The 2-norm of two times."""
    return (a * a + b * b) ** 0.5


def _slower(steps: Num, carded: Condition) -> Num:
    """Steps, each as long as one over PCI Express where it is one."""
    return steps * where(carded, PCIE_STEP, 1.0)


def over_cards(num_ranks: Num, device: Device) -> Condition:
    """Do so many ranks talk over PCI Express? Cards have bridges between two at most.

    >>> from hwmodels import catalog
    >>> [over_cards(n, catalog.device("h100-pcie")) for n in (2, 4)]
    [False, True]
    """
    fastest = max(device.links, key=lambda link: link.bytes_per_s, default=None)
    if fastest is None or all(link.name != PCIE for link in device.links):
        return False
    if fastest.name == PCIE:
        return num_ranks > 0
    return (num_ranks > 2) & (device.form_factor or "").startswith(PCIE_CARD)


def _link(num_ranks: Num, rates: Rates) -> tuple[Num, Condition]:
    """Bandwidth that joins so many ranks, and whether that is PCI Express."""
    device = rates.device
    if not device.links:
        raise UnsupportedError(f"{device.id} has no link; give its spec file one")
    carded = over_cards(num_ranks, device)
    fastest = max(link.bytes_per_s for link in device.links)
    pcie = next((link.bytes_per_s for link in device.links if link.name == PCIE), fastest)
    crossing = where(num_ranks > SOCKET_RANKS, SOCKET_FRAC, 1.0)
    return rates.link_bytes_per_s * where(carded, pcie / fastest * crossing, 1.0), carded


def _reduces_in_switch(op: CollectiveTransfer, rates: Rates) -> bool:
    """Has the device a switch that adds, and is the format one that it adds?"""
    device = rates.device
    major = (device.compute_capability or "").split(".")[0]
    switched = any(link.name == "nvlink" for link in device.links)
    cards = (device.form_factor or "").startswith(PCIE_CARD)
    floating = not op.dtype.name.startswith("int")
    return major in SWITCHED_REDUCTION and switched and not cards and floating


MODEL: Final = KernelModel(
    name="collective",
    ops=(CollectiveTransfer,),
    constants=CONSTANTS,
    timing=collective_seconds,
)
CUSTOM: Final = KernelModel(
    name="custom_all_reduce",
    ops=(CustomAllReduce,),
    constants=CUSTOM_CONSTANTS,
    timing=custom_seconds,
)
CLUSTER: Final = KernelModel(
    name="cluster_collective",
    ops=(ClusterCollective,),
    constants=CLUSTER_CONSTANTS,
    timing=cluster_seconds,
)
EXPERTS: Final = KernelModel(
    name="expert_exchange",
    ops=(ExpertExchange,),
    constants=EXPERT_CONSTANTS,
    timing=expert_seconds,
)
