"""Which points to measure first: those that narrow the intervals of all others the most.

Every trial of the grid has a slope in the log time of its kernel model to each fitted constant,
w_i = d ln T_i / d ln c_j * spread_j / C, in units of the prior (spread) and of an error that counts
like one prior standard deviation (C, `fitting.SCALE`). The posterior of the constants after rows R
is S = (I + sum_R w w')^-1, the variance of a prediction C^2 w' S w. A point is worth

    gain = sum_rows  ||M^(1/2) S w||^2 / (1 + w' S w),      M = sum over the grid of g_i w_i w_i'

the fall of the mean variance over the grid (Bayesian V-optimal design: Cohn, Ghahramani and Jordan
1996, section 4; Chaloner and Verdinelli 1995), with weights g that let every kernel count alike.
Points are taken greedily, each kernel within its quota. A point without a slope (an op without a
fitted model) is taken from the ends of its grid towards the middle.

`python -m validate.design --device h200-sxm` shows what `quick` would measure there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels.calibration import Calibration, shipped
from hwmodels.errors import InputError, UnsupportedError
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from validate.batches import Batch, batches
from validate.calibrate import with_prior
from validate.fitting import SCALE, problem_of
from validate.measurement import Measurement
from validate.record import ROTATED, Trial
from validate.recorded import run_of, source_of
from workloads.op import Op

Floats: TypeAlias = NDArray[np.float64]

USUAL_S: Final = 1e-3
"""What a launch is taken to last where no model times it."""
LEAST_SHARE: Final = 1 / 3
"""Share of the points that is dealt out evenly, so that every kernel is seen."""
MOST_SHARE: Final = 2.5
"""Most points of one kernel, in multiples of an even share."""
TIE: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trial that could be measured: how public tables name it, or the op that counts it.

    `num_binaries` is how many tile sets are compiled for it.
    """

    trial: Trial
    vendor: str
    row: tuple[str, str, Mapping[str, object]] | None
    op: Callable[[], Op]
    num_binaries: int = 0


@dataclass(frozen=True, slots=True)
class Prospect:
    """What the kernel models say of candidates: seconds, slopes (rows x constants) or zeros."""

    seconds: Floats
    slopes: Floats


@dataclass(frozen=True, slots=True)
class Design:
    """Points in the order in which to measure them, and the mean log-time variance after each."""

    order: tuple[int, ...]
    variances: tuple[float, ...]


def prospect(
    candidates: Sequence[Candidate],
    device_id: str,
    donors: Sequence[Calibration] | None = None,
) -> Prospect:
    """Seconds and slopes of every candidate on a device, from what other devices' fits say."""
    found = _batches(candidates, device_id)
    ones = np.ones(len(candidates))
    problem = problem_of(device_id, found, ones)
    if not problem.batches:
        return Prospect(_op_seconds(candidates, device_id, ones * np.nan), np.zeros((len(ones), 0)))
    problem = with_prior(problem, shipped() if donors is None else donors)
    theta = np.array([slot.start for slot in problem.slots])
    with np.errstate(all="ignore"):
        seconds = problem.predicted(theta)
        total = np.where(seconds > 0, seconds, 1.0)
        slopes = problem.jacobian(theta, total)
    scaled = slopes * np.array([slot.spread for slot in problem.slots]) / SCALE
    bad = ~np.isfinite(scaled).all(axis=1) | ~(seconds > 0)
    scaled[bad] = 0.0
    return Prospect(_op_seconds(candidates, device_id, np.where(bad, np.nan, seconds)), scaled)


def _batches(candidates: Sequence[Candidate], device_id: str) -> list[Batch]:
    """Rows as public tables name them together; every other trial by its own op and stages."""
    public = [i for i, c in enumerate(candidates) if c.row is not None]
    rows = [_row(candidates[i], device_id) for i in public]
    found, reasons = batches(rows)
    where = np.array(public, dtype=np.intp)
    made = [Batch(b.device_id, b.op, b.conditions, where[b.where], b.flag) for b in found]
    unread = {public[i] for i, reason in enumerate(reasons) if reason is not None}
    for i, candidate in enumerate(candidates):
        if candidate.row is None or i in unread:
            made += _of_op(candidate, device_id, i)
    return made


