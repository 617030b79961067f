"""Calibrations from measured rows: fit, cross-validate, hold against other architectures, write.

Folds are drawn by shape, so that the same shape timed by two frameworks stands in one fold. The
interval of a prediction is the split-conformal quantile of |log(measured / predicted)| over rows
of the same regime that the fit had not seen (Vovk et al. 2005; Lei et al. 2018, section 2.2).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from hwmodels.calibration import (
    KIND,
    LEVELS,
    POOLED,
    SCHEMA,
    Calibration,
    FittedConstant,
    ModelCalibration,
    Residuals,
)  # fmt: skip
from hwmodels.step_ratios import digest_of
from simulator.kernel_time import general
from simulator.kernel_time.basis import basis, residual_groups
from simulator.kernel_time.model import KernelModel
from simulator.kernel_time.rates import rates_of
from validate.batches import batches
from validate.fitting import SCALE, Fit, Floats, Problem, fit, problem_of
from validate.measurement import Measurement
from validate.runs import digest
from workloads.ops.collective_transfer import CollectiveTransfer

FOLDS: Final = 5
MIN_ROWS: Final = 20
"""Fewest rows a model is calibrated on."""
MOST_OF_A_KIND: Final = 60
"""Rows of one class of op that the general path is fitted on."""
FEW_ROWS: Final = 3
"""Fewest rows of a design a model is fitted on; donors' constants make up for what they leave."""
LEAST_ALONE: Final = 10
"""Fewest errors of which the largest still holds 90 % of new ones (split-conformal)."""
LEAST_FREE: Final = 0.02
"""A row that fixes a constant alone has hardly a residual: it is not blown up beyond this."""
MIN_REGIME: Final = 40
"""Fewest rows a regime needs for residuals of its own."""
DIGEST_CHARS: Final = 16
SEED: Final = 20261121


@dataclass(frozen=True, slots=True)
class Trace:
    """What a fit did with its rows: log(measured / predicted) of each by a fit without its shape.

    `errors` (NaN where a row has none) and `regimes` (kernel label and regime, or None) follow the
    rows of the fit's device.
    """

    fit: Fit
    errors: Floats
    regimes: Any


def short_digest(row: Measurement) -> str:
    """The first 64 bits of the digest of what a row says."""
    return digest(row)[:DIGEST_CHARS]


def calibrate(
    rows: Sequence[Measurement],
    device_id: str,
    *,
    models: Iterable[str] | None = None,
    donors: Sequence[Calibration] = (),
    on: datetime.date | None = None,
    progress: Callable[[str], None] = lambda _: None,
    designed: bool = False,
    trace: Callable[[Trace], None] = lambda _: None,
) -> Calibration:
    """Every kernel model that the rows of one device allow, without transfer residuals.

    With `donors` (calibrations of other devices), the constants they give are where the fit's
    priors are centred: a few rows then move only what they speak of. `designed` rows stand where
    they tell most and not at random (`validate.design`): their errors are `fresh_errors`, and
    models from `FEW_ROWS` rows on are fitted, those of less than `MIN_REGIME` with one set of
    residuals together.
    `trace` hears of every fit.
    """
    mine = [r for r in rows if r.device_id == device_id]
    today = on or datetime.date.today()
    seconds = np.array([r.seconds or math.nan for r in mine], dtype=np.float64)
    found, _ = batches(mine)
    wanted = None if models is None else set(models)
    fitted: dict[str, ModelCalibration] = {}
    used: set[int] = set()
    traces: dict[str, Trace] = {}
    least_rows, alone = (FEW_ROWS, LEAST_ALONE) if designed else (MIN_ROWS, MIN_ROWS)
    for part in components(problem_of(device_id, found, seconds)):
        problem = with_prior(part, donors)
        names = {m.name for m in problem.models}
        if names == {general.MODEL.name}:  # fitted below, with rows of all kinds
            continue
        if len(problem.rows) < least_rows or (wanted is not None and not names & wanted):
            continue
        progress(f"{device_id}: {', '.join(sorted(names))} on {len(problem.rows)} rows")
        made, heard = _fitted(problem, mine, today, designed=designed)
        trace(heard)
        fitted |= made
        traces |= dict.fromkeys(made, heard)
        used |= set(problem.rows.tolist())
    if designed:
        fitted = _with_few(fitted, traces)
    if (wanted is None or general.MODEL.name in wanted) and found:
        progress(f"{device_id}: general")
        able = [b for b in found if not isinstance(b.op, CollectiveTransfer)]
        problem = with_prior(problem_of(device_id, able, seconds, general.MODEL), donors)
        if problem.batches and len(problem.rows) >= alone:
            fitted |= _general(problem, mine, today, alone, trace)
            used |= set(problem.rows.tolist())
    digests = sorted({short_digest(mine[i]) for i in used})
    return Calibration(
        device_id=device_id,
        date=today,
        rows_digest=digest_of(digests),
        rows=frozenset(digests),
        models=fitted,
    )


