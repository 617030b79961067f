"""Serving: how far predicted times of output tokens lie from published ones, and the host's fit.

    error = predicted / measured - 1,    bias = exp(mean log(predicted / measured)) - 1

`compare_serving` groups the figures by family of model, GPU, engine, mode and model. The constants
of the host (`simulator.serving.HOST`) are fitted by `fit` on rows that a calibration may use: those
of a step and of what prompts cost on the time per output token, then those of launches on the time
to the first. Least squares of log(predicted / measured), smoothed to the absolute beyond 10 %, none
below 0. Rows whose model may draft are not fitted on. `python -m validate.serving DIR` fits on a
folder and prints the constants and how they do on the models, GPUs and engines that each fit left
out, and between which factors four fifths of the figures of models left out lie.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hwmodels.errors import InputError
from simulator.serving import HOST, Host, tpot_s, ttft_s
from simulator.serving_kernels import ENGINES
from validate.measurement import Measurement, csv_files, read
from validate.serving_rows import DRAFTING, SERVING_FAMILY, TPOT, TTFT, Serving, read_servings

ALL: Final = "all"
BARS: Final[Mapping[str, float]] = {"dense": 0.12, "moe": 0.20}
"""Largest MAPE of the time per output token that was promised, by family, where no token is
drafted."""
SOFT: Final = 0.1
"""Log error beyond which the loss grows no faster than the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTable:
    """Errors of one metric over one group of figures, as fractions; `all` where it joins groups."""

    metric: str
    family: str
    gpu: str
    engine: str
    mode: str
    model: str
    n: int
    mape: float
    median: float
    p90: float
    bias: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingComparison:
    """Tables by group, totals by family, GPU and engine, and the other rows by metric and reason.

    The figures of `tables` and the rows by reason add up to the serving rows of both metrics.
    """

    tables: tuple[ServingTable, ...] = ()
    totals: tuple[ServingTable, ...] = ()
    reasons: tuple[tuple[str, str, int], ...] = ()

    @property
    def num_rows(self) -> int:
        """Serving rows that were looked at."""
        return sum(t.n for t in self.tables) + sum(n for _, _, n in self.reasons)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "tables": [asdict(t) for t in self.tables],
            "totals": [asdict(t) for t in self.totals],
            "unsupported": [
                {"metric": metric, "reason": reason, "n": n} for metric, reason, n in self.reasons
            ],
        }


Key = tuple[str, str, str, str, str]


def group(one: Serving) -> Key:
    """Family, GPU, engine, mode and model of a figure."""
    return one.family, one.row.gpu, one.served.engine.name, one.mode, one.model


_TOTALS: Final[tuple[Callable[[Serving], Key], ...]] = (
    lambda s: (s.family, ALL, ALL, ALL, ALL),
    lambda s: (s.family, ALL, ALL, s.mode, ALL),
    lambda s: (s.family, s.row.gpu, ALL, ALL, ALL),
    lambda s: (s.family, ALL, s.served.engine.name, ALL, ALL),
)


def predicted_s(one: Serving, host: Host = HOST) -> float:
    """Seconds of the figure's metric."""
    return ttft_s(one.terms, host) if one.row.op == TTFT else tpot_s(one.terms, host)


def compare_serving(rows: Iterable[Measurement], *, host: Host = HOST) -> ServingComparison:
    """Hold the serving rows among `rows` against predictions."""
    rows = tuple(rows)
    tables: list[ServingTable] = []
    totals: list[ServingTable] = []
    reasons: list[tuple[str, str, int]] = []
    for metric in (TPOT, TTFT):
        found, others = read_servings(rows, metric=metric)
        tables += grouped(found, group, metric, host)
        for by in _TOTALS:
            totals += grouped(found, by, metric, host)
        counted = Counter(reason for _, reason in others)
        ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
        reasons += [(metric, reason, n) for reason, n in ordered]
    once = tuple(dict.fromkeys(totals))
    return ServingComparison(tables=tuple(tables), totals=once, reasons=tuple(reasons))


def grouped(
    found: Iterable[Serving], by: Callable[[Serving], Key], metric: str, host: Host
) -> list[ServingTable]:
    """One table a group."""
    members: dict[Key, list[Serving]] = defaultdict(list)
    for one in found:
        members[by(one)].append(one)
    return [_table(metric, key, of, host) for key, of in sorted(members.items())]


def _table(metric: str, key: Key, members: Sequence[Serving], host: Host) -> ServingTable:
    family, gpu, engine, mode, model = key
    ratio = np.array([predicted_s(one, host) / one.seconds for one in members])
    error = np.abs(ratio - 1)
    return ServingTable(
        metric=metric,
        family=family,
        gpu=gpu,
        engine=engine,
        mode=mode,
        model=model,
        n=len(members),
        mape=float(error.mean()),
        median=float(np.median(error)),
        p90=float(np.quantile(error, 0.9)),
        bias=float(np.expm1(np.log(ratio).mean())),
    )


# ---- fitting ---------------------------------------------------------------------------------


