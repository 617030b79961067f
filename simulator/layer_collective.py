"""One collective of a layer, and the pieces of a step that collectives belong to."""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.cluster import Cluster
from simulator.network import bound_seconds, calibrated_seconds
from workloads.axis_order import Spacing
from workloads.numeric import Num
from workloads.ops.collective import Collective

TENSOR, CONTEXT, EXPERT = "tensor parallel", "context parallel", "expert parallel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """`forward` times a collective in the forward pass of a layer, `backward` in its backward.

    `hidden` more run in the backward pass under kernels that do not wait for them.
    """

    piece: str
    collective: Collective
    stride: Spacing
    forward: Num
    backward: Num
    hidden: Num = 0

    def seconds(self, *, on: Cluster, calibrated: bool = False) -> tuple[Num, Num, Num]:
        """Seconds in the forward pass, in the backward pass, and hidden in it."""
        once = self.once(on=on, calibrated=calibrated)
        return self.forward * once, self.backward * once, self.hidden * once

    def once(self, *, on: Cluster, calibrated: bool) -> Num:
        """Seconds of the collective by itself."""
        seconds = calibrated_seconds if calibrated else bound_seconds
        return seconds(self.collective, on=on, stride=self.stride)
