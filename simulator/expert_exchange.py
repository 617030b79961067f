"""What a mixture-of-experts block exchanges: rows to the experts and back, and their shards.

A rank sends T tokens of h e bytes, k choices each, to n = ep ranks that fill N link domains
(nodes) of m = n / N ranks. Bytes that leave a rank, dispatch and combine alike:

    dispatcher    over the inner link                  over the network
    flat          T k (m - 1) / n                      T k (n - m) / n
    hierarchical  T k (m - 1) / m                      T k (N - 1) / N
    node-limited  T copies(n)                          T copies(N)
    deepep        the same, by the kernels of DeepEP

flat: every choice by itself, straight to its owner (an all-to-all); both at once. hierarchical: by
the inner link to the rank of the node that owns the rail, then over the network, one after the
other (Rajbhandari et al. 2022, arXiv 2201.05596, section 5.3). node-limited: once to a node, and
there once to each rank that has a choice, `experts.distinct_copies`. All times the load: what the
most loaded rank receives, or the capacity that is padded up to. A link has the bandwidth of its
level, on the calibrated rung the share of it that a library's all-to-all gets (HybridEP has no
published timings of its own); DeepEP's kernels have a calibrated model. Dispatch and combine move
the same bytes, in 16 bits.

Around it, where experts are split over etp ranks, these gather the rows that came and scatter the
sums, one for each choice; shared experts are split over tp as dense blocks are. Experts that lie
across tp and are not split (etp = 1) take a rank's own shard of the sequence: nothing is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from hwmodels.cluster import Cluster
from hwmodels.errors import InputError, UnknownNameError, UnsupportedError
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from simulator.layer_collective import EXPERT, TENSOR, Exchange
from simulator.network import bound_seconds, calibrated_seconds, members_within
from workloads.models.architecture import Moe, TransformerConfig
from workloads.models.experts import distinct_copies, load_of
from workloads.numeric import Num, ceil_div, is_scalar, maximum, where
from workloads.ops.collective import Collective
from workloads.ops.expert_exchange import ExpertExchange
from workloads.placement import axis_strides, expert_spacing
from workloads.plan import Plan

FLAT, HIERARCHICAL, NODE_LIMITED, DEEPEP = "flat", "hierarchical", "node-limited", "deepep"
DISPATCHERS: Final = (FLAT, HIERARCHICAL, NODE_LIMITED, DEEPEP)
ONCE: Final = (NODE_LIMITED, DEEPEP)
"""Dispatchers that send a token once to a place, however many of its experts are there."""
DISPATCH, COMBINE = "dispatch", "combine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch(Exchange):
    """Rows of one rank to their experts, or back; `collective` is the flat form of it.

    `num_tokens` tokens of `token_bytes` leave the rank, in `direction`.
    """

    moe: Moe
    num_tokens: Num
    token_bytes: float
    dispatcher: str = NODE_LIMITED
    direction: str = DISPATCH

    def __post_init__(self) -> None:
        if self.dispatcher not in DISPATCHERS:
            raise UnknownNameError("dispatcher", self.dispatcher, DISPATCHERS)
        if self.dispatcher in ONCE and self.moe.capacity_factor:
            raise InputError(
                "rows padded to a capacity travel one by one; choose the dispatcher "
                f"{FLAT} or {HIERARCHICAL}, or drop no tokens"
            )

    def once(self, *, on: Cluster, calibrated: bool) -> Num:
        """Seconds of the loaded rank."""
        if self.dispatcher == FLAT:
            seconds = calibrated_seconds if calibrated else bound_seconds
            return seconds(self.collective, on=on, stride=self.stride)
        inner, outer = self._level_seconds(on, calibrated=calibrated)
        if self.dispatcher == HIERARCHICAL:
            return inner + outer
        bound = maximum(inner, outer)
        if self.dispatcher != DEEPEP or not calibrated:
            return bound
        return self._deepep_seconds(on, bound)

    def wire_bytes(self, inside: Num) -> tuple[Num, Num]:
        """Bytes that leave a rank over the inner link and over the network; `inside` ranks of the
        group share a node.

        >>> moe = Moe(num_experts=64, num_active=2, expert_ffn_dim=8, layers=(0,))
        >>> size = Collective("all_to_all", 0, 16)
        >>> one = Dispatch(piece=EXPERT, collective=size, stride=1, forward=1, backward=1, moe=moe,
        ...                num_tokens=100, token_bytes=1.0, dispatcher=HIERARCHICAL)
        >>> one.wire_bytes(8)
        (175.0, 100.0)
        """
        n, k, load = self.collective.num_ranks, self.moe.num_active, load_of(self.moe)
        nodes, sent = n / inside, self.num_tokens * self.token_bytes * load
        if self.dispatcher == FLAT:
            return sent * k * (inside - 1) / n, sent * k * (n - inside) / n
        if self.dispatcher == HIERARCHICAL:
            return sent * k * (inside - 1) / inside, sent * k * (nodes - 1) / nodes
        linked = where(inside > 1, distinct_copies(self.moe, n), 0.0)
        return sent * linked, sent * distinct_copies(self.moe, nodes)

    def _level_seconds(self, on: Cluster, *, calibrated: bool) -> tuple[Num, ...]:
        """Seconds of the inner link, and of the network, as all-to-alls of the same bytes."""
        n = self.collective.num_ranks
        inside = members_within(n, on.levels[0], self.stride, on)
        linked, crossing = self.wire_bytes(inside)
        if calibrated:
            # A rank of `inside` sends all but its own part of the buffer, one of n ranks on nodes
            # all but its node's.
            own = where(inside > 1, inside / maximum(inside - 1, 1), 0.0)
            away = where(n > inside, n / maximum(n - inside, 1), 0.0)
            return tuple(
                self._all_to_all_s(size * share, ranks, on)
                for size, share, ranks in ((linked, own, inside), (crossing, away, n))
            )
        return tuple(
            size / (level.bytes_per_s / level.oversubscription)
            + where(size > 0, level.latency_s or 0.0, 0.0)
            for size, level in ((linked, on.levels[0]), (crossing, on.levels[-1]))
        )

    def _all_to_all_s(self, num_bytes: Num, num_ranks: Num, on: Cluster) -> Num:
        """Calibrated seconds of a flat exchange of so many bytes a rank; none of nothing."""
        same = replace(self.collective, num_bytes=ceil_div(num_bytes, 1), num_ranks=num_ranks)
        return where(num_bytes > 0, calibrated_seconds(same, on=on, stride=self.stride), 0.0)

    def _deepep_seconds(self, on: Cluster, otherwise: Num) -> Num:
        """Seconds by the calibrated model of DeepEP; at the links' rates where it knows nothing."""
        n = self.collective.num_ranks
        inside = members_within(n, on.levels[0], self.stride, on)
        if not is_scalar(n, self.num_tokens, inside):
            return otherwise
        if n <= 1:
            return 0.0
        nodes = n / inside
        op = ExpertExchange(
            num_tokens=ceil_div(self.num_tokens * load_of(self.moe), 1),
            hidden=max(int(self.token_bytes / 2), 1),
            topk=self.moe.num_active,
            num_experts=self.moe.num_experts,
            num_ranks=n,
            num_nodes=nodes,
            direction=self.direction,
            port_bytes_per_s=on.levels[-1].bytes_per_s,
        )
        label = f"deepep-normal-{self.direction}" + ("-nodes" if nodes > 1 else "")
        try:
            return predict(op, on=on.device, conditions=Conditions(kernel=label)).seconds
        except UnsupportedError:
            return otherwise


