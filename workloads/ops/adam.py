"""The AdamW step: an optimizer that is all memory traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, FP8, FP32, FP64, DType
from hwmodels.errors import InputError
from workloads.machine import Machine
from workloads.numeric import Array, Num
from workloads.op import Arrays
from workloads.ops.streamed import Lanes, StreamedOp, set_non_negative, stream

LEARNING_RATE, DECAY, BETA1, BETA2, TINY, STEP = 1e-3, 0.1, 0.9, 0.95, 1e-8, 7
"""Settings the Adam program runs with; counts do not depend on them."""

_FORMATS: Final = {1: FP8, 2: BF16, 4: FP32, 8: FP64}


@dataclass(frozen=True, kw_only=True)
class AdamStep(StreamedOp):
    """One fused AdamW step (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019).

    Reads the FP32 master weight, two moments of `moment_bytes` and a gradient of `grad_bytes`;
    writes the master weight, the moments and, unless `weight_bytes` is 0 (training in FP32
    throughout), the working copy of the weight. 13 flops, one square root and one reciprocal per
    parameter. Ignored: gradient clipping, the norm it needs, and scales of 8-bit moments.

    >>> AdamStep(num_parameters=10**9).work(2**20).bytes == (14 + 14) * 1e9
    True
    """

    name: ClassVar[str] = "adam_step"
    num_parameters: Num
    grad_bytes: Num = 2
    weight_bytes: float | Array = 2
    moment_bytes: Num = 4

    def check(self) -> None:
        """`weight_bytes` may be zero."""
        set_non_negative(self, "weight_bytes")

    def elements(self) -> Num:
        """One element of every array per parameter."""
        return self.num_parameters

    def read_bytes(self) -> Num:
        """Master weight, two moments, gradient."""
        return FP32.bytes_per_element + 2 * self.moment_bytes + self.grad_bytes

    def write_bytes(self) -> Num:
        """Master weight, two moments, working weight."""
        return FP32.bytes_per_element + 2 * self.moment_bytes + self.weight_bytes

    def steps(self) -> tuple[Num, Num]:
        """13 flops (3 for m, 4 for v, 2 for the root, 2 to step, 2 to decay); sqrt, reciprocal."""
        return 13, 2

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """master, m, v (not negative) and grad, each [num_parameters]."""
        n = int(self.num_parameters)
        drawn = {key: rng.standard_normal(n) for key in ("master", "m", "v", "grad")}
        return drawn | {"v": drawn["v"] ** 2}

    def reference(self, inputs: Arrays) -> Arrays:
        """The update as the papers write it."""
        m = BETA1 * inputs["m"] + (1 - BETA1) * inputs["grad"]
        v = BETA2 * inputs["v"] + (1 - BETA2) * inputs["grad"] ** 2
        m_hat, v_hat = m / (1 - BETA1**STEP), v / (1 - BETA2**STEP)
        moved = LEARNING_RATE * (m_hat / (np.sqrt(v_hat) + TINY) + DECAY * inputs["master"])
        master = inputs["master"] - moved
        outputs = {"master": master, "m": m, "v": v}
        return outputs | ({"weight": master} if self.weight_bytes else {})

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Chunk after chunk in one kernel."""
        moment = _format(self.moment_bytes)
        formats = {"master": FP32, "m": moment, "v": moment, "grad": _format(self.grad_bytes)}
        sources = [machine.place(inputs[key], dtype) for key, dtype in formats.items()]
        del formats["grad"]
        if self.weight_bytes:
            formats["weight"] = _format(self.weight_bytes)
        n = int(self.num_parameters)
        targets = {key: machine.empty((n,), dtype) for key, dtype in formats.items()}
        chunk = int(self.tiling(machine.fast_bytes)["chunk"])
        stream(machine, sources, list(targets.values()), chunk, _adam)
        return {key: target.values for key, target in targets.items()}


def _adam(x: Sequence[Lanes]) -> tuple[Lanes, ...]:
    master, m, v, grad = x
    m = m * BETA1 + grad * (1 - BETA1)
    v = v * BETA2 + grad * grad * (1 - BETA2)
    root = v.sqrt() * (1 - BETA2**STEP) ** -0.5 + TINY
    update = m * (LEARNING_RATE / (1 - BETA1**STEP)) * root.reciprocal()
    master = master * (1 - LEARNING_RATE * DECAY) - update
    return master, m, v, master


def _format(size_bytes: Num) -> DType:
    """A format of that width, for programs."""
    if size_bytes not in _FORMATS:
        raise InputError(f"no format is {size_bytes} bytes wide; take 1, 2, 4 or 8")
    return _FORMATS[int(size_bytes)]
