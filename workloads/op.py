"""What every computation offers: counts as a function of fast memory, and a program as proof."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hwmodels.dtypes import DType, dtype
from hwmodels.errors import InputError
from workloads.machine import Machine
from workloads.numeric import Condition, Num, any_true, as_num, is_scalar
from workloads.work import Work

Arrays = Mapping[str, NDArray[np.float64]]


class Stage(NamedTuple):
    """One kernel of an op that runs several: the kernel as an op, and how often it runs.

    `beside` marks what runs at the same time as the rest (a prefetch over the host link): such
    stages together hide behind all others together. `kernel` names the implementation, as the
    kernel models know it ('fa1'); empty for the usual one.
    """

    name: str
    op: Op
    times: Num = 1
    beside: bool = False
    kernel: str = ""


CHUNKED: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {"chunk": (16, 32, 64, 128, 256, 512)}
)
"""`Op.tunable` of what works through a sequence in chunks: whole tiles of the tensor cores."""
LIMIT: Final = 2**52
"""Sizes stay below it, so that every whole number of float64 is exact."""


def checked_number(
    owner: str, name: str, value: object, good: Callable[[Num], Condition], rule: str
) -> Num:
    """The value as a number, or an array of them; refused where one is not good."""
    try:
        number = as_num(value)
    except (TypeError, ValueError):
        raise InputError(f"{owner}: {name} = {value!r} is not a number") from None
    bad = np.logical_not(good(number))
    if any_true(bad):
        shown = value if is_scalar(number) else np.asarray(number)[bad][0]
        raise InputError(f"{owner}: {name} = {shown} must be {rule}")
    return number


def checked_size(owner: str, name: str, value: object) -> Num:
    """A whole number of at least 1 (or an array of them); `*_frac` a number in [0, 1]."""
    if name.endswith("_frac"):
        return checked_number(owner, name, value, _is_fraction, "a fraction in [0, 1]")
    return checked_number(owner, name, value, _is_size, "a whole number from 1 to 2**52")


def _is_fraction(number: Num) -> Condition:
    return (number >= 0) & (number <= 1)


def _is_size(number: Num) -> Condition:
    return (number >= 1) & (number == np.floor(number)) & (number < LIMIT)


@dataclass(frozen=True, kw_only=True)
class Op(ABC):
    """One computation: its shape and number format as fields, its counts as functions.

    Number-valued fields are sizes (checked on construction: whole, at least 1) and may be
    arrays; all arrays of an op broadcast together, and so do all its counts.
    """

    name: ClassVar[str]
    cheaper: ClassVar[tuple[str, ...]] = ()
    """Sizes whose growth makes the op cheaper: a block that shares one list of keys."""
    tunable: ClassVar[Mapping[str, tuple[int, ...]]] = MappingProxyType({})
    """Sizes that the implementer chooses, not the problem (a chunk), with the values worth trying;
    the result is the same whatever they are."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if "Num" in str(f.type):
                if type(value) is int and 1 <= value < LIMIT and not f.name.endswith("_frac"):
                    continue  # the common case, kept cheap
                if value is None and "None" in str(f.type):
                    continue
                object.__setattr__(self, f.name, checked_size(self.name, f.name, value))
            elif "DType" in str(f.type) and isinstance(value, str):
                object.__setattr__(self, f.name, dtype(value))
        self.check()

    def check(self) -> None:  # noqa: B027  (an optional hook, empty by intent)
        """Refuse impossible combinations of fields by raising `InputError`."""

    @abstractmethod
    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Tile sizes chosen for a fast memory of that size; raises `InputError` if none fits."""

    @abstractmethod
    def work(self, fast_bytes: Num) -> Work:
        """Everything the op counts when tiled for a fast memory of that size."""

    def blocks(self, fast_bytes: Num) -> Num | None:
        """Thread blocks that can run at once, each with that fast memory; None: not stated.

        An op that states them is not timed as if it filled the device when it cannot.
        """
        return None

    def stages(self) -> tuple[Stage, ...]:
        """The kernels the op runs one after another, each timed as the op it is.

        Empty: the op is timed by the kernel model of its class.
        """
        return ()

    @abstractmethod
    def compulsory_bytes(self) -> Num:
        """Each input read once and each output written once."""

    def io_lower_bound_bytes(self, fast_bytes: Num) -> Num:
        """Bytes no schedule with that fast memory can avoid moving.

        The compulsory traffic unless the op's literature proves more.
        """
        return self.compulsory_bytes()

    def min_flops(self) -> Mapping[DType, Num]:
        """Matrix flops that the result needs whatever the tiling (no masked-out tile parts)."""
        return self.work(float(2**52)).tensor_flops

    def unmasked(self, work: Work) -> Work:
        """What of `work` the result needs: without the masked-out parts of its tiles."""
        return dataclasses.replace(work, tensor_flops=self.min_flops())

    def over(self, **changes: object) -> Self:
        """The same op with some fields replaced, arrays welcome: `op.over(len_q=lengths)`."""
        known = {f.name for f in dataclasses.fields(self)}
        for key in changes:
            if key not in known:
                raise InputError(
                    f"{self.name} has no field '{key}'; it has {', '.join(sorted(known))}"
                )
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class ProvedOp(Op):
    """An op whose closed form is backed by a program that counts itself."""

    @abstractmethod
    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random inputs for scalar fields, as the program and the reference take them."""

    @abstractmethod
    def reference(self, inputs: Arrays) -> Arrays:
        """The naive computation in float64: the truth the program is compared with."""

    @abstractmethod
    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The algorithm itself, run on a `Machine` that counts; needs scalar fields."""


def require_fit(
    name: str,
    fast_bytes: Num,
    needed_bytes: Num,
    what: str,
    mend: str = "give it more or make the op smaller",
) -> None:
    """Raise `InputError` where fast memory cannot hold even the smallest tile."""
    if any_true(np.greater(needed_bytes, fast_bytes)):
        raise InputError(
            f"{name}: a fast memory of {float(np.min(fast_bytes)):.0f} bytes cannot hold {what} "
            f"({float(np.max(needed_bytes)):.0f} bytes); {mend}"
        )
