"""A training step as a timeline: every stage's passes, sends, exchange and update, event by event.

Symmetric ranks are simulated once: of each pipeline stage one rank stands for all tensor-,
context- and data-parallel ones. Streams of stage s:

    stage s    passes of micro-batches, layer by layer where exchange runs beside them; at last
               the optimizer
    gather s   weights, a layer at a time: ZeRO 3 in every pass, ZeRO 1 and 2 before the first
    reduce s   gradients, a layer at a time: ZeRO 2 and 3 after every backward pass, else the last
               of a part; both share the network port
    link s-t   activations and gradients between stages
    host       the next batch is read; the next step cannot begin before it is there

Under ZeRO 3 a gather runs ahead by one layer; weights that stay are gathered as soon as the step
begins. Exchange beside passes takes the share `exposed` of the
processors from them (`simulator.stack`) while it keeps a device's own links busy, so both are
slowed while both run. Passes are those of the slowest node (`jitter`). Tensor-, context- and
expert-parallel collectives are part of the pass that waits for them.

A faster network can lengthen a pipelined step by a little: exchange that fell into a stage's idle
time then runs beside its last passes, which the stages before wait for.

Where stages are equal and sends free, bubbles are the schedules' closed forms (`schedule`); the
analytic step (`simulator.step`) is this timeline without its starts and ends: they agree within the
exchange of the layers that nothing can run beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from hwmodels.cluster import Cluster
from hwmodels.errors import InputError
from simulator.engine import NONE, Task, Timeline, run
from simulator.felt_exchange import wait_share
from simulator.pieces import send_seconds, total_seconds
from simulator.pipeline import gives, in_order, needs, pass_name
from simulator.recipe import Recipe
from simulator.schedule import (
    BACKWARD,
    BOTH,
    FORWARD,
    INPUT_GRAD,
    INTERLEAVED,
    ONE_F_ONE_B,
    WEIGHT_GRAD,
    Pass,
    Schedule,
    schedule,
)
from simulator.stack import SERIAL, OnDevice
from simulator.step import (
    DataExchange,
    busy_frac,
    data_exchange,
    layer_times,
    optimizer_seconds,
)
from workloads.models.transformer import TrainStep
from workloads.numeric import ceil_div
from workloads.plan import Plan, Recompute
from workloads.workload import BACKWARD as BACKWARD_PHASE
from workloads.workload import FORWARD as FORWARD_PHASE
from workloads.workload import Node

COMPUTE, SEND, GATHER, REDUCE, UPDATE, LOAD = (
    "compute", "send", "gather", "reduce", "update", "load",
)  # fmt: skip
KINDS: Final = (COMPUTE, SEND, GATHER, REDUCE, UPDATE, LOAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """Seconds of one layer and of the ends for a micro-batch, exchange that waits included.

    `input_grad` and `weight_grad` add up to the backward pass, what is computed again in the
    first. `embedding` and `head` are (forward, backward). `felt` is the share of the processors
    that exchange beside passes takes from them; where exchange is `serial`, there is none beside.
    """

    forward: float
    input_grad: float
    weight_grad: float
    embedding: tuple[float, float]
    head: tuple[float, float]
    gather: float
    reduce: float
    send: float
    update: float
    felt: float = 0.0
    serial: bool = False


class PassRun(NamedTuple):
    """Where a pass lies in the timeline: its first and last computing task."""

    stage: int
    kind: str
    micro_batch: int
    chunk: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeline:
    """The timeline of a step, its schedule, and what lies on the critical path by kind."""

    plan: Plan
    schedule: Schedule
    timeline: Timeline
    layers: LayerSeconds
    stage_layers: tuple[float, ...]
    passes: tuple[PassRun, ...]

    @property
    def seconds(self) -> float:
        """From the first gather or forward pass to the last update."""
        return self.timeline.seconds

    def critical_s(self) -> Mapping[str, float]:
        """Seconds of the critical path by kind of task."""
        found = dict.fromkeys(KINDS, 0.0)
        line = self.timeline
        for i in line.critical_path():
            kind = line.tasks[i].kind
            found[kind] = found.get(kind, 0.0) + float(line.end_s[i] - line.start_s[i])
        return found

    def exposed_s(self) -> float:
        """Seconds in which some stage exchanges weights or gradients and does not compute, mean."""
        stages = range(self.schedule.num_stages)
        parts = [
            self.timeline.exposed_s([f"{GATHER} {s}", f"{REDUCE} {s}"], [f"stage {s}"])
            for s in stages
        ]
        return sum(parts) / len(parts)

    def bubble_frac(self) -> float:
        """Share of the stages' time in which they do not compute."""
        stages = range(self.schedule.num_stages)
        busy = [self.timeline.busy([f"stage {s}"]) for s in stages]
        worked = sum(float((b[:, 1] - b[:, 0]).sum()) for b in busy)
        return max(1 - worked / (len(stages) * self.seconds), 0.0)