def _row(candidate: Candidate, device_id: str) -> Measurement:
    assert candidate.row is not None
    family, op, params = candidate.row
    trial = candidate.trial
    return Measurement(
        family=family,
        source=source_of(trial.implementation, candidate.vendor, ROTATED),
        gpu=device_id,
        device_id=device_id,
        op=op,
        dtype=trial.case.dtype,
        params=dict(params),
        seconds=1.0,
    )


def _run(candidate: Candidate) -> Conditions:
    return run_of(source_of(candidate.trial.implementation, candidate.vendor, ROTATED))


def _of_op(candidate: Candidate, device_id: str, index: int) -> list[Batch]:
    """One op, or its stages each once: their slopes are what matters here."""
    try:
        op = candidate.op()
        parts = [stage.op for stage in op.stages()] or [op]
    except (InputError, NotImplementedError):
        return []
    where = np.array([index], dtype=np.intp)
    return [Batch(device_id, part, _run(candidate), where) for part in parts]


def _op_seconds(candidates: Sequence[Candidate], device_id: str, seconds: Floats) -> Floats:
    """The seconds with those filled in that are missing: by the op itself, else the usual."""
    from hwmodels import catalog

    device, found = catalog.device(device_id), seconds.copy()
    for i in map(int, np.flatnonzero(~np.isfinite(seconds))):
        try:
            found[i] = float(np.real(np.asarray(predict(candidates[i].op(), on=device).seconds)))
        except (InputError, UnsupportedError, NotImplementedError, ValueError, TypeError):
            found[i] = USUAL_S
    return np.where(np.isfinite(found) & (found > 0), found, USUAL_S)


def design(
    slopes: Floats, points: Sequence[Sequence[int]], kernels: Sequence[str], count: int
) -> Design:
    """The best `count` points, then all others by what they would add.

    `points` are rows of `slopes` each; `kernels` names the kernel of every point.
    """
    count = min(count, len(points))
    state = _State(slopes, points, kernels)
    least, most = _quotas(kernels, count)
    taken: dict[str, int] = dict.fromkeys(kernels, 0)
    order: list[int] = []
    variances: list[float] = []
    while len(order) < count:
        short = {k for k, n in taken.items() if n < least[k]}
        allowed = short or {k for k, n in taken.items() if n < most[k]} or set(taken)
        best = state.best(allowed, order)
        order.append(best)
        taken[kernels[best]] += 1
        state.take(best)
        variances.append(state.mean_variance())
        least = {k: min(n, kernels.count(k)) for k, n in least.items()}
    rest = sorted(set(range(len(points))) - set(order), key=lambda i: -state.gains[i])
    return Design((*order, *rest), tuple(variances))


def _quotas(kernels: Sequence[str], count: int) -> tuple[dict[str, int], dict[str, int]]:
    """Least and most points of each kernel; never more than it has."""
    sizes = {kernel: kernels.count(kernel) for kernel in dict.fromkeys(kernels)}
    even = count / max(len(sizes), 1)
    least = max(1, int(even * LEAST_SHARE))
    most = max(least, int(np.ceil(even * MOST_SHARE)))
    return (
        {k: min(least, n) for k, n in sizes.items()},
        {k: min(most, n) for k, n in sizes.items()},
    )


