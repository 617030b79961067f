"""Sequence parallelism as data: who computes which chunk of attention, who sends what to whom.

A sequence of N tokens lies on P ranks, c = N / P tokens each. A `Strategy` names

    layout   contiguous  rank r holds tokens r c .. (r + 1) c - 1
             zigzag      of 2 P half chunks, numbers r and 2 P - 1 - r: causal work is even
             striped     tokens r, r + P, r + 2 P ...: even to within a token
    moves    kv          K and V go round a ring, step t: rank p computes (q of p, kv of p - t)
             query       Q goes round, O comes straight back: rank p computes (q of p - t, kv of p)
             pairs       K and V are fetched from their owner; under a causal mask ranks without
                         work compute for others, floor(P / 2) steps instead of P - 1
             heads       all-to-all: each rank computes some heads of the whole sequence
             states      all-gather of K^T V, linear attention alone: no length in what is sent

and `assignment`, `meeting`, `messages` spell a strategy out rank by rank and step by step; all
other counts follow from these three. Messages of step t bring what step t + 1 needs, and results
of step t - 1: they go while step t computes; those of step `num_steps` are left at the end.

Backward, with rings: K and V again, dK and dV on the way home; `query` sends Q, dO and the
logsumexp with sum(dO O) round and dQ back; `pairs` fetches K and V, returns dK and dV, and sends
Q, dO, O and the logsumexp to a helper, who returns dQ (the authors' code). Gradients travel in the
number format of the operands. Ignored: buffers of libraries, padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError, UnknownNameError
from workloads.numeric import Num, is_scalar
from workloads.ops.attention import AttentionOp
from workloads.ops.flash_attention import FP32_BYTES, FlashAttention2
from workloads.workload import BACKWARD, FORWARD

CONTIGUOUS, ZIGZAG, STRIPED = "contiguous", "zigzag", "striped"
LAYOUTS: Final = (CONTIGUOUS, ZIGZAG, STRIPED)
KV, QUERY, PAIRS, HEADS, STATES = "kv", "query", "pairs", "heads", "states"
RINGS: Final = (KV, QUERY, PAIRS)
"""Ways that go in steps from rank to rank."""
NEXT, BACK = "next", "back"
"""The two directions of a ring. Both leave through a rank's one port (PCI Express, a switch); only
links between all pairs of ranks would keep them apart."""
ALL, FIRST, SECOND, TAIL, HEAD = "all", "first half", "second half", "all but 1", "all but last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to spread attention over a sequence's ranks.

    `fused`: online softmax, no score is written. `keeps_output`: the backward pass finds O and the
    logsumexp kept under full recomputation, so that attention's forward pass is not run again.
    """

    name: str
    moves: str
    layout: str = CONTIGUOUS
    fused: bool = True
    keeps_output: bool = False
    source: str = ""


STRATEGIES: Final[Mapping[str, Strategy]] = MappingProxyType(
    {
        s.name: s
        for s in (
            Strategy(name="ring_self_attention", moves=KV, fused=False,
                     source="Li et al. 2021, arXiv 2105.13120: scores of all keys are written"),
            Strategy(name="ring_attention", moves=KV,
                     source="Liu, Zaharia, Abbeel 2023, arXiv 2310.01889"),
            Strategy(name="zigzag_ring", moves=KV, layout=ZIGZAG,
                     source="ring-flash-attention (zhuzilin), Megatron Core context parallelism"),
            Strategy(name="striped_attention", moves=KV, layout=STRIPED,
                     source="Brandon et al. 2023, arXiv 2311.09431"),
            Strategy(name="lightseq", moves=PAIRS, keeps_output=True,
                     source="Li, Shao et al. 2023, arXiv 2310.03294, sections 3.1 to 3.3"),
            Strategy(name="token_ring", moves=QUERY, layout=ZIGZAG,
                     source="Wang et al. 2024, arXiv 2412.20501"),
            Strategy(name="ulysses", moves=HEADS, source="Jacobs et al. 2023, arXiv 2309.14509"),
            Strategy(name="lasp2", moves=STATES, source="Sun et al. 2025, arXiv 2502.07563"),
        )
    }
)  # fmt: skip


def strategy(name: str) -> Strategy:
    """The strategy of that name."""
    if name not in STRATEGIES:
        raise UnknownNameError("sequence-parallel strategy", name, STRATEGIES)
    return STRATEGIES[name]


class Meeting(NamedTuple):
    """A chunk of attention: parts of the queries of one rank and of the keys of another."""

    queries: str
    keys: str
    causal: bool


class Message(NamedTuple):
    """`num_bytes` from rank to rank, in a direction of the ring; `what` names the content."""

    source: int
    target: int
    num_bytes: Num
    lane: str
    what: str


