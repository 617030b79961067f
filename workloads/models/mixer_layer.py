"""The ops of a mixer in the place of attention, forward and backward, on one rank.

What each mixer computes, and how tensor parallelism splits it, is told in `mixers`. With t tokens
of a micro-batch, names of nodes behind 'mixer_':

    mamba2   in, conv, scan, gate, norm, out
    mamba    in, conv, x, (inner norms), dt, scan, out           the gate is in the scan's kernel
    delta    in, gates, conv, decays, scan, norm, gate, out
    conv     in, gate_in, conv, gate_out, out

A short convolution's backward reads its input and the gradient and writes one gradient; that of
its taps is a number a channel and tap and left out. Decoding runs the one-step forms with held
states. A sequence that context parallelism splits would hand its state from rank to rank: refused.

Ignored: copies that join, split or repeat heads; the unit norms of keys and queries, which the
delta rule's kernel makes itself; the product of a token's gates with their sigmoid's slope.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from hwmodels.errors import InputError
from workloads.models.block import Rank, Step, inner_norm, pointwise, product
from workloads.models.mixers import AnyMixer, GatedConv, GatedDelta, Mamba, Mamba2, no_context
from workloads.models.parameters import mixer_projections
from workloads.numeric import Num, any_true
from workloads.op import Op
from workloads.ops.delta_rule import GatedDeltaRule, GatedDeltaStep
from workloads.ops.elementwise import mul, silu_mul, silu_mul_backward
from workloads.ops.linear_recurrence import DELTA, SCALAR
from workloads.ops.linear_recurrence_backward import LinearRecurrenceBackward
from workloads.ops.selective_scan import SelectiveScan
from workloads.ops.selective_scan_backward import SelectiveScanBackward, SelectiveStep
from workloads.ops.short_conv import ShortConv
from workloads.ops.ssd_scan import SsdScan, SsdStep
from workloads.ops.ssd_scan_backward import SsdScanBackward

PART: Final = "mixer"
"""The part of a step that its nodes belong to."""
NORM: Final = "attention_norm"
"""The norm before the mixer, named as before attention."""


def mixer_steps(rank: Rank, mixer: AnyMixer) -> list[Step]:
    """From the normed hidden state to the output projection."""
    if any_true(np.not_equal(rank.plan.cp, 1)):
        raise InputError(no_context(rank.cfg.name, mixer))
    return _STEPS[type(mixer)](rank, mixer)


def _decodes(rank: Rank) -> bool:
    """Is it one new token a sequence, from held states?"""
    new = np.asarray(rank.len_q)
    return bool(np.all(new == 1) and np.any(np.greater(rank.len_kv, rank.len_q)))


def _product(rank: Rank, name: str, after: tuple[str, ...] | None = None) -> Step:
    matrix = mixer_projections(rank.cfg, rank.plan.tp)[name]
    return product(
        rank, f"{PART}_{name}", PART, rank.tokens, matrix.k, matrix.n, after=after
    )  # fmt: skip


def _mapped(name: str, op: Op, gradient: Op, after: tuple[str, ...] | None = None) -> Step:
    return Step(
        name=f"{PART}_{name}", part=PART, op=op, gradients=(("backward", gradient),), after=after
    )


def _conv(
    rank: Rank, mixer: AnyMixer, *, activation: bool, after: tuple[str, ...] | None = None
) -> Step:
    """Taps over every channel; backward: the taps turned round, and the activation's slope."""
    channels = mixer.conv_channels(rank.plan.tp)
    op = ShortConv(
        batch=rank.batch, len_seq=rank.len_q, channels=channels, width=mixer.width,
        dtype=rank.dtype, activation=activation, update=_decodes(rank),
    )  # fmt: skip
    counts = (4 * mixer.width + 6 * activation, 2 * activation)
    return _mapped("conv", op, pointwise(op.elements(), 2, 1, counts, rank.dtype), after)


def _gate(rank: Rank, name: str, num_elements: Num) -> Step:
    """y silu(z)."""
    return _mapped(
        name, silu_mul(num_elements, rank.dtype), silu_mul_backward(num_elements, rank.dtype)
    )


