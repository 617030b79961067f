"""Recurrences of every channel by itself: the walk over time that they share.

A channel's state is a few fp32 numbers in fast memory; a step takes one value a channel from each
input and gives one to the output. Channels are taken in tiles, a tile walks over time in chunks:

    reads  = e batch len channels inputs + 4 channels params,   writes = e batch len channels

Nothing but the order of time is sequential, so the traffic is compulsory whatever the fast memory.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import FP32, DType
from workloads.machine import Machine, SlowArray, Tile, slices
from workloads.numeric import Num, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.elementwise import Elementwise
from workloads.ops.streamed import Lanes
from workloads.work import Work

FP32_BYTES = FP32.bits // 8


@dataclass(frozen=True, kw_only=True)
class ChannelScan(ProvedOp):
    """Arrays [batch, len_seq, channels] in and out; states and parameters in fp32.

    A subclass names its arrays and states `flops` and `special` of a channel's step.
    """

    sources: ClassVar[tuple[str, ...]]
    """Inputs, one value a channel and step each."""
    params: ClassVar[tuple[str, ...]] = ()
    """Inputs [channels], fp32, read once."""
    states: ClassVar[tuple[float, ...]]
    """What each number of a channel's state starts from."""
    flops: ClassVar[int]
    special: ClassVar[int] = 0

    batch: Num = 1
    len_seq: Num
    channels: Num
    dtype: DType = FP32

    @abstractmethod
    def step(self, given: Sequence[Lanes], params: Sequence[Lanes], held: Sequence[Tile]) -> Lanes:
        """One step of a tile of channels: the output; the states held are overwritten."""

    @property
    def steps(self) -> Num:
        """Channel steps."""
        return self.batch * self.len_seq * self.channels

    def state_bytes(self) -> Num:
        """What decoding keeps, whatever the length: the states of all channels in fp32.

        One more token is the op at len_seq = 1, with that much read and written besides.
        """
        return self.batch * self.channels * len(self.states) * FP32_BYTES

    def stages(self) -> tuple[Stage, ...]:
        """Timed as one pass over the arrays; the chain of dependent steps is not."""
        kernel = Elementwise(
            num_elements=self.steps + len(self.params) * self.channels,
            num_inputs=len(self.sources), vector_flops_per_element=self.flops,
            special_ops_per_element=self.special, dtype=self.dtype,
        )  # fmt: skip
        return (Stage("scan", kernel),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Channels of a tile and steps of a chunk: the widest tile that one step leaves."""
        kept = (len(self.states) + len(self.params)) * FP32_BYTES
        cell = (len(self.sources) + 1) * self.dtype.bytes_per_element
        require_fit(self.name, fast_bytes, kept + cell, "one step of one channel")
        widest = minimum(self.channels, floor(fast_bytes / (kept + cell)))
        tile = ceil_div(self.channels, ceil_div(self.channels, widest))
        chunk = floor((fast_bytes - tile * kept) / (tile * cell))
        return {"tile_channels": tile, "tile_steps": minimum(self.len_seq, chunk)}

    def work(self, fast_bytes: Num) -> Work:
        """Counts as in the module's docstring."""
        self.tiling(fast_bytes)
        e = self.dtype.bytes_per_element
        return Work(
            vector_flops=self.steps * self.flops,
            special_ops=self.steps * self.special,
            read_bytes=self.steps * e * len(self.sources) + self._param_bytes(),
            write_bytes=self.steps * e,
        )

    def _param_bytes(self) -> Num:
        return self.channels * len(self.params) * FP32_BYTES

    def compulsory_bytes(self) -> Num:
        """Each input once, the output once."""
        e = self.dtype.bytes_per_element
        return self.steps * e * (len(self.sources) + 1) + self._param_bytes()

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random sources and parameters."""
        shape = (int(self.batch), int(self.len_seq), int(self.channels))
        found = {name: rng.standard_normal(shape) for name in self.sources}
        return found | {name: rng.standard_normal(shape[2]) for name in self.params}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: tiles of channels, sequences, chunks of time."""
        tiles = {key: int(v) for key, v in self.tiling(machine.fast_bytes).items()}
        slow = {name: machine.place(inputs[name], self.dtype) for name in self.sources}
        fixed = {name: machine.place(inputs[name], FP32) for name in self.params}
        y = machine.empty(inputs[self.sources[0]].shape, self.dtype)
        with machine.kernel():
            for chans in slices(int(self.channels), tiles["tile_channels"]):
                with machine.scope():
                    params = [machine.load(array, chans) for array in fixed.values()]
                    for i in range(int(self.batch)):
                        with machine.scope():
                            self._walk(machine, slow, params, y, (i, chans), tiles["tile_steps"])
        return {"y": y.values}

    def _walk(
        self,
        mc: Machine,
        slow: Mapping[str, SlowArray],
        params: Sequence[Tile],
        y: SlowArray,
        place: tuple[int, slice],
        chunk: int,
    ) -> None:
        """One sequence, one tile of channels."""
        i, chans = place
        held = [mc.full((chans.stop - chans.start,), start) for start in self.states]
        fixed = [Lanes(mc, p.values) for p in params]
        for steps in slices(int(self.len_seq), chunk):
            with mc.scope():
                given = [mc.load(array, (i, steps, chans)) for array in slow.values()]
                out = mc.full(given[0].shape, 0.0, self.dtype)
                for t in range(out.shape[0]):
                    now = [Lanes(mc, tile.values[t]) for tile in given]
                    out.values[t] = self.step(now, fixed, held).values
                mc.store(out, y, (i, steps, chans))


def held_lanes(lanes: Lanes, tile: Tile) -> Lanes:
    """What a held tile has, in the registers of the lanes that `lanes` are of."""
    return Lanes(lanes.machine, tile.values.copy())


def larger(a: Lanes, b: Lanes) -> Lanes:
    """The maximum, one flop an element."""
    a.machine.count(vector=a.values.size)
    return Lanes(a.machine, np.maximum(a.values, b.values))


def at_least(a: Lanes, threshold: float) -> Lanes:
    """1 where a value reaches the threshold, else 0: one flop an element."""
    a.machine.count(vector=a.values.size)
    return Lanes(a.machine, (a.values >= threshold) * 1.0)