def simulate_training(
    step: TrainStep,
    *,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None = None,
    schedule_name: str | None = None,
    loading_s: float = 0.0,
) -> StepTimeline:
    """One step under one plan; raises `InputError` where the schedule has no such numbers.

    Without a `stack` kernels are at the bound rung. `schedule_name` defaults to 1F1B, interleaved
    where the plan has more than one chunk a stage. `loading_s` is what the host takes to read a
    batch, one step ahead.
    """
    layers = layer_seconds(step, plan=plan, on=on, recipe=recipe, stack=stack)
    held = _stage_layers(step, plan)
    return simulate_stages(
        step, [layers] * len(held), held, plan=plan, stack=stack, schedule_name=schedule_name,
        loading_s=loading_s,
    )  # fmt: skip


def simulate_stages(
    step: TrainStep,
    layers: Sequence[LayerSeconds],
    held: Sequence[float],
    *,
    plan: Plan,
    stack: OnDevice | None = None,
    schedule_name: str | None = None,
    loading_s: float = 0.0,
) -> StepTimeline:
    """The same with stages that differ: the mean layer of each, and how many it holds."""
    if not 0 <= loading_s < float("inf"):
        raise InputError(f"a batch is loaded in {loading_s:g} s; give a number of seconds from 0")
    num_micro = float(plan.num_micro_batches(step.global_batch))
    if num_micro != int(num_micro):
        raise InputError(
            f"{step.global_batch:g} sequences are no whole number of micro-batches of "
            f"{plan.micro_batch:g} on {plan.dp:g} data-parallel ranks; change one of them"
        )
    chunks = int(plan.interleave)
    chosen = schedule(
        schedule_name or (INTERLEAVED if chunks > 1 else ONE_F_ONE_B),
        num_stages=int(plan.pp), num_micro_batches=int(num_micro), num_chunks=chunks,
    )  # fmt: skip
    built = _Tasks(chosen, tuple(layers), tuple(held), int(plan.zero_stage), layers[0].felt)
    tasks = built.all()
    if loading_s > 0:
        tasks.append(Task(name="load the next batch", stream="host", seconds=loading_s, kind=LOAD))
    return StepTimeline(
        plan=plan, schedule=chosen, timeline=run(tasks), layers=layers[0],
        stage_layers=built.stage_layers, passes=tuple(built.passes),
    )  # fmt: skip


