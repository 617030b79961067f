"""A plan's sequence split as arrays: what each strategy forbids, its steps, bytes and balance.

`workloads.sequence_parallel` spells a strategy out rank by rank; here stand the closed forms of
the same, on arrays, so that planners price many plans at once. With P ranks in a ring, c tokens a
rank and a causal mask, a rank's mean work is P c^2 / 2 pairs; the longest chunk of each step over
that mean, and what the busiest port sends while the step lasts:

    contiguous            first step 1 / P, then 2 / P        (2 P - 1) / P of the mean in all
    zigzag, striped       1 / P each                          1: balanced
    LightSeq              1 / P, then floor(P / 2) of 2 / P   (P + 1) / P for even P, 1 for odd

    moves    steps S          asked before a step (w)              result given after it (r)
    kv       P                K, V                                 backward: dK, dV
    query    P                Q; backward Q, dO, 2 statistics      O, statistic; backward dQ
    pairs    floor(P / 2) + 1  K, V or (helper) Q, backward with    (helper) O, statistic, or dQ;
                              dO, O, a statistic                   backward: dK, dV

w of step t + 1 and r of step t - 1 travel under step t, the last r under nothing. The tests hold
every line against the enumeration. Striped layouts are balanced to a token, which is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np

from hwmodels.errors import InputError, UnknownNameError
from workloads.models.architecture import TransformerConfig
from workloads.models.mixers import no_context
from workloads.models.parameters import heads_per_rank
from workloads.numeric import Num, is_scalar, maximum, where
from workloads.plan import Plan, SequenceSplit
from workloads.sequence_parallel import (
    CONTIGUOUS,
    KV,
    PAIRS,
    QUERY,
    ZIGZAG,
    Parcels,
    Strategy,
    strategy,
)
from workloads.workload import BACKWARD

NAMES: Final[Mapping[str, SequenceSplit]] = MappingProxyType({s.label: s for s in SequenceSplit})
"""Strategies by the name that commands take."""

_STRATEGY: Final[Mapping[SequenceSplit, str]] = MappingProxyType(
    {
        SequenceSplit.RING_ZIGZAG: "zigzag_ring",
        SequenceSplit.RING_CONTIGUOUS: "ring_attention",
        SequenceSplit.RING_STRIPED: "striped_attention",
        SequenceSplit.RING_SELF_ATTENTION: "ring_self_attention",
        SequenceSplit.LIGHTSEQ: "lightseq",
        SequenceSplit.TOKEN_RING: "token_ring",
        SequenceSplit.ULYSSES: "ulysses",
        SequenceSplit.HYBRID: "zigzag_ring",
        SequenceSplit.LASP2: "lasp2",
        SequenceSplit.LASP2H: "lasp2",
    }
)
GATHERING: Final = (SequenceSplit.LASP2, SequenceSplit.LASP2H)


def split_named(name: str) -> SequenceSplit:
    """The split of that name.

    >>> split_named("ring-zigzag")
    <SequenceSplit.RING_ZIGZAG: 0>
    """
    if name.casefold() not in NAMES:
        known = f"known: {', '.join(NAMES)}"
        raise UnknownNameError("sequence-parallel strategy", name, NAMES, known)
    return NAMES[name.casefold()]


def strategy_of(split: Num) -> Strategy:
    """What a split does rank by rank; of a hybrid, its ring."""
    return strategy(_STRATEGY[SequenceSplit(int(split))])


def default_split(cfg: TransformerConfig) -> SequenceSplit:
    """What a planner takes where nothing is asked: a balanced ring, gathered states if linear."""
    if not cfg.num_linear_layers:
        return SequenceSplit.RING_ZIGZAG
    return SequenceSplit.LASP2 if cfg.linear_frac == 1 else SequenceSplit.LASP2H


def refusal(
    cfg: TransformerConfig, *, len_seq: int, tp: int, cp: int, split: Num, ulysses: int = 1
) -> str | None:
    """Why a model's sequences cannot be split that way, in one line; None where they can."""
    kind = SequenceSplit(int(split))
    name = kind.label
    if cp == 1:
        unsplit = kind == SequenceSplit.RING_ZIGZAG and ulysses == 1
        return None if unsplit else alone(kind)
    if cfg.mixer is not None:
        return no_context(cfg.name, cfg.mixer)
    layout = strategy_of(kind).layout
    parts = 2 * cp if layout == ZIGZAG else cp
    if len_seq % parts:
        return (
            f"{name}: cp = {cp} in a {layout} layout needs a length that {parts} divides, not "
            f"{len_seq}; pad the sequence or change cp"
        )
    return _refused_heads(cfg, kind, tp, cp, ulysses) or _refused_layers(cfg, kind)


