"""What a kernel model is: an op's time from rates, constants and the conditions of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from simulator.kernel_time.constants import Constant
from simulator.kernel_time.rates import Rates
from workloads.numeric import Num
from workloads.op import Op

COLD: Final = "cold"
REPLAYED: Final = "replayed"
ROTATED: Final = "rotated"

Constants: TypeAlias = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """How a kernel is run and timed. The defaults describe a kernel of a captured graph.

    `kernel`: the implementation ('fa3', 'triton'); empty for the usual one. `host`: who pays the
    launch: empty for a graph replay, else the timing method ('eager'). `l2`: what the kernel
    finds in the L2: nothing ('cold'), what its last run left ('replayed'), or activations but
    not the weights, of which several copies take turns ('rotated').
    """

    kernel: str = ""
    host: str = ""
    l2: str = COLD


USUAL: Final = Conditions()


@dataclass(frozen=True, slots=True)
class KernelTime:
    """Seconds of a kernel and of the terms they are made of; the largest term is its regime."""

    seconds: Num
    terms: Mapping[str, Num]

    def regime(self) -> Any:
        """Name of the largest term; an array of names for arrays."""
        names = list(self.terms)
        values = list(self.terms.values())
        if not any(isinstance(v, np.ndarray) for v in values):
            return names[max(range(len(values)), key=lambda i: values[i])]
        largest = np.argmax(np.stack(np.broadcast_arrays(*values)), axis=0)
        return np.asarray(names)[largest]


Timing: TypeAlias = Callable[[Any, Rates, Constants, Conditions], KernelTime]
Labels: TypeAlias = Callable[[Any, Conditions], Mapping[str, str]]

HOST: Final = Constant(
    name="host_s",
    meaning="time an eager launch adds to a timed kernel: dispatch, events, synchronisation",
    unit="s",
    start=20e-6,
    low=1e-7,
    high=2e-4,
    by=("host",),
)


def usual_labels(op: Op, conditions: Conditions) -> dict[str, str]:
    """`kernel` and `host` of the run, `dtype` of the op."""
    dtype = getattr(op, "dtype", None)
    return {
        "kernel": conditions.kernel,
        "host": conditions.host,
        "dtype": str(dtype) if dtype is not None else "",
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelModel:
    """One family of kernels: which ops it times, with which constants, and how.

    `timing(op, rates, constants, conditions)` returns the device time; all op sizes and rates
    may be arrays. It must not decrease in any size nor increase in any rate, be continuous but
    for stated switches, and read no constant that `constants` does not declare.
    """

    name: str
    ops: tuple[type[Op], ...]
    constants: tuple[Constant, ...]
    timing: Timing
    labels: Labels = usual_labels

    def all_constants(self) -> tuple[Constant, ...]:
        """The model's own constants and the host's."""
        return (*self.constants, HOST)

    def nominal(self) -> dict[str, float]:
        """Every constant at its start value."""
        return {c.name: c.start for c in self.all_constants()}

    def time(
        self, op: Op, rates: Rates, constants: Constants, conditions: Conditions
    ) -> KernelTime:
        """Device time, and the host's share where the launch is eager."""
        device_time = self.timing(op, rates, constants, conditions)
        if not conditions.host:
            return device_time
        host_s = constants["host_s"]
        terms = {**device_time.terms, "host": host_s}
        return KernelTime(device_time.seconds + host_s, terms)