class _State:
    """The posterior as points are taken; every update is of rank one."""

    def __init__(
        self, slopes: Floats, points: Sequence[Sequence[int]], kernels: Sequence[str]
    ) -> None:
        self._w, self._points, self._kernels = slopes, points, kernels
        self._weights = _weights(slopes.shape[0], points, kernels)
        self._m = (slopes * self._weights[:, None]).T @ slopes
        self._ws = slopes.copy()  # W S
        self._wsm = slopes @ self._m  # W S M
        self._ties = _ties(kernels)

    @property
    def gains(self) -> Floats:
        """What every point would add."""
        spread = 1 + np.einsum("ij,ij->i", self._ws, self._w)
        by_row = np.einsum("ij,ij->i", self._wsm, self._ws) / spread
        of_point = np.array([by_row[list(rows)].sum() for rows in self._points])
        scale = max(float(of_point.max(initial=0.0)), 1.0)
        return of_point + TIE * scale * self._ties

    def best(self, allowed: set[str], taken: Sequence[int]) -> int:
        """The point that adds most among those of the allowed kernels that were not taken."""
        free = np.array([k in allowed for k in self._kernels])
        free[list(taken)] = False
        if not free.any():
            free = np.ones(len(self._kernels), dtype=bool)
            free[list(taken)] = False
        return int(np.argmax(np.where(free, self.gains, -np.inf)))

    def take(self, point: int) -> None:
        """Learn the rows of a point."""
        for row in self._points[point]:
            sw, wide = self._ws[row].copy(), 1 + self._ws[row] @ self._w[row]
            along = self._w @ sw
            self._ws -= np.outer(along, sw) / wide
            self._wsm -= np.outer(along, sw @ self._m) / wide

    def mean_variance(self) -> float:
        """The weighted mean variance of log time over the grid, in units of C^2."""
        spread = np.einsum("ij,ij->i", self._ws, self._w)
        return float(spread @ self._weights / self._weights.sum())


def _weights(rows: int, points: Sequence[Sequence[int]], kernels: Sequence[str]) -> Floats:
    """Weights of the rows with which every kernel counts alike."""
    sizes: dict[str, int] = {}
    for point, kernel in zip(points, kernels, strict=True):
        sizes[kernel] = sizes.get(kernel, 0) + len(point)
    found = np.zeros(rows)
    for point, kernel in zip(points, kernels, strict=True):
        found[list(point)] = 1 / sizes[kernel]
    return found


def _ties(kernels: Sequence[str]) -> Floats:
    """Ranks within a kernel that break ties: the ends of the grid first, then ever finer.

    >>> _ties(["a"] * 5).round(1).tolist()
    [1.0, 0.4, 0.6, 0.2, 0.8]
    """
    found = np.zeros(len(kernels))
    for kernel in dict.fromkeys(kernels):
        where = [i for i, k in enumerate(kernels) if k == kernel]
        for rank, i in enumerate(_spread(len(where))):
            found[where[i]] = 1 - rank / len(where)
    return found


def _spread(size: int) -> list[int]:
    """Indices with the ends first, each next one far from those before."""
    order = [0, size - 1] if size > 1 else [0]
    while len(order) < size:
        gaps = sorted(order)
        ends = max(pairwise(gaps), key=lambda pair: pair[1] - pair[0])
        order.append((ends[0] + ends[1]) // 2)
    return order


def main() -> None:
    """Show the points of `quick` on a device."""
    import argparse

    from validate.agenda import agenda

    parser = argparse.ArgumentParser(prog="python -m validate.design", description=__doc__)
    parser.add_argument("--device", default="h200-sxm", help="a device of the catalogue")
    given = parser.parse_args()
    plan = agenda("quick", given.device)
    for item in plan.items:
        print(f"{item.seconds * 1e6:12.1f} us  {item.trial}")
    print(f"{len(plan.items)} trials at {plan.num_points} points, about {plan.cost_s:.0f} s")
    if plan.variances:
        print(
            "standard deviation of log time over the grid, first and last point: "
            f"{SCALE * plan.variances[0] ** 0.5:.3f}, {SCALE * plan.variances[-1] ** 0.5:.3f}"
        )


if __name__ == "__main__":
    main()
