"""A copy between the host's memory and the device's: what offloaded caches and states cost.

    host bytes = device bytes = n;   no arithmetic

The link is the device's own (chip-to-chip where it has one, else PCIe), one direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import DType
from workloads.numeric import Num
from workloads.op import Op
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class HostCopy(Op):
    """`num_bytes` from the host to the device, or back (`to_host`).

    >>> HostCopy(num_bytes=4096).work(2**20).host_bytes
    4096
    """

    name: ClassVar[str] = "host_copy"
    num_bytes: Num
    to_host: bool = False

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """None: a copy engine streams."""
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """The bytes once over the link, once into or out of device memory."""
        if self.to_host:
            return Work(read_bytes=self.num_bytes, host_bytes=self.num_bytes)
        return Work(write_bytes=self.num_bytes, host_bytes=self.num_bytes)

    def compulsory_bytes(self) -> Num:
        """The bytes once in device memory."""
        return self.num_bytes

    def min_flops(self) -> Mapping[DType, Num]:
        """None."""
        return {}
