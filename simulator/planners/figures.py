"""What every plan of a space costs, mesh by mesh, as arrays; one mesh as a stage problem; bounds.

Layer times depend on few fields of a plan (`step.distinct_shapes`), so that thousands of meshes are
priced with a few dozen. The bound of a mesh, for any layout that fits,

    t   = least seconds of a layer, in any mode;  l = v ceil(L / (p v)) layers some stage has
    T  >= max(l t, (L t + ends) / p),   sum t_i >= L t + ends       (kind by kind where mixed)
    after >= update(l) + what nothing hides of l layers' exchange, under the longest passes

goes into equation (1) of `planners.stages`.

    Implemented in: `figures_of`, `Figures.problem`, `Figures.bounds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np

from hwmodels.cluster import Cluster
from hwmodels.errors import InputError
from simulator.context_parallel import buffer_bytes
from simulator.layer_modes import MODES, OFFLOAD, OFFLOAD_FULL, Kind, layer_kinds, mode_costs
from simulator.memory import in_flight, state_bytes
from simulator.pieces import send_seconds
from simulator.planners.modes import LayerKind, Limits, Mode, undominated
from simulator.planners.stages import After, EndPart, StageProblem, States
from simulator.recipe import Recipe
from simulator.stack import OnDevice
from simulator.step import (
    data_seconds,
    distinct_shapes,
    exposed_data,
    exposed_exchange,
    hiding_seconds,
    layer_times,
    optimizer_seconds,
)
from workloads.models.activations import ends_bytes
from workloads.models.parameters import (
    LayerParameters,
    StageParameters,
    layer_parameters,
    parameters_per_rank,
)
from workloads.models.transformer import TrainStep
from workloads.numeric import Array, Num, ceil_div
from workloads.plan import Plan

MODE_FIELDS: Final = (
    "seconds", "hiding_s", "kept_bytes", "host_bytes", "working_bytes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be trained, on what, how, within which limits."""

    step: TrainStep
    on: Cluster
    recipe: Recipe
    limits: Limits
    stack: OnDevice | None = None
    modes: tuple[str, ...] = MODES

    @property
    def exchanged(self) -> Recipe:
        """The recipe with gradients as the framework reduces them."""
        return self.recipe if self.stack is None else self.stack.stack.exchanged(self.recipe)