def layer_seconds(
    step: TrainStep,
    *,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None = None,
) -> LayerSeconds:
    """What the tasks last: the analytic step's own kernels and collectives, for one plan."""
    recipe = recipe if stack is None else stack.stack.exchanged(recipe)
    times = layer_times(step, plan=plan, on=on, recipe=recipe, stack=stack)
    again = float(plan.recompute == Recompute.FULL)
    some = float(plan.recompute == Recompute.SELECTIVE)
    exposed = [float(sum(e.values(), start=0.0))
               for e in (times.exposed_forward, times.exposed_backward)]  # fmt: skip
    forward = float(times.forward.lower_s) + exposed[0]
    backward = float(times.backward.lower_s) + exposed[1]
    backward += again * float(times.full.seconds) + some * float(times.selective.seconds)
    weight_grad = _weight_grad_s(step, plan, on, recipe, stack)
    real = stack is not None
    moved = data_exchange(step.config, plan, on, recipe, calibrated=real)
    most = float(ceil_div(step.config.num_layers, plan.pp))
    gap = stack.factors.layer_s if stack else 0.0
    head = _ends_s(step, plan, on, recipe, stack, embedding=False)
    # A node that is slower than the others is so in all it computes.
    slow = 1.0 + (float(wait_share(plan, on, stack)) if stack else 0.0)
    first = _ends_s(step, plan, on, recipe, stack, embedding=True)
    return LayerSeconds(
        forward=slow * (forward + gap),
        input_grad=slow * (backward - weight_grad),
        weight_grad=slow * weight_grad,
        embedding=(slow * first[0], slow * first[1]),
        head=(
            slow * (head[0] + float(times.mtp[0].lower_s)),
            slow * (head[1] + float(times.mtp[1].lower_s)),
        ),
        gather=float(moved.gather_s) / most,
        reduce=float(moved.reduce_s) / most,
        send=float(send_seconds(step.config, step.len_seq, plan, on, recipe, calibrated=real)),
        update=slow * float(optimizer_seconds(step.config, plan, on, recipe, stack).lower_s),
        felt=_felt(step, plan, moved, on, stack),
        serial=bool(stack and stack.stack.exposed == SERIAL and np.all(plan.zero_stage <= 1)),
    )


def _felt(
    step: TrainStep, plan: Plan, moved: DataExchange, on: Cluster, stack: OnDevice | None
) -> float:
    """Share of the processors that exchange takes while it runs."""
    if stack is None:
        return 0.0
    return min(stack.factors.exposed, 1.0) * float(busy_frac(step, plan, moved, on, stack))


def _weight_grad_s(
    step: TrainStep, plan: Plan, on: Cluster, recipe: Recipe, stack: OnDevice | None
) -> float:
    """Of the mean layer: products that nothing waits for."""
    cfg = step.config
    fused = stack is None or stack.stack.fused_attention
    total = 0.0
    for kind, count in cfg.kinds.items():
        nodes = recipe.layer(step, kind, plan, on=on.device, fused=fused)
        own = [n for n in nodes if n.name.endswith(".wgrad")]
        share = count / cfg.num_layers
        total += share * float(total_seconds(own, on=on.device, stack=stack).lower_s)
    return total


def _ends_s(
    step: TrainStep,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None,
    *,
    embedding: bool,
) -> tuple[float, float]:
    """Forward and backward seconds of what precedes or follows the layers."""

    def of(phase: str) -> float:
        nodes: Iterable[Node] = (
            n for n in step.ends(plan, dtype=recipe.dtype)
            if n.phase == phase and (n.part == "embedding") == embedding
        )  # fmt: skip
        return float(total_seconds(nodes, on=on.device, stack=stack).lower_s)

    return of(FORWARD_PHASE), of(BACKWARD_PHASE)


def _stage_layers(step: TrainStep, plan: Plan) -> tuple[float, ...]:
    """Layers of every stage: ceil(L / p), the last ones what is left."""
    num, p = step.config.num_layers, int(plan.pp)
    most = int(ceil_div(num, p))
    left = [min(max(num - s * most, 0), most) for s in range(p)]
    if min(left) == 0:
        raise InputError(
            f"{num} layers leave a stage of {p} empty; give at most as many stages as layers, and "
            "so that all but the last are full"
        )
    return tuple(map(float, left))


