"""Time of one collective: the best protocol or algorithm the library has, over the device's link.

With n ranks, B bytes, `steps` and `wire` of the ring, link bandwidth BW per direction:

    T = launch + min over
        LL       ll_step steps                    + wire g / (ll BW)         small messages, flags
        LL128    ll128    + ll128_step steps      + wire g / (ll128 BW)      inlined with the data
        Simple   simple   + simple_step steps     + wire g / (simple BW)     large messages
        one-shot oneshot  + (n - 1) B             / (oneshot BW)   every rank reads all buffers
        two-shot twoshot  + 2 (n - 1) / n B       / (twoshot BW)   reduce-scatter, then gather
    g = 1 + pairs / (n - 1)                        few ranks use their links less fully

LL, LL128 and Simple are NCCL's protocols (NCCL documentation, NCCL_PROTO); one- and two-shot are
the all-reduce kernels of serving frameworks and stand beside NCCL for the labels of such kernels
only. On several nodes the bytes cross the network besides, once a node and step:

    T += net_step (2 or 1)(N - 1) + wire / net_bytes_per_s

A device figure for the network does not exist: its bandwidth is a constant by label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hwmodels.errors import UnsupportedError
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import norm, smaller
from workloads.numeric import Num, maximum, where
from workloads.op import Op
from workloads.ops.collective_transfer import CollectiveTransfer

LIBRARY: Final = "nccl"
CUSTOM: Final = "custom"
"""Kernel labels start with one of these; 'custom' ones may also run one- or two-shot."""

K: Final = ("kernel",)
LIB: Final = ("library",)
CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of a collective: launch and first flags", unit="s",
             start=6e-6, low=5e-7, high=6e-5, spread=0.7, by=K),
    Constant(name="ll_step_s", meaning="one step of LL: a flag's way", unit="s",
             start=9e-7, low=1e-7, high=1e-5, spread=0.5, by=LIB),
    Constant(name="ll_frac", meaning="share of the link that LL's payload gets", unit="1",
             start=0.25, low=0.02, high=0.5, spread=0.4, by=LIB),
    Constant(name="ll128_s", meaning="set-up of LL128", unit="s",
             start=1.5e-6, low=1e-8, high=2e-5, spread=0.7, by=LIB),
    Constant(name="ll128_step_s", meaning="one step of LL128", unit="s",
             start=1.2e-6, low=1e-7, high=1e-5, spread=0.5, by=LIB),
    Constant(name="ll128_frac", meaning="share of the link that LL128's payload gets", unit="1",
             start=0.4, low=0.05, high=0.95, spread=0.4, by=LIB),
    Constant(name="simple_s", meaning="set-up of the Simple protocol", unit="s",
             start=1.2e-5, low=1e-6, high=1e-4, spread=0.7, by=LIB),
    Constant(name="simple_step_s", meaning="one step of Simple: a memory fence", unit="s",
             start=1.5e-6, low=1e-7, high=2e-5, spread=0.5, by=LIB),
    Constant(name="simple_frac", meaning="share of the link that Simple's payload gets", unit="1",
             start=0.8, low=0.1, high=1.0, spread=0.2, by=LIB),
    Constant(name="pairs", meaning="extra traffic time of few ranks, over n - 1", unit="1",
             start=0.4, low=0.01, high=3.0, spread=0.5, by=LIB),
    Constant(name="oneshot_s", meaning="set-up of a one-shot all-reduce: a barrier", unit="s",
             start=1e-6, low=1e-8, high=2e-5, by=K),
    Constant(name="oneshot_frac", meaning="share of the link of a one-shot all-reduce", unit="1",
             start=0.5, low=0.02, high=1.0, spread=0.6, by=K),
    Constant(name="twoshot_s", meaning="set-up of a two-shot all-reduce: two barriers", unit="s",
             start=4e-6, low=1e-8, high=4e-5, by=K),
    Constant(name="twoshot_frac", meaning="share of the link of a two-shot all-reduce", unit="1",
             start=0.5, low=0.02, high=1.0, spread=0.6, by=K),
    Constant(name="net_step_s", meaning="one step between nodes", unit="s",
             start=1.5e-5, low=1e-6, high=2e-4, by=K),
    Constant(name="net_bytes_per_s", meaning="network bandwidth of one rank", unit="B/s",
             start=2.5e10, low=1e9, high=2e11, by=K),
)  # fmt: skip


def collective_seconds(
    op: CollectiveTransfer, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one collective; sizes and rates broadcast."""
    c = constants
    if not rates.device.links:
        raise UnsupportedError(f"{rates.device.id} has no link; give its spec file one")
    link = rates.link_bytes_per_s
    others = maximum(op.num_ranks - 1, 1)
    wire, steps = op.wire_bytes() * (1 + c["pairs"] / others), op.num_steps()
    best = _fastest(
        c["ll_step_s"] * steps + wire / (c["ll_frac"] * link),
        c["ll128_s"] + c["ll128_step_s"] * steps + wire / (c["ll128_frac"] * link),
        c["simple_s"] + c["simple_step_s"] * steps + wire / (c["simple_frac"] * link),
    )
    if op.kind == "all_reduce" and conditions.kernel.startswith(CUSTOM):
        best = _fastest(
            best,
            c["oneshot_s"] + others * op.num_bytes / (c["oneshot_frac"] * link),
            c["twoshot_s"] + 2 * others / op.num_ranks * op.num_bytes / (c["twoshot_frac"] * link),
        )
    network = _network(op, c)
    memory = op.compulsory_bytes() / rates.hbm_bytes_per_s
    terms = {"launch": c["launch_s"], "link": best, "network": network, "hbm": memory}
    return KernelTime(c["launch_s"] + norm(4, best, memory) + network, terms)


def _network(op: CollectiveTransfer, c: Constants) -> Num:
    """Seconds between nodes; nothing on one node."""
    rounds = (2 if op.kind == "all_reduce" else 1) * (op.num_nodes - 1)
    crossing = op.wire_bytes() / c["net_bytes_per_s"]
    return where(op.num_nodes > 1, c["net_step_s"] * rounds + crossing, 0.0)


def _fastest(*times: Num) -> Num:
    best = times[0]
    for t in times[1:]:
        best = smaller(best, t)
    return best


def labels(op: Op, conditions: Conditions) -> Mapping[str, str]:
    """The kernel, which carries the network where there is one, and the library it is of."""
    kernel = conditions.kernel
    library = LIBRARY if kernel.startswith(CUSTOM) else kernel.removesuffix("-nodes")
    return {"kernel": kernel, "library": library, "host": conditions.host}


MODEL: Final = KernelModel(
    name="collective",
    ops=(CollectiveTransfer,),
    constants=CONSTANTS,
    timing=collective_seconds,
    labels=labels,
)
