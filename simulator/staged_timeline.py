"""A step whose stages differ as a timeline: `simulator.timeline` with layers stage by stage.

Each stage has the mean of its own layers in their modes: what runs again is part of the backward
pass, copies to the host slow the forward pass, copies back the backward one. A stage gathers,
reduces and updates its own parameters, in equal parts for each of its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hwmodels.cluster import Cluster
from hwmodels.errors import InputError
from simulator.felt_exchange import wait_share
from simulator.layer_modes import NONE, layer_kinds, mode_costs
from simulator.recipe import Recipe
from simulator.schedule import DUALPIPE
from simulator.stack import OnDevice
from simulator.staged import StageCost, StageLayers, apart, stage_costs
from simulator.step import data_seconds, layer_times
from simulator.timeline import LayerSeconds, StepTimeline, layer_seconds, simulate_stages
from workloads.models.transformer import TrainStep
from workloads.plan import Plan, Recompute


def simulate_staged(
    step: TrainStep,
    *,
    plan: Plan,
    stages: Sequence[StageLayers],
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None = None,
    schedule_name: str | None = None,
    loading_s: float = 0.0,
) -> StepTimeline:
    """One step under a plan with the layers and modes of every stage; see `simulate_training`."""
    if schedule_name == DUALPIPE:
        raise InputError(
            "dualpipe lays two parts of the model on every rank; give another schedule, or leave "
            "the stages alike"
        )
    bare = replace(plan, recompute=int(Recompute.NONE))
    costs = stage_costs(step, plan=bare, stages=stages, on=on, recipe=recipe, stack=stack)
    layers = _layers(step, bare, stages, costs, on, recipe, stack)
    held = [float(s.num_layers) for s in stages]
    return simulate_stages(
        step, layers, held, plan=plan, stack=stack, schedule_name=schedule_name,
        loading_s=loading_s,
    )  # fmt: skip


def _layers(
    step: TrainStep,
    plan: Plan,
    stages: Sequence[StageLayers],
    costs: Sequence[StageCost],
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None,
) -> list[LayerSeconds]:
    """The mean layer of every stage."""
    exchanged = recipe if stack is None else stack.stack.exchanged(recipe)
    whole = layer_seconds(step, plan=plan, on=on, recipe=recipe, stack=stack)
    kinds = {}
    for kind in layer_kinds(step.config, by_attention=apart(plan))[0]:
        own = replace(step, config=kind.config)
        times = layer_times(own, plan=plan, on=on, recipe=exchanged, stack=stack)
        kinds[kind.name] = (
            layer_seconds(own, plan=plan, on=on, recipe=recipe, stack=stack),
            mode_costs(times, step, kind, plan=plan, on=on, recipe=recipe, stack=stack),
        )
    found = []
    # A node that is slower than the others is so in all it computes.
    slow = 1.0 + (float(wait_share(plan, on, stack)) if stack else 0.0)
    for stage, cost in zip(stages, costs, strict=True):
        ahead = back = weights = 0.0
        for name, modes in stage.counts.items():
            seconds, table = kinds[name]
            for mode, number in modes.items():
                copy_s = slow * float(table[mode].copy_s) / 2
                more_s = float(table[mode].seconds) - float(table[NONE].seconds)
                ahead += number * (seconds.forward + copy_s)
                back += number * (seconds.input_grad + slow * more_s - copy_s)
                weights += number * seconds.weight_grad
        count = stage.num_layers
        reduce_s, gather_s = data_seconds(
            step.config, plan, on, exchanged, cost.held, calibrated=stack is not None
        )
        found.append(
            replace(
                whole,
                forward=ahead / count,
                input_grad=back / count,
                weight_grad=weights / count,
                gather=float(gather_s) / count,
                reduce=float(reduce_s) / count,
                update=slow * float(cost.update.lower_s),
            )
        )
    return found
