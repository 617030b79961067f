"""SGConv: a long convolution whose filter is made of few parameters at many scales.

The filter of L taps is put together from log2(L / d) pieces of d parameters, each stretched by
linear interpolation to 2 d, 2 d, 4 d, 8 d, ... taps and damped by 1/2 a scale (arXiv 2210.09298,
section 3.2, with the first scale doubled, `init_scale = 1` of the authors' code, which is where
the pieces fill L exactly). H channels have H d log2(L / d) parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import FP16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values, slices
from workloads.numeric import Num, any_true, ceil_log2, floor, minimum, power_of_two
from workloads.op import Arrays, Stage, require_fit
from workloads.ops.fft_convolution import FFTConvolution
from workloads.ops.staged import ProvedStagedOp
from workloads.ops.streamed import StreamedOp

TAP_FLOPS = 4
"""a + (b - a) f, times the damping."""


def check_scales(name: str, length: Num, kernel_dim: Num) -> None:
    """The pieces must fill the filter."""
    ratio = length / kernel_dim
    if any_true((ratio < 2) | (power_of_two(ceil_log2(ratio)) != ratio)):
        raise InputError(
            f"{name}: len_seq = {length} must be kernel_dim = {kernel_dim} times a power of two "
            "from 2; pad it"
        )


@dataclass(frozen=True, kw_only=True)
class MultiscaleFilter(StreamedOp):
    """Filters [channels, len_seq] from parameters [channels, scales, kernel_dim], fp32.

    >>> op = MultiscaleFilter(channels=8, len_seq=1024, kernel_dim=64)
    >>> op.num_parameters() == 8 * 64 * 4, op.work(2**16).vector_flops == 4 * 8 * 1024
    (True, True)
    """

    name: ClassVar[str] = "multiscale_filter"
    channels: Num
    len_seq: Num
    kernel_dim: Num = 16
    dtype: DType = FP32

    def check(self) -> None:
        """See `check_scales`."""
        check_scales(self.name, self.len_seq, self.kernel_dim)

    def num_scales(self) -> Num:
        """log2(L / d)."""
        return ceil_log2(self.len_seq / self.kernel_dim)

    def num_parameters(self) -> Num:
        """H d log2(L / d)."""
        return self.channels * self.kernel_dim * self.num_scales()

    def elements(self) -> Num:
        """Taps of all filters."""
        return self.channels * self.len_seq

    def read_bytes(self) -> Num:
        """Parameters, spread over the taps they make."""
        spread = self.kernel_dim * self.num_scales() / self.len_seq
        return spread * self.dtype.bytes_per_element

    def write_bytes(self) -> Num:
        """One tap."""
        return self.dtype.bytes_per_element

    def steps(self) -> tuple[Num, Num]:
        """Interpolation and damping."""
        return TAP_FLOPS, 0

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Taps per `chunk` beside one piece's parameters."""
        held = self.kernel_dim * self.dtype.bytes_per_element
        require_fit(self.name, fast_bytes, held + self.write_bytes(), "one piece's parameters")
        room = floor((fast_bytes - held) / self.write_bytes())
        return {"chunk": minimum(self.len_seq, room)}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """The parameters."""
        shape = (int(self.channels), int(self.num_scales()), int(self.kernel_dim))
        return {"p": rng.standard_normal(shape)}

    def _lengths(self) -> list[int]:
        d = int(self.kernel_dim)
        return [d * 2 ** max(i, 1) for i in range(int(self.num_scales()))]

    def reference(self, inputs: Arrays) -> Arrays:
        """`np.interp` over the centres of stretched parameters, ends held."""
        d = int(self.kernel_dim)
        pieces = []
        for i, length in enumerate(self._lengths()):
            places = (np.arange(length) + 0.5) * d / length - 0.5
            rows = [np.interp(places, np.arange(d), row) for row in inputs["p"][:, i]]
            pieces.append(np.stack(rows) * 0.5**i)
        return {"k": np.concatenate(pieces, axis=1)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Piece by piece: its parameters are read once, its taps written as they are made."""
        params = machine.place(inputs["p"], self.dtype)
        k = machine.empty((int(self.channels), int(self.len_seq)), self.dtype)
        chunk = int(self.tiling(machine.fast_bytes)["chunk"])
        with machine.kernel():
            for c in range(int(self.channels)):
                start = 0
                for i, length in enumerate(self._lengths()):
                    with machine.scope():
                        piece = machine.load(params, (c, i))
                        for part in slices(length, chunk):
                            with machine.scope():
                                taps = _stretched(piece.values, length, part) * 0.5**i
                                out = machine.vector(taps, per_element=TAP_FLOPS)
                                machine.store(out, k, (c, _moved(part, start)))
                    start += length
        return {"k": k.values}


def _stretched(params: Values, length: int, part: slice) -> Values:
    """Taps `part` of a piece stretched to `length`."""
    d = len(params)
    places = np.clip((np.arange(part.start, part.stop) + 0.5) * d / length - 0.5, 0, d - 1)
    low = np.minimum(places.astype(np.int64), max(d - 2, 0))
    high = np.minimum(low + 1, d - 1)
    return np.asarray(params[low] + (params[high] - params[low]) * (places - low))


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


@dataclass(frozen=True, kw_only=True)
class SGConv(ProvedStagedOp):
    """Filter and causal convolution of u[batch, channels, len_seq] through library FFTs.

    >>> op = SGConv(batch=1, channels=64, len_seq=4096, kernel_dim=32)
    >>> op.num_parameters() == 64 * 32 * 7
    True
    """

    name: ClassVar[str] = "sgconv"
    batch: Num
    channels: Num
    len_seq: Num
    kernel_dim: Num = 16
    dtype: DType = FP16

    def check(self) -> None:
        """See `check_scales`; the rest is the convolution's."""
        check_scales(self.name, self.len_seq, self.kernel_dim)
        self.convolution()

    def filters(self) -> MultiscaleFilter:
        """All channels' filters."""
        return MultiscaleFilter(
            channels=self.channels, len_seq=self.len_seq, kernel_dim=self.kernel_dim
        )

    def convolution(self) -> FFTConvolution:
        """The long convolution."""
        return FFTConvolution(
            batch=self.batch, channels=self.channels, len_seq=self.len_seq, dtype=self.dtype
        )

    def num_parameters(self) -> Num:
        """Of the filters."""
        return self.filters().num_parameters()

    def stages(self) -> tuple[Stage, ...]:
        """Filters, convolution."""
        return Stage("filters", self.filters()), Stage("convolve", self.convolution())

    def compulsory_bytes(self) -> Num:
        """u and y, the parameters."""
        u = self.convolution().sequence_bytes
        return 2 * u + self.num_parameters() * FP32.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """u and the parameters."""
        shape = (int(self.batch), int(self.channels), int(self.len_seq))
        return {"u": rng.standard_normal(shape), **self.filters().inputs(rng)}

    def reference(self, inputs: Arrays) -> Arrays:
        """With NumPy."""
        k = self.filters().reference(inputs)["k"]
        return self.convolution().reference({"u": inputs["u"], "k": k})

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Both stages."""
        k = self.filters().program(machine, {"p": inputs["p"]})["k"]
        return self.convolution().program(machine, {"u": inputs["u"], "k": k})
