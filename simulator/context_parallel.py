"""What a plan's sequence split costs in a layer: kernels beside the balanced share, and exchange.

A layer's nodes hold a rank's mean share of attention; under the split that a plan names

    rings       kernels + (longest chunks - mean) + merges; each step hides what it sends:
                exposed = sum of steps max(0, send - chunk), the last results under nothing
    ulysses     Q, K, V there and O back in all-to-alls that everything waits for
    hybrid      all-to-alls inside groups of `ulysses` neighbours, a zigzag ring across the groups
    ring self-  all scores written, none masked away: unfused kernels instead; K round under the
    attention   scores, V round under the outputs; dK and dV all-reduced at the end
    LASP-2      K^T V and Q M beside the chunks' own attention, which hides the all-gather
    LASP-2H     the same, and an all-gather of K and V for softmax layers, waited for; backward
                gathers again and scatters dK and dV

Sends are shifts of a ring of the group, `stride` ranks apart; a fetch from further away (LightSeq)
takes as long. LightSeq keeps attention's output under full recomputation (arXiv 2310.03294, section
3.4), so that the forward pass that runs again has neither its kernels nor its exchange. Windowed
layers send as if they had no window, and are balanced in every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from hwmodels.cluster import Cluster
from hwmodels.dtypes import DType
from simulator.exchange import kv_elements_per_token
from simulator.network import bound_seconds, calibrated_seconds
from simulator.pieces import Totals, is_attention, total_seconds
from simulator.stack import OnDevice
from workloads.models.config import TransformerConfig
from workloads.models.parameters import heads_per_rank
from workloads.numeric import Num, any_true, ceil_div, is_scalar, maximum, where
from workloads.op import Op
from workloads.ops.attention import StandardAttention
from workloads.ops.attention_backward import StandardAttentionBackward
from workloads.ops.collective import Collective
from workloads.ops.elementwise import add
from workloads.ops.flash_attention import FP32_BYTES
from workloads.ops.linear_recurrence import LinearRecurrence
from workloads.ops.linear_recurrence_backward import LinearRecurrenceBackward
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.shared_prefix import CombineParts
from workloads.placement import axis_strides
from workloads.plan import Plan, Recompute, SequenceSplit
from workloads.sequence_parallel import PAIRS, QUERY, Parcels, Strategy
from workloads.sequence_plan import GATHERING, Run, longest_of, ring_runs, strategy_of
from workloads.workload import BACKWARD, FORWARD, Node

PART: Final = "attention"
PHASES: Final = (FORWARD, BACKWARD)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPass:
    """One pass of the mean layer: kernels beside the balanced share, exchange, what of it is felt.

    Seconds broadcast over the plans; `extra` may be negative where other kernels take the place.
    """

    extra: Totals
    moved: Num = 0.0
    exposed: Num = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSeconds:
    """Both passes, and what of the forward pass runs again.

    `kept`: kernels that full recomputation leaves out, `kept_moved` and `kept_exposed` their
    exchange; `selective`: scores that a split without fused attention writes and redoes.
    """

    forward: SplitPass
    backward: SplitPass
    kept: Totals
    kept_moved: Num = 0.0
    kept_exposed: Num = 0.0
    selective: Totals


NOTHING: Final = SplitPass(extra=Totals())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """What the price of a pass depends on."""

    cfg: TransformerConfig
    len_seq: Num
    plan: Plan
    on: Cluster
    dtype: DType
    stack: OnDevice | None
    phase: str
    nodes: Sequence[Node]

    def totals(self, nodes: Iterable[Node]) -> Totals:
        return total_seconds(nodes, on=self.on.device, stack=self.stack)

    def collective(self, kind: str, num_bytes: Num, ranks: Num, stride: Num) -> Num:
        """Seconds of one collective of the group."""
        seconds = calibrated_seconds if self.stack is not None else bound_seconds
        op = Collective(kind=kind, num_bytes=num_bytes, num_ranks=ranks)
        return seconds(op, on=self.on, stride=stride)

    @property
    def stride(self) -> Num:
        """Places between neighbours of the group."""
        return axis_strides(self.plan).cp

    @property
    def tokens(self) -> Num:
        """Of a micro-batch, on one rank."""
        return self.plan.micro_batch * ceil_div(self.len_seq, self.plan.cp)

    @property
    def heads(self) -> tuple[Num, Num]:
        """Query heads and key heads of a tensor-parallel rank."""
        spec = self.cfg.attention
        return heads_per_rank(spec.num_heads, spec.num_kv_heads, self.plan.tp)

    @property
    def parcels(self) -> Parcels:
        """Bytes of a rank's chunk in a layer."""
        return rank_parcels(self.cfg, self.len_seq, self.plan, self.dtype)

    def core(self) -> Totals:
        """A rank's mean share of softmax attention."""
        return self.totals(n for n in self.nodes if is_attention(n))

    def masked(self) -> Totals:
        """What of it a causal layout may leave unbalanced: the layers without a window."""
        return self.totals(n for n in self.nodes if is_attention(n) and _whole(n))

    def linear(self) -> Totals:
        """A rank's share of linear attention."""
        kinds = (LinearRecurrence, LinearRecurrenceBackward)
        return self.totals(n for n in self.nodes if isinstance(n.op, kinds))

    def added(self, op: Op, count: Num) -> Totals:
        """Kernels that no node of the layer stands for."""
        return self.totals([Node(name="split", op=op, part=PART, phase=self.phase, count=count)])