def alone(kind: SequenceSplit) -> str:
    """Why one rank cannot split a sequence."""
    return f"{kind.label}: one rank (cp = 1) has nobody to share a sequence with; give cp 2 or more"


def _refused_heads(
    cfg: TransformerConfig, kind: SequenceSplit, tp: int, cp: int, ulysses: int
) -> str | None:
    """Degrees that heads do not allow."""
    if kind == SequenceSplit.HYBRID:
        if not 1 < ulysses < cp or cp % ulysses:
            return (
                f"hybrid: ulysses = {ulysses} must divide cp = {cp} and lie between 1 and it; "
                "give --pin ulysses=N, or ulysses or ring-zigzag alone"
            )
    elif ulysses != 1:
        return f"{kind.label}: a ulysses degree belongs to the hybrid; leave it out or ask for that"
    degree = cp if kind == SequenceSplit.ULYSSES else ulysses
    kv_heads = int(heads_per_rank(cfg.attention.num_heads, cfg.attention.num_kv_heads, tp)[1])
    if kv_heads % degree:
        return (
            f"{kind.label}: a ulysses degree of {degree} must divide the {kv_heads} key and value "
            f"heads of a rank at tp = {tp}; give a divisor, a hybrid or a ring"
        )
    return None


def _refused_layers(cfg: TransformerConfig, kind: SequenceSplit) -> str | None:
    """Strategies that the model's attention has no use for."""
    if kind in GATHERING and not cfg.num_linear_layers:
        return (
            f"{kind.label}: {cfg.name} has softmax attention, whose chunks have no state to gather;"
            " take a ring or ulysses, or a model with linear attention"
        )
    if kind == SequenceSplit.LASP2 and cfg.linear_frac < 1:
        return f"lasp2: {cfg.name} has softmax layers beside its linear ones; take lasp2h"
    if kind not in (*GATHERING, SequenceSplit.ULYSSES) and cfg.num_linear_layers:
        return (
            f"{kind.label}: layers of linear attention in {cfg.name} need no ring of keys; take "
            "lasp2, lasp2h or ulysses"
        )
    return None


def check_plan(cfg: TransformerConfig, plan: Plan, len_seq: Num) -> None:
    """Refuse the first plan whose sequence cannot be split as it says."""
    fields = (plan.sequence, plan.ulysses, plan.cp, plan.tp, len_seq)
    if is_scalar(*fields):
        rows = [tuple(int(x) for x in fields)]
    else:
        columns = np.broadcast_arrays(*(np.asarray(x, dtype=np.int64) for x in fields))
        found = np.unique(np.stack([c.reshape(-1) for c in columns], axis=1), axis=0)
        rows = [tuple(int(x) for x in row) for row in found]
    for split, ulysses, cp, tp, length in rows:
        why = refusal(cfg, len_seq=length, tp=tp, cp=cp, split=split, ulysses=ulysses)
        if why:
            raise InputError(why)


def hybrid_degrees(cfg: TransformerConfig, *, tp: int, cp: int) -> list[int]:
    """Ulysses degrees that a hybrid of `cp` ranks may have."""
    kv_heads = int(heads_per_rank(cfg.attention.num_heads, cfg.attention.num_kv_heads, tp)[1])
    return [u for u in range(2, cp) if cp % u == 0 and kv_heads % u == 0]


# ---- steps of rings ------------------------------------------------------------------------


