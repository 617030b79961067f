"""Time of one op on one device: counts divided by rates, on the rung that was asked for.

`estimate` answers on the best rung there is: *calibrated* where a kernel model has fitted constants
for the device or a donor, *model* where its constants are nominal (`simulator.kernel_time`), each
with an interval. Beside it always stands the *bound* rung, the roofline with every memory level:

    t_tensor  = sum over formats of tensor_flops / rate        (vector units where no tensor path)
    t_vector  = vector_flops / fp32 rate                       (same resource as the above)
    t_special = special_ops / special-function rate
    t_level   = bytes across the boundary above the level / bandwidth of the level
    lower_s   = max over resources,  upper_s = sum over resources

The bytes of a level are what the op moves when its fast memory is what lies above that level: HBM
bytes with all that the chip holds, L2 bytes with one SM's shared memory and registers together
(kernels fill both: operands here, accumulators there), shared-memory bytes with one SM's
registers. Flops and special functions are those the result needs: a kernel's tiles may compute
masked parts besides, but another tiling need not. Source: Williams et al. 2009 (roofline), extended
to a hierarchy as by Ilic et al. 2014 (cache-aware roofline). Ignored: launch latency, occupancy,
waves, ramps, clock droop; so a cold kernel is never faster than `lower_s`; a real one is slower.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.calibration import Calibration
from hwmodels.device import Device, MemoryLevel
from hwmodels.dtypes import FP32
from hwmodels.errors import UnknownNameError, UnsupportedError
from simulator.kernel_time.basis import remembered
from simulator.kernel_time.model import USUAL, Conditions
from simulator.kernel_time.predict import Prediction, predict
from workloads.numeric import Num, any_true, maximum
from workloads.op import Op
from workloads.work import Work

BOUND = "bound"
BEST = "best"
RUNGS = (BEST, BOUND)
"""What may be asked for; the answer names the rung it stands on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one op costs on one device, and why. Seconds and bytes broadcast over the op's arrays.

    `unrated` names resources the device publishes no rate for: they are left out of the bounds,
    which stay valid lower bounds. `notes` says what a reader must know (a fallback, a doubt).
    `prediction` is None on the bound rung.
    """

    op: Op
    device: Device
    rung: str
    work: Work
    seconds_by_resource: Mapping[str, Num]
    bytes_by_level: Mapping[str, Num]
    unrated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    prediction: Prediction | None = None

    @property
    def lower_s(self) -> Num:
        """No schedule of this algorithm on this device is faster: the slowest resource alone."""
        times = iter(self.seconds_by_resource.values())
        longest = next(times)
        for t in times:
            longest = maximum(longest, t)
        return longest

    @property
    def upper_s(self) -> Num:
        """Every resource at its peak rate but none overlapping another."""
        return sum(self.seconds_by_resource.values(), start=0.0)

    @property
    def seconds(self) -> Num:
        """The rung's answer; on the bound rung, `lower_s`."""
        return self.lower_s if self.prediction is None else self.prediction.seconds

    def interval(self, level: int = 80) -> tuple[Num, Num]:
        """Low and high seconds that hold `level` (80 or 90) per cent of measured kernels.

        On the bound rung, which predicts nothing, `lower_s` and `upper_s`.
        """
        if self.prediction is None:
            return self.lower_s, self.upper_s
        return self.prediction.interval(level)

    @property
    def bound(self) -> str | NDArray[np.str_]:
        """Name of the binding resource; an array of names for array-valued ops."""
        names = list(self.seconds_by_resource)
        times = list(self.seconds_by_resource.values())
        if not any(isinstance(t, np.ndarray) for t in times):
            return names[max(range(len(times)), key=lambda i: times[i])]
        slowest = np.argmax(np.stack(np.broadcast_arrays(*times)), axis=0)
        binding: NDArray[np.str_] = np.asarray(names)[slowest]
        return binding

    def share_frac(self, resource: str) -> Num:
        """Time of one resource as a fraction of the binding one; 1 for the binding one."""
        return self.seconds_by_resource[resource] / self.lower_s

    @property
    def limit_s(self) -> Num:
        """Time no algorithm for this result can beat: minimal flops, or minimal HBM bytes."""
        _, fast, _ = boundaries(self.device)[-1]
        bandwidth = rated(self.device, self.device.hbm)
        limit = self.op.io_lower_bound_bytes(fast) / bandwidth
        for dtype, flops in self.op.min_flops().items():
            limit = maximum(limit, flops / self.device.matmul_rate_flops_per_s(dtype)[0])
        return limit

    @property
    def limit_frac(self) -> Num:
        """`limit_s / seconds`: 1 means that nothing is left to gain on this device."""
        return self.limit_s / self.seconds


