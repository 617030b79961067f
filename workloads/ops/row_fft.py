"""Fourier transforms of real rows by themselves, where a spectrum is made or used by other kernels.

As in `fft_convolution`: n = 2 m real points, n the least power of two that holds a row, are folded
into m complex ones, so that the spectrum of the polynomial x(X) = sum_j x[j] X^j is its value at
the m roots of X^m = i (`root_points`), in bit-reversed order. With P passes of m points,

    forward  reads  rows (e L + 8 m (P - 1)),   writes rows 8 m P
    inverse  reads  rows 8 m P,                 writes rows 8 m P     (the last 2 m fp32 numbers)
    flops    rows (5 m log2 m + 6 m P),         launches P

Ignored: as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
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
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.elementwise import Elementwise
from workloads.ops.fft_convolution import (
    COMPLEX64,
    POINT_BYTES,
    Complex,
    _bit_reversed,
    _forward,
    _inverse,
    _Pass,
)
from workloads.work import Work

BUTTERFLY_FLOPS: Final = 5
TWIDDLE_FLOPS: Final = 6
LOG2_TIMED: Final = 12
"""log2 of the points of a pass as it is timed: what 64 KiB of shared memory hold."""


def log2_points(len_seq: Num) -> Num:
    """log2 m of the transform that holds `len_seq` real points.

    >>> log2_points(1), log2_points(8), log2_points(9)
    (0, 2, 3)
    """
    return maximum(ceil_log2(len_seq), 1) - 1


def root_points(num_points: int) -> Complex:
    """The roots w of w^m = i, as the places of a spectrum hold them.

    >>> np.allclose(root_points(8) ** 8, 1j)
    True
    """
    turns = 0.5 / (2 * num_points) - _bit_reversed(num_points) / num_points
    return np.asarray(np.exp(2j * np.pi * turns))


@dataclass(frozen=True, kw_only=True)
class RowFFT(ProvedOp):
    """Spectra x[rows, m] complex64 of x[rows, len_seq] (`inverse`: y[rows, 2 m] of spectra).

    `len_seq` are the real points that hold data; the transform has `num_points` complex ones, the
    least that hold them unless `len_transform` real points are asked for.

    >>> op = RowFFT(rows=3, len_seq=1000)
    >>> op.num_points, op.work(2**16).vector_flops == 3 * (5 * 512 * 9 + 6 * 512)
    (512, True)
    """

    name: ClassVar[str] = "row_fft"
    rows: Num
    len_seq: Num
    len_transform: Num | None = None
    inverse: bool = False
    dtype: DType = FP32

    def check(self) -> None:
        """Rows that the transform holds."""
        if self.len_transform is not None and any_true(self.len_seq > self.len_transform):
            raise InputError(
                f"{self.name}: len_seq = {self.len_seq} must not exceed len_transform = "
                f"{self.len_transform}; leave len_transform out"
            )
        if self.dtype.bytes_per_element > FP32.bytes_per_element:
            raise InputError(f"{self.name}: dtype {self.dtype} is wider than its fp32 transforms")

    @property
    def log2_points(self) -> Num:
        """log2 m."""
        return log2_points(self.len_seq if self.len_transform is None else self.len_transform)

    @property
    def num_points(self) -> Num:
        """Complex points m."""
        return power_of_two(self.log2_points)

    def row_flops(self, passes: Num) -> Num:
        """Of one row."""
        return self.num_points * (BUTTERFLY_FLOPS * self.log2_points + TWIDDLE_FLOPS * passes)

    def stages(self) -> tuple[Stage, ...]:
        """Timed as passes over complex64 points, of 4096 points each at most."""
        passes = maximum(ceil_div(self.log2_points, LOG2_TIMED), 1)
        one = Elementwise(
            num_elements=self.rows * self.num_points, dtype=COMPLEX64,
            vector_flops_per_element=self.row_flops(passes) / (self.num_points * passes),
        )  # fmt: skip
        return (Stage("pass", one, passes),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """`num_points`, the `fast_points` that fit, and the `num_passes`."""
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
        """Counts as in the module's docstring."""
        passes = self.tiling(fast_bytes)["num_passes"]
        plane = self.rows * self.num_points * COMPLEX64.bytes_per_element
        first = plane if self.inverse else self.row_bytes()
        return Work(
            vector_flops=self.rows * self.row_flops(passes),
            read_bytes=first + plane * (passes - 1),
            write_bytes=plane * passes,
            launches=passes,
        )

    def row_bytes(self) -> Num:
        """The real rows' data."""
        return self.rows * self.len_seq * self.dtype.bytes_per_element

    def spectrum_bytes(self) -> Num:
        """The spectra."""
        return self.rows * self.num_points * COMPLEX64.bytes_per_element

    def compulsory_bytes(self) -> Num:
        """Rows and spectra once."""
        return self.spectrum_bytes() + (self.spectrum_bytes() if self.inverse else self.row_bytes())

    def min_flops(self) -> Mapping[DType, Num]:
        """No matrix products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Rows x, or spectra."""
        rows, points = int(self.rows), int(self.num_points)
        if not self.inverse:
            return {"x": rng.standard_normal((rows, int(self.len_seq)))}
        parts = rng.standard_normal((2, rows, points))
        return {"x": parts[0] + 1j * parts[1]}

    def reference(self, inputs: Arrays) -> Arrays:
        """The polynomials' values at the roots, or the polynomials that have these values."""
        points = int(self.num_points)
        table = root_points(points)[:, None] ** np.arange(2 * points)
        if not self.inverse:
            spectra: Values = inputs["x"] @ table[:, : int(self.len_seq)].T
            return {"y": spectra}
        return {"y": np.real(inputs["x"] @ table.conj()) / points}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Pass after pass, each a kernel."""
        rows, m = int(self.rows), int(self.num_points)
        steps = self._steps(machine.fast_bytes)
        if self.inverse:
            source = machine.place(inputs["x"].copy(), COMPLEX64)
            real = machine.empty((rows, 2 * m), FP32)
            _inverse(machine, steps, source, real)
            return {"y": real.values}
        spectra = machine.empty((rows, m), COMPLEX64, is_complex=True)
        _forward(machine, steps, machine.place(inputs["x"], self.dtype), spectra)
        return {"y": spectra.values}

    def _steps(self, fast_bytes: float) -> list[_Pass]:
        """The factors of m, as even as possible, each with the points before and after it."""
        q, passes = int(self.log2_points), int(self.tiling(fast_bytes)["num_passes"])
        logs = [q // passes + (i < q % passes) for i in range(passes)]
        before = [sum(logs[:i]) for i in range(passes)]
        return [
            _Pass(2**b, 2**size, 2 ** (q - b - size)) for b, size in zip(before, logs, strict=True)
        ]
