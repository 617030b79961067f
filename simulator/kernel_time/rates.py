"""The figures of a device that kernel models divide by, as numbers that can be moved.

A `Rates` field is a number or an array, also a complex one: the derivative of a time with respect
to a device figure is taken by the complex step (Squire and Trapp 1998), all figures in one call,
with an array that moves one figure an entry.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from hwmodels.device import Device
from hwmodels.dtypes import FP32, DType
from hwmodels.errors import UnsupportedError
from workloads.numeric import Num

SPECIAL_OPS_PER_CLK: Final = 16.0
"""Special-function results per clock and SM where a device states none: the figure of every
NVIDIA data-centre part since Volta (CUDA C++ programming guide, arithmetic throughput)."""

UNITS: Final = ("SM", "CU")
"""What a device must be built of for tiles, waves and thread blocks to make sense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates and sizes of one device, SI units; `device` carries what is not a number.

    `matmul_scale` and `vector_scale` multiply every matrix and vector rate; `smem_bytes` is one
    SM's shared memory; `link_bytes_per_s` the fastest link's, per direction (0: none),
    `host_bytes_per_s` that of the link to the host's memory (0: none).
    """

    device: Device
    num_sms: Num
    clock_hz: Num
    hbm_bytes_per_s: Num
    l2_bytes: Num
    smem_bytes: Num
    special_ops_per_clk: Num
    link_bytes_per_s: Num
    host_bytes_per_s: Num = 0.0
    matmul_scale: Num = 1.0
    vector_scale: Num = 1.0

    def matmul_flops_per_s(self, dtype: DType) -> Num:
        """Dense peak rate of products in that format; raises `UnsupportedError` without one."""
        return self.device.matmul_rate_flops_per_s(dtype)[0] * self.matmul_scale

    def has_tensor_path(self, dtype: DType) -> bool:
        """Do products in that format run on tensor cores?"""
        return self.device.matmul_rate_flops_per_s(dtype)[1] == "tensor"

    @property
    def vector_flops_per_s(self) -> Num:
        """Rate of the fp32 lanes."""
        rate = self.device.vector_rate_flops_per_s(FP32)
        if rate is None:
            raise UnsupportedError(f"{self.device.id} has no fp32 vector rate")
        return rate * self.vector_scale

    @property
    def special_ops_per_s(self) -> Num:
        """Special-function results per second over all SMs."""
        return self.special_ops_per_clk * self.num_sms * self.clock_hz

    @property
    def sm_clocks_per_s(self) -> Num:
        """SM clocks per second over all SMs: bytes per clock per SM times this is a bandwidth."""
        return self.num_sms * self.clock_hz

    def lifted(self) -> Rates:
        """With one more trailing axis on every array, to broadcast against tile choices."""
        arrays: dict[str, Any] = {
            f.name: value[..., None]
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), np.ndarray)
        }
        return dataclasses.replace(self, **arrays) if arrays else self


PATHS: Final = {
    "num_sms": "num_sms",
    "clock_hz": "clock_hz",
    "hbm_bytes_per_s": "memory.hbm.bytes_per_s",
    "l2_bytes": "memory.l2.capacity_bytes",
    "smem_bytes": "memory.smem.capacity_bytes",
    "special_ops_per_clk": "sm.special_ops_per_clk",
    "link_bytes_per_s": "links.bytes_per_s",
    "host_bytes_per_s": "links.host.bytes_per_s",
    "matmul_scale": "tensor_flops_per_s",
    "vector_scale": "vector_flops_per_s",
}
"""Fields of `Rates` that move, with the path of the Device figure each stands for."""


@lru_cache(maxsize=256)
def rates_of(device: Device) -> Rates:
    """The figures of a device; raises `UnsupportedError` where it has no rated device memory."""
    memory = device.hbm
    if device.sm_unit not in UNITS:
        raise UnsupportedError(
            f"{device.id} is built of {device.sm_unit}s, kernel models of {' and '.join(UNITS)}s; "
            "ask for the bound rung"
        )
    if memory.bytes_per_s is None or len(device.memory) < 2:
        raise UnsupportedError(
            f"{device.id} has no memory hierarchy with a rated device memory; "
            "give a spec file with both"
        )
    shared = [level for level in device.memory[:-1] if level.num_units == 1]
    private = [level for level in device.memory[:-1] if level.num_units > 1]
    return Rates(
        device=device,
        num_sms=float(device.num_sms),
        clock_hz=device.tensor_clock_hz or device.clock_hz,
        hbm_bytes_per_s=memory.bytes_per_s,
        l2_bytes=shared[-1].capacity_bytes if shared else device.memory[-2].capacity_bytes,
        smem_bytes=private[-1].capacity_bytes if private else device.memory[0].capacity_bytes,
        special_ops_per_clk=device.sm.special_ops_per_clk or SPECIAL_OPS_PER_CLK,
        link_bytes_per_s=max((link.bytes_per_s for link in device.links), default=0.0),
        host_bytes_per_s=device.host_bytes_per_s or 0.0,
    )
