"""Predicted against measured: errors by family, GPU, op and dtype.

Every row that was read ends up in exactly one of three places: predicted (`n`), without a count
(`unsupported`, with a reason) or refused by the reader (also `unsupported`).

    ape  = |predicted - measured| / measured
    bias = exp(mean(log(predicted / measured))) - 1

All figures are fractions. On the bound rung the prediction is `lower_s`, so a negative bias is
expected and a row measured faster than the bound is a finding: `faster_than_bound` counts them
all, `faster_than_bound_warm` those of them that a warm cache explains. A replayed kernel finds up
to one L2 full of its bytes there, so it may be as fast as

    warm_s = max(every other resource, (device memory bytes - L2 capacity) / bandwidth)

and no faster; where all bytes fit, device memory drops out altogether.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels import catalog
from hwmodels.device import Device
from hwmodels.errors import InputError, UnsupportedError
from simulator.estimate import BOUND, Estimate, estimate
from validate.adapters import Part, Uncounted, parts
from validate.measurement import Measurement, Refusal
from workloads.numeric import Num, maximum

VERSION = 1
SLACK_FRAC = 1e-9
"""A row this little below the bound equals it; rounding of the sum of a few terms."""

Group: TypeAlias = tuple[str, str, str, str]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Errors of one family, GPU, op and dtype; None where no row was predicted."""

    family: str
    gpu: str
    op: str
    dtype: str
    n: int
    unsupported: int
    mape: float | None = None
    median_ape: float | None = None
    p90_ape: float | None = None
    bias: float | None = None
    coverage_80: float | None = None
    coverage_90: float | None = None
    calibration: str | None = None
    roofline_mape: float | None = None
    faster_than_bound: int = 0
    faster_than_bound_warm: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupported:
    """How many rows of one family, GPU, op and dtype had no prediction for one reason."""

    family: str
    gpu: str
    op: str
    dtype: str
    reason: str
    n: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of `compare`; `n` and `unsupported` of the tables add up to the rows given."""

    tables: tuple[Table, ...]
    unsupported: tuple[Unsupported, ...]
    rung: str = BOUND

    def as_dict(self) -> dict[str, Any]:
        """The one JSON document: plain numbers, strings and None."""
        return {
            "version": VERSION,
            "rung": self.rung,
            "tables": [asdict(t) for t in self.tables],
            "unsupported": [asdict(u) for u in self.unsupported],
        }


@dataclass(frozen=True, slots=True)
class Predictions:
    """Bounds in row order: of a cold and of a replayed kernel, NaN where `reasons` has one."""

    lower_s: Floats
    warm_s: Floats
    reasons: tuple[str | None, ...]


def compare(rows: Sequence[Measurement], refused: Iterable[Refusal] = ()) -> Comparison:
    """Predict every row and hold it against its measurement."""
    found = predict(rows)
    indices: dict[Group, list[int]] = defaultdict(list)
    reasons: Counter[tuple[Group, str]] = Counter()
    for i, row in enumerate(rows):
        reason = found.reasons[i]
        if reason is None:
            indices[_group(row)].append(i)
        else:
            reasons[_group(row), reason] += 1
    for refusal in refused:
        reasons[_group(refusal), f"refused: {refusal.reason}"] += 1
    without: Counter[Group] = Counter()
    for (group, _), n in reasons.items():
        without[group] += n
    groups = sorted(indices.keys() | without.keys())
    return Comparison(
        tables=tuple(_table(g, indices.get(g, []), without[g], rows, found) for g in groups),
        unsupported=tuple(
            Unsupported(**_labels(group), reason=reason, n=n)
            for (group, reason), n in sorted(reasons.items())
        ),
    )


def predict(rows: Sequence[Measurement]) -> Predictions:
    """The bound of every row, with one array-valued op for all rows that allow it."""
    lower_s, warm_s = np.zeros(len(rows)), np.zeros(len(rows))
    reasons: list[str | None] = [None] * len(rows)
    alike: dict[Any, list[tuple[int, Part]]] = defaultdict(list)
    for i, row in enumerate(rows):
        try:
            for part in parts(row):
                key = (row.device_id, part.op, part.fixed, tuple(part.sizes))
                alike[key].append((i, part))
        except Uncounted as why:
            reasons[i] = str(why)
    for (device_id, *_), members in alike.items():
        for where, cold, warm, reason in _bounds(catalog.device(device_id), members):
            # add.at and not +=: a row may hold the same op twice
            np.add.at(lower_s, where, cold)
            np.add.at(warm_s, where, warm)
            for i in where if reason else ():
                reasons[i] = reason
    missing = np.array([r is not None for r in reasons], dtype=bool)
    lower_s[missing] = warm_s[missing] = np.nan
    return Predictions(lower_s, warm_s, tuple(reasons))


def replayed_s(e: Estimate) -> Num:
    """The bound of a kernel that finds one L2 full of its bytes in the L2: `warm_s` above."""
    above, memory = e.device.memory[-2], e.device.hbm
    longest: Num = 0.0
    for resource, seconds in e.seconds_by_resource.items():
        if resource == memory.name and memory.bytes_per_s is not None:
            seconds = seconds - above.capacity_bytes * above.num_units / memory.bytes_per_s
        longest = maximum(longest, seconds)
    return longest


def _bounds(
    device: Device, members: Sequence[tuple[int, Part]]
) -> Iterator[tuple[list[int], Floats, Floats, str | None]]:
    """Rows, their cold and warm bounds and perhaps a reason, for parts that differ in size only.

    Where an op refuses some sizes, the rows are halved until the refused ones stand alone.
    """
    where = [i for i, _ in members]
    part = members[0][1]
    nothing = np.zeros(len(where))
    try:
        sizes = {name: np.array([float(p.sizes[name]) for _, p in members]) for name in part.sizes}
        e = estimate(part.op(**dict(part.fixed), **sizes), on=device)
        cold, warm = (np.broadcast_to(s, len(where)) for s in (e.lower_s, replayed_s(e)))
    except UnsupportedError as why:
        yield where, nothing, nothing, str(why)
    except InputError as why:
        if len(members) == 1:
            yield where, nothing, nothing, f"{part.op.name} refuses the sizes: {why}"
            return
        half = len(members) // 2
        yield from _bounds(device, members[:half])
        yield from _bounds(device, members[half:])
    else:
        yield where, cold, warm, None


def _table(
    group: Group,
    where: Sequence[int],
    unsupported: int,
    rows: Sequence[Measurement],
    found: Predictions,
) -> Table:
    if not where:
        return Table(**_labels(group), n=0, unsupported=unsupported)
    measured = np.array([rows[i].seconds for i in where], dtype=np.float64)
    predicted = found.lower_s[where]
    ape = np.abs(predicted - measured) / measured
    faster = measured < predicted * (1 - SLACK_FRAC)
    warm = faster & (measured >= found.warm_s[where] * (1 - SLACK_FRAC))
    mape = float(ape.mean())
    return Table(
        **_labels(group),
        n=len(where),
        unsupported=unsupported,
        mape=mape,
        median_ape=float(np.median(ape)),
        p90_ape=float(np.quantile(ape, 0.9)),
        bias=float(np.expm1(np.log(predicted / measured).mean())),
        roofline_mape=mape,
        faster_than_bound=int(faster.sum()),
        faster_than_bound_warm=int(warm.sum()),
    )


def _group(row: Measurement | Refusal) -> Group:
    return row.family, row.gpu, row.op, row.dtype


def _labels(group: Group) -> dict[str, Any]:
    return dict(zip(("family", "gpu", "op", "dtype"), group, strict=True))
