"""A step's memory planned as MEMO does: what leaves for the host, and where the rest lies.

`plan_memory` puts together the layer's time on the cluster (`simulator.step`), the swap fraction
(`swap.py`), the step's requests with and without swapping (`layer_requests.py`) and their placement
in two levels and at once (`storage.py`), of which the smaller counts; beside them stands what
PyTorch's caching allocator reserves for the same requests (`simulator.caching_allocator`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hwmodels.cluster import Cluster
from hwmodels.errors import InputError, UnsupportedError
from simulator.pieces import total_seconds
from simulator.planners.layer_requests import Requests, step_requests
from simulator.planners.storage import Placement, Tensors, TwoLevels, place, place_in_passes
from simulator.planners.swap import SwapPlan, SwapQuestion, kept_bytes, plan_swap
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


def swap_question(
    step: TrainStep,
    *,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    host_bytes: float,
    stack: OnDevice | None = None,
    link_bytes_per_s: float | None = None,
) -> SwapQuestion:
    """The program's numbers on a cluster; `host_bytes` is a node's memory for all its ranks."""
    if plan.pp != 1:
        raise InputError(f"pp = {plan.pp}: swapping is planned for one pipeline stage; pin pp=1")
    link = link_bytes_per_s or on.device.host_bytes_per_s
    if link is None:
        raise UnsupportedError(f"{on.device.id} has no link to the host; give --host-bandwidth")
    cfg = step.config
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
        num_layers=cfg.num_layers,
        num_tokens=tokens,
    )  # fmt: skip


def plan_memory(
    step: TrainStep,
    question: SwapQuestion,
    *,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    time_limit_s: float = 3.0,
    gap_frac: float = 0.0,
) -> MemoryPlan:
    """Swap fraction and storage of one micro-batch of a step on one rank."""
    swap = plan_swap(question)
    stored = [
        store(
            step_requests(step, plan=plan, num_layers=step.config.num_layers, dtype=recipe.dtype,
                          swap=swapped),
            time_limit_s=time_limit_s, gap_frac=gap_frac,
        )
        for swapped in (True, False)
    ]  # fmt: skip
    return MemoryPlan(
        step=step, plan=plan, cluster=on, swap=swap, swapped=stored[0], kept=stored[1]
    )


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
