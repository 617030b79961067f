"""Ops that run several kernels: their counts are the sums over the stages, and so is their time.

A system states its kernels in `stages` (each an op of its own, with a count and a kernel model)
and, where it is proved, how their programs hand arrays to each other in `program`. Nothing else
is needed: a scheme that selects keys is a scoring product, a top-k and an attention over what was
selected.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from hwmodels.dtypes import DType
from workloads.machine import Machine
from workloads.numeric import Num
from workloads.op import Arrays, Op, ProvedOp, Stage
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class StagedOp(Op):
    """Kernels one after another. `compulsory_bytes` counts the op's own inputs and outputs."""

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The kernels in the order they run."""

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """The stages' tilings, prefixed with their names."""
        return {
            f"{stage.name}_{key}": value
            for stage in self.stages()
            for key, value in stage.op.tiling(fast_bytes).items()
        }

    def work(self, fast_bytes: Num) -> Work:
        """The sum over the stages, each as often as it runs."""
        total = Work(launches=0)
        for stage in self.stages():
            total = total + stage.op.work(fast_bytes).times(stage.times)
        return total

    def min_flops(self) -> Mapping[DType, Num]:
        """What the stages' results need."""
        total: dict[DType, Num] = {}
        for stage in self.stages():
            for dtype, flops in stage.op.min_flops().items():
                total[dtype] = total.get(dtype, 0) + flops * stage.times
        return total


@dataclass(frozen=True, kw_only=True)
class ProvedStagedOp(StagedOp, ProvedOp):
    """A staged op whose program runs the stages' programs in turn."""


Step: TypeAlias = Callable[[ProvedOp, Arrays], Arrays]
"""Runs one stage: its program on a machine, or its reference."""


@dataclass(frozen=True, kw_only=True)
class SteppedOp(ProvedStagedOp):
    """A staged op that runs its stages by their programs, or by their naive forms."""

    @abstractmethod
    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """All stages in turn; what no op of its own describes runs on `machine`, if given."""

    def reference(self, inputs: Arrays) -> Arrays:
        """The stages' naive forms in turn."""
        return self.run(lambda op, given: op.reference(given), inputs, None)

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        return self.run(lambda op, given: op.program(machine, given), inputs, machine)
