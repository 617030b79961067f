"""Time of collectives on one node: the best protocol or algorithm, over the device's links.

With n ranks, B bytes, k = 2 for an all-reduce and 1 otherwise, S dependent steps, link bandwidth
BW per direction and the bytes that a ring's busiest link carries, with its start-up:

    wire = B / n (k (n - 1) + start)

    T = launch + min over
        LL       ll_step S + wire / (ll SMs f) + 2 wire / BW     small messages: half is flags
        LL128    ll128 + |ll128_step S, wire / (ll128 BW)|       a flag every 128 bytes
        Simple   simple + |simple_step S, wire / (simple BW)|    large messages, memory fences
        NVLS     nvls + n / (n - 1) B / (nvls BW)                all-reduce inside the switch

LL, LL128 and Simple are NCCL's protocols, NVLS its in-switch algorithm (NCCL documentation,
NCCL_PROTO and NCCL_ALGO); |a, b| is the 2-norm: steps of later chunks hide behind earlier ones.
LL128 needs NVLink; NVLS a Hopper or later GPU on a switch, a floating-point format and as many
ranks as `simulator.nccl.first_switched_rank` says. A send takes LL in one step, or

        sends    |send, B / (send BW)|                           from a floor of its own; between
                                                                 cards `pcie` of it, as Simple

A profiler times kernels that wait for the last rank, which a longer kernel hides: `overlap`.
`custom_all_reduce`:

        one-shot oneshot + (n - 1) B / (oneshot BW)              every rank reads all buffers
        two-shot twoshot + 2 (n - 1) / n B / (twoshot BW)        reduce-scatter, then gather
        library  as above                                        what frameworks fall back on

Links: a card (form factor PCIe) is joined to one other at most, so groups of more than two run over
PCI Express, where a step takes `PCIE_STEP` times as long; more than `SOCKET_RANKS` of them sit on
two CPU sockets, between which `SOCKET_FRAC` of the bandwidth is left; Simple gets `pcie` of it in
place of `simple`. In a mesh of point-to-point
links a group has the share of them that leads to its own (`CollectiveTransfer.mesh_frac`).
Several nodes: `collective_nodes`; experts: `expert_exchange`.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from hwmodels.device import Device
from hwmodels.errors import UnsupportedError
from simulator import nccl
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import larger, overlap, smaller
from workloads.numeric import Condition, Num, where
from workloads.op import Op
from workloads.ops.collective_transfer import (
    ClusterCollective,
    CollectiveTransfer,
    CustomAllReduce,
)

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
NVLS: Final = "nvls"
PROFILED: Final = "nccl-profiled"
"""Run whose times are a profiler's: they hold the wait for the last rank."""