def _whole(node: Node) -> bool:
    return node.name.split(".")[:2] in (["attention"], ["attention", "backward"])


def rank_parcels(cfg: TransformerConfig, len_seq: Num, plan: Plan, dtype: DType) -> Parcels:
    """Bytes of one rank's tokens in one layer: Q, K with V, O, a statistic of every row."""
    spec, e = cfg.attention, dtype.bytes_per_element
    tokens = plan.micro_batch * ceil_div(len_seq, plan.cp)
    heads, _ = heads_per_rank(spec.num_heads, spec.num_kv_heads, plan.tp)
    return Parcels(
        query=tokens * heads * spec.head_dim * e,
        keys=tokens * kv_elements_per_token(cfg, plan.tp) * e,
        output=tokens * heads * spec.v_head_dim * e,
        rows=tokens * heads * FP32_BYTES,
    )


def split_seconds(
    cfg: TransformerConfig,
    nodes: Sequence[Node],
    *,
    len_seq: Num,
    plan: Plan,
    on: Cluster,
    dtype: DType,
    stack: OnDevice | None = None,
) -> SplitSeconds:
    """What the plans' splits add to a layer of `nodes`, forward and backward."""
    if not any_true(np.greater(plan.cp, 1)):
        return SplitSeconds(forward=NOTHING, backward=NOTHING, kept=Totals(), selective=Totals())
    layers = {
        phase: _Layer(
            cfg=cfg, len_seq=len_seq, plan=plan, on=on, dtype=dtype, stack=stack, phase=phase,
            nodes=[n for n in nodes if n.phase == phase],
        )
        for phase in PHASES
    }  # fmt: skip
    forward, backward = (_pass(layer) for layer in layers.values())
    keeps = chosen(plan, SequenceSplit.LIGHTSEQ)
    kept, selective = Totals(), Totals()
    if np.any(keeps):
        kept = kept.plus(layers[FORWARD].core(), keeps).plus(forward.extra, keeps)
    writes = chosen(plan, SequenceSplit.RING_SELF_ATTENTION)
    if np.any(writes):
        selective = selective.plus(_unfused(layers[FORWARD]), writes)
    return SplitSeconds(
        forward=forward,
        backward=backward,
        kept=kept,
        kept_moved=keeps * forward.moved,
        kept_exposed=keeps * forward.exposed,
        selective=selective,
    )


def chosen(plan: Plan, split: SequenceSplit) -> Num:
    """1.0 where a plan has that split over more than one rank."""
    if is_scalar(plan.sequence, plan.cp):
        return float(plan.sequence == split and plan.cp > 1)
    return (np.equal(plan.sequence, split) & np.greater(plan.cp, 1)).astype(np.float64)


def forward_split(
    cfg: TransformerConfig,
    nodes: Sequence[Node],
    *,
    len_seq: Num,
    plan: Plan,
    on: Cluster,
    dtype: DType,
) -> SplitPass:
    """The same for a forward pass alone, at the bound rung: serving."""
    if not any_true(np.greater(plan.cp, 1)):
        return NOTHING
    return _pass(_Layer(cfg=cfg, len_seq=len_seq, plan=plan, on=on, dtype=dtype, stack=None,
                        phase=FORWARD, nodes=[n for n in nodes if n.phase == FORWARD]))  # fmt: skip


def _pass(layer: _Layer) -> SplitPass:
    """Every split among the plans, each where it is chosen."""
    extra, moved, exposed = Totals(), layer.plan.cp * 0.0, layer.plan.cp * 0.0
    for kind in sorted({SequenceSplit(int(s)) for s in np.unique(np.asarray(layer.plan.sequence))}):
        here = chosen(layer.plan, kind)
        if not np.any(here):
            continue
        found = _PRICES.get(kind, _ring)(layer, kind)
        extra = extra.plus(found.extra, here)
        moved, exposed = moved + here * found.moved, exposed + here * found.exposed
    return SplitPass(extra=extra, moved=moved, exposed=exposed)


