"""Planned against published: is the plan found ever slower, under `simulate`, than the one used?

Every published training run of a dense model whose plan is known is simulated as its framework
trains, and so is the plan that the planner finds for the same model, batch and cluster, with the
whole device memory as budget. Where a row leaves the micro-batch or the chunks open, the fastest
published choice counts. Runs that the memory model says do not fit are told apart: no plan can be
compared with one that breaks the planner's limits.

    ratio = simulated seconds of the plan found / of the published one      never above 1
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from hwmodels.errors import InfeasibleError, InputError
from hwmodels.step_factors import shipped_factors
from simulator.memory import training_memory
from simulator.planners.training import plan_training
from simulator.stack import STACKS, OnDevice, factors_of
from simulator.staged_timeline import simulate_staged
from simulator.timeline import simulate_training
from validate.adapters import TRAINING_FAMILY
from validate.measurement import Measurement, csv_files, read
from validate.runs import Run, read_runs
from workloads.plan import Plan

SKIPPED: Final = "llm-foundry"
"""Runs of one plan only, FSDP with the micro-batch that fits: 150 rows that add nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run: simulated seconds of the published plan and of the plan found.

    `fits`: the memory model lets the published plan have the device.
    """

    source: str
    model: str
    published: Plan
    published_s: float
    found: Plan
    found_s: float
    fits: bool

    @property
    def ratio(self) -> float:
        """Found over published."""
        return self.found_s / self.published_s


def planned(run: Run) -> Planned:
    """Simulate the run as it was published, and as it is planned."""
    stack = _stack(run)
    published_s, published = min(
        (simulate_training(run.step, plan=p, on=run.cluster, recipe=run.recipe, stack=stack)
         .seconds, i, p)
        for i, p in enumerate(_plans(run))
    )[::2]  # fmt: skip
    memory = training_memory(run.step, plan=published, recipe=run.recipe)
    choice = plan_training(
        run.step, on=run.cluster, recipe=run.recipe, stack=stack, hbm_frac=1.0, num_runners_up=4
    )
    found_s, found = min(
        (simulate_staged(run.step, plan=c.plan, stages=c.stages, on=run.cluster,
                         recipe=run.recipe, stack=stack).seconds, i, c.plan)
        for i, c in enumerate((choice.best, *choice.runners_up))
    )[::2]  # fmt: skip
    return Planned(
        source=run.source, model=run.config.name, published=published, published_s=published_s,
        found=found, found_s=found_s,
        fits=float(memory.total) <= run.cluster.device.hbm.capacity_bytes,
    )  # fmt: skip


def _stack(run: Run) -> OnDevice | None:
    shipped = shipped_factors()
    if run.stack is None or shipped is None:
        return None
    framework = STACKS[run.stack]
    return OnDevice(
        stack=framework, factors=factors_of(framework, run.cluster.device, shipped.values)
    )


def _plans(run: Run) -> Iterator[Plan]:
    plan = run.plan
    count = np.size(plan.micro_batch)
    yield from (plan.at(i) for i in range(count)) if count > 1 else iter([_whole(plan)])


def _whole(plan: Plan) -> Plan:
    return replace(
        plan,
        micro_batch=int(np.reshape(plan.micro_batch, -1)[0]),
        interleave=int(np.reshape(plan.interleave, -1)[0]),
    )


def compare_plans(rows: Iterable[Measurement]) -> tuple[list[Planned], list[str]]:
    """Every dense run that can be planned, and why others cannot."""
    found: list[Planned] = []
    others: list[str] = []
    seen: set[str] = set()
    for run in read_runs(rows, assume=True)[0]:
        key = f"{run.source} {run.step} {run.plan!r} {run.cluster.id} {run.cluster.num_nodes}"
        if run.config.moe is not None or run.source == SKIPPED or key in seen:
            continue
        seen.add(key)
        try:
            found.append(planned(run))
        except (InputError, InfeasibleError) as why:
            others.append(f"{run.source} {run.config.name}: {why}")
    return found, others


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for every run of the training tables in the directories given."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        print("usage: python -m validate.plan_rows FOLDER [FOLDER ...]", file=sys.stderr)
        return 2
    rows = [
        row
        for directory in given
        for path in csv_files(Path(directory), TRAINING_FAMILY)
        for row in read(path).rows
    ]
    found, others = compare_plans(rows)
    for one in sorted(found, key=lambda p: -p.ratio):
        print(f"{one.ratio:.3f}  {one.source}  {one.model}  {one.published} -> {one.found}"
              + ("" if one.fits else "  (published: over the memory model)"))  # fmt: skip
    for why in others:
        print(why)
    inside = [p for p in found if p.fits]
    worse = sum(p.ratio > 1 + 1e-9 for p in inside)
    print(f"{len(found)} runs, {len(inside)} within the memory model, {worse} planned slower")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
