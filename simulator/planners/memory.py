"""A step's memory planned as MEMO does: what leaves for the host, and where the rest lies.

`plan_memory` puts together the layer's time on the cluster (`simulator.step`), the swap fraction
(`swap.py`), the step's requests with and without swapping (`layer_requests.py`) and their placement
in two levels and at once (`storage.py`), of which the smaller counts; beside them stands what
PyTorch's caching allocator reserves for the same requests (`simulator.caching_allocator`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from hwmodels.cluster import Cluster
from hwmodels.errors import InfeasibleError, InputError, UnsupportedError
from simulator.layer_modes import layer_kinds
from simulator.memory import in_flight
from simulator.pieces import total_seconds
from simulator.planners.layer_requests import Part, Requests, step_requests
from simulator.planners.storage import Placement, Tensors, TwoLevels, place, place_in_passes
from simulator.planners.swap import (
    LAST_LAYERS,
    KeptBytes,
    SwapKind,
    SwapPlan,
    SwapQuestion,
    kept_bytes,
    plan_swap,
)
from simulator.recipe import Recipe
from simulator.stack import OnDevice
from simulator.step import layer_times
from workloads.models.transformer import TrainStep
from workloads.numeric import ceil_div
from workloads.ops.attention import StandardAttention
from workloads.ops.flash_attention import FlashAttention2
from workloads.plan import Plan
from workloads.workload import FORWARD

ATTENTION: Final = (FlashAttention2, StandardAttention)
SCAN: Final = "mixer_scan"
"""The node of a mixer that is not run again."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A step's requests with both placements; the smaller one is `best`."""

    requests: Requests
    flat: Placement
    two_levels: TwoLevels | None
    caching_bytes: int

    @property
    def best(self) -> Placement:
        """The placement of the lower peak; two levels where they are equal."""
        levels = self.two_levels
        if levels is None or self.flat.peak_bytes < levels.whole.peak_bytes:
            return self.flat
        return levels.whole


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The swap, and storage with it; `kept` is the storage of the same step without swapping."""

    step: TrainStep
    plan: Plan
    cluster: Cluster
    swap: SwapPlan
    swapped: Storage
    kept: Storage
    stage: int = 0


def swap_question(
    step: TrainStep,
    *,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    host_bytes: float,
    stack: OnDevice | None = None,
    link_bytes_per_s: float | None = None,
    stage: int = 0,
) -> SwapQuestion:
    """The program's numbers on a cluster; `host_bytes` is a node's memory for all its ranks.

    `stage`: of a pipeline, one of its stages (0 has the most micro-batches in flight).
    """
    start, stop = stage_of(step, plan, stage)
    held = float(in_flight(step, plan, stage))
    link = link_bytes_per_s or on.device.host_bytes_per_s
    if link is None:
        raise UnsupportedError(f"{on.device.id} has no link to the host; give --host-bandwidth")
    cfg = step.config
    if cfg.mixer is not None:
        if plan.pp != 1:
            raise InputError(
                f"pp = {plan.pp}: swapping beside scans is planned for one pipeline stage; pin pp=1"
            )
        return _of_kinds(
            step, plan, on, recipe, stack, link_bytes_per_s=link,
            host_bytes=host_bytes / on.accelerators_per_node,
        )  # fmt: skip
    times = layer_times(step, plan=plan, on=on, recipe=recipe, stack=stack)
    layer_s = float(times.forward.lower_s) + float(sum(times.exposed_forward.values()))
    nodes = recipe.layer(step, cfg.last_kind, plan, on=on.device).select(phase=FORWARD)
    cores = [node for node in nodes if isinstance(node.op, ATTENTION)]
    attention_s = float(total_seconds(cores, on=on.device, stack=stack).lower_s)
    tokens = int(ceil_div(plan.micro_batch * step.len_seq, plan.cp))
    return SwapQuestion(
        kept=kept_bytes(cfg, num_tokens=tokens, len_seq=int(step.len_seq), plan=plan,
                        kind=cfg.last_kind, dtype=recipe.dtype),
        layer_s=layer_s,
        other_forward_s=max(layer_s - attention_s, 0.0),
        link_bytes_per_s=link,
        host_bytes=host_bytes / on.accelerators_per_node,
        num_layers=stop - start,
        num_tokens=tokens,
        in_flight=held,
        last_kept=LAST_LAYERS if stage == plan.pp - 1 and held == 1 else 0,
    )  # fmt: skip


def plan_stages(step: TrainStep, *, plan: Plan, **given: Any) -> tuple[SwapPlan, ...]:
    """The swap of every pipeline stage; `given` as of `swap_question`."""
    found = []
    for stage in range(int(plan.pp)):
        try:
            found.append(plan_swap(swap_question(step, plan=plan, stage=stage, **given)))
        except InfeasibleError as error:
            if plan.pp == 1:
                raise
            raise InfeasibleError(f"stage {stage} of {plan.pp}: {error}") from error
    return tuple(found)


def stage_of(step: TrainStep, plan: Plan, stage: int) -> tuple[int, int]:
    """The first layer of a stage and the one after its last; all but the last are equal."""
    total, stages = step.config.num_layers, int(plan.pp)
    most = -(-total // stages)
    start, stop = stage * most, min((stage + 1) * most, total)
    if not 0 <= stage < stages or start >= stop:
        raise InputError(
            f"pp = {stages}: {total} layers in equal stages leave stage {stage} without any; pin a "
            "pp that divides them"
        )
    return start, stop


def part_of(step: TrainStep, plan: Plan, stage: int) -> Part:
    """A stage for its storage: first layer, ends, and the other micro-batches in flight."""
    return Part(
        first_layer=stage_of(step, plan, stage)[0],
        has_embedding=stage == 0,
        has_head=stage == plan.pp - 1,
        others=float(in_flight(step, plan, stage)) - 1,
    )


def _of_kinds(
    step: TrainStep,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None,
    **limits: Any,
) -> SwapQuestion:
    """The program of a stack of several kinds of layers: a copy row for each, means beside."""
    kinds, sequence = layer_kinds(step.config)
    num_layers, tokens = len(sequence), int(plan.micro_batch * step.len_seq)
    away = sequence[: max(num_layers - LAST_LAYERS, 0)] or sequence
    found, others = [], []
    for kind in kinds:
        own = replace(step, config=kind.config)
        times = layer_times(own, plan=plan, on=on, recipe=recipe, stack=stack)
        nodes = recipe.layer(own, kind.block, plan, on=on.device).select(phase=FORWARD)
        cores = [n for n in nodes if isinstance(n.op, ATTENTION) or n.name == SCAN]
        core_s = float(total_seconds(cores, on=on.device, stack=stack).lower_s)
        layer_s = float(times.forward.lower_s) + float(sum(times.exposed_forward.values()))
        kept = kept_bytes(kind.config, num_tokens=tokens, len_seq=int(step.len_seq), plan=plan,
                          kind=kind.block, dtype=recipe.dtype)  # fmt: skip
        found.append(SwapKind(name=kind.name, kept=kept, layer_s=layer_s))
        others.append(max(layer_s - core_s, 0.0))

    def mean(values: Sequence[float]) -> float:
        return sum(values[k] for k in away) / len(away)

    parts = ("input", "attention", "others")
    return SwapQuestion(
        kept=KeptBytes(**{part: mean([getattr(k.kept, part) for k in found]) for part in parts}),
        layer_s=mean([k.layer_s for k in found]),
        other_forward_s=mean(others),
        num_layers=num_layers,
        num_tokens=tokens,
        kinds=tuple(found),
        **limits,
    )


def plan_memory(
    step: TrainStep,
    question: SwapQuestion,
    *,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    time_limit_s: float = 3.0,
    gap_frac: float = 0.0,
    stage: int = 0,
) -> MemoryPlan:
    """Swap fraction and storage of one micro-batch of a step on one rank of a stage."""
    swap = plan_swap(question)
    stored = [
        store(
            step_requests(step, plan=plan, num_layers=question.num_layers, dtype=recipe.dtype,
                          swap=swapped, part=part_of(step, plan, stage)),
            time_limit_s=time_limit_s, gap_frac=gap_frac,
        )
        for swapped in (True, False)
    ]  # fmt: skip
    return MemoryPlan(
        step=step, plan=plan, cluster=on, swap=swap, swapped=stored[0], kept=stored[1],
        stage=stage,
    )  # fmt: skip


def store(requests: Requests, *, time_limit_s: float = 3.0, gap_frac: float = 0.0) -> Storage:
    """Both placements; without passes only the flat one. Half of the time goes to each."""
    tensors = Tensors.of(requests.timeline)
    half = time_limit_s / 2
    levels = None
    if requests.passes:
        levels = place_in_passes(tensors, requests.passes, time_limit_s=half, gap_frac=gap_frac)
    return Storage(
        requests=requests,
        flat=place(tensors, time_limit_s=half, gap_frac=gap_frac),
        two_levels=levels,
        caching_bytes=requests.timeline.replayed().peak_reserved_bytes,
    )