def _mamba2(rank: Rank, mixer: Mamba2) -> list[Step]:
    heads, groups = mixer.shape(rank.plan.tp)
    inner = mixer.inner(rank.plan.tp)
    shape = {
        "batch": rank.batch, "num_heads": heads, "num_groups": groups,
        "head_dim": mixer.head_dim, "state_dim": mixer.state_dim, "dtype": rank.dtype,
    }  # fmt: skip
    scan: Op = (
        SsdStep(**shape) if _decodes(rank) else SsdScan(**shape, len_seq=rank.len_q)  # type: ignore[arg-type]
    )
    backward = SsdScanBackward(**shape, len_seq=rank.len_q)  # type: ignore[arg-type]
    return [
        _product(rank, "in"),
        _conv(rank, mixer, activation=True),
        _mapped("scan", scan, backward),
        _gate(rank, "gate", rank.tokens * inner),
        inner_norm(rank, f"{PART}_norm", rank.tokens, inner),
        _product(rank, "out"),
    ]


def _mamba(rank: Rank, mixer: Mamba) -> list[Step]:
    shape = {
        "batch": rank.batch, "channels": mixer.conv_channels(rank.plan.tp),
        "state_dim": mixer.state_dim, "dtype": rank.dtype,
    }  # fmt: skip
    scan: Op = (
        SelectiveStep(**shape) if _decodes(rank) else SelectiveScan(**shape, len_seq=rank.len_q)  # type: ignore[arg-type]
    )
    backward = SelectiveScanBackward(**shape, len_seq=rank.len_q)  # type: ignore[arg-type]
    norms = []
    if mixer.inner_norms:
        norms = [
            inner_norm(rank, f"{PART}_dt_norm", rank.tokens, mixer.dt_rank),
            inner_norm(rank, f"{PART}_state_norm", 2 * rank.tokens, mixer.state_dim),
        ]
    return [
        _product(rank, "in"),
        _conv(rank, mixer, activation=True),
        _product(rank, "x"),
        *norms,
        _product(rank, "dt"),
        _mapped("scan", scan, backward),
        _product(rank, "out"),
    ]


def _delta(rank: Rank, mixer: GatedDelta) -> list[Step]:
    heads, keys = mixer.shape(rank.plan.tp)
    shape = {
        "batch": rank.batch, "num_heads": heads, "key_dim": mixer.key_dim,
        "value_dim": mixer.value_dim, "dtype": rank.dtype,
    }  # fmt: skip
    scan: Op = (
        GatedDeltaStep(**shape, num_key_heads=keys)  # type: ignore[arg-type]
        if _decodes(rank)
        else GatedDeltaRule(**shape, num_key_heads=keys, len_seq=rank.len_q)  # type: ignore[arg-type]
    )
    backward = LinearRecurrenceBackward(
        **shape, len_seq=rank.len_q, rule=DELTA, decay=SCALAR,  # type: ignore[arg-type]
    )  # fmt: skip
    gates = rank.tokens * 2 * heads
    return [
        _product(rank, "in"),
        _product(rank, "gates", after=(NORM,)),
        _mapped(
            "decays", pointwise(gates, 1, 1, (2, 2), rank.dtype),
            pointwise(gates, 2, 1, (3, 2), rank.dtype),
        ),
        _conv(rank, mixer, activation=True, after=(f"{PART}_in",)),
        _mapped("scan", scan, backward, after=(f"{PART}_conv", f"{PART}_decays")),
        inner_norm(rank, f"{PART}_norm", rank.tokens * heads, mixer.value_dim),
        _gate(rank, "gate", rank.tokens * heads * mixer.value_dim),
        _product(rank, "out"),
    ]  # fmt: skip


def _gated_conv(rank: Rank, mixer: GatedConv) -> list[Step]:
    elements = rank.tokens * mixer.conv_channels(rank.plan.tp)
    gradient = pointwise(elements, 3, 2, (2, 0), rank.dtype)
    gate = mul(elements, rank.dtype)
    return [
        _product(rank, "in"),
        _mapped("gate_in", gate, gradient),
        _conv(rank, mixer, activation=False),
        _mapped("gate_out", gate, gradient),
        _product(rank, "out"),
    ]


_STEPS: Final[Mapping[type, Callable[..., list[Step]]]] = {
    Mamba2: _mamba2, Mamba: _mamba, GatedDelta: _delta, GatedConv: _gated_conv,
}  # fmt: skip