# ---- rings ---------------------------------------------------------------------------------


def _ring(layer: _Layer, kind: SequenceSplit) -> SplitPass:
    """Steps of a ring over all ranks."""
    return _in_steps(layer, strategy_of(kind), layer.plan.cp, layer.stride)


def _hybrid(layer: _Layer, kind: SequenceSplit) -> SplitPass:
    """Heads inside, a ring of the groups' chunks outside, whose bytes a rank are the same."""
    plan = layer.plan
    ring = _in_steps(layer, strategy_of(kind), plan.cp / plan.ulysses, layer.stride * plan.ulysses)
    heads_s = _all_to_alls(layer, plan.ulysses)
    return replace(ring, moved=ring.moved + heads_s, exposed=ring.exposed + heads_s)


def _in_steps(layer: _Layer, how: Strategy, ranks: Num, stride: Num) -> SplitPass:
    runs = ring_runs(how, layer.parcels, ranks, phase=layer.phase)
    core, masked = layer.core(), layer.masked()
    windowed_s = core.lower_s - masked.lower_s
    moved: Num = 0.0
    exposed: Num = 0.0
    for run in runs:
        send_s = layer.collective("send_recv", run.num_bytes, ranks, stride)
        even = where(np.greater(run.share, 0), 1.0 / ranks, 0.0)
        chunk_s = run.share * masked.lower_s + even * windowed_s
        moved = moved + run.times * send_s
        exposed = exposed + run.times * maximum(send_s - chunk_s, 0.0)
    extra = Totals().plus(masked, longest_of(runs) - 1).plus(_merges(layer, how, runs))
    return SplitPass(extra=extra, moved=moved, exposed=exposed)


def _merges(layer: _Layer, how: Strategy, runs: Sequence[Run]) -> Totals:
    """Each chunk after the first is added to what there is: outputs, or gradients."""
    steps = sum((run.times * np.greater(run.share, 0) for run in runs), start=0.0)
    count = maximum(steps - 1, 0)
    p, e = layer.parcels, layer.dtype.bytes_per_element
    if layer.phase == FORWARD:
        rows = maximum(layer.tokens * layer.heads[0], 1)
        dim = layer.cfg.attention.v_head_dim
        return layer.added(CombineParts(rows=rows, dim=dim, dtype=layer.dtype), count)
    return layer.added(add((p.query + p.keys) / e, layer.dtype), count)


# ---- the others ----------------------------------------------------------------------------


def _heads(layer: _Layer, kind: SequenceSplit) -> SplitPass:
    """Ulysses: everything waits for the all-to-alls."""
    seconds = _all_to_alls(layer, layer.plan.cp)
    return SplitPass(extra=Totals(), moved=seconds, exposed=seconds)


def _all_to_alls(layer: _Layer, degree: Num) -> Num:
    """Q, K and V one way and O the other; backward dO and the three gradients."""
    p = layer.parcels
    return sum(
        (layer.collective("all_to_all", size, degree, layer.stride)
         for size in (p.query + p.keys, p.output)),
        start=0.0,
    )  # fmt: skip


def _unfused(layer: _Layer) -> Totals:
    """A rank's queries against all keys, scores in memory, no chunk left out for the mask."""
    kinds = {FORWARD: StandardAttention, BACKWARD: StandardAttentionBackward}
    make: Callable[..., Op] = kinds[layer.phase]
    fields = ("batch", "num_heads", "num_kv_heads", "len_q", "len_kv", "head_dim", "head_dim_v")
    return layer.totals(
        replace(n, op=make(**{f: getattr(n.op, f) for f in fields}, causal=False,
                           dtype=layer.dtype))
        for n in layer.nodes if is_attention(n)
    )  # fmt: skip


def _self_attention(layer: _Layer, kind: SequenceSplit) -> SplitPass:
    """Li et al.: each ring under its product, which is taken to be half of what is computed."""
    plan, p = layer.plan, layer.parcels
    unfused = _unfused(layer)
    send_s = layer.collective("send_recv", p.keys / 2, plan.cp, layer.stride)
    products = 2 if layer.phase == FORWARD else 4
    product_s = unfused.lower_s / (products * plan.cp)
    times, reduced_s = 2 * (plan.cp - 1), 0.0 * send_s
    if layer.phase == BACKWARD:
        whole = p.keys * plan.cp / 2
        reduced_s = 2 * layer.collective("all_reduce", whole, plan.cp, layer.stride)
    return SplitPass(
        extra=Totals().plus(unfused).plus(layer.core(), -1.0),
        moved=times * send_s + reduced_s,
        exposed=times * maximum(send_s - product_s, 0.0) + reduced_s,
    )