def calibrate_all(
    rows: Sequence[Measurement],
    device_ids: Sequence[str],
    *,
    models: Sequence[str] | None = None,
    donors: Sequence[Calibration] = (),
) -> list[Calibration]:
    """`calibrate` for several devices, side by side on the machine's cores."""
    if len(device_ids) == 1:
        return [calibrate(rows, device_ids[0], models=models, donors=donors)]
    with ProcessPoolExecutor(max_workers=min(len(device_ids), os.cpu_count() or 1)) as pool:
        done = [
            pool.submit(
                calibrate,
                [r for r in rows if r.device_id == device_id],
                device_id,
                models=models,
                donors=donors,
            )
            for device_id in device_ids
        ]
        return [future.result() for future in done]


def with_prior(problem: Problem, donors: Sequence[Calibration]) -> Problem:
    """The same problem with priors centred on what other devices' calibrations give this one."""
    others = [c for c in donors if c.device_id != problem.device.id]
    if not others:
        return problem
    prior = {
        (model.name, name): value
        for model in dict.fromkeys(problem.models)
        for name, value in basis(problem.device, model, others).constants({}).items()
    }
    return replace(problem, prior=prior)


def components(problem: Problem) -> list[Problem]:
    """Parts of a problem that share no model: models whose kernels run in one row stay together."""
    import networkx as nx

    graph = nx.Graph()
    by_row: dict[int, str] = {}
    for batch, model in zip(problem.batches, problem.models, strict=True):
        graph.add_node(model.name)
        for i in batch.where:
            graph.add_edge(model.name, by_row.setdefault(int(i), model.name))
    parts = []
    for names in nx.connected_components(graph):
        keep = [i for i, m in enumerate(problem.models) if m.name in names]
        parts.append(
            replace(
                problem,
                batches=tuple(problem.batches[i] for i in keep),
                models=tuple(problem.models[i] for i in keep),
            )
        )
    return parts


def _fitted(
    problem: Problem,
    rows: Sequence[Measurement],
    today: datetime.date,
    *,
    designed: bool,
) -> tuple[dict[str, ModelCalibration], Trace]:
    """Full fit for the constants, cross-validation for the residuals."""
    whole = fit(problem)
    errors = fresh_errors(problem, whole) if designed else cross_validated(problem, whole, rows)
    regimes = _regimes(problem, whole)
    made = {
        model.name: _entry(problem, whole, model, errors, regimes, rows, today)
        for model in dict.fromkeys(problem.models)
    }
    return made, Trace(whole, errors, regimes)


