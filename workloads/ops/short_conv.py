"""Short causal convolution of each channel by itself: over a sequence, or one step with a state.

    y[b, t, c] = act(sum_{j < width} w[c, j] x[b, t - j, c])

It stands before the scans of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7) and Gated
DeltaNet (arXiv 2412.06464, figure 1). Counts are minima over kernels: each element once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, any_true
from workloads.op import Arrays, ProvedOp
from workloads.work import Work

ACTIVATION_SPECIAL_OPS = 2
"""SiLU: an exponential and a reciprocal."""
ACTIVATION_FLOPS = 2


@dataclass(frozen=True, kw_only=True)
class ShortConv(ProvedOp):
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

    # ---- the program -------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x[batch, len_seq, channels], w[channels, width], and the state of an update."""
        batch, channels, width = int(self.batch), int(self.channels), int(self.width)
        made = {
            "x": rng.standard_normal((batch, int(self.len_seq), channels)),
            "w": rng.standard_normal((channels, width)),
        }
        if self.update:
            made["state"] = rng.standard_normal((batch, channels, width - 1))
        return made

    def reference(self, inputs: Arrays) -> Arrays:
        """Tap by tap over the input behind its history; the last width - 1 elements are left."""
        x, taps = inputs["x"].swapaxes(1, 2), inputs["w"]
        width, length = taps.shape[1], x.shape[2]
        before = inputs["state"] if self.update else np.zeros((*x.shape[:2], width - 1))
        padded = np.concatenate([before, x], axis=2)
        y = np.zeros_like(x)
        for j in range(width):
            y += taps[:, j, None] * padded[:, :, width - 1 - j : width - 1 - j + length]
        if self.activation:
            y = y / (1 + np.exp(-y))
        out = {"y": y.swapaxes(1, 2)}
        return out | ({"state": padded[:, :, length:]} if self.update else {})

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Channel by channel, its taps read once; the history stays beside the piece."""
        slow = {key: machine.place(value, self.dtype) for key, value in inputs.items()}
        y = machine.empty(inputs["x"].shape, self.dtype)
        with machine.kernel():
            for c in range(int(self.channels)):
                with machine.scope():
                    taps = machine.load(slow["w"], c)
                    for b in range(int(self.batch)):
                        with machine.scope():
                            self._row(machine, slow, y, taps, (b, c))
        return {"y": y.values} | ({"state": slow["state"].values} if self.update else {})

    def _row(
        self, mc: Machine, slow: dict[str, SlowArray], y: SlowArray, taps: Tile, at: tuple[int, int]
    ) -> None:
        """One channel of one sequence."""
        (b, c), width = at, int(self.width)
        e = self.dtype.bytes_per_element
        if self.update:
            history = mc.load(slow["state"], (b, c))
        else:
            history = mc.hold(np.zeros(width - 1), self.dtype)
        step = max(int((mc.fast_bytes - mc.used_bytes) // (e + 4)), 1)
        for part in slices(int(self.len_seq), step):
            with mc.scope():
                piece = mc.load(slow["x"], (b, part, c))
                window = np.concatenate([history.values, piece.values])
                sums = _taps_over(window, taps.values)
                out = mc.vector(sums, per_element=2 * width)
                if self.activation:
                    gate = 1 / (1 + np.exp(-out.values))
                    mc.special(out.values, per_element=ACTIVATION_SPECIAL_OPS, into=out)
                    mc.vector(out.values * gate, per_element=ACTIVATION_FLOPS, into=out)
                mc.store(out, y, (b, part, c))
            history.values[...] = window[len(window) - width + 1 :]
        if self.update:
            mc.store(history, slow["state"], (b, c))


def _taps_over(window: Values, taps: Values) -> Values:
    """sum_j w[j] x[t - j] for every t behind the first width - 1 elements."""
    return np.asarray(np.convolve(window, taps, mode="valid"))
