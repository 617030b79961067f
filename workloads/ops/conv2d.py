"""Two-dimensional convolutions: direct counts, and those of faster algorithms.

With batch N, channels C to K, output P x Q and filters R x S, every direction multiplies

    direct     2 N K P Q C R S flops
    winograd   of stride 1, the same (3 + R) (3 + S) / (16 R S) times, that is F(4 x 4, R x S)
               (Lavin and Gray 2016, arXiv 1509.09308, section 4.1): a quarter for 3 x 3 filters
    fft        of stride 1, the same 4 * 32 * 17 / ((33 - R) (33 - S) R S) times: tiles of 32 x 32
               have 32 * 17 complex values, four real products each, and (33 - R) (33 - S) outputs
               (Vasilache et al. 2015, arXiv 1412.7580)
    best       the fewest of these

Directions: 'fwd' y = x * w, 'bwd_data' dx from dy and w, 'bwd_weight' dw from x and dy. Bytes are
x, w and y (or their gradients) once. The algorithm 'best' is what a library picks by trying: it
counts as the cheapest. Libraries run Winograd's algorithm on 3 x 3 and 5 x 5 filters. Transforms
are additions; 4 an element of each tensor are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from hwmodels.dtypes import FP32, DType
from hwmodels.errors import UnknownNameError
from workloads.numeric import Condition, Num, ceil_div, maximum, where
from workloads.op import Op
from workloads.work import Work

DIRECTIONS: Final = ("fwd", "bwd_data", "bwd_weight")
ALGORITHMS: Final = ("direct", "winograd", "fft", "best")
TILE: Final = 4
"""Outputs of one Winograd tile along each axis."""
FFT_TILE: Final = 32
"""Side of one tile that is transformed."""
FFT_PRODUCTS: Final = FFT_TILE * (FFT_TILE // 2 + 1)
"""Complex values of the transform of one real tile."""


@dataclass(frozen=True, kw_only=True)
class Conv2d(Op):
    """One convolution; sizes of the input, the filter and the output (which say the padding).

    >>> op = Conv2d(batch=16, in_channels=64, height=56, width=56, out_channels=64,
    ...             out_height=56, out_width=56)
    >>> op.direct_flops() == 2 * 16 * 64 * 56 * 56 * 64 * 9
    True
    """

    name: ClassVar[str] = "conv2d"
    batch: Num = 1
    in_channels: Num
    height: Num
    width: Num
    out_channels: Num
    out_height: Num
    out_width: Num
    kernel_h: Num = 3
    kernel_w: Num = 3
    stride: Num = 1
    direction: str = "fwd"
    algorithm: str = "direct"
    dtype: DType = FP32
    math_dtype: DType | None = None

    def check(self) -> None:
        """A known direction and algorithm."""
        if self.direction not in DIRECTIONS:
            raise UnknownNameError("conv2d direction", self.direction, list(DIRECTIONS))
        if self.algorithm not in ALGORITHMS:
            raise UnknownNameError("conv2d algorithm", self.algorithm, list(ALGORITHMS))

    @property
    def computed_dtype(self) -> DType:
        """Format of the products."""
        return self.math_dtype or self.dtype

    def direct_flops(self) -> Num:
        """2 N K P Q C R S."""
        outputs = self.batch * self.out_channels * self.out_height * self.out_width
        return 2 * outputs * self.in_channels * self.kernel_h * self.kernel_w

    def takes_winograd(self) -> Condition:
        """Is it a 3 x 3 or 5 x 5 filter of stride 1, and allowed to use it?"""
        if self.algorithm not in ("winograd", "best"):
            return False
        square = (self.kernel_h == self.kernel_w) & (self.stride == 1)
        return square & ((self.kernel_h == 3) | (self.kernel_h == 5))

    def takes_fft(self) -> Condition:
        """Does the filter fit into a tile, at stride 1, and is it allowed to use transforms?"""
        if self.algorithm not in ("fft", "best"):
            return False
        fits = (self.kernel_h <= FFT_TILE) & (self.kernel_w <= FFT_TILE)
        return fits & (self.stride == 1)

    def saving(self) -> Num:
        """Products of direct filtering over those of the algorithm, of 'best' over the fewest."""
        r, s = self.kernel_h, self.kernel_w
        filtering = TILE**2 * r * s / ((r + TILE - 1) * (s + TILE - 1))
        step_h, step_w = self._fft_steps()
        transforms = step_h * step_w * r * s / (4 * FFT_PRODUCTS)
        if self.algorithm == "best":
            return where(self.stride == 1, maximum(maximum(filtering, transforms), 1), 1.0)
        if self.algorithm == "fft":
            return where(self.takes_fft(), transforms, 1.0)
        return where(self.takes_winograd(), filtering, 1.0)

    def _fft_steps(self) -> tuple[Num, Num]:
        """New outputs of one transformed tile along each axis."""
        new = FFT_TILE + 1
        return maximum(new - self.kernel_h, 1), maximum(new - self.kernel_w, 1)

    def min_flops(self) -> Mapping[DType, Num]:
        """Direct flops over the saving."""
        return {self.computed_dtype: self.direct_flops() / self.saving()}

    def input_bytes(self) -> Num:
        """x, or its gradient."""
        pixels = self.batch * self.in_channels * self.height * self.width
        return pixels * self.dtype.bytes_per_element

    def output_bytes(self) -> Num:
        """y, or its gradient."""
        pixels = self.batch * self.out_channels * self.out_height * self.out_width
        return pixels * self.dtype.bytes_per_element

    def filter_bytes(self) -> Num:
        """w, or its gradient."""
        taps = self.out_channels * self.in_channels * self.kernel_h * self.kernel_w
        return taps * self.dtype.bytes_per_element

    def as_product(self) -> tuple[Num, Num, Num]:
        """m, n and k of the matrix product that computes the same directly.

        Data gradients of a stride multiply by zeros between the pixels.
        """
        pixels = self.output_pixels()
        taps = self.kernel_h * self.kernel_w
        if self.direction == "fwd":
            return pixels, self.out_channels, self.in_channels * taps
        if self.direction == "bwd_weight":
            return self.out_channels, self.in_channels * taps, pixels
        sites = maximum(self.batch * self.height * self.width, pixels)
        return sites, self.in_channels, self.out_channels * taps

    def output_pixels(self) -> Num:
        """N P Q."""
        return self.batch * self.out_height * self.out_width

    def fft_tiles(self) -> Num:
        """Tiles of 32 x 32 that all images are cut in, which overlap by a filter."""
        step_h, step_w = self._fft_steps()
        return self.batch * ceil_div(self.out_height, step_h) * ceil_div(self.out_width, step_w)

    def winograd_tiles(self) -> Num:
        """Output tiles of 4 x 4 in all images."""
        return self.batch * ceil_div(self.out_height, TILE) * ceil_div(self.out_width, TILE)

    def compulsory_bytes(self) -> Num:
        """Two tensors in, one out."""
        return self.input_bytes() + self.output_bytes() + self.filter_bytes()

    def work(self, fast_bytes: Num) -> Work:
        """Every tensor once; transforms of the cheaper algorithm as vector flops."""
        written = {
            "fwd": self.output_bytes, "bwd_data": self.input_bytes,
            "bwd_weight": self.filter_bytes,
        }[self.direction]()  # fmt: skip
        elements = self.compulsory_bytes() / self.dtype.bytes_per_element
        return Work(
            tensor_flops=dict(self.min_flops()),
            vector_flops=where(self._transforms(), 4.0 * elements, 0.0 * elements),
            read_bytes=self.compulsory_bytes() - written,
            write_bytes=written,
            launches=1,
        )

    def _transforms(self) -> Condition:
        return self.takes_winograd() if self.algorithm != "fft" else self.takes_fft()

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No tile is chosen: the counts do not depend on one."""
        return {}
