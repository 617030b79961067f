"""Does the simulator put published alternatives in the order that was measured? Kendall's tau.

Two comparisons, told apart:

    same step    one table's rows of one model, GPU, number of GPUs, batch, sequence length and
                 recipe; they differ in layout, recomputation or the framework's switches
    same model   one publisher's rows of one model, GPU, sequence length and recipe; the number of
                 GPUs and the batch differ too, and what is ranked is GPU seconds per token

Rows of one layout, batch and framework (a second source of one figure, or in `same model` another
release) are one alternative, its seconds the geometric mean of theirs. Over the pairs of a group

    tau = (pairs in the measured order - pairs against it) / pairs

with equal predictions counted as neither (scipy's tau-b within a group, the plain quotient over all
pairs). Pairs that were measured closer than `NOISE_FRAC` are told with and without: their order
says little. A group of one alternative ranks nothing and one of two has tau 1 or -1: both are
counted and named. `python -m validate.plan_ranking FOLDER ...` prints it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import kendalltau

from hwmodels.errors import InputError
from hwmodels.step_experts import shipped_expert_factors, shipped_experts
from hwmodels.step_factors import shipped_factors, shipped_low_precision, shipped_values
from validate.adapters import TRAINING_FAMILY
from validate.measurement import Measurement, csv_files, read
from validate.moe_runs import DROPPING, read_moe_runs
from validate.moe_runs import predicted_s as predicted_moe_s
from validate.published_steps import korthikanti
from validate.runs import Run, digest, read_runs
from validate.step_fit import predicted_s, table_of
from workloads.models.config import TransformerConfig
from workloads.plan import Plan

NOISE_FRAC: Final = 0.02
"""Two measured times closer than this are called equal: two publications of one dense
configuration (another release or table) lie 0.5 to 7.6 % apart, 2.1 % in the median of ten."""
LEAST_TAU: Final = 0.7
"""What the ranking is held to."""
FEWEST: Final = 3
"""Alternatives without which a group has no tau of its own."""
SAME_STEP, SAME_MODEL = "same step", "same model"
SCOPES: Final = (SAME_STEP, SAME_MODEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One way to train a model: GPU seconds per token, measured and predicted.

    `fitted`: the factors have seen one of its rows. `mesh`: its degrees but dp, which follows.
    """

    layout: str
    mesh: tuple[float, ...] = ()
    measured_s: float
    predicted_s: float
    num_rows: int = 1
    fitted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Pairs of alternatives by whether the prediction has the measured order, tied ones apart."""

    agreeing: int = 0
    opposing: int = 0
    tied: int = 0

    @property
    def num(self) -> int:
        """All of them."""
        return self.agreeing + self.opposing + self.tied

    @property
    def tau(self) -> float | None:
        """Agreeing less opposing over all; None where there is no pair."""
        return (self.agreeing - self.opposing) / self.num if self.num else None

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(
            agreeing=self.agreeing + other.agreeing,
            opposing=self.opposing + other.opposing,
            tied=self.tied + other.tied,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Alternatives of one question, fastest measured first."""

    scope: str
    name: str
    alternatives: tuple[Alternative, ...]

    @property
    def tau(self) -> float | None:
        """Kendall's tau-b; None with fewer than `FEWEST` alternatives, or with all alike."""
        if len(self.alternatives) < FEWEST:
            return None
        found = float(
            kendalltau(
                [a.measured_s for a in self.alternatives],
                [a.predicted_s for a in self.alternatives],
            ).statistic
        )
        return None if math.isnan(found) else found

    def pairs(
        self, noise_frac: float = 0.0, *, unseen: bool = False, other_mesh: bool = False
    ) -> Pairs:
        """Its pairs; those measured no further apart than `noise_frac` are left out.

        `unseen`: only pairs of which no row was fitted on; `other_mesh`: of different meshes.
        """
        found = Pairs()
        for a, b in itertools.combinations(self.alternatives, 2):
            low, high = sorted((a.measured_s, b.measured_s))
            left_out = (unseen and (a.fitted or b.fitted)) or (other_mesh and a.mesh == b.mesh)
            if high > low * (1 + noise_frac) and not left_out:
                found += _pair(a, b)
        return found


