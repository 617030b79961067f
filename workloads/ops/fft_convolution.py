"""Long causal convolution by FFT, as separate kernels (the unfused baseline of FlashFFTConv).

    y = irfft(rfft(u, n) * rfft(k, n))[:len_seq]

with n the least power of two not below len_seq + len_filter - 1 (and at least 2), so that nothing
wraps around.

**Half-length transforms.** A real row of n points is carried by n / 2 complex ones, as any
real-to-complex FFT does. Ours folds: with m = n / 2 and zeta = exp(i pi / n),

    z[j] = (x[j] + i x[j + m]) zeta^j,      0 <= j < m

is the polynomial x(X) modulo X^m - i, twisted so that the product of two such polynomials is a
cyclic convolution of length m. Since u * k has fewer than n terms, (u * k)[j] and
(u * k)[j + m] are the real and imaginary parts of the untwisted result. No step needs to split
or merge half spectra, and every element costs the same.

**Passes.** A radix-2 transform of m points costs 5 m log2 m flops (a butterfly is one complex
product, 6, and two complex adds, 4; trivial factors count like the others). When the longest
transform that fast memory holds has F < m points, the four-step scheme (Bailey 1990) extended to
more factors runs P = ceil(log2 m / log2 F) passes, each reading and writing everything, the number
that Aggarwal and Vitter 1988 prove optimal up to a constant for transforms of that kind; between
two passes every element is multiplied by a twiddle factor (6 flops). A pass needs all of the
previous one, so each is a launch. Frequencies stay in the order the passes leave them in: the
product needs no other.

**Circular.** With `circular` the result wraps around after len_seq, a power of two, as where a
model asks the library for transforms no longer than its input (bidirectional mixers, the
published benchmark of FlashFFTConv). Nothing can be folded then: every real element takes a
complex point of its own, m = len_seq, and the twist is left out.

Ignored: the cost of making twiddle factors (tables or sine units; they do occupy fast memory),
coalescing, and savings on rows that are known to be zero padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels.dtypes import FP16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Tile, slices
from workloads.numeric import (
    Num,
    any_true,
    ceil_div,
    ceil_log2,
    floor_log2,
    maximum,
    minimum,
    power_of_two,
)
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.work import Work

COMPLEX64 = DType("complex64", 64, "fp32")
"""A complex number of two fp32 parts, as the transforms hold it."""

POINT_BYTES = 16
"""Fast memory per transform point: the point and a twiddle factor, both complex64."""

Complex: TypeAlias = NDArray[np.complex128]


@dataclass(frozen=True, kw_only=True)
class LongConvolution(ProvedOp):
    """Causal convolution of [batch, channels, len_seq] with one filter [len_filter] per channel.

    `len_filter` is `len_seq` unless given. With `gated`, y = v * conv(u * w, k); with `circular`
    the convolution wraps around instead of starting from zeros.
    """

    batch: Num
    channels: Num
    len_seq: Num
    len_filter: Num | None = None
    gated: bool = False
    circular: bool = False
    dtype: DType = FP16

    def check(self) -> None:
        """The filter is no longer than the sequence; the format fits into fp32 transforms."""
        if self.circular and any_true(power_of_two(ceil_log2(self.len_seq)) != self.len_seq):
            raise InputError(
                f"{self.name}: a circular convolution needs a power of two as len_seq; "
                "pad it, or leave circular out"
            )
        if self.dtype.bytes_per_element > FP32.bytes_per_element:
            raise InputError(f"{self.name}: dtype {self.dtype} is wider than its fp32 transforms")
        if self.len_filter is not None and any_true(self.len_filter > self.len_seq):
            raise InputError(
                f"{self.name}: len_filter must not exceed len_seq; a causal filter's later taps "
                "touch nothing, so cut it"
            )

    @property
    def filter_len(self) -> Num:
        """Taps of each filter."""
        return self.len_seq if self.len_filter is None else self.len_filter

    @property
    def rows(self) -> Num:
        """Independent sequences: batch * channels."""
        return self.batch * self.channels

    @property
    def log2_points(self) -> Num:
        """log2 of `num_points`."""
        if self.circular:
            return ceil_log2(self.len_seq)
        return maximum(ceil_log2(self.len_seq + self.filter_len - 1), 1) - 1

    @property
    def num_points(self) -> Num:
        """Complex points m of a transform: half the padded real length n, and at least 1.

        All of len_seq for a circular one.
        """
        return power_of_two(self.log2_points)

    @property
    def sequence_bytes(self) -> Num:
        """One pass over u, or over any other [batch, channels, len_seq] tensor of the op."""
        return self.rows * self.len_seq * self.dtype.bytes_per_element

    def min_flops(self) -> Mapping[DType, Num]:
        """None: vector butterflies give the same result without a matrix product."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """u (and gates v, w) [batch, channels, len_seq]; k [channels, len_filter]."""
        shape = (int(self.batch), int(self.channels), int(self.len_seq))
        made = {
            "u": rng.standard_normal(shape),
            "k": rng.standard_normal((shape[1], int(self.filter_len))),
        }
        if self.gated:
            made |= {"v": rng.standard_normal(shape), "w": rng.standard_normal(shape)}
        return made

    def reference(self, inputs: Arrays) -> Arrays:
        """Sums over taps, row by row, by `np.convolve`; what passes the end is added in front."""
        u = inputs["u"] * inputs["w"] if self.gated else inputs["u"]
        length, y = u.shape[2], np.empty_like(u)
        for i, c in np.ndindex(u.shape[:2]):
            full = np.convolve(u[i, c], inputs["k"][c])
            y[i, c] = full[:length]
            if self.circular:
                y[i, c, : len(full) - length] += full[length:]
        return {"y": y * inputs["v"] if self.gated else y}


@dataclass(frozen=True, kw_only=True)
class FFTConvolution(LongConvolution):
    """The convolution as separate kernels, data in complex64 between them.

    Forward FFT of u (zero padding is not read), FFT of the fp32 filters (once per channel),
    product, inverse FFT, crop and cast; with `gated` an elementwise kernel before and after. With
    R = batch * channels rows of L elements of e bytes, K taps, m points in P passes:

        reads  = R (e L + 8 m (2 P) + 4 L) + channels (4 K + 8 m P)      gated: + 4 e L R
        writes = R (8 m (2 P + 1) + e L) + channels 8 m P                gated: + 2 e L R
        flops  = (2 R + channels) (5 m log2 m + 6 m P) + 6 m R           gated: + 2 L R
        launches = 3 P + 2                                               gated: + 2

    The 6 m P are the twiddle products between passes and one twist at the folded end. Circular
    transforms have no twist: 6 m (P - 1), 2 m more for the 1 / m of each inverse one, which
    writes 4 m bytes less.

    >>> op = FFTConvolution(batch=1, channels=1, len_seq=1024)
    >>> op.num_points, op.work(2**17).vector_flops == 3 * 5 * 1024 * 10 + 4 * 6 * 1024
    (1024, True)
    >>> op.tiling(2**17)["num_passes"], op.tiling(2**10)["num_passes"]
    (1, 2)
    """

    name: ClassVar[str] = "fft_convolution"

    def blocks(self, fast_bytes: Num) -> Num | None:
        """A block a channel of every sequence: transforms of different ones are independent."""
        return self.batch * self.channels

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """`num_points` of each transform, the `fast_points` that fit, and the `num_passes`."""
        least = POINT_BYTES * minimum(self.num_points, 2)
        require_fit(self.name, fast_bytes, least, "one butterfly and its factors")
        log2_fast = floor_log2(fast_bytes / POINT_BYTES)
        passes = ceil_div(self.log2_points, maximum(log2_fast, 1))
        return {
            "num_points": self.num_points,
            "fast_points": power_of_two(log2_fast),
            "num_passes": maximum(passes, 1),
        }

    def work(self, fast_bytes: Num) -> Work:
        """Counts as in the class docstring."""
        tiles = self.tiling(fast_bytes)
        m, passes = tiles["num_points"], tiles["num_passes"]
        plane, taps = COMPLEX64.bytes_per_element * m, 4 * self.channels * self.filter_len
        wraps = int(self.circular)
        transform = 5 * m * self.log2_points + 6 * m * (passes - wraps)
        u, gates = self.sequence_bytes, int(self.gated)
        cropped = self.rows * self.len_seq * FP32.bytes_per_element
        spectra = self.channels * plane * passes
        return Work(
            vector_flops=(2 * self.rows + self.channels) * transform
            + self.rows * ((6 + 2 * wraps) * m + 2 * gates * self.len_seq),
            read_bytes=u * (1 + 4 * gates)
            + self.rows * plane * 2 * passes
            + cropped
            + taps
            + spectra,
            write_bytes=u * (1 + 2 * gates)
            + self.rows * plane * (2 * passes + 1 - wraps / 2)
            + spectra,
            launches=3 * passes + 2 + 2 * gates,
        )

    def compulsory_bytes(self) -> Num:
        """u, the gates and y in the op's format, the fp32 filters, once each."""
        filters = self.channels * self.filter_len * FP32.bytes_per_element
        return self.sequence_bytes * (2 + 2 * int(self.gated)) + filters

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Gate, forward FFTs, product, inverse FFT, crop, gate: each its own kernels."""
        batch, channels, length = inputs["u"].shape
        m = int(self.num_points)
        formats = {"k": FP32}
        slow = {
            key: machine.place(value.reshape(-1, value.shape[-1]), formats.get(key, self.dtype))
            for key, value in inputs.items()
        }
        u = slow["u"]
        if self.gated:
            u = machine.empty(u.values.shape, self.dtype)
            _multiply(machine, slow["u"], slow["w"], u)
        spectra = machine.empty((batch, channels, m), COMPLEX64, is_complex=True)
        filters = machine.empty((channels, m), COMPLEX64, is_complex=True)
        steps = self._steps(machine.fast_bytes)
        rows = SlowArray(spectra.values.reshape(batch * channels, m), COMPLEX64)
        _forward(machine, steps, u, rows)
        _forward(machine, steps, slow["k"], filters)
        _product(machine, spectra, filters)
        real = machine.empty((batch * channels, m if self.circular else 2 * m), FP32)
        _inverse(machine, steps, rows, real)
        y = machine.empty((batch * channels, length), self.dtype)
        _crop(machine, real, y)
        if self.gated:
            _multiply(machine, y, slow["v"], y)
        return {"y": y.values.reshape(batch, channels, length)}

    def _steps(self, fast_bytes: float) -> list[_Pass]:
        """The factors of m, as even as possible, each with the points before and after it."""
        q, passes = int(self.log2_points), int(self.tiling(fast_bytes)["num_passes"])
        sizes = [2 ** (q // passes + (i < q % passes)) for i in range(passes)]
        rest = [int(np.prod(sizes[i + 1 :], dtype=np.int64)) for i in range(passes)]
        return [
            _Pass(2**q // (size * after), size, after, folded=not self.circular)
            for size, after in zip(sizes, rest, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Pass:
    """Transforms of `size` points along the middle axis of [before, size, after]."""

    before: int
    size: int
    after: int
    folded: bool = True

    def blocks(self, fast_bytes: float) -> list[tuple[int, slice]]:
        """(index before, slice of the columns after) of what fast memory takes at a time."""
        columns = max(int(fast_bytes // (POINT_BYTES * self.size)), 1)
        return [(b, part) for b in range(self.before) for part in slices(self.after, columns)]

    def factors(self, part: slice) -> Complex:
        """Twiddles exp(-2 pi i k r / (size after)) of columns r; k in bit-reversed order."""
        angle = np.outer(_bit_reversed(self.size), np.arange(part.start, part.stop))
        return np.exp(-2j * np.pi * angle / (self.size * self.after))

    def twist(self, part: slice) -> Complex:
        """zeta^j of the elements j that the columns hold; only where nothing lies before."""
        angle = 0.5 * np.pi * self.places(part) / (self.size * self.after)
        return np.asarray(np.exp(1j * angle))

    def places(self, part: slice) -> NDArray[np.int64]:
        """Index in the row of every element, [size, columns]."""
        rest = np.arange(part.start, part.stop)
        return np.arange(self.size)[:, None] * self.after + rest


def _forward(mc: Machine, steps: list[_Pass], real: SlowArray, target: SlowArray) -> None:
    """Fold, twist and transform every row of `real` into `target`, one kernel a pass."""
    for index, step in enumerate(steps):
        with mc.kernel():
            for row, (b, part) in _each(mc, step, target):
                with mc.scope():
                    view = target.values[row].reshape(step.before, step.size, step.after)
                    if index == 0:
                        tile = _fold(mc, real, row, step.places(part), target.values.shape[-1])
                        if step.folded:
                            _scale(mc, tile, step.twist(part))
                    else:
                        tile = mc.load(SlowArray(view, COMPLEX64), (b, slice(None), part))
                    _butterflies(mc, tile)
                    if index < len(steps) - 1:
                        _scale(mc, tile, step.factors(part))
                    mc.store(tile, SlowArray(view, COMPLEX64), (b, slice(None), part))


def _inverse(mc: Machine, steps: list[_Pass], source: SlowArray, real: SlowArray) -> None:
    """The passes of `_forward` undone in reverse; the last one unfolds into `real`."""
    m = source.values.shape[-1]
    for index, step in reversed(list(enumerate(steps))):
        with mc.kernel():
            for row, (b, part) in _each(mc, step, source):
                with mc.scope():
                    view = source.values[row].reshape(step.before, step.size, step.after)
                    slow = SlowArray(view, COMPLEX64)
                    tile = mc.load(slow, (b, slice(None), part))
                    if index < len(steps) - 1:
                        _scale(mc, tile, step.factors(part).conj())
                    _butterflies(mc, tile, inverse=True)
                    if index:
                        mc.store(tile, slow, (b, slice(None), part))
                        continue
                    if step.folded:
                        _scale(mc, tile, step.twist(part).conj() / m)
                        _unfold(mc, tile, real, row, step.places(part))
                    else:
                        mc.vector(tile.values / m, per_element=2, into=tile)
                        mc.store(mc.hold(tile.values.real, FP32), real, (row, step.places(part)))


def _each(mc: Machine, step: _Pass, target: SlowArray) -> list[tuple[int, tuple[int, slice]]]:
    blocks = step.blocks(mc.fast_bytes)
    return [(row, block) for row in range(len(target.values)) for block in blocks]


def _fold(mc: Machine, real: SlowArray, row: int, places: NDArray[np.int64], m: int) -> Tile:
    """x[j] + i x[j + m] with zeros past the end of the row, which are not read."""
    length = real.values.shape[-1]
    low, high = places < length, places + m < length
    parts = mc.load(real, (row, places[low])), mc.load(real, (row, places[high] + m))
    tile = mc.hold(np.zeros(places.shape, dtype=np.complex128), COMPLEX64)
    tile.values.real[low], tile.values.imag[high] = parts[0].values, parts[1].values
    mc.free(*parts)
    return tile


def _unfold(mc: Machine, tile: Tile, real: SlowArray, row: int, places: NDArray[np.int64]) -> None:
    """Real parts to y[j], imaginary parts to y[j + m]: two fp32 stores for one complex64."""
    m = real.values.shape[-1] // 2
    both = mc.hold(np.stack([tile.values.real, tile.values.imag]), FP32)
    mc.store(both, real, (row, np.stack([places, places + m])))


def _scale(mc: Machine, tile: Tile, factors: Complex) -> None:
    """Multiply by factors derived from the index, held beside the tile: 6 flops an element."""
    with mc.scope():
        held = mc.hold(factors, COMPLEX64)
        mc.vector(tile.values * held.values, per_element=6, into=tile)


def _butterflies(mc: Machine, tile: Tile, *, inverse: bool = False) -> None:
    """All radix-2 stages along axis 0, in place; forward leaves frequencies bit-reversed.

    Forward (decimation in frequency): a + b, (a - b) w. Inverse undoes it: a + w' b, a - w' b.
    """
    size, columns = tile.shape
    halves = [2**s for s in range(size.bit_length() - 1)]
    for half in halves if inverse else reversed(halves):
        with mc.scope():
            sign = 1j if inverse else -1j
            w = mc.hold(np.exp(sign * np.pi * np.arange(half) / half)[:, None], COMPLEX64).values
            pairs = tile.values.reshape(size // (2 * half), 2, half, columns)
            a, b = pairs[:, 0].copy(), pairs[:, 1] * w if inverse else pairs[:, 1].copy()
            stage = np.stack([a + b, a - b if inverse else (a - b) * w], axis=1)
            mc.vector(stage.reshape(tile.shape), per_element=5, into=tile)


def _product(mc: Machine, spectra: SlowArray, filters: SlowArray) -> None:
    """Every row times its channel's filter, in place; the filter is read once per channel."""
    points = max(int(mc.fast_bytes // POINT_BYTES), 1)
    with mc.kernel():
        for c in range(len(filters.values)):
            for part in slices(filters.values.shape[-1], points):
                with mc.scope():
                    k = mc.load(filters, (c, part))
                    for i in range(len(spectra.values)):
                        with mc.scope():
                            tile = mc.load(spectra, (i, c, part))
                            mc.vector(tile.values * k.values, per_element=6, into=tile)
                            mc.store(tile, spectra, (i, c, part))


def _crop(mc: Machine, real: SlowArray, target: SlowArray) -> None:
    """The first elements of every row, in the target's format; a cast is not a flop."""
    with mc.kernel():
        for row, part in _pieces(mc, target):
            with mc.scope():
                mc.store(mc.load(real, (row, part)), target, (row, part))


def _multiply(mc: Machine, a: SlowArray, b: SlowArray, target: SlowArray) -> None:
    """An elementwise kernel: target = a b."""
    with mc.kernel():
        for row, part in _pieces(mc, target):
            with mc.scope():
                left, right = mc.load(a, (row, part)), mc.load(b, (row, part))
                mc.vector(left.values * right.values, into=left)
                mc.store(left, target, (row, part))


def _pieces(mc: Machine, target: SlowArray) -> list[tuple[int, slice]]:
    elements = int(mc.fast_bytes // POINT_BYTES)
    rows, length = target.values.shape
    return [(row, part) for row in range(rows) for part in slices(length, elements)]


def _bit_reversed(size: int) -> NDArray[np.int64]:
    """Frequency held at each place after the forward butterflies of that size."""
    order = np.zeros(1, dtype=np.int64)
    while len(order) < size:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order