def _states(layer: _Layer, kind: SequenceSplit) -> SplitPass:
    """LASP-2, and beside it the gathered keys of LASP-2H's softmax layers."""
    plan, spec, e = layer.plan, layer.cfg.attention, layer.dtype
    frac = layer.cfg.linear_frac
    heads, tokens = layer.heads[0], ceil_div(layer.len_seq, plan.cp)
    streams, d, dv = plan.micro_batch * heads, spec.head_dim, spec.v_head_dim
    gathered = plan.cp * streams * d * dv * e.bytes_per_element
    gather_s = layer.collective("all_gather", gathered, plan.cp, layer.stride)
    own_s = layer.linear().lower_s
    passes = frac * (1 if layer.phase == FORWARD else 2)
    extra = (
        layer.added(BatchedMatmul(batch=streams, m=d, n=dv, k=tokens, dtype=e), passes)
        .plus(layer.added(BatchedMatmul(batch=streams, m=tokens, n=dv, k=d, dtype=e), passes))
        .plus(layer.added(add(streams * d * dv, e), frac * maximum(plan.cp - 2, 0)))
        .plus(layer.added(add(streams * tokens * dv, e), passes))
    )
    keys = layer.parcels.keys * plan.cp
    keys_s = layer.collective("all_gather", keys, plan.cp, layer.stride)
    if layer.phase == BACKWARD:
        keys_s = keys_s + layer.collective("reduce_scatter", keys, plan.cp, layer.stride)
    return SplitPass(
        extra=extra,
        moved=frac * gather_s + (1 - frac) * keys_s,
        exposed=maximum(frac * gather_s - own_s, 0.0) + (1 - frac) * keys_s,
    )


_PRICES: Final = {
    SequenceSplit.HYBRID: _hybrid,
    SequenceSplit.ULYSSES: _heads,
    SequenceSplit.RING_SELF_ATTENTION: _self_attention,
    **dict.fromkeys(GATHERING, _states),
}


# ---- memory --------------------------------------------------------------------------------


def buffer_bytes(cfg: TransformerConfig, *, len_seq: Num, plan: Plan, dtype: DType) -> Num:
    """What passing takes beside: two chunks of what travels, one to use and one to fill.

    All-to-alls have a copy of Q, K, V and O, gathered states and keys all ranks' of them.
    """
    p = rank_parcels(cfg, len_seq, plan, dtype)
    states = _state_bytes(cfg, plan, dtype)
    found: Num = 0.0
    for kind in {SequenceSplit(int(s)) for s in np.unique(np.asarray(plan.sequence))}:
        helped = p.query + p.output + p.rows
        moves = strategy_of(kind).moves
        size: Num = 2 * p.keys + (2 * helped if moves == PAIRS else 0)
        if moves == QUERY:
            size = 2 * helped
        elif kind in (SequenceSplit.ULYSSES, SequenceSplit.HYBRID):
            ring = 2 * p.keys if kind == SequenceSplit.HYBRID else 0
            size = p.query + p.keys + p.output + ring
        elif kind in GATHERING:
            softmax = plan.cp * p.keys if kind == SequenceSplit.LASP2H else 0
            size = plan.cp * states + softmax
        found = found + chosen(plan, kind) * size
    return found


def _state_bytes(cfg: TransformerConfig, plan: Plan, dtype: DType) -> Num:
    """K^T V of a rank's heads in a layer."""
    spec = cfg.attention
    heads, _ = heads_per_rank(spec.num_heads, spec.num_kv_heads, plan.tp)
    elements = plan.micro_batch * heads * spec.head_dim * spec.v_head_dim
    return elements * dtype.bytes_per_element


def kept_beside_bytes(cfg: TransformerConfig, *, len_seq: Num, plan: Plan, dtype: DType) -> Num:
    """Bytes that a layer keeps more than a balanced ring's would under the same recomputation.

    LightSeq's full recomputation keeps attention's output and its statistic; LASP-2 the sum of
    states that a rank's queries met. Ring self-attention's scores are counted where they are
    materialised (`workloads.models.activations`).
    """
    p = rank_parcels(cfg, len_seq, plan, dtype)
    full = where(np.equal(plan.recompute, Recompute.FULL), 1.0, 0.0)
    lightseq = chosen(plan, SequenceSplit.LIGHTSEQ) * full * (p.output + p.rows)
    gathers: Num = sum((chosen(plan, kind) for kind in GATHERING), start=0.0)
    states = gathers * cfg.linear_frac * (1 - full) * _state_bytes(cfg, plan, dtype)
    return lightseq + states