def moe_exchanges(
    cfg: TransformerConfig,
    *,
    num_tokens: Num,
    plan: Plan,
    element_bytes: float,
    dispatcher: str = NODE_LIMITED,
) -> tuple[Exchange, ...]:
    """Collectives of one mixture-of-experts block; `num_tokens` of a micro-batch for a tp group."""
    moe = cfg.moe
    assert moe is not None
    token_bytes = cfg.hidden_dim * element_bytes
    own = ceil_div(num_tokens, plan.tp)
    choices = own * moe.num_active * load_of(moe) * token_bytes
    travel = [
        Dispatch(
            piece=EXPERT,
            collective=Collective(kind="all_to_all", num_bytes=choices, num_ranks=plan.ep),
            stride=expert_spacing(plan, plan.expert_tp, plan.ep),
            forward=1,
            backward=1,
            moe=moe,
            num_tokens=own,
            token_bytes=token_bytes,
            dispatcher=dispatcher,
            direction=direction,
        )
        for direction in (DISPATCH, COMBINE)
    ]
    return (*_edges(moe, num_tokens, plan, token_bytes), *travel)


def _edges(moe: Moe, num_tokens: Num, plan: Plan, token_bytes: float) -> list[Exchange]:
    """Gathers before and scatters behind what is split over tensor-parallel ranks.

    Without an exchange of experts that are split over tp, every rank routes the gathered tokens:
    one gather serves router, routed and shared experts.
    """
    etp = plan.expert_tp
    together = (plan.ep == 1) & (etp == plan.tp) if is_scalar(plan.ep, etp, plan.tp) else (
        (plan.ep == 1) * (etp == plan.tp) > 0)  # fmt: skip
    shared = num_tokens * token_bytes * (1 if moe.shared_ffn_dim else 0)
    rows = ceil_div(num_tokens * etp, plan.tp) * moe.num_active * load_of(moe) * token_bytes
    once = where(together, num_tokens * token_bytes, shared)
    routed = where(together, 0.0, rows)
    return [
        Exchange(
            piece=TENSOR,
            collective=Collective(kind=kind, num_bytes=size, num_ranks=ranks),
            stride=apart,
            forward=1,
            backward=1,
            hidden=1 if kind == "all_gather" else 0,
        )
        for size, ranks, apart in (
            (once, plan.tp, axis_strides(plan).tp),
            (routed, etp, expert_spacing(plan, 1, etp)),
        )
        for kind in ("all_gather", "reduce_scatter")
    ]
