"""Layers by kind, and what each mode of keeping activations costs one of them.

Kinds are told apart by feed-forward block (dense, moe), by attention (softmax, linear) and by the
mixer that stands in its place (`workloads.models.mixers`); a kind
is priced as the layers of the same model with layers of that kind only. Where the config does not
say which layers have linear attention, only how many, they are spread evenly. Layers with a window
are not told apart from those without: the mean layer is taken.

For one micro-batch of a layer, with what its forward and backward pass take and expose,

    none            t = forward + backward + exposed + gap              kept: every saved tensor
    selective       t + what the framework's policy runs again          kept: all but the scores
    full            t + the forward pass again, what it exposes too     kept: the input
    offload         t + 2 kept(none) / memory bandwidth                 host: kept(none)
    offload+full    full + 2 kept(full) / memory bandwidth              host: kept(full)

where a copied byte is read or written once by the copy on each way. A layer that is redone is
there whole; copies have two buffers. On the calibrated rung without a fused kernel, scores are
kept. See `simulator.planners.modes` for what limits copies.

    Implemented in: `layer_kinds` (kinds and their order), `mode_costs` (the table).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from hwmodels.cluster import Cluster
from simulator.context_parallel import kept_beside_bytes
from simulator.memory import kept_bytes
from simulator.recipe import Recipe
from simulator.stack import OnDevice
from simulator.step import LayerTimes, hiding_seconds, room_of
from workloads.models.activations import layer_bytes
from workloads.models.architecture import has_experts, kind_indices, mixer_of
from workloads.models.config import TransformerConfig
from workloads.models.transformer import TrainStep
from workloads.numeric import Num
from workloads.plan import Plan, Recompute

NONE, SELECTIVE, FULL, OFFLOAD, OFFLOAD_FULL = (
    "none", "selective", "full", "offload", "offload+full",
)  # fmt: skip
MODES: Final = (NONE, SELECTIVE, FULL, OFFLOAD, OFFLOAD_FULL)
RECOMPUTED: Final[Mapping[str, Recompute]] = {
    NONE: Recompute.NONE, SELECTIVE: Recompute.SELECTIVE, FULL: Recompute.FULL,
    OFFLOAD: Recompute.NONE, OFFLOAD_FULL: Recompute.FULL,
}  # fmt: skip
"""What runs again in each mode."""
COPIES: Final = 2
"""To the host and back; also the buffers that copies have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Layers that are alike: a model of such layers only, and the kind's name in it."""

    name: str
    config: TransformerConfig
    block: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeCost:
    """One layer in one mode, for one micro-batch on one rank; broadcasts over plans.

    `hiding_s` of the backward pass is what gradients hide under, `copy_s` what copies slow.
    """

    seconds: Num
    hiding_s: Num
    copy_s: Num
    kept_bytes: Num
    host_bytes: Num
    working_bytes: Num


def layer_kinds(
    cfg: TransformerConfig, *, by_attention: bool = True
) -> tuple[tuple[Kind, ...], tuple[int, ...]]:
    """The kinds that occur, and which of them each layer of the model is.

    >>> from workloads.models.config import load_hf_config
    >>> kinds, sequence = layer_kinds(load_hf_config("examples/deepseek-v3.json"))
    >>> [k.name for k in kinds], sequence[:5]
    (['dense', 'moe'], (0, 0, 0, 1, 1))
    """
    total, linear = cfg.num_layers, cfg.num_linear_layers
    apart = by_attention and 0 < linear < total
    kind_at = {j: kind for kind, own in kind_indices(cfg).items() for j in own}
    labels = [
        (kind_at[j], apart and (j + 1) * linear // total > j * linear // total)
        for j in range(total)
    ]
    order = sorted(set(labels))
    mixed = len(order) > 1
    kinds = tuple(_kind(cfg, block, is_linear, mixed, apart) for block, is_linear in order)
    return kinds, tuple(order.index(label) for label in labels)


def _kind(cfg: TransformerConfig, block: str, linear: bool, mixed: bool, apart: bool) -> Kind:
    if not mixed:
        return Kind(name=block, config=cfg, block=block)
    every, moe = tuple(range(cfg.num_layers)), None
    if has_experts(block) and cfg.moe:
        moe = replace(cfg.moe, layers=every)
    mixer = mixer_of(cfg, block)
    only = replace(
        cfg, moe=moe, num_mtp=0, mixer=mixer, mixer_layers=every if mixer is not None else ()
    )
    if apart:
        only = replace(only, num_linear_layers=cfg.num_layers if linear else 0)
    return Kind(name=f"{block} linear" if linear else block, config=only, block=block)


def mode_costs(
    times: LayerTimes,
    step: TrainStep,
    kind: Kind,
    *,
    plan: Plan,
    on: Cluster,
    recipe: Recipe,
    stack: OnDevice | None = None,
) -> Mapping[str, ModeCost]:
    """Cost of every mode for `times` of that kind's layers."""
    waits = stack is not None
    gap = stack.factors.layer_s if stack else 0.0
    exposed = sum(times.exposed_forward.values(), start=0.0)
    exposed = exposed + sum(times.exposed_backward.values(), start=0.0)
    base = times.forward.lower_s + times.backward.lower_s + gap + exposed
    _, hiding = hiding_seconds(times, waits=waits)
    again = {
        Recompute.NONE: (0.0, 0.0),
        Recompute.SELECTIVE: (times.selective.seconds, room_of(times.selective, waits)),
        Recompute.FULL: (times.full.seconds, room_of(times.full, waits)),
    }
    fused = stack is None or stack.stack.fused_attention
    kept = {mode: _kept(step, kind, plan, mode, recipe, fused) for mode in Recompute}
    memory_bytes_per_s = on.device.hbm.bytes_per_s
    copied_s = 1 / memory_bytes_per_s if memory_bytes_per_s else math.inf
    found = {}
    for name in MODES:
        redo_s, redo_hiding = again[RECOMPUTED[name]]
        away = name in (OFFLOAD, OFFLOAD_FULL)
        own = kept[RECOMPUTED[name]]
        copy_s = COPIES * own * copied_s if away else 0.0
        redone = kept[Recompute.NONE] if RECOMPUTED[name] == Recompute.FULL else 0.0
        found[name] = ModeCost(
            seconds=base + redo_s + copy_s,
            hiding_s=hiding + redo_hiding,
            copy_s=copy_s,
            kept_bytes=0.0 * own if away else own,
            host_bytes=own if away else 0.0 * own,
            working_bytes=redone + (COPIES * own if away else 0.0),
        )
    return found


def _kept(
    step: TrainStep, kind: Kind, plan: Plan, mode: Recompute, recipe: Recipe, fused: bool
) -> Num:
    asked, own = replace(plan, recompute=int(mode)), replace(step, config=kind.config)
    if fused:
        return kept_bytes(own, asked, recipe)[kind.block]
    written = layer_bytes(
        kind.config, kind=kind.block, batch=plan.micro_batch, len_seq=step.len_seq, plan=asked,
        materialised=True, dtype=recipe.dtype,
    )  # fmt: skip
    beside = kept_beside_bytes(kind.config, len_seq=step.len_seq, plan=asked, dtype=recipe.dtype)
    return written + beside