K: Final = ("kernel",)
CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of a collective: launch and first flags", unit="s",
             start=6e-6, low=5e-7, high=6e-5, spread=0.7),
    Constant(name="ll_step_s", meaning="one step of LL: a flag's way", unit="s",
             start=9e-7, low=1e-7, high=1e-5, spread=0.5, by=K),
    Constant(name="ll_bytes_per_clk", meaning="bytes an SM's share of the channels sends by LL",
             unit="B/clk/SM", start=0.06, low=0.005, high=2.0, spread=0.7, by=K),
    Constant(name="ll128_s", meaning="set-up of LL128", unit="s",
             start=1.5e-6, low=1e-8, high=2e-5, spread=0.7, by=K),
    Constant(name="ll128_step_s", meaning="one step of LL128", unit="s",
             start=1.2e-6, low=1e-7, high=1e-5, spread=0.5),
    Constant(name="ll128_frac", meaning="share of the link that LL128's payload gets", unit="1",
             start=0.3, low=0.05, high=0.95, spread=0.4, by=K),
    Constant(name="simple_s", meaning="set-up of the Simple protocol", unit="s",
             start=1.2e-5, low=1e-6, high=1e-4, spread=0.7, by=K),
    Constant(name="simple_step_s", meaning="one step of Simple: a memory fence", unit="s",
             start=2e-6, low=1e-7, high=4e-5, spread=0.7, by=K),
    Constant(name="simple_frac", meaning="share of the link that Simple's payload gets", unit="1",
             start=0.75, low=0.1, high=1.0, spread=0.2, by=K),
    Constant(name="send_s", meaning="floor of a plain send by Simple", unit="s",
             start=1.2e-5, low=1e-6, high=1e-4, spread=0.7, lent=True),
    Constant(name="start", meaning="steps' worth of traffic of starting and ending a ring",
             unit="1", start=0.4, low=0.01, high=3.0, spread=0.5, by=K),
    Constant(name="nvls_s", meaning="set-up of the reduction inside the switch", unit="s",
             start=2.5e-5, low=1e-6, high=2e-4, spread=0.7,
             source="NCCL's tables, src/graph/tuning.cc, 25 us; fitted from there"),
    Constant(name="nvls_frac", meaning="share of the link that the switch's reduction gets",
             unit="1", start=0.6, low=0.1, high=1.0, spread=0.2),
    Constant(name="wait_s", meaning="wait for the last rank in times that a profiler states",
             unit="s", start=4e-5, low=1e-7, high=2e-4, spread=0.7, unlearned=1e-7),
    Constant(name="send_frac", meaning="share of the link that a plain send gets", unit="1",
             start=0.85, low=0.1, high=1.0, spread=0.3, lent=True),
    Constant(name="send_launch_s", meaning="floor of a plain send by LL", unit="s",
             start=6e-6, low=5e-7, high=6e-5, spread=0.7, lent=True),
    Constant(name="pcie_frac", meaning="share of PCI Express that Simple's payload gets", unit="1",
             start=0.6, low=0.1, high=1.0, spread=0.3, by=K, lent=True),
)  # fmt: skip

LIBRARY_NAMES: Final = (
    "launch_s", "ll_step_s", "ll_bytes_per_clk", "ll128_s", "ll128_step_s", "ll128_frac",
    "simple_s", "simple_step_s", "simple_frac", "start", "nvls_s", "nvls_frac", "pcie_frac",
)  # fmt: skip
"""Constants of the library's all-reduce that large messages of a framework fall back on."""

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
    *(dataclasses.replace(c, name=f"library_{c.name}", by=()) for c in CONSTANTS
      if c.name in LIBRARY_NAMES),
)  # fmt: skip


