"""A layer's times as a framework runs its experts: see `expert_run` for the equations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from simulator.expert_run import ExpertRun
from simulator.layer_collective import EXPERT, Exchange
from simulator.pieces import GAPS, Totals
from workloads.models.architecture import TransformerConfig
from workloads.numeric import Num, maximum

if TYPE_CHECKING:
    from simulator.step import LayerTimes

EXPERTS = "moe"
"""The part of a layer's nodes that router, routed and shared experts are."""


def mtp_layers(
    cfg: TransformerConfig,
    exchanges: Sequence[Exchange],
    times: Sequence[tuple[Num, Num, Num]],
    passes: Sequence[Totals],
) -> tuple[Totals, Totals]:
    """The layers of all modules of multi-token prediction, forward and backward.

    `exchanges`, their `times` and the kernels' `passes` are those of one layer of the last kind.
    """
    found = []
    for phase, kernels in enumerate(passes):
        moved: dict[str, Num] = {}
        for exchange, seconds in zip(exchanges, times, strict=True):
            moved[exchange.piece] = moved.get(exchange.piece, 0.0) + seconds[phase]
        once = sum(moved.values(), start=0.0)
        exposed = Totals(lower_s=once, upper_s=once, by_part=moved, by_resource=moved)
        found.append(Totals().plus(kernels.plus(exposed), cfg.num_mtp))
    return found[0], found[1]


def with_experts(times: LayerTimes, cfg: TransformerConfig, run: ExpertRun) -> LayerTimes:
    """The mean layer with its experts' kernels, exchange and host as the framework has them."""
    share = cfg.num_moe_layers / cfg.num_layers
    if not share:
        return times
    forward, backward = (_scaled(t, run) for t in (times.forward, times.backward))
    kernels_s = forward.lower_s + backward.lower_s
    exposed = _exposed(times.exposed_forward, times.exposed_backward, kernels_s, run)
    busy = kernels_s + sum((s for p in exposed for s in p.values()), start=0.0)
    mtp = _modules(times.mtp, cfg, run)
    head = times.head
    for before, after in zip(times.mtp, mtp, strict=True):
        head = head.plus(before, -1.0).plus(after)
    return replace(
        times,
        forward=forward,
        backward=_waiting(backward, busy, share, run),
        exposed_forward=exposed[0],
        exposed_backward=exposed[1],
        head=head,
        mtp=mtp,
        full=replace(times.full, kernels=_scaled(times.full.kernels, run)),
        selective=replace(times.selective, kernels=_scaled(times.selective.kernels, run)),
    )


def _scaled(kernels: Totals, run: ExpertRun) -> Totals:
    """Kernels with those of experts as long as the framework takes for them."""
    more = (run.kernels - 1) * kernels.by_part.get(EXPERTS, 0.0)
    extra = Totals(lower_s=more, upper_s=more, by_part={EXPERTS: more}, by_resource={EXPERTS: more})
    return kernels.plus(extra) if run.kernels != 1 else kernels


def _exposed(
    forward: Mapping[str, Num], backward: Mapping[str, Num], kernels_s: Num, run: ExpertRun
) -> tuple[Mapping[str, Num], Mapping[str, Num]]:
    """What nothing hides; either pass of one micro-batch hides under either of another."""
    if not run.overlapped:
        return forward, backward
    both = forward.get(EXPERT, 0.0) + backward.get(EXPERT, 0.0)
    return {**forward, EXPERT: 0.0}, {**backward, EXPERT: maximum(both - kernels_s, 0.0)}


def _waiting(backward: Totals, busy_s: Num, share: float, run: ExpertRun) -> Totals:
    """With the time in which the device waits for the host; `share` of the layers have experts."""
    if not run.waits_s:
        return backward
    idle = share * maximum(run.waits_s - busy_s, 0.0)
    gap = Totals(lower_s=idle, upper_s=idle, by_part={GAPS: idle}, by_resource={GAPS: idle})
    return backward.plus(gap)


def _modules(
    mtp: tuple[Totals, Totals], cfg: TransformerConfig, run: ExpertRun
) -> tuple[Totals, Totals]:
    """Layers of multi-token prediction likewise; their exchange is exposed."""
    if not cfg.num_mtp or cfg.last_kind != "moe":
        return mtp
    forward, backward = (_scaled(t, run) for t in mtp)
    once = (forward.lower_s + backward.lower_s) / cfg.num_mtp
    return forward, _waiting(backward, once, float(cfg.num_mtp), run)
