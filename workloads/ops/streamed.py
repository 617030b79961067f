"""What ops that stream share: counting vector lanes, and arrays read once and written once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from hwmodels.dtypes import DType
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Condition, Num, floor, minimum
from workloads.op import LIMIT, ProvedOp, checked_number, require_fit
from workloads.work import Work


class Lanes:
    """Values in the registers of vector lanes; every operation on them counts itself."""

    __slots__ = ("machine", "values")

    def __init__(self, machine: Machine, values: Values) -> None:
        self.machine, self.values = machine, values

    def __add__(self, other: Operand) -> Lanes:
        return self._vector(self.values + _raw(other))

    def __mul__(self, other: Operand) -> Lanes:
        return self._vector(self.values * _raw(other))

    def __sub__(self, other: Operand) -> Lanes:
        return self._vector(self.values - _raw(other))

    def __rsub__(self, other: float) -> Lanes:
        return self._vector(other - self.values)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Lanes:
        return Lanes(self.machine, -self.values)

    def exp(self) -> Lanes:
        """e to the power of each value."""
        return self._special(np.exp(self.values))

    def tanh(self) -> Lanes:
        """The hyperbolic tangent."""
        return self._special(np.tanh(self.values))

    def reciprocal(self) -> Lanes:
        """One over each value."""
        return self._special(1 / self.values)

    def sqrt(self) -> Lanes:
        """The square root."""
        return self._special(np.sqrt(self.values))

    def rsqrt(self) -> Lanes:
        """One over the square root."""
        return self._special(1 / np.sqrt(self.values))

    def sum(self, axis: int) -> Lanes:
        """The sum along an axis, which stays with length one: as many flops as elements go in.

        Adding that sum to a running one is included (`gather`): n elements are n additions.
        """
        self.machine.count(vector=self.values.size)
        return Lanes(self.machine, self.values.sum(axis=axis, keepdims=True))

    def into(self, tile: Tile) -> Tile:
        """Overwrite a held tile; the flops are counted already."""
        return self.machine.vector(self.values, per_element=0, into=tile)

    def gather(self, tile: Tile) -> Tile:
        """Add a fresh `sum` to a running one; the additions are counted there."""
        return self.machine.vector(tile.values + self.values, per_element=0, into=tile)

    def keep(self, dtype: DType) -> Tile:
        """Hold the values in a new tile of that format."""
        return self.machine.vector(self.values, per_element=0, dtype=dtype)

    def _vector(self, values: Values) -> Lanes:
        self.machine.count(vector=values.size)
        return Lanes(self.machine, values)

    def _special(self, values: Values) -> Lanes:
        self.machine.count(special=values.size)
        return Lanes(self.machine, values)


Operand: TypeAlias = Lanes | float
Map: TypeAlias = Callable[[Sequence[Lanes]], tuple[Lanes, ...]]


@dataclass(frozen=True, kw_only=True)
class StreamedOp(ProvedOp):
    """Arrays of the same length, each read or written once, element by element."""

    @abstractmethod
    def elements(self) -> Num:
        """Length of every array."""

    @abstractmethod
    def read_bytes(self) -> Num:
        """Bytes read per element, all inputs together."""

    @abstractmethod
    def write_bytes(self) -> Num:
        """Bytes written per element, all outputs together."""

    @abstractmethod
    def steps(self) -> tuple[Num, Num]:
        """Vector flops and special functions per element."""

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Elements per `chunk`: inputs and outputs of one chunk are held together."""
        held_bytes = self.read_bytes() + self.write_bytes()
        require_fit(self.name, fast_bytes, held_bytes, "one element of every array")
        return {"chunk": minimum(self.elements(), floor(fast_bytes / held_bytes))}

    def work(self, fast_bytes: Num) -> Work:
        """Every input read once, every output written once, one launch."""
        self.tiling(fast_bytes)
        n = self.elements()
        vector_flops, special_ops = self.steps()
        return Work(
            vector_flops=n * vector_flops,
            special_ops=n * special_ops,
            read_bytes=n * self.read_bytes(),
            write_bytes=n * self.write_bytes(),
        )

    def min_flops(self) -> Mapping[DType, Num]:
        """No matrix products."""
        return {}

    def compulsory_bytes(self) -> Num:
        """Each input once, each output once: what a stream moves."""
        return self.elements() * (self.read_bytes() + self.write_bytes())


def stream(
    machine: Machine,
    sources: Sequence[SlowArray],
    targets: Sequence[SlowArray],
    chunk: int,
    run: Map,
) -> None:
    """One kernel that maps chunk after chunk of `sources` to `targets`."""
    with machine.kernel():
        for part in slices(targets[0].values.size, chunk):
            with machine.scope():
                held = [Lanes(machine, machine.load(source, part).values) for source in sources]
                nothing = [Lanes(machine, np.ones(part.stop - part.start))]
                results = run(held or nothing)
                for result, target in zip(results, targets, strict=False):
                    machine.store(result.keep(target.dtype), target, part)


def set_non_negative(op: ProvedOp, field: str, *, whole: bool = False) -> None:
    """Check and normalise a field that, unlike a size, may be zero."""
    value = getattr(op, field)
    if type(value) is int and 0 <= value < LIMIT:
        return  # the common case, kept cheap
    rule = "a whole number from 0" if whole else "a number from 0"

    def good(number: Num) -> Condition:
        natural = (number >= 0) & (number < LIMIT)
        return natural & (number == np.floor(number)) if whole else natural

    number = checked_number(op.name, field, value, good, f"{rule} to 2**52")
    object.__setattr__(op, field, number)


def _raw(operand: Operand) -> Values | float:
    return operand.values if isinstance(operand, Lanes) else operand