def fit(found: Iterable[Serving]) -> Host:
    """The host's constants that suit these figures best; an unseen engine has the others' mean."""
    used = [one for one in found if one.family != DRAFTING]
    tokens = [one for one in used if one.row.op == TPOT]
    if not tokens:
        raise InputError("no serving figure to fit on; give a folder with steps_inference.csv")
    engines = sorted({one.served.engine.name for one in tokens})

    def host(values: NDArray[np.float64]) -> Host:
        steps = _all_engines(dict(zip(engines, map(float, values), strict=False)))
        sequence, prompt = map(float, values[len(engines) :])
        return replace(HOST, step_s=steps, sequence_s=sequence, prompt_s=prompt)

    steps = _solved(tokens, [1e-4] * len(engines) + [1e-5, 1e-3], host)
    first = [one for one in used if one.row.op == TTFT]
    starting = sorted({one.served.engine.name for one in first})

    def launching(values: NDArray[np.float64]) -> Host:
        found = dict(zip(starting, map(float, values), strict=True))
        return replace(steps, launch_s=_all_engines(found))

    return _solved(first, [1e-4] * len(starting), launching) if first else steps


def _all_engines(seen: Mapping[str, float]) -> dict[str, float]:
    return dict.fromkeys(ENGINES, float(np.mean(list(seen.values())))) | dict(seen)


def _solved(
    used: Sequence[Serving], scales: Sequence[float], host: Callable[[NDArray[np.float64]], Host]
) -> Host:
    """The constants of `host` that suit the figures best, each begun at its scale."""
    scale, measured = np.array(scales), np.array([one.seconds for one in used])

    def loss(values: NDArray[np.float64]) -> NDArray[np.float64]:
        tried = host(values * scale)
        found = np.array([predicted_s(one, tried) for one in used], dtype=np.float64)
        return np.asarray(np.log(found / measured), dtype=np.float64)

    solved = least_squares(loss, np.ones(len(scale)), bounds=(0.0, np.inf), loss="soft_l1",
                           f_scale=SOFT)  # fmt: skip
    return host(solved.x * scale)


def left_out(
    found: Sequence[Serving], source: Callable[[Serving], str]
) -> tuple[tuple[str, ServingTable], ...]:
    """Errors on the figures of each source, with constants fitted on all the others.

    Only the constants are fitted anew: which kernels engines run, and in which formats, was settled
    with all sources in view. Nothing where there is a single source.
    """
    tables: list[tuple[str, ServingTable]] = []
    for name, host, unseen in _folds(found, source):
        for metric in (TPOT, TTFT):
            chosen = [one for one in unseen if one.row.op == metric]
            for table in grouped(chosen, _BY_FAMILY, metric, host):
                tables.append((name, table))
    return tuple(tables)


_BY_FAMILY: Final = _TOTALS[0]


def _folds(
    found: Sequence[Serving], source: Callable[[Serving], str]
) -> Iterator[tuple[str, Host, list[Serving]]]:
    """Each source, the constants of all the others, and its figures."""
    used = [one for one in found if one.family != DRAFTING]
    names = sorted({source(one) for one in used})
    for name in names if len(names) > 1 else ():
        others = [one for one in used if source(one) != name]
        if any(one.row.op == TPOT for one in others):
            yield name, fit(others), [one for one in used if source(one) == name]


def ranges(found: Sequence[Serving]) -> dict[str, tuple[float, float]]:
    """First and last tenth of measured over predicted by metric, models left out of the fit."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for _, host, unseen in _folds(found, lambda one: one.model):
        for one in unseen:
            ratios[one.row.op].append(one.seconds / predicted_s(one, host))
    return {
        metric: (float(np.quantile(of, 0.1)), float(np.quantile(of, 0.9)))
        for metric, of in sorted(ratios.items())
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m validate.serving DIR`: fit the host on a folder's steps_inference.csv."""
    parser = argparse.ArgumentParser(prog="python -m validate.serving", description=main.__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="rows a calibration may use")
    given = parser.parse_args(arguments)
    try:
        rows = [row for f in csv_files(given.folder, SERVING_FAMILY) for row in read(f).rows]
        found = [one for metric in (TPOT, TTFT) for one in read_servings(rows, metric=metric)[0]]
        host = fit(found)
    except (InputError, OSError) as error:
        print(f"validate.serving: error: {error}", file=sys.stderr)
        return 2
    for name, value in asdict(host).items():
        print(f"{name:18} {value}")
    for metric in (TPOT, TTFT):
        chosen = [one for one in found if one.row.op == metric]
        for table in grouped(chosen, _BY_FAMILY, metric, host):
            print(_line("fitted", table))
    sources: dict[str, Callable[[Serving], str]] = {
        "model": lambda s: s.model,
        "GPU": lambda s: s.row.gpu,
        "engine": lambda s: s.served.engine.name,
    }
    for kind, source in sources.items():
        for name, table in left_out(found, source):
            print(_line(f"without {kind} {name}", table))
    for metric, (low, high) in ranges(found).items():
        print(f"{metric}: four fifths of the figures left out lie at {low:.3f} to {high:.3f}")
    return 0


def _line(what: str, t: ServingTable) -> str:
    errors = "  ".join(
        f"{name} {100 * value:5.1f} %"
        for name, value in (
            ("MAPE", t.mape),
            ("median", t.median),
            ("p90", t.p90),
            ("bias", t.bias),
        )
    )
    return f"{what:36} {t.metric:7} {t.family:22} {t.n:4}  {errors}"


if __name__ == "__main__":
    sys.exit(main())