def check_ranks(how: Strategy, shape: AttentionOp, num_ranks: int) -> None:
    """Refuse degrees that a strategy does not have."""
    if num_ranks < 2:
        raise InputError(
            f"{how.name}: num_ranks = {num_ranks} has nobody to send to; give 2 or more"
        )
    parts = 2 * num_ranks if how.layout == ZIGZAG and shape.causal else num_ranks
    if np.any(shape.len_q % parts):
        raise InputError(
            f"{how.name}: a {how.layout} layout over {num_ranks} ranks needs a length that "
            f"{parts} divides, not {shape.len_q}; pad the sequence"
        )
    if how.moves == HEADS and np.any(shape.kv_heads % num_ranks):
        raise InputError(
            f"{how.name}: degree {num_ranks} must divide the {shape.kv_heads} key and value heads; "
            f"give a divisor of them and a ring for the rest, or pad or repeat heads"
        )


def num_steps(how: Strategy, num_ranks: int, *, causal: bool) -> int:
    """Steps of attention, each with its messages; the first is a rank's own chunk.

    >>> [num_steps(strategy(name), 8, causal=True) for name in ("ring_attention", "lightseq")]
    [8, 5]
    """
    if how.moves not in RINGS:
        return 1
    return num_ranks // 2 + 1 if how.moves == PAIRS and causal else num_ranks


def assignment(
    how: Strategy, num_ranks: int, rank: int, step: int, *, causal: bool
) -> tuple[int, int] | None:
    """(owner of the queries, owner of the keys) that a rank works on in a step; None: it waits.

    >>> balanced = strategy("lightseq")
    >>> [assignment(balanced, 8, rank, 3, causal=True) for rank in (0, 7)]
    [(5, 0), (7, 4)]
    """
    before = (rank - step) % num_ranks
    if how.moves == QUERY:
        return before, rank
    if how.moves != PAIRS or not causal or rank >= step:
        return rank, before
    return None if 2 * step == num_ranks else (num_ranks - step + rank, rank)


def meeting(how: Strategy, queries: int, keys: int, *, causal: bool) -> Meeting | None:
    """What of two ranks' chunks meets; None where the mask leaves nothing."""
    if not causal:
        return Meeting(ALL, ALL, False)
    if queries == keys:
        return Meeting(ALL, ALL, True)
    earlier = keys < queries
    if how.layout == ZIGZAG:
        return Meeting(ALL, FIRST, False) if earlier else Meeting(SECOND, ALL, False)
    if how.layout == STRIPED:
        return Meeting(ALL, ALL, True) if earlier else Meeting(TAIL, HEAD, True)
    return Meeting(ALL, ALL, False) if earlier else None


def part_length(part: str, length: Num) -> Num:
    """Tokens of a part of a chunk."""
    if part in (FIRST, SECOND):
        return length // 2
    return length if part == ALL else length - 1


