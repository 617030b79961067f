"""Times kernels on a CUDA GPU; everything but the calls into CUDA is tested without one.

A trial is measured in this order; what goes wrong on the way is named and nothing is timed then:

    small checks    every check of the kernel in the trial's format, once an implementation
    tile set        each configuration is compiled, run and timed briefly; the fastest stays
    own output      outputs poisoned, run again, held against the reference (or, where that does
                    not fit in memory, against another implementation) on a sample of elements
    repetitions     after a warm-up, until the 95 % interval of the median is tight

What the kernel finds in the L2 is fixed and recorded. Where at most `sampling.COPIES` sets of
inputs and outputs exceed two L2s, that many take turns ('rotated'); smaller sets stay in the L2
('warm'); where a second set does not fit in memory, a buffer of that size is written before every
launch ('cold'). Launches are replayed from one captured graph, so that gaps between them are the
device's own; a launch that cannot be captured is timed in eager batches ('events').

An attempt whose interval of the median stays wide is repeated; the tightest attempt stands, flagged
as noisy where even it is wide. Nothing is averaged.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from validate.record import (
    COLD,
    NOISY,
    ROTATED,
    THROTTLED,
    Case,
    Environment,
    Record,
    Trial,
)
from validate.sampling import Sample, num_copies, quantile
from validate.session import now
from validate.timer import DeviceLost, Unmeasured

if TYPE_CHECKING:
    from validate.kernels.spec import Implementation, Inputs, KernelSpec, Launch

Run = Callable[[], Any]
TRITON: Final = "triton"
"""How names of our own implementations begin."""

TIGHT: Final = 0.01
"""Half width of the interval of the median, over the median, at which repetitions end."""
ATTEMPTS: Final = 3
FIRST, BATCH, MOST = 11, 10, 401
"""Samples of an attempt: at first, at a time, at most."""
GRAPH_S: Final = 1e-3
"""Length of a captured graph that makes the timer's own resolution (0.5 us) small."""
MOST_LAUNCHES: Final = 240
WARM_UP_S: Final = 0.05
ATTEMPT_S: Final = 0.6
"""Longest attempt, beyond its first samples."""
TRY_SAMPLES: Final = 3
SHORT_S, SEVERAL = 1e-4, 16
"""Launches below so many seconds are tried so many at a time."""
SLOW: Final = ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake")
"""Reasons of the driver that make a time no figure of the device at its rated power."""


class Captured(Protocol):
    """Launches that can be timed together, again and again."""

    method: str

    def seconds(self, samples: int, *, flush: bool) -> list[float]:
        """Device seconds of all launches together, for each sample; flushed before each if so."""
        ...


class Gpu(Protocol):
    """What a timer asks of a GPU. An error of the device is raised as `Unmeasured`, one after
    which it answers no more as `DeviceLost`.
    """

    arch: int
    l2_bytes: float

    def environment(self, l2_state: str) -> Environment:
        """The machine now."""
        ...

    def inputs(self, spec: KernelSpec, case: Case, seed: int) -> Inputs:
        """Random inputs of a case."""
        ...

    def copy(self, inputs: Inputs) -> Inputs:
        """The same inputs elsewhere in memory."""
        ...

    def size_bytes(self, *held: object) -> float:
        """Bytes of all tensors in there, each storage once."""
        ...

    def free_bytes(self) -> float:
        """Device memory that is left."""
        ...

    def outputs(self, run: Run) -> Any:
        """What one run returns, finished."""
        ...

    def poison(self, outputs: Any, inputs: Inputs) -> None:
        """Overwrite outputs that are no inputs, so that what is left unwritten shows."""
        ...

    def error(self, outputs: Any, truth: Any) -> float:
        """The worst relative error over the outputs, on a sample; infinite for NaN anywhere."""
        ...

    def capture(self, runs: Sequence[Run], count: int) -> Captured:
        """`count` launches that take `runs` in turn."""
        ...

    def release(self) -> None:
        """Give back memory that nothing holds."""
        ...


@dataclass(frozen=True, slots=True)
class _Job:
    """A case of a kernel by one implementation, with its inputs."""

    spec: KernelSpec
    how: Implementation
    case: Case
    inputs: Inputs


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The tile set that is timed, ready to run; `tried` are brief timings by label."""

    launch: Launch | None
    run: Run
    tried: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Its brief timing."""
        return self.tried[label_of(self.launch)]