class _Tasks:
    """Builds the tasks of a step, in an order in which each follows what it waits for."""

    def __init__(
        self,
        plan: Schedule,
        layers: tuple[LayerSeconds, ...],
        stage_layers: tuple[float, ...],
        zero_stage: int,
        share: float,
    ) -> None:
        self.plan, self.layers, self.zero_stage, self.share = plan, layers, zero_stage, share
        self.stage_layers = stage_layers
        self.tasks: list[Task] = []
        self.passes: list[PassRun] = []
        self.done: dict[tuple[str, int, int], int] = {}
        self.last_reduce: dict[int, int] = {}
        self.last_pass: dict[int, int] = {}
        self.seen: dict[tuple[int, str, int], int] = {}

    def all(self) -> list[Task]:
        """Passes in the schedule's order, then the updates."""
        stages = range(self.plan.num_stages)
        gathered = {s: (self._serial(s, GATHER, ()),) for s in stages if self._is_serial(s, GATHER)}
        for stage, _, p in in_order(self.plan):
            after = (*self._received(stage, p), *gathered.pop(stage, ()))
            first, end = self._pass(stage, p, after)
            self.passes.append(PassRun(stage, p.kind, p.micro_batch, p.chunk, first, end))
            for key in gives(self.plan, stage, p):
                self.done[key] = end
            self.last_pass[stage] = end
        for stage in stages:
            if self._is_serial(stage, REDUCE):
                after = (self.last_pass[stage],)
                self.last_reduce[stage] = self._serial(stage, REDUCE, after)
            waits = (self.last_reduce[stage],) if stage in self.last_reduce else ()
            self._add("optimizer", f"stage {stage}", self.layers[stage].update, waits, UPDATE)
        return self.tasks

    def _is_serial(self, stage: int, kind: str) -> bool:
        """Does the stage exchange all its layers at once, beside nothing?"""
        t = self.layers[stage]
        wanted = t.reduce > 0 if kind == REDUCE else t.gather > 0 and self.zero_stage >= 1
        return t.serial and wanted

    def _serial(self, stage: int, kind: str, after: tuple[int, ...]) -> int:
        t = self.layers[stage]
        seconds = (t.reduce if kind == REDUCE else t.gather) * self.stage_layers[stage]
        return self._add(f"{kind} all", f"{kind} {stage}", seconds, after, kind)

    def _add(
        self, name: str, stream: str, seconds: float, after: tuple[int, ...], kind: str,
        uses: Mapping[str, float] | None = None,
    ) -> int:  # fmt: skip
        self.tasks.append(Task(name=name, stream=stream, seconds=seconds, after=after, kind=kind,
                               uses=uses or {}))  # fmt: skip
        return len(self.tasks) - 1

    def _received(self, stage: int, p: Pass) -> Iterator[int]:
        """What the pass waits for; what comes from another stage is sent first."""
        for key, sender in needs(self.plan, stage, p):
            cause = self.done[key]
            if sender != stage and self.layers[stage].send > 0:
                name = f"send {key[0]}{key[2]}"
                cause = self._add(
                    name, f"link {sender}-{stage}", self.layers[stage].send, (cause,), SEND
                )
            yield cause

    def _pass(self, stage: int, p: Pass, after: tuple[int, ...]) -> tuple[int, int]:
        """The pass, layer by layer where exchange runs beside it; the tasks that frame it."""
        gathers, reduces = self._exchange(stage, p)
        seconds, fixed = self._seconds(stage, p)
        count = self._layers_of(stage)
        if not (gathers or reduces):
            whole = fixed + count * seconds
            only = self._add(pass_name(p), f"stage {stage}", whole, after, COMPUTE)
            return only, only
        uses = {f"sm {stage}": 1.0}
        first = end = NONE
        num, whole = int(count) or 1, count
        gathered = [NONE, NONE]
        for i in range(num):
            waits = list(after) if i == 0 else [end]
            if gathers:
                limited = self.zero_stage >= 3 and gathered[0] != NONE
                ahead = (gathered[0],) if limited else ()
                gathered = [
                    end,
                    self._data(
                        f"gather {pass_name(p)}.{i}",
                        stage,
                        self.layers[stage].gather * whole / num,
                        ahead,
                        GATHER,
                    ),
                ]
                waits.append(gathered[1])
            own = seconds * whole / num + (fixed if i == (0 if p.kind != FORWARD else num - 1)
                                           else 0.0)  # fmt: skip
            end = self._add(f"{pass_name(p)} layer {i}", f"stage {stage}", own, tuple(waits),
                            COMPUTE, uses)  # fmt: skip
            first = end if first == NONE else first
            if reduces:
                self.last_reduce[stage] = self._data(
                    f"reduce {pass_name(p)}.{i}", stage,
                    self.layers[stage].reduce * whole / num, (end,), REDUCE,
                )  # fmt: skip
        return first, end

    def _data(
        self, name: str, stage: int, seconds: float, after: tuple[int, ...], kind: str
    ) -> int:
        uses = {f"port {stage}": 1.0} | ({f"sm {stage}": self.share} if self.share else {})
        return self._add(name, f"{kind} {stage}", seconds, after, kind, uses)

    def _layers_of(self, stage: int) -> float:
        """Layers of one part of a stage."""
        chunks = 1 if self.plan.name == "dualpipe" else len(self.plan.parts)
        return self.stage_layers[stage] / chunks

    def _seconds(self, stage: int, p: Pass) -> tuple[float, float]:
        """Seconds of a layer of the pass, and of the ends it has beside its layers."""
        t, part = self.layers[stage], self.plan.parts[p.chunk][stage]
        backward = t.input_grad + t.weight_grad
        per_layer = {
            FORWARD: t.forward, BACKWARD: backward, INPUT_GRAD: t.input_grad,
            WEIGHT_GRAD: t.weight_grad, BOTH: t.forward + backward,
        }[p.kind]  # fmt: skip
        fixed = 0.0
        for kind, chunk in _halves(p):
            part = self.plan.parts[chunk][stage]
            forward = kind == FORWARD
            if kind == WEIGHT_GRAD:
                continue
            fixed += t.embedding[0 if forward else 1] if part == 0 else 0.0
            fixed += t.head[0 if forward else 1] if part == self.plan.num_parts - 1 else 0.0
        return per_layer, fixed

    def _exchange(self, stage: int, p: Pass) -> tuple[bool, bool]:
        """Does the pass gather weights, does it reduce gradients?"""
        gathers = reduces = False
        if self.layers[stage].serial:
            return gathers, reduces
        for kind, chunk in _halves(p):
            last = {FORWARD: FORWARD, WEIGHT_GRAD: WEIGHT_GRAD}.get(kind, BACKWARD)
            count = self.seen.get((stage, last, chunk), 0) + 1
            self.seen[stage, last, chunk] = count
            if kind == FORWARD:
                gathers |= self.zero_stage >= 3 or (self.zero_stage >= 1 and count == 1)
            elif kind != WEIGHT_GRAD:
                gathers |= self.zero_stage >= 3
                reduces |= self.zero_stage >= 2 or count == self._micro_batches()
        return gathers and self.layers[stage].gather > 0, reduces and self.layers[stage].reduce > 0

    def _micro_batches(self) -> int:
        """Micro-batches that pass a part (half of them each way under dualpipe)."""
        halves = 2 if self.plan.name == "dualpipe" else 1
        return self.plan.num_micro_batches // halves


def _halves(p: Pass) -> Iterator[tuple[str, int]]:
    """(kind, chunk) of the passes that `p` is made of."""
    if p.kind != BOTH:
        yield p.kind, p.chunk
        return
    assert p.second is not None
    yield FORWARD, p.chunk
    yield BACKWARD, p.second[1]