@dataclass(frozen=True, kw_only=True)
class KindFigures:
    """One kind of layer: arrays over the plans; `modes[name][field]` as `ModeCost` has them."""

    name: str
    forward_s: Array
    dense: Array
    experts: Array
    modes: Mapping[str, Mapping[str, Array]]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All meshes of a space: arrays over `plans`, with one entry for each."""

    question: Question
    plans: Plan
    kinds: tuple[KindFigures, ...]
    sequence: tuple[int, ...]
    num_micro: Array
    embedding_s: Array
    head_s: Array
    fixed_s: Array
    fixed_bytes: Array
    embedding_kept: Array
    head_fixed: Array
    first: StageParameters
    last: StageParameters

    @property
    def size(self) -> int:
        """Meshes."""
        return len(self.num_micro)

    def plan(self, index: int) -> Plan:
        """One mesh, nothing recomputed."""
        return self.plans.at(index)

    def problem(self, index: int, limits: Limits | None = None) -> StageProblem:
        """One mesh as a stage problem, under other limits where given."""
        plan, q = self.plan(index), self.question
        limits = limits or q.limits
        p = int(plan.pp)
        alone = p == 1
        names = [n for n in q.modes if limits.host_bytes or n not in (OFFLOAD, OFFLOAD_FULL)]
        head = EndPart(
            seconds=float(self.head_s[index]),
            fixed_bytes=float(self.head_fixed[index]),
            dense=0.0 if alone else float(_item(self.last.dense, index)),
            experts=0.0 if alone else float(_item(self.last.experts, index)),
        )
        return StageProblem(
            num_stages=p,
            num_chunks=int(plan.interleave),
            num_micro=float(self.num_micro[index]),
            kinds=tuple(_layer_kind(k, index, names) for k in self.kinds),
            sequence=self.sequence,
            first=EndPart(
                seconds=float(self.embedding_s[index]),
                kept_bytes=float(self.embedding_kept[index]),
                dense=float(_item(self.first.dense, index)),
                experts=float(_item(self.first.experts, index)),
            ),
            last=head,
            in_flight=tuple(float(in_flight(q.step, plan, i)) for i in range(p)),
            limits=limits,
            states=states_of(q, plan),
            after=after_of(q, plan),
            fixed_s=float(self.fixed_s[index]),
            fixed_bytes=float(self.fixed_bytes[index]),
        )

    @cached_property
    def bounds(self) -> Array:
        """No layout of a mesh is faster, whatever the memory."""
        plans, total = self.plans, float(len(self.sequence))
        p, v = np.asarray(plans.pp), np.asarray(plans.interleave)
        most = v * np.ceil(total / (p * v))
        whole_s = self.embedding_s + self.head_s
        slowest_s = most * self._least("seconds")
        for number, kind in zip(self.counts, self.kinds, strict=True):
            layer_s = np.min([kind.modes[name]["seconds"] for name in self.question.modes], axis=0)
            whole_s = whole_s + number * layer_s
            slowest_s = np.maximum(slowest_s, np.ceil(number / p) * layer_s)
        slowest_s = np.maximum(slowest_s, whole_s / p)
        pipeline = self.num_micro * slowest_s + (whole_s - slowest_s) / v
        return np.asarray(pipeline + self.fixed_s + self._least_after(most))

    @property
    def counts(self) -> tuple[int, ...]:
        """Layers of every kind."""
        return tuple(self.sequence.count(k) for k in range(len(self.kinds)))

    @cached_property
    def least_bytes(self) -> Array:
        """No layout of a mesh needs less: states and activations of the layers some stage has."""
        q, plans = self.question, self.plans
        total, p, v = float(len(self.sequence)), np.asarray(plans.pp), np.asarray(plans.interleave)
        flight = in_flight(q.step, plans, p - 1)
        most, counts = v * np.ceil(total / (p * v)), np.array(self.counts)[:, None]
        found = []
        for shares in (self._cheapest(most), counts / p):  # some stage's layers; the mean stage
            held = StageParameters(
                dense=(shares * np.array([k.dense for k in self.kinds])).sum(axis=0),
                experts=(shares * np.array([k.experts for k in self.kinds])).sum(axis=0),
            )
            parts = state_bytes(q.step.config, plans, q.recipe, held)
            kept = [
                np.min([k.modes[name]["kept_bytes"] for name in q.modes], axis=0)
                for k in self.kinds
            ]
            activations = flight * (shares * np.array(kept)).sum(axis=0)
            found.append(sum(parts.values(), start=activations))
        return np.asarray(np.max(np.asarray(found), axis=0) + self.fixed_bytes)

    def _cheapest(self, layers: Array) -> Array:
        """So many layers of the kind with fewest parameters, none of the others."""
        held = np.array([k.dense + k.experts for k in self.kinds])
        return np.asarray(np.where(held == held.min(axis=0), layers, 0.0))

    def _least(self, field: str) -> Array:
        """The least of a field over kinds and modes."""
        tables = [k.modes[name][field] for k in self.kinds for name in self.question.modes]
        return np.asarray(np.min(tables, axis=0))

    def _least_after(self, layers: Array) -> Array:
        """After the pipeline: an update, and exchange under the longest passes of any mode."""
        q, plans = self.question, self.plans
        dense = layers * np.min([k.dense for k in self.kinds], axis=0)
        experts = layers * np.min([k.experts for k in self.kinds], axis=0)
        held = StageParameters(dense=dense, experts=experts)
        update = optimizer_seconds(q.step.config, plans, q.on, q.exchanged, q.stack, held)
        ends = [self._exchange(layers, held)]
        scale = len(self.sequence) / layers  # in between, what is exposed is a convex line
        more = StageParameters(dense=scale * dense, experts=scale * experts)
        ends.append(self._exchange(scale * layers, more))
        least = np.minimum(ends[0][1], ends[1][1])
        return np.asarray(update.lower_s + least)

    def _exchange(self, layers: Array, held: StageParameters) -> tuple[Num, Num]:
        """Exchange of stages of so many layers at wire rate, all of it and what is exposed."""
        q = self.question
        reduce_s, gather_s = data_seconds(q.step.config, self.plans, q.on, q.exchanged, held)
        forward_s = np.max([k.forward_s for k in self.kinds], axis=0)
        hiding = [k.modes[name]["hiding_s"] for k in self.kinds for name in q.modes]
        backward_s = np.max(hiding, axis=0)
        return exposed_exchange(
            self.plans, self.num_micro, reduce_s, gather_s, layers * forward_s, layers * backward_s
        )


def figures_of(question: Question, plans: Plan, *, by_attention: bool = True) -> Figures:
    """Price all plans of a space; `recompute` of the plans plays no role."""
    q, cfg = question, question.step.config
    size = np.size(plans.dp)
    kinds, sequence = layer_kinds(cfg, by_attention=by_attention)
    shapes, inverse = distinct_shapes(plans)
    times = layer_times(q.step, plan=shapes, on=q.on, recipe=q.exchanged, stack=q.stack)
    edges = ends_bytes(
        cfg, batch=plans.micro_batch, len_seq=q.step.len_seq, plan=plans, dtype=q.recipe.dtype
    )
    micro = plans.num_micro_batches(q.step.global_batch)
    sends_s = send_seconds(
        cfg, q.step.len_seq, plans, q.on, q.exchanged, calibrated=q.stack is not None
    )
    passing = buffer_bytes(cfg, len_seq=q.step.len_seq, plan=plans, dtype=q.recipe.dtype)
    first, last = _ends_parameters(question, plans, kinds, sequence)
    return Figures(
        question=question,
        plans=plans,
        kinds=tuple(_kind_figures(q, k, plans, shapes, inverse) for k in kinds),
        sequence=sequence,
        num_micro=_spread(micro, size),
        embedding_s=_spread(times.embedding.lower_s, size, inverse),
        head_s=_spread(times.head.lower_s, size, inverse),
        fixed_s=_spread(2 * (plans.pp - 1) * sends_s, size),
        fixed_bytes=_spread(passing, size),
        embedding_kept=_spread(edges.embedding, size),
        head_fixed=_spread(edges.head, size),
        first=first,
        last=last,
    )


def states_of(question: Question, plan: Plan) -> States:
    """Bytes of weights, gradients and optimizer of a stage under one plan."""
    cfg, recipe = question.step.config, question.recipe

    def states(dense: Array, experts: Array) -> Array:
        parts = state_bytes(cfg, plan, recipe, StageParameters(dense=dense, experts=experts))
        return np.asarray(sum(parts.values(), start=0.0 * dense))

    return states


def after_of(question: Question, plan: Plan) -> After:
    """Exposed exchange and update of a stage under one plan."""
    q, cfg = question, question.step.config

    def after(dense: Array, experts: Array, forward_s: Array, backward_s: Array) -> Array:
        held = StageParameters(dense=dense, experts=experts)
        _, exposed = exposed_data(
            q.step, plan, forward_s, backward_s, q.on, q.exchanged, q.stack, held
        )
        update = optimizer_seconds(cfg, plan, q.on, q.exchanged, q.stack, held)
        return np.asarray(exposed + update.lower_s)

    return after


def _kind_figures(
    q: Question, kind: Kind, plans: Plan, shapes: Plan, inverse: np.ndarray | None
) -> KindFigures:
    own = replace(q.step, config=kind.config)
    times = layer_times(own, plan=shapes, on=q.on, recipe=q.exchanged, stack=q.stack)
    costs = mode_costs(times, q.step, kind, plan=shapes, on=q.on, recipe=q.recipe, stack=q.stack)
    size = np.size(plans.dp)
    forward_s, _ = hiding_seconds(times, waits=q.stack is not None)
    held = kind_parameters(kind, plans)
    return KindFigures(
        name=kind.name,
        forward_s=_spread(forward_s, size, inverse),
        dense=_spread(held.dense, size),
        experts=_spread(held.experts, size),
        modes={
            name: {f: _spread(getattr(cost, f), size, inverse) for f in MODE_FIELDS}
            for name, cost in costs.items()
        },
    )


def kind_parameters(kind: Kind, plan: Plan) -> LayerParameters:
    """Parameters of one layer of a kind on one rank."""
    return layer_parameters(kind.config, kind.block, plan.tp, plan.ep, plan.expert_tp)


def _ends_parameters(
    q: Question, plans: Plan, kinds: tuple[Kind, ...], sequence: tuple[int, ...]
) -> tuple[StageParameters, StageParameters]:
    """What first and last stage hold beside their layers; a lone stage has all in the first."""
    held = [kind_parameters(k, plans) for k in kinds]
    num = np.asarray(ceil_div(len(sequence), plans.pp), dtype=np.int64)
    one_hot = np.eye(len(kinds))[list(sequence)]
    prefix = np.vstack([np.zeros(len(kinds)), one_hot.cumsum(axis=0)])
    found = []
    ahead, behind = prefix[num], prefix[-1] - prefix[len(sequence) - num]
    for whole, counts in zip(
        parameters_per_rank(q.step.config, plans), (ahead, behind), strict=True
    ):
        dense = sum(counts[..., k] * h.dense for k, h in enumerate(held))
        experts = sum(counts[..., k] * h.experts for k, h in enumerate(held))
        found.append(StageParameters(dense=whole.dense - dense, experts=whole.experts - experts))
    return found[0], found[1]


def _layer_kind(figures: KindFigures, index: int, names: Sequence[str]) -> LayerKind:
    modes = []
    for name in names:
        cost = {f: float(values[index]) for f, values in figures.modes[name].items()}
        modes.append(
            Mode(
                name=name, seconds=cost["seconds"], backward_s=cost["hiding_s"],
                kept_bytes=cost["kept_bytes"], host_bytes=cost["host_bytes"],
                working_bytes=cost["working_bytes"],
            )
        )  # fmt: skip
    return LayerKind(
        name=figures.name,
        modes=undominated(modes),
        forward_s=float(figures.forward_s[index]),
        dense=float(figures.dense[index]),
        experts=float(figures.experts[index]),
    )


def _spread(value: Num, size: int, inverse: np.ndarray | None = None) -> Array:
    """One entry for each plan."""
    array = np.asarray(value, dtype=np.float64)
    if inverse is not None and array.ndim:
        array = array[inverse]
    return np.ascontiguousarray(np.broadcast_to(array, (size,)))


def _item(value: Num, index: int) -> float:
    return float(np.asarray(value).reshape(-1)[index if np.ndim(value) else 0])


def rank_limits(budget_bytes: float, on: Cluster, host_bytes_per_node: float = 0.0) -> Limits:
    """Device budget of a rank, its share of a node's host memory, and its link to the host.

    Without host memory nothing is offloaded; with it, the cluster must say how fast its link is.
    """
    if not host_bytes_per_node:
        return Limits(budget_bytes=budget_bytes)
    links = [x.bytes_per_s for x in on.side_levels if x.name in HOST_LINKS]
    if not links:
        raise InputError(
            f"{on.id} has no link to the host's memory ({' or '.join(HOST_LINKS)} among its side "
            "levels), so that nothing can be offloaded; leave the host memory out, or give a "
            "cluster file with one"
        )
    return Limits(
        budget_bytes=budget_bytes,
        host_bytes=host_bytes_per_node / on.accelerators_per_node,
        host_bytes_per_s=links[0],
    )


HOST_LINKS: Final = ("pcie", "c2c")
"""Side levels that lead to the host's memory."""
