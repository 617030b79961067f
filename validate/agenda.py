"""What a profile measures, in which order, and what each trial will cost.

A point is a case of a kernel; its trials are the implementations that run there, side by side.
`quick` takes the points that `validate.design` chooses, `full` the whole grid in the order of what
each adds. A trial costs its set-up, the trying of tile sets, and its repetitions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Final

from hwmodels import catalog
from hwmodels.errors import InputError, UnknownNameError
from validate.record import Trial

if TYPE_CHECKING:
    from validate.design import Candidate
    from validate.kernels.spec import Implementation, KernelSpec
    from validate.record import Case

QUICK, FULL = "quick", "full"
SUITES: Final = (QUICK, FULL)
POINTS: Final = {QUICK: 100, FULL: 10**6}
SECONDS: Final = {QUICK: 7.5 * 60, FULL: 24 * 60.0}
"""Most seconds a suite takes unless told otherwise: 8 and 25 minutes, less what the last trial may
take beyond its predicted cost."""
KIN: Final = {
    8: "a100-sxm4-80gb",
    9: "h100-sxm",
    10: "b200-sxm",
    12: "rtx-pro-6000-blackwell-server",
}
"""The device whose calibration speaks for a GPU in no catalogue, by capability's major number."""

SET_UP_S: Final = 0.35
"""Inputs, reference and checks of one trial."""
COMPILE_S: Final = 1.5
"""Compiling one tile set, counted once per kernel, implementation and format."""
QUICK_LAUNCHES: Final = 3
"""Tile sets that `quick` tries, the most promising first: compiling is most of its time."""
LEAST_TIMED_S: Final = 0.25
"""Shortest time spent on repetitions."""
RUNS: Final = 60
"""Launches of one trial, all told: tries, warm-up, repetitions."""


@dataclass(frozen=True, slots=True)
class Item:
    """A trial, the seconds predicted for one launch, and the seconds that measuring it takes."""

    trial: Trial
    seconds: float
    cost_s: float


@dataclass(frozen=True, slots=True)
class Agenda:
    """Trials in order of importance; `broken` names suites that could not be read, and why.

    `skipped` are trials that their implementation refuses here, with its reason.
    """

    items: tuple[Item, ...]
    num_points: int
    skipped: tuple[tuple[Trial, str], ...] = ()
    broken: tuple[tuple[str, str], ...] = ()
    variances: tuple[float, ...] = ()

    @property
    def cost_s(self) -> float:
        """Seconds that everything together takes."""
        return sum(item.cost_s for item in self.items)


def agenda(
    suite: str,
    device_id: str,
    *,
    kernels: Sequence[str] = (),
    points: int | None = None,
    arch: int | None = None,
) -> Agenda:
    """The trials of a suite on a device; `kernels` keeps those named only."""
    specs, broken = suites()
    chosen = named(specs, kernels) if kernels else specs
    here = arch or arch_of(device_id)
    return planned(chosen, device_id, here, points or POINTS[_checked(suite)], broken=tuple(broken))


def planned(
    specs: Sequence[KernelSpec],
    device_id: str,
    arch: int,
    points: int,
    broken: tuple[tuple[str, str], ...] = (),
) -> Agenda:
    """The best `points` points of some kernels on a device."""
    from validate.design import design, prospect

    candidates, rows_of, kernels, skipped = _candidates(specs, arch)
    if not candidates:
        return Agenda((), 0, tuple(skipped), broken)
    seen = prospect(candidates, device_id)
    found = design(seen.slopes, rows_of, kernels, points)
    order = found.order[:points]
    paid: set[tuple[str, str, str]] = set()
    items = []
    for point in order:
        for i in rows_of[point]:
            trial, seconds = candidates[i].trial, float(seen.seconds[i])
            binary = (trial.kernel, trial.implementation, trial.case.dtype)
            compiled = 0 if binary in paid else candidates[i].num_binaries
            items.append(Item(trial, seconds, _cost(seconds, compiled)))
            paid.add(binary)
    return Agenda(tuple(items), len(order), tuple(skipped), broken, found.variances)


def suites() -> tuple[tuple[KernelSpec, ...], list[tuple[str, str]]]:
    """Every kernel of the suite; a folder that cannot be read is named and stops no other."""
    from validate.kernels.registry import FOLDERS

    found: list[KernelSpec] = []
    broken: list[tuple[str, str]] = []
    for folder in FOLDERS:
        try:
            found += import_module(f"validate.kernels.{folder}.suite").SPECS
        except Exception as error:  # whatever a suite raises, the others are still worth timing
            broken.append((folder, one_line(error)))
    return tuple(found), broken


def one_line(error: BaseException) -> str:
    """The kind of an error and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}".rstrip(": ")


def arch_of(device_id: str) -> int:
    """The compute capability, times ten.

    >>> arch_of("h200-sxm"), arch_of("a100-sxm4-80gb")
    (90, 80)
    """
    text = catalog.device(device_id).compute_capability
    if text is None:
        raise InputError(f"{device_id} has no compute capability; profile an NVIDIA GPU")
    major, minor = text.split(".")
    return int(major) * 10 + int(minor)


def _checked(suite: str) -> str:
    if suite not in SUITES:
        raise UnknownNameError("suite", suite, SUITES)
    return suite


def named(specs: Sequence[KernelSpec], names: Sequence[str]) -> tuple[KernelSpec, ...]:
    """The kernels of those names; raises `UnknownNameError`."""
    known = {spec.name: spec for spec in specs}
    for name in names:
        if name not in known:
            hint = f"there are {', '.join(known)}" if known else "the suite is empty"
            raise UnknownNameError("kernel", name, known, hint)
    return tuple(known[name] for name in dict.fromkeys(names))


def _candidates(
    specs: Iterable[KernelSpec], arch: int
) -> tuple[list[Candidate], list[list[int]], list[str], list[tuple[Trial, str]]]:
    """All trials, the rows of each point, the kernel of each point, what is refused here."""
    candidates: list[Candidate] = []
    rows_of: list[list[int]] = []
    kernels: list[str] = []
    skipped: list[tuple[Trial, str]] = []
    for spec in specs:
        for case in {case.key: case for case in spec.grid}.values():
            mine: list[int] = []
            for how in spec.implementations:
                trial = Trial(kernel=spec.name, implementation=how.name, case=case)
                refusal = _refusal(how, case, arch)
                if refusal is not None:
                    skipped.append((trial, refusal))
                    continue
                mine.append(len(candidates))
                candidates.append(_candidate(spec, how, trial, arch))
            if mine:
                rows_of.append(mine)
                kernels.append(spec.name)
    return candidates, rows_of, kernels, skipped


def _candidate(spec: KernelSpec, how: Implementation, trial: Trial, arch: int) -> Candidate:
    from validate.design import Candidate

    row = spec.row(trial.case) if spec.row is not None else None
    binaries = [launch for launch in how.launches(trial.case, arch) if launch is not None]
    num_binaries = min(len(binaries), QUICK_LAUNCHES)
    return Candidate(trial, how.vendor, row, partial(spec.op, trial.case), num_binaries)


def _refusal(how: Implementation, case: Case, arch: int) -> str | None:
    """Why an implementation does not run there, or has no tile set there."""
    reason = how.refusal(case, arch)
    if reason is None and not how.launches(case, arch):
        return "no tile configuration is shipped for this GPU"
    return reason


def _cost(seconds: float, compiled: int) -> float:
    return SET_UP_S + COMPILE_S * compiled + max(LEAST_TIMED_S, RUNS * seconds)