class CudaTimer:
    """Times trials of the suite on one GPU."""

    def __init__(
        self,
        gpu: Gpu,
        specs: Sequence[KernelSpec],
        *,
        most_launches: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most_launches` is how many tile configurations a trial may try; all by default."""
        self._gpu, self._clock = gpu, clock
        self._specs = {spec.name: spec for spec in specs}
        self._most_launches = most_launches
        self._verdicts: dict[tuple[str, str, str], str] = {}
        self._held: tuple[str, Inputs] | None = None
        self._truth: tuple[str, Any] | None = None

    @property
    def environment(self) -> Environment:
        """The machine as it is now; the state of the L2 is that of a rotated trial."""
        return self._gpu.environment(ROTATED)

    def measure(self, trial: Trial) -> Record:
        """Check, choose a tile set, check again, time; any error becomes the trial's refusal."""
        spec, how, launches = self._ready(trial)
        try:
            self._check_small(spec, how, trial.case)
            job = _Job(spec, how, trial.case, self._inputs(spec, trial.case))
            chosen = self._fastest(job, launches)
            error, judge = self._check_own(job, chosen)
            return self._timed(job, chosen, error, judge)
        except DeviceLost:
            raise
        except Exception as why:  # kernels are many people's: whatever they raise is a refusal
            kind, reason = reason_of(why)
            if kind == "memory":
                self._forget()
            raise Unmeasured(kind, reason) from None
        finally:
            self._gpu.release()

    def _ready(self, trial: Trial) -> tuple[KernelSpec, Implementation, list[Launch | None]]:
        """The kernel, the implementation and its tile sets here; refused where there are none."""
        spec = self._specs.get(trial.kernel)
        known = {how.name: how for how in spec.implementations} if spec is not None else {}
        how = known.get(trial.implementation)
        if spec is None or how is None:
            raise Unmeasured("unsupported", f"the suite has no {trial}")
        reason = how.refusal(trial.case, self._gpu.arch)
        if reason is not None:
            raise Unmeasured("unsupported", reason)
        launches = list(how.launches(trial.case, self._gpu.arch))[: self._most_launches]
        if not launches:
            raise Unmeasured("unsupported", "no tile configuration is shipped for this GPU")
        return spec, how, launches

    def _inputs(self, spec: KernelSpec, case: Case) -> Inputs:
        """Inputs of a case; kept for its next implementation."""
        key = f"{spec.name} {case.key}"
        if self._held is None or self._held[0] != key:
            self._forget()
            self._held = (key, self._gpu.inputs(spec, case, seed_of(key)))
        return self._held[1]

    def _forget(self) -> None:
        self._held = self._truth = None
        self._gpu.release()

    def _check_small(self, spec: KernelSpec, how: Implementation, case: Case) -> None:
        """All small checks in that format, once; a wrong implementation stays refused."""
        key = (spec.name, how.name, case.dtype)
        if key not in self._verdicts:
            self._verdicts[key] = self._small_verdict(spec, how, case.dtype)
        if self._verdicts[key]:
            raise Unmeasured("wrong", self._verdicts[key])

    def _small_verdict(self, spec: KernelSpec, how: Implementation, dtype: str) -> str:
        """What is wrong with an implementation on the small checks; empty where nothing is."""
        limit = self._limit(spec, dtype)
        for check in small_checks(spec, dtype):
            launches = how.launches(check, self._gpu.arch)
            if how.refusal(check, self._gpu.arch) is not None or not launches:
                continue
            inputs = self._gpu.inputs(spec, check, seed_of(check.key))
            try:
                run = how.prepare(check, inputs, launches[0])
                error = self._own_error(inputs, run, spec.reference(check, inputs))
            except DeviceLost:
                raise
            except Exception as why:
                if not how.name.startswith(TRITON):
                    continue  # a library may refuse odd sizes; what it is timed on is checked too
                kind, reason = reason_of(why)
                raise Unmeasured(kind, f"{reason} (on the check {shown(check)})") from None
            if not error <= limit:
                return f"relative error {error:.2g} above {limit:.2g} on the check {shown(check)}"
        return ""

    def _limit(self, spec: KernelSpec, dtype: str) -> float:
        limit = spec.tolerances.get(dtype)
        if limit is None:
            raise Unmeasured("unsupported", f"{spec.name} states no tolerance in {dtype}")
        return limit

    def _own_error(self, inputs: Inputs, run: Run, truth: Any) -> float:
        """The error of a second run over poisoned outputs."""
        self._gpu.poison(self._gpu.outputs(run), inputs)
        return self._gpu.error(self._gpu.outputs(run), truth)

    def _fastest(self, job: _Job, launches: Sequence[Launch | None]) -> _Chosen:
        """The tile set with the least median of a few launches; those that fail are passed over."""
        best: tuple[float, Launch | None, Run] | None = None
        tried: dict[str, float] = {}
        problem: Exception = Unmeasured("failed", "nothing to run")
        for launch in launches:
            try:
                run = job.how.prepare(job.case, job.inputs, launch)
                self._gpu.outputs(run)
                seconds = self._briefly(run)
            except DeviceLost:
                raise
            except Exception as why:  # a tile set that does not fit is no reason to give up others
                problem = why.with_traceback(None)
                self._gpu.release()
                continue
            tried[label_of(launch)] = seconds
            if best is None or seconds < best[0]:
                best = (seconds, launch, run)
        if best is None:
            raise problem
        return _Chosen(best[1], best[2], tried)

    def _briefly(self, run: Run) -> float:
        """Seconds of a launch, from few; short ones in a graph of several."""
        once = quantile(self._gpu.capture([run], 1).seconds(TRY_SAMPLES, flush=False), 0.5)
        if once > SHORT_S:
            return once
        several = self._gpu.capture([run], SEVERAL).seconds(TRY_SAMPLES, flush=False)
        return quantile(several, 0.5) / SEVERAL

    def _check_own(self, job: _Job, chosen: _Chosen) -> tuple[float, str]:
        """The error of the timed case itself, and against what it was judged."""
        limit = self._limit(job.spec, job.case.dtype)
        truth, judge = self._judge(job)
        if truth is None:
            raise Unmeasured("memory", "neither the reference nor another implementation fits")
        # two implementations may err in opposite directions
        allowed = limit if judge == REFERENCE else 2 * limit
        error = self._own_error(job.inputs, chosen.run, truth)
        if not error <= allowed:
            raise Unmeasured("wrong", f"relative error {error:.2g} above {allowed:.2g} ({judge})")
        return error, judge

    def _judge(self, job: _Job) -> tuple[Any, str]:
        """The reference's outputs, kept for the case; else those of another implementation."""
        key = f"{job.spec.name} {job.case.key}"
        if self._truth is None or self._truth[0] != key:
            self._truth = None
            try:
                self._truth = (
                    key,
                    self._gpu.outputs(partial(job.spec.reference, job.case, job.inputs)),
                )
            except DeviceLost:
                raise
            except Exception:  # most often out of memory: float64 of a large case
                self._gpu.release()
        if self._truth is not None:
            return self._truth[1], REFERENCE
        return self._peer(job)

    def _peer(self, job: _Job) -> tuple[Any, str]:
        """The outputs of the first other implementation that runs, and its name."""
        for other in job.spec.implementations:
            launches = other.launches(job.case, self._gpu.arch)
            refused = other.refusal(job.case, self._gpu.arch) is not None
            if other.name == job.how.name or refused or not launches:
                continue
            try:
                run = other.prepare(job.case, job.inputs, launches[0])
                return self._gpu.outputs(run), other.name
            except DeviceLost:
                raise
            except Exception:  # then another
                self._gpu.release()
        return None, ""

    def _timed(self, job: _Job, chosen: _Chosen, error: float, judge: str) -> Record:
        """The record of the chosen tile set."""
        set_bytes = self._gpu.size_bytes(job.inputs, self._gpu.outputs(chosen.run))
        copies, l2_state = num_copies(set_bytes, self._gpu.l2_bytes, self._gpu.free_bytes())
        captured, launches = self._captured(
            self._copies(job, chosen, copies), chosen.seconds, l2_state
        )
        self._warm_up(captured, launches * chosen.seconds)
        sample, attempts = self._attempts(captured, launches, flush=l2_state == COLD)
        environment = self._gpu.environment(l2_state)
        row = job.spec.row(job.case) if job.spec.row is not None else None
        return Record(
            case=job.case,
            environment=environment,
            seconds=sample.median,
            repetitions=len(sample.seconds) * launches,
            spread_frac=sample.spread_frac,
            measured_at=now(),
            kernel=job.spec.name,
            implementation=job.how.name,
            vendor=job.how.vendor,
            launch=label_of(chosen.launch),
            method=captured.method,
            low_s=sample.ends[0],
            high_s=sample.ends[1],
            attempts=attempts,
            flags=_flags(sample, environment),
            error=error,
            judge=judge,
            tried=dict(chosen.tried),
            row=None if row is None else {"family": row[0], "op": row[1], "params": dict(row[2])},
        )

    def _copies(self, job: _Job, chosen: _Chosen, copies: int) -> list[Run]:
        """As many runs as sets take turns, each run once so that nothing is allocated later."""
        runs = [chosen.run]
        for _ in range(copies - 1):
            own = self._gpu.copy(job.inputs)
            runs.append(job.how.prepare(job.case, own, chosen.launch))
            self._gpu.outputs(runs[-1])
        return runs

    def _captured(
        self, runs: Sequence[Run], estimate_s: float, l2_state: str
    ) -> tuple[Captured, int]:
        """A graph of whole turns, long enough for the timer; one launch where L2 is flushed."""
        turns = math.ceil(GRAPH_S / max(estimate_s, 1e-7) / len(runs))
        count = len(runs) * min(max(turns, 1), max(MOST_LAUNCHES // len(runs), 1))
        count = 1 if l2_state == COLD else count
        return self._gpu.capture(runs, count), count

    def _warm_up(self, captured: Captured, graph_s: float) -> None:
        captured.seconds(max(3, math.ceil(WARM_UP_S / max(graph_s, 1e-6))), flush=False)

    def _attempts(self, captured: Captured, launches: int, *, flush: bool) -> tuple[Sample, int]:
        """The first attempt with a tight interval; the tightest of all where there is none."""
        best: Sample | None = None
        for attempt in range(1, ATTEMPTS + 1):
            found = self._attempt(captured, launches, flush=flush)
            if best is None or found.half_width_frac < best.half_width_frac:
                best = found
            if best.half_width_frac <= TIGHT:
                return best, attempt
        assert best is not None
        return best, ATTEMPTS

    def _attempt(self, captured: Captured, launches: int, *, flush: bool) -> Sample:
        start, seconds, wanted = self._clock(), list[float](), FIRST
        while True:
            got = captured.seconds(wanted, flush=flush)
            if not all(math.isfinite(s) and s > 0 for s in got):
                raise Unmeasured("failed", "the device's clock gave no positive time")
            seconds += [s / launches for s in got]
            found = Sample(tuple(seconds))
            late = self._clock() - start > ATTEMPT_S
            if found.half_width_frac <= TIGHT or late or len(seconds) >= MOST:
                return found
            wanted = BATCH


REFERENCE: Final = "reference"


def _flags(sample: Sample, environment: Environment) -> tuple[str, ...]:
    """What a reader must know of a time."""
    slow = any(reason in environment.throttle for reason in SLOW)
    noisy = sample.half_width_frac > TIGHT
    return tuple(flag for flag, on in ((NOISY, noisy), (THROTTLED, slow)) if on)


def label_of(launch: Launch | None) -> str:
    """The tile configuration in one word; empty where there is none to choose."""
    return "" if launch is None else launch.label


def small_checks(spec: KernelSpec, dtype: str) -> list[Case]:
    """The small checks in a format: those stated in it, else all of one format turned to it."""
    stated = [case for case in spec.checks if case.dtype == dtype]
    if stated or not spec.checks:
        return stated
    first = spec.checks[0].dtype
    return [replace(case, dtype=dtype) for case in spec.checks if case.dtype == first]


def seed_of(text: str) -> int:
    """A seed that is the same on every machine."""
    return zlib.crc32(text.encode())


def shown(case: Case) -> str:
    """A case in a few words."""
    return " ".join(f"{name}={value}" for name, value in case.params.items()) or "without sizes"


def reason_of(error: BaseException) -> tuple[str, str]:
    """The kind of a refusal and its first line, by what was raised.

    >>> reason_of(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))[0]
    'memory'
    """
    if isinstance(error, Unmeasured):
        return error.kind, str(error)
    name = type(error).__name__
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = f"{name}: {lines[0][:300] if lines else ''}".rstrip(": ")
    if "out of memory" in str(error).lower() or name in ("OutOfMemoryError", "MemoryError"):
        return "memory", text
    compiling = ("CompilationError", "OutOfResources", "PTXASError", "CompileTimeAssertionFailure")
    if name in compiling or "ptxas" in str(error):
        return "compile", text
    return "failed", text
