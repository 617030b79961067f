"""Direct convolution of images with zeros around them: filters stay, images stream past.

    y[n, p, q, k] = sum over c, r, s of x[n, p + r - r0, q + s - s0, c] w[r, s, c, k]

with r0 = (R - 1) // 2 rows and s0 columns of zeros before the image and the rest behind it, so that
y is as large as x. As `tk` filters stay in fast memory, images pass in bands of `th` rows of output
with the R - 1 rows around them that lie in the image:

    reads   w + ceil(K / tk) N W C sum over bands of (rows of the band and around it)
    writes  y

Every tap is a matrix product of the band's pixels [pixels, C] with w[r, s]; zeros around the image
are multiplied as well (2 N K H W C R S flops), as an implicit matrix product does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, any_true, ceil_div, floor, maximum, minimum
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.ops.conv2d import Conv2d
from workloads.work import Work

ACCUMULATOR_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class SameConv(Conv2d, ProvedOp):
    """Forward convolution of stride 1 with an output as large as the input.

    >>> op = SameConv(in_channels=8, height=6, width=6, out_channels=4, out_height=6, out_width=6)
    >>> work = op.work(2**20)   # all filters and the whole image fit
    >>> work.read_bytes == 4 * (8 * 36 + 4 * 8 * 9), work.write_bytes == 4 * 4 * 36
    (True, True)
    """

    name: ClassVar[str] = "same_conv"

    def check(self) -> None:
        """Forward, direct, of one size."""
        super().check()
        if self.direction != "fwd" or self.algorithm != "direct" or any_true(self.stride != 1):
            raise InputError(f"{self.name}: takes forward direct filters of stride 1; use conv2d")
        if any_true((self.height != self.out_height) | (self.width != self.out_width)):
            raise InputError(f"{self.name}: the output is as large as the input; use conv2d")

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """`tk` filters that stay, `th` rows of output beside them, most filters first."""
        e, r, width = self.dtype.bytes_per_element, self.kernel_h, self.width
        row_bytes = width * self.in_channels * e
        around = minimum(r, self.height) * row_bytes
        filter_bytes = self.in_channels * r * self.kernel_w * e
        each = filter_bytes + width * ACCUMULATOR_BYTES
        least = around + row_bytes
        require_fit(self.name, fast_bytes, least + each, "one filter and the rows of one output")
        tk = minimum(self.out_channels, floor((fast_bytes - least) / each))
        spare = fast_bytes - tk * filter_bytes - (r - 1) * row_bytes
        th = floor(spare / (2 * row_bytes + tk * width * ACCUMULATOR_BYTES))
        return {"tk": tk, "th": minimum(self.height, maximum(th, 1))}

    def rows_read(self, th: Num) -> Num:
        """Rows of one image that bands of `th` output rows read."""
        above = (self.kernel_h - 1) // 2
        below = self.kernel_h - 1 - above
        edges = ceil_div(self.height, th) - 1  # bands with another one after, or before, them
        last = self.height - edges * th
        return self.height + _clipped(th, th, edges, above) + _clipped(last, th, edges, below)

    def work(self, fast_bytes: Num) -> Work:
        """As in the module's table; one launch."""
        tiles = self.tiling(fast_bytes)
        passes = ceil_div(self.out_channels, tiles["tk"])
        rows = self.batch * self.rows_read(tiles["th"])
        row_bytes = self.width * self.in_channels * self.dtype.bytes_per_element
        return Work(
            tensor_flops=dict(self.min_flops()),
            read_bytes=self.filter_bytes() + passes * rows * row_bytes,
            write_bytes=self.output_bytes(),
        )

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x[batch, height, width, in_channels], w[kernel_h, kernel_w, in, out channels]."""
        x = (self.batch, self.height, self.width, self.in_channels)
        w = (self.kernel_h, self.kernel_w, self.in_channels, self.out_channels)
        return {
            "x": rng.standard_normal([int(n) for n in x]),
            "w": rng.standard_normal([int(n) for n in w]),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """Pixel by pixel: the window around it times the filters."""
        x, w = inputs["x"], inputs["w"]
        padded = self._padded(x)
        y = np.zeros((*x.shape[:3], w.shape[3]))
        for p in range(x.shape[1]):
            for q in range(x.shape[2]):
                window = padded[:, p : p + w.shape[0], q : q + w.shape[1]]
                y[:, p, q] = np.tensordot(window, w, axes=3)
        return {"y": y}

    def _padded(self, x: Values) -> Values:
        (before_h, after_h), (before_w, after_w) = (
            ((k - 1) // 2, k - 1 - (k - 1) // 2) for k in (int(self.kernel_h), int(self.kernel_w))
        )
        return np.pad(x, ((0, 0), (before_h, after_h), (before_w, after_w), (0, 0)))

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: filters in parts, images in turn, band after band."""
        tiles = {key: int(n) for key, n in self.tiling(machine.fast_bytes).items()}
        x, w = (machine.place(inputs[name], self.dtype) for name in ("x", "w"))
        y = machine.empty((*x.values.shape[:3], int(self.out_channels)), self.dtype)
        with machine.kernel():
            for part in slices(int(self.out_channels), tiles["tk"]):
                with machine.scope():
                    filters = [machine.load(w, (*tap, slice(None), part)) for tap in self._taps()]
                    for image in range(int(self.batch)):
                        for rows in slices(int(self.height), tiles["th"]):
                            self._band(machine, x, filters, y, (image, rows, part))
        return {"y": y.values}

    def _band(
        self,
        mc: Machine,
        x: SlowArray,
        filters: list[Tile],
        y: SlowArray,
        at: tuple[int, slice, slice],
    ) -> None:
        """Rows of one image: every tap's product of the pixels it meets."""
        image, rows, part = at
        height, width, channels = x.values.shape[1:]
        above = (int(self.kernel_h) - 1) // 2
        first, last = rows.start - above, rows.stop + int(self.kernel_h) - 1 - above
        with mc.scope():
            held = mc.load(x, (image, slice(max(first, 0), min(last, height))))
            missing = ((max(-first, 0), max(last - height, 0)), (0, 0), (0, 0))
            band = self._padded_columns(np.pad(held.values, missing))
            sums = mc.full(((rows.stop - rows.start) * width, part.stop - part.start), 0.0)
            for (r, s), taps in zip(self._taps(), filters, strict=True):
                with mc.scope():
                    pixels = band[r : r + rows.stop - rows.start, s : s + width]
                    met = mc.hold(pixels.reshape(-1, channels), self.dtype)  # gathered, no traffic
                    mc.matmul(met, taps, self.computed_dtype, into=sums)
            mc.store(sums, y, (image, rows, slice(None), part))

    def _taps(self) -> list[tuple[int, int]]:
        return [(r, s) for r in range(int(self.kernel_h)) for s in range(int(self.kernel_w))]

    def _padded_columns(self, band: Values) -> Values:
        before = (int(self.kernel_w) - 1) // 2
        return np.pad(band, ((0, 0), (before, int(self.kernel_w) - 1 - before), (0, 0)))


def _clipped(first: Num, step: Num, terms: Num, most: Num) -> Num:
    """The sum of min(most, first + i step) over i = 0 ... terms - 1.

    >>> _clipped(2, 3, 4, 6)    # 2 + 5 + 6 + 6
    19
    """
    below = minimum(maximum(floor((most - first) / step) + 1, 0), terms)
    return below * first + step * below * (below - 1) // 2 + (terms - below) * most
