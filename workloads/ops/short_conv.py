"""Short causal convolution of each channel by itself: over a sequence, or one step with a state.

    y[b, t, c] = act(sum_{j < width} w[c, j] x[b, t - j, c])

It stands before the scans of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7) and Gated
DeltaNet (arXiv 2412.06464, figure 1). Counts are minima over kernels: each element once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.numeric import Num, any_true
from workloads.op import Op
from workloads.work import Work

ACTIVATION_SPECIAL_OPS = 2
"""SiLU: an exponential and a reciprocal."""
ACTIVATION_FLOPS = 2


@dataclass(frozen=True, kw_only=True)
class ShortConv(Op):
    """Depthwise causal convolution of x[batch, len_seq, channels] by w[channels, width].

    With `update` it makes one step (len_seq = 1) and reads and writes a state of width - 1 earlier
    elements a channel. With `activation` a SiLU follows. For B, L, C, W and e bytes an element:

        bytes = B L C 2 e + C W e          update: + B C 2 (W - 1) e
        vector flops = B L C 2 W           activation: + 2 flops and 2 special functions

    >>> ShortConv(batch=1, len_seq=4096, channels=8192).work(2**16).bytes
    134283264.0
    >>> ShortConv(batch=64, channels=8192, update=True).work(2**16).bytes  # 64 C (2 + 6) 2 + 4 C 2
    8454144.0
    """

    name: ClassVar[str] = "short_conv"
    batch: Num = 1
    len_seq: Num = 1
    channels: Num
    width: Num = 4
    dtype: DType = BF16
    activation: bool = True
    update: bool = False

    def check(self) -> None:
        """An update is one step."""
        if self.update and any_true(self.len_seq != 1):
            raise InputError(f"{self.name}: an update makes one step; leave len_seq at 1")

    def elements(self) -> Num:
        """Elements of x, and of y."""
        return self.batch * self.len_seq * self.channels

    def state_bytes(self) -> Num:
        """One copy of the states that an update reads and writes; 0 otherwise."""
        if not self.update:
            return 0
        return self.batch * self.channels * (self.width - 1) * self.dtype.bytes_per_element

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No choice that changes the traffic: halos of width - 1 elements are left out."""
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """Counts as in the class docstring, one launch."""
        e, n, act = self.dtype.bytes_per_element, self.elements(), int(self.activation)
        return Work(
            vector_flops=n * (2 * self.width + ACTIVATION_FLOPS * act),
            special_ops=n * ACTIVATION_SPECIAL_OPS * act,
            read_bytes=(n + self.channels * self.width) * e + self.state_bytes(),
            write_bytes=n * e + self.state_bytes(),
        )

    def compulsory_bytes(self) -> Num:
        """x, y and the filter once; the states read and written."""
        e = self.dtype.bytes_per_element
        return (2 * self.elements() + self.channels * self.width) * e + 2 * self.state_bytes()