def _general(
    problem: Problem,
    rows: Sequence[Measurement],
    today: datetime.date,
    least_rows: int,
    trace: Callable[[Trace], None],
) -> dict[str, ModelCalibration]:
    """The general path on many kinds of op: the folds are whole classes, as its users' ops are new.

    Evenly sampled over the classes, so that it speaks of kernels at large, not of the commonest.
    """
    kinds = np.array(["" for _ in rows], dtype=object)
    for batch in problem.batches:
        kinds[batch.where] = batch.op.name
    use = _even_sample(problem, kinds)
    whole = fit(problem, use)
    errors = np.full(len(rows), np.nan)
    for name in sorted(set(kinds[use])):
        held, kept = use[kinds[use] == name], use[kinds[use] != name]
        theta = fit(problem, kept, whole.theta).theta if len(kept) >= least_rows else whole.theta
        errors[held] = np.log(problem.seconds[held] / problem.predicted(theta)[held])
    model = general.MODEL
    nowhere = np.full(len(rows), None, dtype=object)
    trace(Trace(whole, errors, nowhere))
    return {model.name: _entry(problem, whole, model, errors, nowhere, rows, today)}


def _even_sample(problem: Problem, kinds: Any) -> Any:
    """At most `MOST_OF_A_KIND` rows of every class of op."""
    rng = np.random.default_rng(SEED)
    chosen = []
    for name in sorted(set(kinds[problem.rows])):
        rows = problem.rows[kinds[problem.rows] == name]
        chosen.append(rng.permutation(rows)[:MOST_OF_A_KIND])
    return np.sort(np.concatenate(chosen))


def cross_validated(problem: Problem, whole: Fit, rows: Sequence[Measurement]) -> Floats:
    """log(measured / predicted) of every row, predicted by a fit without its shape."""
    folds = np.array([fold(rows[i]) for i in problem.rows])
    errors = np.full(len(rows), np.nan)
    for number in range(FOLDS):
        held, kept = problem.rows[folds == number], problem.rows[folds != number]
        if len(held) == 0:
            continue
        theta = fit(problem, kept, whole.theta).theta
        errors[held] = np.log(problem.seconds[held] / problem.predicted(theta)[held])
    return errors


def fresh_errors(problem: Problem, whole: Fit) -> Floats:
    """log(measured / predicted) as wide as of a new timing of each row's shape; NaN elsewhere.

    Rows of a design stand at the ends of what is measured. Left out in turn, each is extrapolated
    to, and its error says little of the shapes between. The fit is a ridge regression near its
    end, with hat matrix H over the rows: residuals r = (I - H) e of errors e with the variance s^2
    have the variance s^2 v, v = diag((I - H)^2), and a new timing lies s^2 (1 + diag H) off, so

        error = r sqrt((1 + h) / v)        (Cook and Weisberg 1982, section 2.2, with a prior)
    """
    use, total = problem.rows, problem.predicted(whole.theta)
    slopes = problem.jacobian(whole.theta, total)[use] / SCALE
    hat = slopes @ whole.covariance @ slopes.T
    left = np.eye(len(use)) - hat
    free = np.maximum(np.einsum("ij,ij->i", left, left), LEAST_FREE)
    errors = np.full(len(problem.seconds), np.nan)
    errors[use] = np.log(problem.seconds[use] / total[use])
    errors[use] *= np.sqrt((1 + np.clip(np.diag(hat), 0.0, None)) / free)
    return errors


def _with_few(
    fitted: Mapping[str, ModelCalibration], traces: Mapping[str, Trace]
) -> dict[str, ModelCalibration]:
    """Models of too few rows for quantiles of their own share those of all such rows together;
    they are dropped where even these are few.
    """
    few = [name for name, m in fitted.items() if m.num_rows < MIN_REGIME]
    errors = {id(traces[name]): traces[name].errors for name in few}.values()
    together = np.concatenate([e[np.isfinite(e)] for e in errors]) if few else np.zeros(0)
    if len(together) < LEAST_ALONE:
        return {name: m for name, m in fitted.items() if name not in few}
    pooled = {POOLED: residuals_of(together)}
    return dict(fitted) | {name: replace(fitted[name], residuals=pooled) for name in few}