def collective_seconds(
    op: CollectiveTransfer, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one collective of a library on one node; sizes and rates broadcast."""
    c = constants
    launch, seconds = launch_of(op, c), nccl.best(ways(op, rates, c))
    if conditions.kernel == PROFILED:
        seconds = overlap(launch + seconds, c["wait_s"]) - launch
    return timed(op, rates, launch, seconds)


def launch_of(op: CollectiveTransfer, constants: Constants) -> float:
    """The floor that all ways of a collective share; sends have their own in each."""
    return 0.0 if op.kind == "send_recv" else constants["launch_s"]


def ways(op: CollectiveTransfer, rates: Rates, constants: Constants) -> dict[nccl.Way, Num]:
    """Seconds by algorithm and protocol, launch aside; infinite where a group cannot take one."""
    c = constants
    if op.kind == "send_recv":
        return _sends(op, rates, c)
    link, carded = link_of(op, rates)
    top = _between_sockets(op, link, carded)
    wire, steps = _wire(op, c["start"]), _slower(op.num_steps(), carded)
    sent = wire / (c["ll_bytes_per_clk"] * rates.sm_clocks_per_s) + 2 * wire / top
    share = where(carded, c["pcie_frac"], c["simple_frac"])
    simple = pair(c["simple_step_s"] * steps, wire / smaller(share * link, top))
    ll128 = c["ll128_s"] + pair(c["ll128_step_s"] * steps, wire / (c["ll128_frac"] * link))
    found = {
        (nccl.RING, nccl.LL): c["ll_step_s"] * steps + sent,
        (nccl.RING, nccl.LL128): where(carded, np.inf, ll128),
        (nccl.RING, nccl.SIMPLE): c["simple_s"] + simple,
    }
    efficiency = nccl.switch_efficiency(rates.device)
    if op.kind == "all_reduce" and efficiency and not op.dtype.name.startswith("int"):
        gathered = op.num_ranks / larger(op.num_ranks - 1, 1.0) * op.num_bytes
        switched = c["nvls_s"] + gathered / (c["nvls_frac"] * link)
        many = np.greater_equal(op.num_ranks, nccl.first_switched_rank(efficiency))
        found[NVLS, nccl.SIMPLE] = where(many, switched, np.inf)
    return found


def _sends(op: CollectiveTransfer, rates: Rates, c: Constants) -> dict[nccl.Way, Num]:
    link, carded = link_of(op, rates)
    top = _between_sockets(op, link, carded)
    sent = op.num_bytes / (c["ll_bytes_per_clk"] * rates.sm_clocks_per_s) + 2 * op.num_bytes / top
    small = c["send_launch_s"] + c["ll_step_s"] * _slower(1.0, carded) + sent
    share = where(carded, c["pcie_frac"], c["send_frac"])
    large = pair(c["send_s"], op.num_bytes / smaller(share * link, top))
    return {(nccl.DIRECT, nccl.LL): small, (nccl.DIRECT, nccl.SIMPLE): large}


def custom_seconds(
    op: CustomAllReduce, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of a framework's own all-reduce; sizes and rates broadcast."""
    c = constants
    link, carded = link_of(op, rates)
    top = _between_sockets(op, link, carded)
    barrier = c["launch_s"] + c["rank_s"] * _slower(op.num_ranks, carded)
    own = barrier + smaller(
        op.one_shot_bytes() / smaller(c["oneshot_frac"] * link, top),
        c["twoshot_s"] + op.two_shot_bytes() / smaller(c["twoshot_frac"] * link, top),
    )
    library = {name: c[f"library_{name}"] for name in LIBRARY_NAMES}
    ring = library["launch_s"] + nccl.best(ways(op, rates, library))
    return timed(op, rates, 0.0, smaller(own, ring))


def timed(op: Op, rates: Rates, launch: Num, link: Num) -> KernelTime:
    """Launch, then the link, which own memory must keep up with; the kernel time of an op."""
    memory = op.work(0.0).bytes / rates.hbm_bytes_per_s
    terms = {"launch": launch, "link": link, "hbm": memory}
    return KernelTime(launch + overlap(link, memory), terms)


def _wire(op: CollectiveTransfer, start: Num) -> Num:
    """Bytes of the busiest link, with what starting and ending the ring is worth."""
    return op.wire_bytes() + start * op.num_bytes / op.num_ranks


def pair(a: Num, b: Num) -> Num:
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


def link_of(op: CollectiveTransfer, rates: Rates) -> tuple[Num, Condition]:
    """Bandwidth that joins a rank to its group, and whether that is PCI Express."""
    each = op.ranks_per_node() if isinstance(op, ClusterCollective) else op.num_ranks
    link, carded = link_share(rates, each * op.stride)
    return link * op.mesh_frac, carded


def link_share(rates: Rates, span: Num) -> tuple[Num, Condition]:
    """The same for ranks that span so many places."""
    device = rates.device
    if not device.links:
        raise UnsupportedError(f"{device.id} has no link; give its spec file one")
    carded = over_cards(span, device)
    fastest = max(link.bytes_per_s for link in device.links)
    pcie = next((link.bytes_per_s for link in device.links if link.name == PCIE), fastest)
    return rates.link_bytes_per_s * where(carded, pcie / fastest, 1.0), carded


def _between_sockets(op: CollectiveTransfer, link: Num, carded: Condition) -> Num:
    """The most that passes where cards sit on two sockets; the link itself elsewhere."""
    if op.root_bytes_per_s:
        return where(carded, smaller(link, op.root_bytes_per_s + 0 * link), link)
    far = np.greater(op.num_ranks * op.stride, SOCKET_RANKS) & np.asarray(carded, dtype=bool)
    return link * where(far if isinstance(far, np.ndarray) else bool(far), SOCKET_FRAC, 1.0)


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
