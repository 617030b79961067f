"""Mamba's selective scan, fused and unfused (Gu and Dao 2023, arXiv 2312.00752).

For one channel with `state_dim` states (Algorithm 2, section 3.3.2 and appendix D), per time step:

    delta = softplus(delta)                        (optional)
    h     = exp(delta A) h + (delta x) B           discretisation and recurrence, h in fp32
    y     = sum over states of h C + D x
    y     = y z sigmoid(z)                         (optional gate)

x, delta, z, y are [batch, len_seq, channels]; B and C [batch, len_seq, state_dim] and shared by
all channels of a batch element; A [channels, state_dim] and D [channels], both fp32.

The fused kernel holds a tile of channels with its states in fast memory and walks over time:
nothing of size len_seq * channels * state_dim ever reaches slow memory. B and C are read once per
channel tile. The unfused contrast runs three kernels and writes exp(delta A), delta x B and h
out in full. Both do the same arithmetic, so their difference is traffic alone.

Ignored: the bias added to delta, the last state as an output, the chunk states that a backward
pass would keep, and the reshuffling that a parallel (associative) scan over time costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, ceil_div, floor, maximum, minimum
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.work import Work

FP32_BYTES = 4
"""States, A, D and every intermediate are fp32, as in the published kernel."""


@dataclass(frozen=True, kw_only=True)
class _SelectiveScan(ProvedOp):
    """What the fused and the unfused scan share: shape, arithmetic, compulsory traffic."""

    batch: Num
    len_seq: Num
    channels: Num
    state_dim: Num = 16
    gated: bool = True
    delta_softplus: bool = True
    dtype: DType = BF16

    @property
    def steps(self) -> Num:
        """Channel steps: batch * len_seq * channels."""
        return self.batch * self.len_seq * self.channels

    def vector_flops(self) -> Num:
        """6 N + 3 per channel step, 1 more with softplus, 3 more with the gate.

        Per state: delta A, times h, (delta x) B, the add, times C, the sum (6). Per channel step:
        delta x, D x and its add (3); 1 + exp in softplus; 1 + exp, z sigmoid(z), y times it.
        """
        per_step = 6 * self.state_dim + 3 + int(self.delta_softplus) + 3 * int(self.gated)
        return self.steps * per_step

    def special_ops(self) -> Num:
        """N exponentials per channel step; exp and log for softplus; exp, reciprocal to gate."""
        return self.steps * (self.state_dim + 2 * int(self.delta_softplus) + 2 * int(self.gated))

    def compulsory_bytes(self) -> Num:
        """x, delta, z, B, C in the op's format, A and D in fp32, once each; y once."""
        e = self.dtype.bytes_per_element
        shared = 2 * self.batch * self.len_seq * self.state_dim * e
        return self.steps * e * (3 + int(self.gated)) + shared + self.parameter_bytes()

    def parameter_bytes(self) -> Num:
        """A and D in fp32."""
        return self.channels * (self.state_dim + 1) * FP32_BYTES

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, delta, z [b, l, c]; b, c [b, l, n]; a [c, n], negative so that states decay; d [c]."""
        wide = (int(self.batch), int(self.len_seq), int(self.channels))
        shared = (*wide[:2], int(self.state_dim))
        delta = rng.standard_normal(wide)
        made = {
            "x": rng.standard_normal(wide),
            "delta": delta if self.delta_softplus else np.abs(delta),
            "b": rng.standard_normal(shared),
            "c": rng.standard_normal(shared),
            "a": -np.exp(rng.standard_normal((wide[2], shared[2]))),
            "d": rng.standard_normal(wide[2]),
        }
        return made | {"z": rng.standard_normal(wide)} if self.gated else made

    def reference(self, inputs: Arrays) -> Arrays:
        """The recurrence with whole-batch states, one time step after the other."""
        x, a = inputs["x"], inputs["a"]
        delta = np.log1p(np.exp(inputs["delta"])) if self.delta_softplus else inputs["delta"]
        h = np.zeros((x.shape[0], *a.shape))
        y = np.empty_like(x)
        for t in range(x.shape[1]):
            scale = delta[:, t, :, None]
            h = np.exp(scale * a) * h + scale * x[:, t, :, None] * inputs["b"][:, t, None, :]
            y[:, t] = np.einsum("bcn,bn->bc", h, inputs["c"][:, t]) + inputs["d"] * x[:, t]
        if self.gated:
            y = y * inputs["z"] / (1 + np.exp(-inputs["z"]))
        return {"y": y}

    def _place(self, machine: Machine, inputs: Arrays) -> dict[str, SlowArray]:
        placed = {k: machine.place(v, FP32 if k in "ad" else self.dtype) for k, v in inputs.items()}
        return placed | {"y": machine.empty(inputs["x"].shape, self.dtype)}


@dataclass(frozen=True, kw_only=True)
class SelectiveScan(_SelectiveScan):
    """The fused scan: discretise, scan and contract in fast memory; one kernel.

    With e bytes per element, N states and T = ceil(channels / channel tile) tiles:

        reads  = e batch len (channels (2 + gated) + 2 N T) + 4 channels (N + 1)
        writes = e batch len channels

    Fast memory holds, per channel of the tile, A, h and one scratch copy (12 N bytes), D and one
    fp32 scalar (8; a second one, 12, with softplus or the gate), and for each step of the time
    chunk its x (later y), delta and z beside the N-vectors B and C. The tile is the widest that a
    chunk of one step leaves room for (least traffic), evened out over the tiles; the chunk takes
    what is left, at no traffic.

    >>> op = SelectiveScan(batch=1, len_seq=4096, channels=5120, state_dim=16)
    >>> op.tiling(8 * 2**20)["tile_channels"], op.work(8 * 2**20).write_bytes
    (5120, 41943040.0)
    >>> op.work(8 * 2**20).read_bytes == 2 * 4096 * (5120 * 3 + 2 * 16) + 4 * 5120 * 17
    True
    """

    name: ClassVar[str] = "mamba_scan"

    def blocks(self, fast_bytes: Num) -> Num | None:
        """A block a channel of every sequence, as the published kernel launches them."""
        return self.batch * self.channels

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Widths `tile_channels` and `tile_steps`, and the `num_channel_tiles`."""
        n, e = self.state_dim, self.dtype.bytes_per_element
        per_channel = 12 * n + 8 + 4 * int(self.delta_softplus or self.gated)
        per_step = 2 * n * e
        per_cell = e * (2 + int(self.gated))
        require_fit(
            self.name, fast_bytes, per_channel + per_step + per_cell, "one step of one channel"
        )
        widest = floor((fast_bytes - per_step) / (per_channel + per_cell))
        num_tiles = ceil_div(self.channels, minimum(self.channels, widest))
        tile = ceil_div(self.channels, num_tiles)
        chunk = floor((fast_bytes - tile * per_channel) / (per_step + tile * per_cell))
        return {
            "tile_channels": tile,
            "tile_steps": minimum(self.len_seq, chunk),
            "num_channel_tiles": ceil_div(self.channels, tile),
        }

    def work(self, fast_bytes: Num) -> Work:
        """Counts as in the class docstring; the same arithmetic for every tile."""
        e = self.dtype.bytes_per_element
        tiles = self.tiling(fast_bytes)["num_channel_tiles"]
        shared = 2 * self.batch * self.len_seq * self.state_dim * e * tiles
        return Work(
            vector_flops=self.vector_flops(),
            special_ops=self.special_ops(),
            read_bytes=self.steps * e * (2 + int(self.gated)) + shared + self.parameter_bytes(),
            write_bytes=self.steps * e,
            launches=1,
        )

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Channel tiles outermost, so that A and D are read once; batch; chunks of time."""
        tiles = {key: int(v) for key, v in self.tiling(machine.fast_bytes).items()}
        slow = self._place(machine, inputs)
        with machine.kernel():
            for chans in slices(int(self.channels), tiles["tile_channels"]):
                with machine.scope():
                    a, d = machine.load(slow["a"], chans), machine.load(slow["d"], chans)
                    for i in range(int(self.batch)):
                        with machine.scope():
                            h = machine.full(a.shape, 0.0)
                            for steps in slices(int(self.len_seq), tiles["tile_steps"]):
                                with machine.scope():
                                    self._chunk(machine, slow, (i, steps, chans), a, d, h)
        return {"y": slow["y"].values}

    def _chunk(
        self,
        mc: Machine,
        slow: Mapping[str, SlowArray],
        cell: tuple[int, slice, slice],
        a: Tile,
        d: Tile,
        h: Tile,
    ) -> None:
        """One chunk of time for one tile of channels; y takes the place of x as it appears."""
        x, delta = mc.load(slow["x"], cell), mc.load(slow["delta"], cell)
        b, c = mc.load(slow["b"], cell[:2]), mc.load(slow["c"], cell[:2])
        z = mc.load(slow["z"], cell) if self.gated else None
        for t in range(x.shape[0]):
            with mc.scope():
                step = _softplus(mc, delta.values[t]) if self.delta_softplus else None
                size = (delta.values[t] if step is None else step.values)[:, None]
                drive = mc.vector(size[:, 0] * x.values[t])
                scratch = mc.vector(size * a.values)
                mc.special(np.exp(scratch.values), into=scratch)
                mc.vector(scratch.values * h.values, into=h)
                mc.vector(drive.values[:, None] * b.values[t], into=scratch)
                mc.vector(h.values + scratch.values, into=h)
                mc.free(drive, *(() if step is None else (step,)))
                y = _output(mc, h.values, c.values[t], scratch)
                _finish(mc, y, d.values, x.values[t], None if z is None else z.values[t])
                x.values[t] = y.values
        mc.store(x, slow["y"], cell)


@dataclass(frozen=True, kw_only=True)
class SelectiveScanUnfused(_SelectiveScan):
    """The contrast: exp(delta A), delta x B and all states h are written out, [b, l, c, n] each.

    Three kernels: discretise, scan, contract. With s bytes per materialised element and
    E = batch len channels N of them, T channel tiles:

        reads  = 3 s E + e batch len (channels (3 + gated) + 2 N T) + 4 channels (N + 1)
        writes = 3 s E + e batch len channels

    Source: the baseline of arXiv 2312.00752, section 3.3.2, against which fusing saves a factor
    of the order of N: here about 6 s N / (e (3 + gated)) = 3 N with bf16, fp32 states and a gate.

    >>> shape = dict(batch=1, len_seq=4096, channels=5120, state_dim=16)
    >>> unfused, fused = SelectiveScanUnfused(**shape), SelectiveScan(**shape)
    >>> round(unfused.work(8 * 2**20).bytes / fused.work(8 * 2**20).bytes, 1)
    49.1
    """

    name: ClassVar[str] = "mamba_scan_unfused"
    state_dtype: DType = FP32

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Width `tile_channels` that all three kernels can hold for one time step."""
        n, e, s = self.state_dim, self.dtype.bytes_per_element, self.state_dtype.bytes_per_element
        discretise = 8 * n + 8 + 2 * e
        scan = 4 * n + 2 * n * s
        contract = 4 * n + n * s + 12 + e * (1 + int(self.gated))
        per_channel = maximum(maximum(discretise, scan), contract)
        require_fit(self.name, fast_bytes, per_channel + n * e, "one step of one channel")
        widest = floor((fast_bytes - n * e) / per_channel)
        num_tiles = ceil_div(self.channels, minimum(self.channels, widest))
        tile = ceil_div(self.channels, num_tiles)
        return {"tile_channels": tile, "num_channel_tiles": ceil_div(self.channels, tile)}

    def work(self, fast_bytes: Num) -> Work:
        """Counts as in the class docstring; arithmetic as fused."""
        e, s = self.dtype.bytes_per_element, self.state_dtype.bytes_per_element
        tiles = self.tiling(fast_bytes)["num_channel_tiles"]
        states = 3 * s * self.steps * self.state_dim
        shared = 2 * self.batch * self.len_seq * self.state_dim * e * tiles
        narrow = self.steps * e * (3 + int(self.gated))
        return Work(
            vector_flops=self.vector_flops(),
            special_ops=self.special_ops(),
            read_bytes=states + narrow + shared + self.parameter_bytes(),
            write_bytes=states + self.steps * e,
            launches=3,
        )

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The three kernels, each over channel tiles, batch and time."""
        tile = int(self.tiling(machine.fast_bytes)["tile_channels"])
        slow = self._place(machine, inputs)
        shape = (*inputs["x"].shape, int(self.state_dim))
        slow |= {key: machine.empty(shape, self.state_dtype) for key in ("decay", "drive", "h")}
        for kernel in (self._discretise, self._scan, self._contract):
            with machine.kernel():
                for chans in slices(int(self.channels), tile):
                    with machine.scope():
                        kernel(machine, slow, chans)
        return {"y": slow["y"].values}

    def _discretise(self, mc: Machine, slow: Mapping[str, SlowArray], chans: slice) -> None:
        a = mc.load(slow["a"], chans)
        for i, t in np.ndindex(int(self.batch), int(self.len_seq)):
            with mc.scope():
                x, delta = mc.load(slow["x"], (i, t, chans)), mc.load(slow["delta"], (i, t, chans))
                b = mc.load(slow["b"], (i, t))
                step = _softplus(mc, delta.values) if self.delta_softplus else delta
                wide = mc.vector(step.values[:, None] * a.values)
                mc.special(np.exp(wide.values), into=wide)
                mc.store(wide, slow["decay"], (i, t, chans))
                drive = mc.vector(step.values * x.values)
                mc.vector(drive.values[:, None] * b.values, into=wide)
                mc.store(wide, slow["drive"], (i, t, chans))

    def _scan(self, mc: Machine, slow: Mapping[str, SlowArray], chans: slice) -> None:
        width = chans.stop - chans.start
        for i in range(int(self.batch)):
            with mc.scope():
                h = mc.full((width, int(self.state_dim)), 0.0)
                for t in range(int(self.len_seq)):
                    with mc.scope():
                        decay = mc.load(slow["decay"], (i, t, chans))
                        drive = mc.load(slow["drive"], (i, t, chans))
                        moved = decay.values * h.values + drive.values
                        mc.vector(moved, per_element=2, into=h)
                        mc.store(h, slow["h"], (i, t, chans))

    def _contract(self, mc: Machine, slow: Mapping[str, SlowArray], chans: slice) -> None:
        d = mc.load(slow["d"], chans)
        for i, t in np.ndindex(int(self.batch), int(self.len_seq)):
            with mc.scope():
                h, c = mc.load(slow["h"], (i, t, chans)), mc.load(slow["c"], (i, t))
                x = mc.load(slow["x"], (i, t, chans))
                z = mc.load(slow["z"], (i, t, chans)) if self.gated else None
                scratch = mc.full(h.shape, 0.0)
                y = _output(mc, h.values, c.values, scratch)
                _finish(mc, y, d.values, x.values, None if z is None else z.values)
                mc.store(y, slow["y"], (i, t, chans))


def _softplus(mc: Machine, delta: Values) -> Tile:
    """log(1 + exp(delta)) in fp32: two special results and an add."""
    tile = mc.special(np.exp(delta))
    mc.vector(1 + tile.values, into=tile)
    return mc.special(np.log(tile.values), into=tile)


def _output(mc: Machine, h: Values, c: Values, scratch: Tile) -> Tile:
    """Sum of h C over the states, [channels]."""
    mc.vector(h * c, into=scratch)
    return mc.reduce("sum", scratch, keepdims=False)


def _finish(mc: Machine, y: Tile, d: Values, x: Values, z: Values | None) -> None:
    """Add D x, then gate with z sigmoid(z); the minus of exp(-z) folds into the exponential."""
    mc.vector(y.values + d * x, per_element=2, into=y)
    if z is None:
        return
    gate = mc.special(np.exp(-z))
    mc.vector(1 + gate.values, into=gate)
    mc.special(1 / gate.values, into=gate)
    mc.vector(z * gate.values, into=gate)
    mc.vector(y.values * gate.values, into=y)