def fold(row: Measurement, folds: int = FOLDS) -> int:
    """The same for all rows of one shape, whoever timed them."""
    text = json.dumps([SEED, row.op, dict(row.params)], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[0] % folds


def _regimes(problem: Problem, whole: Fit) -> Any:
    """The kernel label and the regime of every row: those of its longest part."""
    names = np.full(len(problem.seconds), None, dtype=object)
    longest = np.zeros(len(problem.seconds))
    rates = rates_of(problem.device)
    for i, (batch, model) in enumerate(zip(problem.batches, problem.models, strict=True)):
        time = model.time(batch.op, rates, problem.values(i, whole.theta), batch.conditions)
        seconds = np.broadcast_to(time.seconds, len(batch.where))
        regime = np.broadcast_to(np.asarray(time.regime()), len(batch.where))
        longer = seconds > longest[batch.where]
        where = batch.where[longer]
        kernel = batch.conditions.kernel
        names[where] = [(kernel, str(name)) for name in regime[longer]]
        longest[where] = seconds[longer]
    return names


def _entry(
    problem: Problem,
    whole: Fit,
    model: KernelModel,
    errors: Floats,
    regimes: Any,
    rows: Sequence[Measurement],
    today: datetime.date,
) -> ModelCalibration:
    """What the file says of one model: its own rows' residuals, pooled and by regime."""
    mine = np.unique(
        np.concatenate(
            [b.where for b, m in zip(problem.batches, problem.models, strict=True) if m is model]
        )
    )
    mine = mine[np.isfinite(errors[mine])]
    groups: dict[str, list[int]] = defaultdict(list)
    for i in mine:
        for group in residual_groups(*regimes[i]) if regimes[i] else ():
            groups[group].append(i)
    found = {g: residuals_of(errors[w]) for g, w in sorted(groups.items()) if len(w) >= MIN_REGIME}
    return ModelCalibration(
        device_id=problem.device.id,
        date=today,
        num_rows=len(mine),
        usual_kernel=_usual_kernel(problem, model),
        sources=tuple(sorted({rows[i].source for i in mine})),
        constants=whole.constants(model),
        residuals={POOLED: residuals_of(errors[mine]), **found},
        transfer=None,
    )


def _usual_kernel(problem: Problem, model: KernelModel) -> str:
    """The label most rows carry, figures and rows without one aside; '' where there is none."""
    rows: dict[str, int] = defaultdict(int)
    each = zip(problem.batches, problem.models, problem.labels, strict=True)
    for batch, used, labels in each:
        kernel = labels.get("kernel", "")
        if used is model and kernel and not batch.conditions.kernel.startswith("figure"):
            rows[kernel] += len(batch.where)
    return max(rows, key=lambda kernel: (rows[kernel], kernel)) if rows else ""


def residuals_of(errors: Floats) -> Residuals:
    """Conformal quantiles of |error| and the signed quantiles, of log(measured / predicted)."""
    size = len(errors)
    rising = np.sort(np.abs(errors))

    def conformal(level: float) -> float:
        rank = min(math.ceil((size + 1) * level), size)
        return float(f"{max(rising[rank - 1], 1e-4):.4g}")

    return Residuals(
        num_rows=size,
        q80=conformal(0.8),
        q90=conformal(0.9),
        quantiles=tuple(float(f"{q:.4g}") for q in np.quantile(errors, LEVELS)),
    )


def as_document(calibration: Calibration) -> dict[str, Any]:
    """The JSON document that `hwmodels.calibration` reads."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "device": calibration.device_id,
        "date": calibration.date.isoformat(),
        "rows_digest": calibration.rows_digest,
        "models": {name: _model_document(m) for name, m in sorted(calibration.models.items())},
        "rows": sorted(calibration.rows),
    }


def _model_document(entry: ModelCalibration) -> dict[str, Any]:
    return {
        "num_rows": entry.num_rows,
        "usual_kernel": entry.usual_kernel,
        "sources": list(entry.sources),
        "constants": {name: _constant_document(c) for name, c in entry.constants.items()},
        "residuals": {name: asdict(r) for name, r in entry.residuals.items()},
        "transfer": None if entry.transfer is None else asdict(entry.transfer),
    }


def _constant_document(constant: FittedConstant) -> Mapping[str, Any]:
    return {
        "value": constant.value,
        "status": constant.status,
        "factors": dict(sorted(constant.factors.items())),
    }
