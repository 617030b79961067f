"""Time of a copy over the link to the host's memory.

    T = latency + bytes / (link frac)

A copy engine streams pinned memory. The share of the wire rate is that of packet headers at 256
bytes a packet and of flow control; 24 to 26 GB/s of 31.5 are commonly reported for PCIe 4.0 x16
(NVIDIA's bandwidthTest on A100). No published row of `calib/` times one, so nothing is fitted.
"""

from __future__ import annotations

from typing import Final

from hwmodels.errors import UnsupportedError
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import Conditions, Constants, KernelModel, KernelTime
from simulator.kernel_time.rates import Rates
from simulator.kernel_time.terms import real
from workloads.numeric import any_true
from workloads.ops.host_copy import HostCopy

CONSTANTS: Final = (
    Constant(name="latency_s", meaning="from the call to the first byte", unit="s",
             start=1e-5, low=1e-6, high=1e-4, fitted=False, source="usual of cudaMemcpyAsync"),
    Constant(name="link_frac", meaning="sustained share of the wire rate", unit="1",
             start=0.8, low=0.3, high=1.0, fitted=False, source="24 to 26 of 31.5 GB/s"),
)  # fmt: skip


def copy_seconds(
    op: HostCopy, rates: Rates, constants: Constants, conditions: Conditions
) -> KernelTime:
    """Seconds of one copy; refuses a device without a link to its host."""
    link = rates.host_bytes_per_s
    if not any_true(real(link) > 0):
        raise UnsupportedError(f"{rates.device.id} states no link to the host's memory")
    wire = op.num_bytes / (link * constants["link_frac"])
    latency = constants["latency_s"]
    return KernelTime(latency + wire, {"latency": latency, "host": wire})


MODEL: Final = KernelModel(
    name="host_copy", ops=(HostCopy,), constants=CONSTANTS, timing=copy_seconds
)