def _pair(a: Alternative, b: Alternative) -> Pairs:
    told = (a.predicted_s - b.predicted_s) * (a.measured_s - b.measured_s)
    return Pairs(agreeing=int(told > 0), opposing=int(told < 0), tied=int(told == 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """All groups of one scope; `num_alone` questions had one alternative only."""

    scope: str
    groups: tuple[Group, ...]
    num_alone: int

    def pairs(
        self, noise_frac: float = 0.0, *, unseen: bool = False, other_mesh: bool = False
    ) -> Pairs:
        """Over all groups; see `Group.pairs`."""
        own = (g.pairs(noise_frac, unseen=unseen, other_mesh=other_mesh) for g in self.groups)
        return sum(own, start=Pairs())

    @property
    def too_small(self) -> tuple[Group, ...]:
        """Groups of two: they count as a pair, but have no tau of their own."""
        return tuple(g for g in self.groups if len(g.alternatives) < FEWEST)

    @property
    def kept(self) -> bool | None:
        """Do the pairs that differ by more than the noise keep to `LEAST_TAU`?"""
        tau = self.pairs(NOISE_FRAC).tau
        return None if tau is None else tau >= LEAST_TAU

    def as_dict(self) -> dict[str, Any]:
        """The JSON document's part."""
        return {
            "scope": self.scope,
            "bar": LEAST_TAU,
            "kept": self.kept,
            "noise_frac": NOISE_FRAC,
            "num_alone": self.num_alone,
            "num_too_small": len(self.too_small),
            "all_pairs": _told(self.pairs()),
            "beyond_noise": _told(self.pairs(NOISE_FRAC)),
            "beyond_noise_unseen": _told(self.pairs(NOISE_FRAC, unseen=True)),
            "beyond_noise_other_mesh": _told(self.pairs(NOISE_FRAC, other_mesh=True)),
            "groups": [_group_dict(g) for g in self.groups],
        }


def _told(pairs: Pairs) -> dict[str, Any]:
    return {
        "pairs": pairs.num,
        "agreeing": pairs.agreeing,
        "opposing": pairs.opposing,
        "tied": pairs.tied,
        "tau": pairs.tau,
    }


def _group_dict(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "tau": group.tau,
        "pairs": _told(group.pairs()),
        "alternatives": [
            {
                "layout": a.layout,
                "measured_gpu_s_per_token": a.measured_s,
                "predicted_gpu_s_per_token": a.predicted_s,
                "rows": a.num_rows,
                "fitted": a.fitted,
            }
            for a in group.alternatives
        ],
    }


def plan_ranking(rows: Iterable[Measurement], *, papers: bool = True) -> tuple[Ranking, ...]:
    """One ranking by scope; with `papers`, steps that stand in no file beside those of the rows.

    None where no factors are shipped, or where the rows hold no training step.
    """
    if shipped_factors() is None:
        return ()
    timed = list(_timed(tuple(rows), papers))
    return tuple(_ranking(scope, timed) for scope in SCOPES) if timed else ()


def _ranking(scope: str, timed: Sequence[tuple[Run, str, float]]) -> Ranking:
    held: dict[tuple[str, TransformerConfig], dict[str, list[tuple[Run, float]]]]
    held = defaultdict(lambda: defaultdict(list))
    for one, algorithm, seconds in timed:
        question = _question(scope, one, algorithm), one.config
        held[question][_layout(scope, one)].append((one, seconds))
    groups = [
        Group(
            scope=scope,
            name=name,
            alternatives=tuple(
                sorted(itertools.starmap(_alternative, by_layout.items()), key=_measured)
            ),
        )
        for (name, _), by_layout in sorted(held.items(), key=lambda item: item[0][0])
    ]
    several = tuple(g for g in groups if len(g.alternatives) > 1)
    return Ranking(scope=scope, groups=several, num_alone=len(groups) - len(several))


def _measured(one: Alternative) -> tuple[float, str]:
    return one.measured_s, one.layout


def _timed(rows: tuple[Measurement, ...], papers: bool) -> Iterator[tuple[Run, str, float]]:
    """Every run with its framework known: the run, the algorithm if it has its own, seconds."""
    values = shipped_values()
    runs = list(read_runs(rows, assume=True)[0])
    if papers and runs:
        runs += read_runs(korthikanti())[0]
    for one in runs:
        if one.stack is None:
            continue
        try:
            yield one, "", predicted_s(one, values)
        except InputError:
            continue  # its rows are counted with their reason beside the bound
    if shipped_experts() is None:
        return
    for moe in read_moe_runs(rows)[0]:
        algorithm = ", token drop" if moe.algorithm == DROPPING else ""
        try:
            yield moe.run, algorithm, predicted_moe_s(moe, values, shipped_expert_factors())
        except InputError:
            continue


def _question(scope: str, one: Run, algorithm: str) -> str:
    """What all alternatives of a group have in common."""
    model = f"{one.config.name}{algorithm}, {one.step.len_seq} tokens"
    if scope == SAME_MODEL:
        return f"{table_of(one)}: {model}, {one.row.gpu}, {one.recipe.name}"
    asked = f"{one.row.params['num_gpus']} x {one.row.gpu}, batch {one.step.global_batch}"
    return f"{one.row.source}: {model}, {asked}, {one.recipe.name}"


def _layout(scope: str, one: Run) -> str:
    """What tells one alternative from another: its plan, the framework, in words.

    A field that the row leaves open (`validate.trainers`) is told as such.
    """
    told = []
    for field in fields(Plan):
        values = np.unique(np.asarray(getattr(one.plan, field.name), dtype=np.float64))
        if values.size > 1:
            told.append(f"{field.name} open")
        elif values[0] != getattr(Plan(), field.name):
            told.append(f"{field.name}={values[0]:g}")
    size = f"{one.row.params['num_gpus']} GPUs, batch {one.step.global_batch}, "
    return f"{'' if scope == SAME_STEP else size}{' '.join(told) or 'one rank'}, {one.stack}"


def _alternative(layout: str, runs: Sequence[tuple[Run, float]]) -> Alternative:
    return Alternative(
        layout=layout,
        mesh=_mesh(runs[0][0].plan),
        measured_s=_mean([_per_token(one, one.seconds) for one, _ in runs]),
        predicted_s=_mean([_per_token(one, seconds) for one, seconds in runs]),
        num_rows=len(runs),
        fitted=any(digest(one.row) in _seen() for one, _ in runs),
    )


def _mesh(plan: Plan) -> tuple[float, ...]:
    return tuple(float(np.max(getattr(plan, name))) for name in ("tp", "pp", "cp", "ep"))


def _per_token(one: Run, seconds: float) -> float:
    return seconds * float(one.row.params["num_gpus"]) / float(one.step.num_tokens)


def _mean(values: Sequence[float]) -> float:
    """The geometric mean; of equal values, that value to the last bit."""
    if len(set(values)) == 1:
        return values[0]
    return math.exp(sum(map(math.log, values)) / len(values))


def _seen() -> frozenset[str]:
    """Rows that some fit of steps has used."""
    fits = (shipped_factors(), shipped_low_precision(), shipped_experts())
    return frozenset().union(*(f.rows for f in fits if f is not None))


# ---- in words --------------------------------------------------------------------------------


def line(ranking: Ranking) -> str:
    """What a scope shows in a line: tau with its number of pairs, the bar, what is too small."""
    verdict = {None: "nothing to rank", True: "kept", False: "missed"}[ranking.kept]
    unseen = _text(ranking.pairs(NOISE_FRAC, unseen=True))
    mesh = _text(ranking.pairs(NOISE_FRAC, other_mesh=True))
    return (
        f"order of published alternatives, {ranking.scope}: tau {_text(ranking.pairs(NOISE_FRAC))} "
        f"over pairs more than {100 * NOISE_FRAC:g} % apart (bar {LEAST_TAU}: {verdict}), "
        f"{_text(ranking.pairs())} over all, {unseen} where no row was fitted, {mesh} of other "
        f"degrees than dp; {len(ranking.groups)} groups, {len(ranking.too_small)} of two "
        f"alternatives only, {ranking.num_alone} questions with one"
    )


def _text(pairs: Pairs) -> str:
    return "- (no pair)" if pairs.tau is None else f"{pairs.tau:.2f} ({pairs.num})"


def _details(ranking: Ranking) -> Iterator[str]:
    for g in ranking.groups:
        pairs = g.pairs()
        tau = "too small for a tau" if g.tau is None else f"tau {g.tau:.2f}"
        yield f"  {g.name}: {len(g.alternatives)} alternatives, {tau}, {pairs.opposing} against"
        for a in g.alternatives:
            ratio = a.predicted_s / a.measured_s
            seen = ", fitted" if a.fitted else ""
            yield f"    {a.measured_s:.3e} GPU s/token, predicted {ratio:.3f} x{seen}: {a.layout}"


def as_dicts(rankings: Iterable[Ranking]) -> list[Mapping[str, Any]]:
    """Plain numbers and strings."""
    return [r.as_dict() for r in rankings]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m validate.plan_ranking FOLDER ...`: the order of published alternatives."""
    parser = argparse.ArgumentParser(
        prog="python -m validate.plan_ranking", description=main.__doc__
    )
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    try:
        files = [f for folder in given.folders for f in csv_files(folder, TRAINING_FAMILY)]
        rankings = plan_ranking([row for f in files for row in read(f).rows])
    except (InputError, OSError) as error:
        print(f"validate.plan_ranking: error: {error}", file=sys.stderr)
        return 2
    for ranking in rankings:
        print(line(ranking), *_details(ranking), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
