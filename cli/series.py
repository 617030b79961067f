"""Swept estimates: one op on one device over many values, and where two of them cross."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cli.quantity import count_text
from cli.records import params_of, record

if TYPE_CHECKING:
    from cli.questions import Over
    from hwmodels.device import Device
    from simulator.estimate import Estimate
    from simulator.tuning import Tuned
    from workloads.op import Op

MOST_CHANCES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Estimates of one op on one device along the swept values (or a single one).

    `tuned` where a field of the op was chosen for each value.
    """

    op_name: str
    estimate: Estimate
    values: tuple[int, ...]
    swept_fields: tuple[str, ...]
    tuned: Tuned | None = None

    @property
    def device_id(self) -> str:
        """Id of the device."""
        return self.estimate.device.id

    @property
    def seconds(self) -> NDArray[np.float64]:
        """The rung's answer at every value."""
        return self.along(self.estimate.seconds)

    @property
    def interval(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Ends of the 80 % interval at every value; None on the bound rung."""
        if self.estimate.prediction is None:
            return None
        low, high = self.estimate.interval(80)
        return self.along(low), self.along(high)

    @property
    def bound(self) -> NDArray[np.str_]:
        """The binding resource at every value."""
        return np.broadcast_to(np.asarray(self.estimate.bound), len(self.values))

    def along(self, value: Any) -> NDArray[np.float64]:
        """A number or an array as one number per value."""
        return np.broadcast_to(np.asarray(value, dtype=np.float64), len(self.values))

    def fixed_params(self) -> dict[str, Any]:
        """The op's fields that do not change along the sweep."""
        chosen = () if self.tuned is None else (self.tuned.field,)
        changing = (*self.swept_fields, *chosen)
        return {k: v for k, v in params_of(self.estimate).items() if k not in changing}

    def choices(self) -> dict[str, NDArray[np.int64]]:
        """The chosen field's value at every value; empty where none was chosen."""
        if self.tuned is None:
            return {}
        return {self.tuned.field: self.along(self.tuned.best).astype(np.int64)}

    def document(self) -> dict[str, Any]:
        """The JSON record: one list entry per value in everything that is counted or timed."""
        fixed = record(self.estimate) | {"op": self.op_name, "params": self.fixed_params()}
        constant = ("op", "params", "device", "rung", "unrated", "notes", "sources", "calibration")
        told = {k: v if k in constant else self._listed(v) for k, v in fixed.items()}
        best = {field: values.tolist() for field, values in self.choices().items()}
        return told | ({"best": best} if best else {})

    def _listed(self, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Mapping):
            return {key: self._listed(item) for key, item in value.items()}
        return np.broadcast_to(np.asarray(value), len(self.values)).tolist()


def caption(series: Sequence[Series]) -> str:
    """The parameters in a line: what all ops share, then what each has of its own.

    Values that are an op's default are left out, but for the number format.
    """
    told = {s.op_name: _told(s) for s in series}
    first = next(iter(told.values()))
    common = {k: v for k, v in first.items() if all(t.get(k, t) == v for t in told.values())}
    own = {
        name: ", ".join(f"{k} {v}" for k, v in params.items() if k not in common)
        for name, params in told.items()
    }
    parts = [", ".join(f"{k} {v}" for k, v in common.items())]
    parts += [text if len(told) == 1 else f"{name}: {text}" for name, text in own.items() if text]
    return "; ".join(part for part in parts if part)


def rungs_text(series: Sequence[Series]) -> str:
    """What the times stand on, in a sentence without its full stop."""
    if all(s.estimate.prediction is None for s in series):
        return "Rung bound: roofline lower bounds; real kernels are slower"
    said: dict[str, dict[str, None]] = {}
    for s in series:
        said.setdefault(_basis_text(s), {})[s.device_id] = None
    parts = [f"{', '.join(devices)}: {text}" for text, devices in said.items()]
    rungs = "/".join(sorted({s.estimate.rung for s in series}))
    return f"Rung {rungs}, with 80 % intervals. {'; '.join(parts)}{_general_text(series)}"


def choices_text(series: Sequence[Series], key: str) -> list[str]:
    """A line a series with a chosen field: 'gla on h100-sxm: chunk 32, from seq = 4,096 on 64'."""
    lines = []
    for s in series:
        for field, values in s.choices().items():
            order = np.argsort(s.values, kind="stable")
            steps = [order[0], *(j for i, j in pairwise(order) if values[i] != values[j])]
            parts = [f"from {key} = {s.values[i]:,} on {values[i]:g}" for i in steps[1:]]
            told = ", ".join([f"{field} {values[steps[0]]:g}", *parts])
            lines.append(f"{s.op_name} on {s.device_id}: {told}")
    return lines


def faster_frac(series: Sequence[Series]) -> NDArray[np.float64] | None:
    """Probability at every value that the first of two series is the faster, else None.

    Errors of different kernels are drawn independently, those of one kernel are shared. A sweep of
    more than `MOST_CHANCES` values has too many samples and gets none.
    """
    from simulator.uncertainty import samples

    if len(series) != 2 or len(series[0].values) > MOST_CHANCES:
        return None
    first, second = (s.estimate.prediction for s in series)
    if first is None or second is None:
        return None
    a, b = (
        samples(p, key=f"{s.op_name} on {s.device_id}")
        for p, s in zip((first, second), series, strict=True)
    )
    return series[0].along(a.faster_frac(b))


def _basis_text(series: Series) -> str:
    """Whose constants a series stands on, in a few words."""
    found = series.estimate.prediction
    if found is None:
        return "the bound alone"
    donors = [d.device_id for d in found.basis.donors]
    text = {
        "own": "own calibration",
        "architecture": f"calibration of {', '.join(donors)}, same architecture",
        "mean": f"mean of {len(donors)} other architectures",
        "nominal": "nominal constants, never calibrated",
    }[found.basis.scope]
    return text


def _general_text(series: Sequence[Series]) -> str:
    """Which ops the general path times, wholly or in part; nothing where none."""
    found: dict[str, dict[str, None]] = {}
    for s in series:
        models = s.estimate.prediction.model.split("+") if s.estimate.prediction else []
        if "general" in models:
            found.setdefault("part of " if len(models) > 1 else "", {})[s.op_name] = None
    parts = [f"{some}{', '.join(names)}" for some, names in sorted(found.items())]
    return f"; general path for {' and for '.join(parts)}" if parts else ""


def _told(series: Series) -> dict[str, str]:
    from workloads import registry

    known = registry.params(series.op_name)
    return {
        key: _told_value(value)
        for key, value in series.fixed_params().items()
        if value is not None and (key == "dtype" or value != known[key].default)
    }


def _told_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return count_text(value) if isinstance(value, int) else f"{value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossover:
    """From about `value` on, `faster` takes less time than `slower` on the device."""

    device: str
    faster: str
    slower: str
    value: float
    seconds: float


def crossovers(series: Sequence[Series]) -> list[Crossover]:
    """Where two ops swap places on one device, by interpolation on logarithmic axes."""
    found = []
    for a, b in combinations(series, 2):
        if a.device_id == b.device_id:
            found += list(_swaps(a, b))
    return found


def _swaps(a: Series, b: Series) -> Iterator[Crossover]:
    order = np.argsort(a.values)
    x = np.log(np.asarray(a.values, dtype=np.float64)[order])
    log_a, log_b = np.log(a.seconds[order]), np.log(b.seconds[order])
    gap = log_a - log_b
    gap[np.abs(gap) < 1e-12] = 0.0
    differs = np.flatnonzero(gap)  # where they are equal neither is ahead
    for i, j in pairwise(differs):
        if gap[i] * gap[j] > 0:
            continue
        part = gap[i] / (gap[i] - gap[j])
        ahead, behind = (a, b) if gap[j] < 0 else (b, a)
        yield Crossover(
            device=a.device_id,
            faster=ahead.op_name,
            slower=behind.op_name,
            value=float(np.exp(x[i] + part * (x[j] - x[i]))),
            seconds=float(np.exp(log_a[i] + part * (log_a[j] - log_a[i]))),
        )


def ask_all(
    names: Sequence[str],
    device_names: Sequence[str],
    params: Sequence[str],
    over: Over | None,
    rung: str,
    best: str | None = None,
) -> list[Series]:
    """Every op on every device along the swept values, one array call each; once without them.

    `best` names a size to be chosen for the ops that have it.
    """
    from cli.questions import ops_asked, require_choice
    from hwmodels import catalog

    devices = {catalog.device(name).id: catalog.device(name) for name in device_names}
    ops = ops_asked(names, params, over)
    if best is not None:
        require_choice(best, ops.values(), params, over)
    return [
        _series_of(name, op, device, over, rung, best)
        for name, op in ops.items()
        for device in devices.values()
    ]


def _series_of(
    name: str, op: Op, device: Device, over: Over | None, rung: str, best: str | None
) -> Series:
    from simulator.estimate import estimate
    from simulator.tuning import tuned
    from workloads import registry

    chosen = None
    if best is not None and best in op.tunable:
        chosen = tuned(op, best, lambda tried: estimate(tried, on=device, rung=rung).seconds)
        op = chosen.op
    return Series(
        op_name=name,
        estimate=estimate(op, on=device, rung=rung),
        values=over.values if over else (1,),
        swept_fields=registry.fields_meant(name, over.key) if over else (),
        tuned=chosen,
    )