class Run(NamedTuple):
    """`times` steps alike: the longest chunk over a rank's mean work, bytes of the busiest port."""

    times: Num
    share: Num
    num_bytes: Num


def ring_runs(how: Strategy, parcels: Parcels, num_ranks: Num, *, phase: str) -> tuple[Run, ...]:
    """Steps of one causal pass over a layer, as runs of equal ones; none for a single rank.

    >>> parcels = Parcels(query=1, keys=2, output=1, rows=0)
    >>> runs = ring_runs(strategy("ring_attention"), parcels, 8, phase="forward")
    >>> float(sum(run.times * run.share for run in runs)), float(
    ...     sum(run.times * run.num_bytes for run in runs))
    (1.875, 14.0)
    """
    n = num_ranks
    steps = n // 2 + 1 if how.moves == PAIRS else n
    sent = _sent(how, parcels, n, phase)
    own, rest = 1 / n, (2 / n if how.moves == PAIRS or how.layout == CONTIGUOUS else 1 / n)
    two, three = steps == 2, steps == 3
    return (
        Run(where(steps >= 2, 1, 0), own, where(two, sent.last_asked, sent.asked)),
        Run(where(steps > 2, 1, 0), rest, where(three, sent.last_asked, sent.asked)),
        Run(maximum(steps - 4, 0), rest, sent.both),
        Run(where(steps > 3, 1, 0), rest, sent.last_both),
        Run(where(steps > 2, 1, 0), rest, sent.given),
        Run(where(two, 1, 0), rest, 0 * sent.given),
        Run(where(steps >= 2, 1, 0), 0 * own, sent.last_given),
    )


class _Sent(NamedTuple):
    """Bytes of the busiest port: before a step, after one, both at once; and at the end."""

    asked: Num
    given: Num
    both: Num
    last_asked: Num
    last_both: Num
    last_given: Num


def _sent(how: Strategy, p: Parcels, num_ranks: Num, phase: str) -> _Sent:
    back = phase == BACKWARD
    if how.moves == PAIRS:
        return _sent_by_pairs(p, num_ranks, back=back)
    if how.moves == KV:
        asked, given = p.keys, (p.keys if back else 0 * p.keys)
    else:
        assert how.moves == QUERY
        asked = p.query + p.output + 2 * p.rows if back else p.query
        given = p.query if back else p.output + p.rows
    return _Sent(asked, given, asked + given, asked, asked + given, given)


def _sent_by_pairs(p: Parcels, num_ranks: Num, *, back: bool) -> _Sent:
    """A port has keys and a helper's result, keys and gradients, or queries and gradients.

    With an even number of ranks nobody helps in the last step.
    """
    query = p.query + 2 * p.output + p.rows if back else p.query
    helper = p.query if back else p.output + p.rows
    gradients = p.keys if back else 0 * p.keys
    even = num_ranks % 2 == 0
    of_keys = maximum(p.keys + helper, p.keys + gradients)
    asked, given, both = (
        maximum(p.keys, query), maximum(gradients, helper), maximum(of_keys, query + gradients),
    )  # fmt: skip
    return _Sent(
        asked, given, both,
        where(even, p.keys, asked), where(even, of_keys, both), where(even, gradients, given),
    )  # fmt: skip


def balance(how: Strategy, num_ranks: Num) -> Num:
    """Longest chunks of a causal pass over the mean work of a rank: 1 is even.

    >>> [balance(strategy(name), 8) for name in ("ring_attention", "zigzag_ring", "lightseq")]
    [1.875, 1.0, 1.125]
    """
    if how.moves == PAIRS:
        return (1 + 2 * (num_ranks // 2)) / num_ranks
    if how.moves == KV and how.layout == CONTIGUOUS and how.fused:
        return (2 * num_ranks - 1) / num_ranks
    return 1.0 + 0 * num_ranks


def longest_of(runs: Sequence[Run]) -> Num:
    """Longest chunks of all steps over a rank's mean work."""
    return sum((run.times * run.share for run in runs), start=0.0)
