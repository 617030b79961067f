"""Published training steps of mixtures of experts, with the setting their trainer had.

A row becomes a `MoeRun`: the run as `validate.runs` reads it, experts unsplit by tensor parallelism
(etp = 1), and the framework as `validate.moe_trainers` has it. `graphs_frac`, the share of the
host's work that graphs take, is the share of a layer's nodes, forward and backward, that belong to
the captured parts. Racks: jobs of several take 64 of the 72 GPUs of each (16 of 18 trays), without
which no group of 64 experts' ranks in these tables could lie in one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from hwmodels.cluster import Cluster
from hwmodels.errors import InputError
from hwmodels.step_experts import ExpertFactors
from simulator.expert_run import ExpertRun
from simulator.stack import OnDevice, factors_of, stack
from simulator.step import training_step
from validate.adapters import Uncounted, is_training_step
from validate.measurement import Measurement
from validate.moe_models import drops_tokens
from validate.moe_trainers import ATTENTION, ROUTER, STEP, Setting, release_of, setting_of
from validate.runs import METRICS, SAME_RUN, Run, identity, run
from workloads.models.transformer import TrainStep
from workloads.plan import Plan

RACK_GPUS, JOB_GPUS = 72, 64
DROPLESS, DROPPING = "dropless", "token drop"
_CAPTURED: Final = {
    ATTENTION: ("attention", "norm", "residual"),
    ROUTER: ("router", "dispatch"),
}
"""Parts, or names, of a layer's nodes that a captured module has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeRun:
    """A run of a mixture of experts, its setting, and the release that ran it."""

    run: Run
    setting: Setting
    release: str
    algorithm: str


def read_moe_runs(
    rows: Iterable[Measurement],
) -> tuple[tuple[MoeRun, ...], tuple[tuple[Measurement, str], ...]]:
    """Every such run among training rows, and every other row of experts with the reason."""
    rows = tuple(r for r in rows if is_training_step(r) and "experts" in r.params["model"])
    published = {(identity(row), row.op) for row in rows}
    runs: list[MoeRun] = []
    others: list[tuple[Measurement, str]] = []
    for row in rows:
        better = METRICS[: METRICS.index(row.op)] if row.op in METRICS else ()
        if any((identity(row), metric) in published for metric in better):
            others.append((row, SAME_RUN))
            continue
        try:
            runs.append(moe_run(row))
        except Uncounted as why:
            others.append((row, str(why)))
    return tuple(runs), tuple(others)


def moe_run(row: Measurement) -> MoeRun:
    """The run that a row states; raises `Uncounted` with what is missing."""
    setting = setting_of(row.source, row.gpu, row.params["model"])
    stated = row.params["parallelism"]
    filled = {
        "interleave": 1,
        **stated,
        "etp": 1,
        "recompute": "selective" if setting.modules else "none",
        "zero": 3 if stated.get("fsdp") else 1,
    }
    found = run(
        replace(row, params={**row.params, "parallelism": filled}), assume=True, experts=True
    )
    return MoeRun(
        run=replace(found, row=row, cluster=_in_racks(found.cluster)),
        setting=setting,
        release=".".join(f"{n:02}" for n in release_of(row.source)),
        algorithm=DROPPING if drops_tokens(row.params["model"]) else DROPLESS,
    )


def _in_racks(cluster: Cluster) -> Cluster:
    """The cluster as a job of several racks sees it: 64 GPUs of each."""
    inner, *outer = cluster.levels
    if inner.size != RACK_GPUS or cluster.num_accelerators <= RACK_GPUS:
        return cluster
    return replace(cluster, levels=(replace(inner, size=JOB_GPUS), *outer))


def graphs_frac(step: TrainStep, plan: Plan, graphs: tuple[str, ...]) -> float:
    """Share of an experts' layer's nodes that captured parts have."""
    if STEP in graphs:
        return 1.0
    names = {name for graph in graphs for name in _CAPTURED[graph]}
    nodes = list(step.layer("moe", plan))
    inside = [n for n in nodes if n.part in names or n.name.split(".")[0] in names]
    return len(inside) / len(nodes)


def on_device(one: MoeRun, dense: Mapping[str, float], experts: ExpertFactors) -> OnDevice:
    """The run's framework with the factors that steps of dense models gave, and the experts'."""
    found, setting = one.run, one.setting
    assert found.stack is not None
    framework = replace(stack(found.stack), modules=setting.modules)
    return OnDevice(
        stack=framework,
        factors=factors_of(framework, found.cluster.device, dense),
        experts=ExpertRun(
            dispatcher=setting.dispatcher,
            overlapped=setting.overlapped,
            kernels=1.0 if setting.fused else experts.kernels,
            host_s=experts.host_s,
            graphs_frac=graphs_frac(found.step, found.plan, setting.graphs),
        ),
    )


def predicted_s(one: MoeRun, dense: Mapping[str, float], experts: ExpertFactors) -> float:
    """Seconds of the run's step on the calibrated rung."""
    found = one.run
    estimate = training_step(
        found.step,
        plan=found.plan,
        on=found.cluster,
        recipe=found.recipe,
        stack=on_device(one, dense, experts),
    )
    return float(np.min(estimate.seconds))


def predictable(
    runs: Iterable[MoeRun], dense: Mapping[str, float]
) -> tuple[tuple[MoeRun, ...], tuple[tuple[Measurement, str], ...]]:
    """The runs that a prediction is possible for, and the rows of the others with the reason."""
    kept: list[MoeRun] = []
    others: list[tuple[Measurement, str]] = []
    for one in runs:
        try:
            predicted_s(one, dense, ExpertFactors())
        except InputError as why:
            others.append((one.run.row, str(why)))
        else:
            kept.append(one)
    return tuple(kept), tuple(others)
