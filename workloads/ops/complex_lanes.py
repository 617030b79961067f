"""Complex values in the registers of vector lanes: two real lanes, every operation counted.

A complex product is 6 flops, a sum 2, a reciprocal 5 and one special function:

    1 / (a + i b) = (a - i b) (a^2 + b^2)^-1
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from workloads.machine import Machine, Values
from workloads.ops.streamed import Lanes

SUM_FLOPS: Final = 2
SCALE_FLOPS: Final = 2
PRODUCT_FLOPS: Final = 6
RECIPROCAL_FLOPS: Final = 5
"""Beside one special function."""


class ComplexLanes(NamedTuple):
    """Real and imaginary parts, of one shape or shapes that broadcast.

    >>> z = ComplexLanes.of(Machine(0), np.array([1 + 2j]))
    >>> (z.times(z.reciprocal())).values.round(12).tolist(), z.re.machine.counted().vector_flops
    ([(1+0j)], 11)
    """

    re: Lanes
    im: Lanes

    @classmethod
    def of(cls, machine: Machine, values: Values) -> ComplexLanes:
        """Values that are in registers already."""
        return cls(Lanes(machine, np.real(values)), Lanes(machine, np.imag(values)))

    @property
    def values(self) -> Values:
        """The complex numbers."""
        return np.asarray(self.re.values + 1j * self.im.values)

    def plus(self, other: ComplexLanes) -> ComplexLanes:
        """The sum."""
        return ComplexLanes(self.re + other.re, self.im + other.im)

    def minus(self, other: ComplexLanes) -> ComplexLanes:
        """The difference."""
        return ComplexLanes(self.re - other.re, self.im - other.im)

    def times(self, other: ComplexLanes) -> ComplexLanes:
        """The product."""
        return ComplexLanes(self.real_part(other), self.re * other.im + self.im * other.re)

    def real_part(self, other: ComplexLanes) -> Lanes:
        """The real part of the product: 3 flops."""
        return self.re * other.re - self.im * other.im

    def scaled(self, factor: Lanes | float) -> ComplexLanes:
        """Times a real number."""
        return ComplexLanes(self.re * factor, self.im * factor)

    def one_plus(self) -> ComplexLanes:
        """One more: a flop."""
        return ComplexLanes(self.re + 1.0, self.im)

    def one_minus(self) -> ComplexLanes:
        """One less this: a flop, the sign is free."""
        return ComplexLanes(1.0 - self.re, -self.im)

    def reciprocal(self) -> ComplexLanes:
        """One over each."""
        inverse = (self.re * self.re + self.im * self.im).reciprocal()
        return ComplexLanes(self.re * inverse, -(self.im * inverse))

    def sum(self) -> ComplexLanes:
        """Over the first axis: 2 flops a term, adding to a running sum included."""
        return ComplexLanes(self.re.sum(0), self.im.sum(0))
