"""Time of dispatch and combine of routed experts, by DeepEP's two kinds of kernel.

T tokens of h bytes, E experts on n ranks. A token's block of the low-latency kernels sends its
copies one after another; blocks are as many as experts, or as SMs:

    T = launch + E expert + ceil(T / blocks) h / row + |wire / (link BW), crossing / (net port)|

The throughput kernels keep a few SMs, which copy every row, also the ones that stay on the rank:

    T = launch + E expert + h / row + |copied / copy, crossing / (net port)|

|a, b| is the 2-norm. A launch between nodes costs `net_step` more. Bytes: `ExpertExchange`.
"""

from __future__ import annotations

from typing import Final

from simulator.kernel_time.collective import link_share, pair, timed
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import ceil, larger
from workloads.numeric import Num, minimum, where
from workloads.ops.expert_exchange import ExpertExchange

K: Final = ("kernel",)
EXPERT_CONSTANTS: Final = (
    Constant(name="launch_s", meaning="floor of an exchange: launch, counts, barrier", unit="s",
             start=2e-5, low=1e-6, high=1e-4, spread=0.7, by=K),
    Constant(name="expert_s", meaning="one expert's counter and its flag", unit="s",
             start=1e-8, low=1e-10, high=3e-7, by=K),
    Constant(name="row_bytes_per_s", meaning="rate at which one block moves one token", unit="B/s",
             start=2e9, low=1e8, high=1e12, by=K),
    Constant(name="link_frac", meaning="share of the link that low-latency kernels get", unit="1",
             start=0.5, low=0.02, high=1.0, spread=0.6, by=K),
    Constant(name="copy_bytes_per_s", meaning="rate of the throughput kernels' SMs", unit="B/s",
             start=2.5e11, low=1e10, high=5e12, spread=0.6, by=K),
    Constant(name="net_frac", meaning="share of the network port's bandwidth", unit="1",
             start=0.7, low=0.02, high=1.0, spread=0.5, by=K),
    Constant(name="net_step_s", meaning="latency of the network, once", unit="s",
             start=1e-5, low=1e-7, high=2e-4, by=K),
)  # fmt: skip


def expert_seconds(
    op: ExpertExchange, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one dispatch or combine; sizes and rates broadcast."""
    c = constants
    if op.low_latency:
        rounds = ceil(op.num_tokens / _blocks(op.num_experts, rates))
        moved = op.wire_bytes() / (c["link_frac"] * link_share(rates, 1.0)[0])
    else:
        rounds = 1.0
        moved = op.copied_bytes() / c["copy_bytes_per_s"]
    floor = c["launch_s"] + c["expert_s"] * op.num_experts
    floor = floor + rounds * op.row_bytes() / c["row_bytes_per_s"]
    away = where(op.num_nodes > 1, c["net_step_s"], 0.0)
    crossing = op.crossing_bytes() / (c["net_frac"] * op.port_bytes_per_s)
    return timed(op, rates, floor + away, pair(moved, crossing))


def _blocks(num_experts: Num, rates: Rates) -> Num:
    """Thread blocks of a low-latency kernel: a warp group an expert, spread over the SMs."""
    each = larger(ceil(num_experts / rates.num_sms), 1.0)
    return minimum(ceil(num_experts / each), rates.num_sms)


EXPERTS: Final = KernelModel(
    name="expert_exchange",
    ops=(ExpertExchange,),
    constants=EXPERT_CONSTANTS,
    timing=expert_seconds,
)