def estimate(
    op: Op,
    *,
    on: Device,
    rung: str = BEST,
    conditions: Conditions = USUAL,
    calibrations: Sequence[Calibration] | None = None,
) -> Estimate:
    """What `op` costs on a device; raises `UnsupportedError` where that has no rate for it.

    `rung` is 'best' or 'bound'; `conditions` say how the kernel is run (by default cold, in a
    captured graph), `calibrations` replace the shipped ones.

    >>> from hwmodels import catalog
    >>> from workloads.ops.matmul import Matmul
    >>> e = estimate(Matmul(m=8192, n=8192, k=8192), on=catalog.device("h100-sxm"))
    >>> e.bound, round(e.lower_s * 1e3, 2), e.lower_s < e.seconds < e.interval(80)[1]
    ('tensor', 1.11, True)
    """
    if rung not in RUNGS:
        raise UnknownNameError("rung", rung, list(RUNGS))
    found: Prediction | None = None
    more: tuple[str, ...] = ()
    if rung == BEST:
        try:
            found = predict(op, on=on, conditions=conditions, calibrations=calibrations)
            more = found.notes
        except UnsupportedError as why:
            more = (f"no prediction beyond the bound: {why}",)
    return _with_bound(op, on, found, more)


def _with_bound(op: Op, on: Device, found: Prediction | None, more: tuple[str, ...]) -> Estimate:
    """The roofline of every memory level, beside the prediction where there is one."""
    seconds: dict[str, Num] = {}
    level_bytes: dict[str, Num] = {}
    unrated: list[str] = []
    work: Work | None = None
    for slow, fast_bytes, private in _boundaries(on):
        work_here = op.work(fast_bytes)
        level_bytes[slow.name] = work_here.bytes
        if work is None or private:
            work = work_here
        if slow.bytes_per_s is None:
            unrated.append(slow.name)
        else:
            seconds[slow.name] = work_here.bytes / slow.bytes_per_s
    if work is None:
        raise UnsupportedError(f"{on.id} has a single memory level; a roofline needs two")
    compute, unrated_units, notes = compute_seconds(op.unmasked(work), on)
    return Estimate(
        op=op,
        device=on,
        rung=BOUND if found is None else found.rung,
        work=work,
        seconds_by_resource=compute | seconds,
        bytes_by_level=level_bytes,
        unrated=(*unrated_units, *unrated),
        notes=(*notes, *more),
        prediction=found,
    )


def boundaries(device: Device) -> tuple[tuple[MemoryLevel, float, bool], ...]:
    """(level, bytes of fast memory above it, whether one SM has that to itself), fast to slow.

    Above a level that all SMs share lies everything on the chip; above the first shared level,
    what one SM holds: registers, shared memory, Blackwell's tensor memory.

    >>> from hwmodels import catalog
    >>> [(b[0].name, b[1] / 2**10) for b in boundaries(catalog.device("a100-sxm4-80gb"))]
    [('smem', 256.0), ('l2', 420.0), ('hbm', 86320.0)]
    """
    tensor_memory = float(device.sm.tensor_memory_bytes or 0)
    own, everything = tensor_memory, tensor_memory * device.num_sms
    found = []
    for fast, slow in itertools.pairwise(device.memory):
        private = fast.num_units > 1
        own += fast.capacity_bytes if private else 0.0
        everything += fast.capacity_bytes * fast.num_units
        found.append((slow, own if private else everything, private))
    return tuple(found)


_boundaries = remembered(boundaries)


def compute_seconds(
    work: Work, on: Device
) -> tuple[dict[str, Num], tuple[str, ...], tuple[str, ...]]:
    """Seconds on tensor, vector and special-function units; what has no rate; notes."""
    seconds: dict[str, Num] = {}
    unrated: list[str] = []
    notes: list[str] = []
    for dtype, flops in work.tensor_flops.items():
        rate, unit = on.matmul_rate_flops_per_s(dtype)
        seconds[unit] = seconds.get(unit, 0.0) + flops / rate
        if unit == "vector":
            notes.append(
                f"{on.id} has no tensor path for {dtype}: its products run on vector units"
            )
    vector_rate = on.vector_rate_flops_per_s(FP32)
    if vector_rate is None:
        unrated.append("vector")
    else:
        seconds["vector"] = seconds.get("vector", 0.0) + work.vector_flops / vector_rate
    if any_true(np.greater(work.host_bytes, 0)):
        if on.host_bytes_per_s is None:
            raise UnsupportedError(f"{on.id} states no link to the host's memory")
        seconds["host"] = work.host_bytes / on.host_bytes_per_s
    special_rate = on.special_ops_per_s
    if special_rate is None:
        unrated.append("special")
    else:
        seconds["special"] = work.special_ops / special_rate
    return seconds, tuple(unrated), tuple(notes)


def rated(device: Device, level: MemoryLevel) -> float:
    """The level's bandwidth; raises `UnsupportedError` where none is published."""
    if level.bytes_per_s is None:
        raise UnsupportedError(f"{device.id}: no bandwidth is published for level '{level.name}'")
    return level.bytes_per_s