def part_slice(part: str, length: int) -> slice:
    """The part's place in the chunk."""
    return {
        ALL: slice(0, length), FIRST: slice(0, length // 2), SECOND: slice(length // 2, length),
        TAIL: slice(1, length), HEAD: slice(0, length - 1),
    }[part]  # fmt: skip


def tokens_of(layout: str, num_ranks: int, length: int, rank: int) -> NDArray[np.int64]:
    """Positions that a rank holds.

    >>> tokens_of(ZIGZAG, 2, 8, 1), tokens_of(STRIPED, 2, 8, 1)
    (array([2, 3, 4, 5]), array([1, 3, 5, 7]))
    """
    positions = np.arange(length, dtype=np.int64)
    if layout == STRIPED:
        return positions[rank::num_ranks]
    if layout == CONTIGUOUS:
        return np.split(positions, num_ranks)[rank]
    halves = np.split(positions, 2 * num_ranks)
    return np.concatenate([halves[rank], halves[2 * num_ranks - 1 - rank]])


def chunk(
    how: Strategy, shape: AttentionOp, num_ranks: int, queries: int, keys: int
) -> FlashAttention2 | None:
    """The attention of two ranks' chunks as the kernel runs it."""
    met = meeting(how, queries, keys, causal=shape.causal)
    length = shape.len_q // num_ranks
    if met is None or (met.queries == TAIL and not np.all(np.greater(length, 1))):
        return None
    return FlashAttention2(
        batch=shape.batch, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
        len_q=part_length(met.queries, length), len_kv=part_length(met.keys, length),
        head_dim=shape.head_dim, head_dim_v=shape.head_dim_v, causal=met.causal, dtype=shape.dtype,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcels:
    """Bytes of one rank's chunk: queries, keys with values, outputs, a statistic of every row."""

    query: Num
    keys: Num
    output: Num
    rows: Num

    @classmethod
    def of(cls, shape: AttentionOp, num_ranks: int) -> Parcels:
        """An equal share of the sequence.

        >>> whole = FlashAttention2(num_heads=32, num_kv_heads=8, len_q=8192, head_dim=128)
        >>> Parcels.of(whole, 8).keys == 2 * 1024 * 8 * 128 * 2
        True
        """
        e = shape.dtype.bytes_per_element
        return cls(
            query=shape.query_elements() * e / num_ranks,
            keys=shape.kv_elements() * e / num_ranks,
            output=shape.output_elements() * e / num_ranks,
            rows=shape.batch * shape.num_heads * shape.len_q * FP32_BYTES / num_ranks,
        )


def messages(
    how: Strategy, shape: AttentionOp, num_ranks: int, step: int, *, phase: str = FORWARD
) -> tuple[Message, ...]:
    """What goes from rank to rank while a step computes; `step` = `num_steps`: what is left."""
    if how.moves not in RINGS:
        return ()
    found: list[Message] = []
    last = num_steps(how, num_ranks, causal=shape.causal) - 1
    for rank in range(num_ranks):
        if step < last:
            found += _wanted(how, shape, num_ranks, rank, step + 1, phase)
        if step >= 2:
            found += _results(how, shape, num_ranks, rank, step - 1, phase)
    return tuple(found)


def _wanted(
    how: Strategy, shape: AttentionOp, num_ranks: int, rank: int, step: int, phase: str
) -> list[Message]:
    """What a rank gets before a step."""
    parcels, back = Parcels.of(shape, num_ranks), phase == BACKWARD
    before = (rank - 1) % num_ranks
    if how.moves == KV:
        return [Message(before, rank, parcels.keys, NEXT, "keys")]
    gradients = parcels.output + 2 * parcels.rows if back else 0
    if how.moves == QUERY:
        return [Message(before, rank, parcels.query + gradients, NEXT, "query")]
    work = assignment(how, num_ranks, rank, step, causal=shape.causal)
    if work is None:
        return []
    queries, keys = work
    if queries == rank:
        return [Message(keys, rank, parcels.keys, NEXT, "keys")]
    given = 2 * parcels.output + parcels.rows if back else 0
    return [Message(queries, rank, parcels.query + given, NEXT, "query")]


def _results(
    how: Strategy, shape: AttentionOp, num_ranks: int, rank: int, step: int, phase: str
) -> list[Message]:
    """What a rank gives away of the step before: to the owner, or on to who adds to it."""
    parcels, back = Parcels.of(shape, num_ranks), phase == BACKWARD
    work = assignment(how, num_ranks, rank, step, causal=shape.causal)
    if work is None:
        return []
    queries, keys = work
    if queries == rank:  # gradients of keys that are not its own
        target = (rank + 1) % num_ranks if how.moves == KV else keys
        return [Message(rank, target, parcels.keys, NEXT, "gradients")] if back else []
    met = meeting(how, queries, keys, causal=shape.causal)
    if met is None:
        return []
    share = 0.5 if met.queries == SECOND else 1.0
    num_bytes = parcels.query if back else parcels.output + parcels.rows
    return [Message(rank, queries, share * num_bytes, BACK, f"output of {met.queries}")]


def exchange_bytes(
    how: Strategy, shape: AttentionOp, num_ranks: int, *, phase: str = FORWARD
) -> dict[str, Num]:
    """Bytes that the busiest rank sends in one layer, by collective.

    All-to-all: all but its own share of Q, K, V and O, and of their gradients again. All-gather of
    states: `state_bytes`, to everybody. Unfused rings reduce dK and dV as an all-reduce, which is
    twice the ring.

    >>> whole = FlashAttention2(num_heads=32, len_q=8192, head_dim=128, causal=True)
    >>> exchange_bytes(strategy("ring_attention"), whole, 8) == {"send_recv": 7 * 2 * 2**20 * 8}
    True
    """
    if how.moves == HEADS:
        parcels = Parcels.of(shape, num_ranks)
        whole = parcels.query + parcels.keys + parcels.output
        return {"all_to_all": whole * (num_ranks - 1) / num_ranks}
    if how.moves == STATES:
        return {"all_gather": state_bytes(shape) * (num_ranks - 1)}
    sent: list[Num] = [0.0] * num_ranks
    for step in range(num_steps(how, num_ranks, causal=shape.causal) + 1):
        for message in messages(how, shape, num_ranks, step, phase=phase):
            sent[message.source] = sent[message.source] + message.num_bytes
    if phase == BACKWARD and not how.fused:
        parcels = Parcels.of(shape, num_ranks)
        sent = [total + (num_ranks - 1) * parcels.keys for total in sent]
    return {"send_recv": np.max(np.broadcast_arrays(*sent), axis=0) if not is_scalar(*sent)
            else max(sent, key=float)}  # fmt: skip


def state_bytes(shape: AttentionOp) -> Num:
    """K^T V of all heads, in the format of the operands."""
    elements = shape.batch * shape.num_heads * shape.head_dim * shape.value_dim
    return elements * shape.dtype.bytes_per_element


def num_pairs(how: Strategy, shape: AttentionOp, num_ranks: int, rank: int) -> Num:
    """(query, key) pairs of a head that a rank computes, in all steps."""
    if how.moves not in RINGS:
        return shape.num_pairs() / num_ranks
    total: Num = 0
    for step in range(num_steps(how, num_ranks, causal=shape.causal)):
        work = assignment(how, num_ranks, rank, step, causal=shape.causal)
        op = chunk(how, shape, num_ranks, *work) if work else None
        total = total + (op.num_pairs() if op else 0)
    return total


def balance_frac(how: Strategy, shape: AttentionOp, num_ranks: int) -> Num:
    """Work of all ranks over what they could do while the steps last.

    A step lasts as long as its longest chunk: ranks wait for each other.

    >>> whole = FlashAttention2(num_heads=1, len_q=2**20, head_dim=128, causal=True)
    >>> [round(float(balance_frac(strategy(name), whole, 8)), 3)
    ...  for name in ("ring_attention", "zigzag_ring", "lightseq")]
    [0.533, 1.0, 0.889]
    """
    done, lasts = _step_pairs(how, shape, num_ranks)
    return sum(done) / (num_ranks * sum(lasts))


def attention_speedup(how: Strategy, shape: AttentionOp, num_ranks: int) -> Num:
    """Against one device: all pairs over those of the longest chunk of each step.

    Sends are taken to be hidden and kernels to take a time in proportion to their pairs.
    """
    _, lasts = _step_pairs(how, shape, num_ranks)
    return shape.num_pairs() / sum(lasts)


def _step_pairs(how: Strategy, shape: AttentionOp, num_ranks: int) -> tuple[list[Num], list[Num]]:
    """Pairs of all ranks, and of the busiest, step by step."""
    if how.moves not in RINGS:
        return [shape.num_pairs()], [shape.num_pairs() / num_ranks]
    done: list[Num] = []
    lasts: list[Num] = []
    for step in range(num_steps(how, num_ranks, causal=shape.causal)):
        pairs: list[Num] = []
        for rank in range(num_ranks):
            work = assignment(how, num_ranks, rank, step, causal=shape.causal)
            op = chunk(how, shape, num_ranks, *work) if work else None
            pairs.append(op.num_pairs() if op else 0)
        done.append(sum(pairs))
        lasts.append(np.max(np.asarray(pairs), axis=0))
    return done, lasts


def kept_bytes(how: Strategy, shape: AttentionOp, num_ranks: int) -> Num:
    """Bytes of attention that a rank holds for the backward pass, of one layer.

    Q, K, V and O of its own tokens with the logsumexp; unfused, the scores of its queries against
    all keys instead of the logsumexp; states instead of it for linear attention.
    """
    parcels = Parcels.of(shape, num_ranks)
    own = parcels.query + parcels.keys + parcels.output
    if how.moves == STATES:
        return own + state_bytes(shape)
    if how.fused:
        return own + parcels.rows
    scores = shape.batch * shape.num_heads * shape.len_q * shape.len_keys
    return own + scores * shape.dtype.bytes_per_element / num_ranks


def buffer_bytes(how: Strategy, shape: AttentionOp, num_ranks: int) -> Num:
    """What passing takes beside: two chunks of whatever travels, one to use and one to fill."""
    parcels = Parcels.of(shape, num_ranks)
    if how.moves == HEADS:
        return parcels.query + parcels.keys + parcels.output
    if how.moves == STATES:
        return num_ranks * state_bytes(shape)
    if how.moves == QUERY:
        return 2 * (parcels.query + parcels.output + parcels.rows)
    helped = parcels.query + parcels.output + parcels.rows if how.moves == PAIRS else 0
    return 2 * (parcels.keys + helped)


def with_layout(how: Strategy, layout: str) -> Strategy:
    """The same with another layout."""
    if layout not in LAYOUTS:
        raise UnknownNameError("layout", layout, LAYOUTS)
    if how.moves in (PAIRS, HEADS, STATES) and layout != CONTIGUOUS:
        raise InputError(
            f"{how.name}: no layout but {CONTIGUOUS} is known of it; leave the layout out"
        )
    return replace(how, layout=layout)
