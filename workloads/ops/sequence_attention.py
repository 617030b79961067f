"""Attention of a sequence that lies on several ranks, forward: one rank's kernels and sends.

`RingAttention` runs any strategy of `workloads.sequence_parallel` that goes from rank to rank: in
every step the kernel of the step's chunk, beside it the sends of the next, then what puts the
partial outputs together,

    o = sum_i w_i o_i,   w_i = exp(l_i - l),   l = log sum_i exp(l_i)

`UlyssesAttention` is two all-to-alls around the attention of some heads, `RingSelfAttention` the
unfused ring of Li et al. (2021): K goes round while rows of scores fill, softmax, V goes round.

Counted is the busiest rank: the last under a causal mask, the first where queries travel. Their
programs run all ranks, so that the result is whole attention, each rank on a machine of its own.
A send reads and writes its bytes in the rank's own memory. A rank has one port, whose directions
work at once: the larger of what comes and goes counts. Ignored: copies that bring heads together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, floor, is_scalar, maximum
from workloads.op import Arrays, Op, Stage
from workloads.ops.attention import probabilities
from workloads.ops.collective_transfer import CollectiveTransfer
from workloads.ops.elementwise import Elementwise, add
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.shared_prefix import CombineParts
from workloads.ops.softmax import Softmax
from workloads.ops.staged import ProvedStagedOp, StagedOp
from workloads.sequence_parallel import (
    QUERY,
    RINGS,
    Message,
    Parcels,
    Strategy,
    assignment,
    check_ranks,
    chunk,
    meeting,
    messages,
    num_steps,
    part_length,
    part_slice,
    strategy,
    tokens_of,
)


def spread_over(machine: Machine, read_bytes: float, written_bytes: float, dtype: DType) -> None:
    """What a collective's kernel moves in a rank's own memory: so much in, so much out."""
    e = dtype.bytes_per_element
    step = max(int(floor(machine.fast_bytes / e)), 1)
    with machine.kernel():
        for num_bytes, is_read in ((read_bytes, True), (written_bytes, False)):
            array = machine.place(np.zeros(round(num_bytes / e)), dtype)
            for start in range(0, array.values.size, step):
                index = slice(start, start + step)
                with machine.scope():
                    if is_read:
                        machine.load(array, index)
                    else:
                        machine.store(machine.hold(array.values[index], dtype), array, index)


@dataclass(frozen=True, kw_only=True)
class Round(StagedOp):
    """One step of one rank: a chunk of attention, sends beside it, partial outputs merged."""

    name: ClassVar[str] = "ring_round"
    chunk: Op | None
    merges: tuple[CombineParts, ...]
    send: CollectiveTransfer | None

    def stages(self) -> tuple[Stage, ...]:
        """A step that only sends waits for it."""
        found = [Stage("chunk", self.chunk)] if self.chunk else []
        found += [Stage(f"merge_{i}", op) for i, op in enumerate(self.merges)]
        if self.send:
            found.append(Stage("send", self.send, beside=bool(found)))
        return tuple(found)

    def compulsory_bytes(self) -> Num:
        """Those of its stages."""
        return sum((stage.op.compulsory_bytes() for stage in self.stages()), start=0.0)


@dataclass(frozen=True, kw_only=True)
class SpreadAttention(ProvedStagedOp):
    """Q[batch, num_heads, len_seq, head_dim] of the whole sequence over `num_ranks` ranks.

    K and V have `num_kv_heads` heads, as many as Q where left out. `num_ranks` is one number: a
    schedule of steps is no formula.
    """

    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_seq: Num
    head_dim: Num
    num_ranks: Num = 4
    causal: bool = True
    dtype: DType = BF16

    def check(self) -> None:
        """One number of ranks, which the strategy can use."""
        if not is_scalar(self.num_ranks):
            raise InputError(
                f"{self.name}: num_ranks is an array; a schedule of steps takes one number: "
                f"ask once for each"
            )
        check_ranks(self.how(), self.whole(), self.ranks)

    @abstractmethod
    def how(self) -> Strategy:
        """The strategy."""

    @property
    def ranks(self) -> int:
        """`num_ranks` as an int."""
        return int(self.num_ranks)

    @property
    def kv_heads(self) -> Num:
        """`num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def whole(self) -> FlashAttention2:
        """The attention of the sequence as one device would run it."""
        return FlashAttention2(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            len_q=self.len_seq, head_dim=self.head_dim, causal=self.causal, dtype=self.dtype,
        )  # fmt: skip

    def transfer(self, kind: str, num_bytes: Num) -> CollectiveTransfer:
        """A collective of the sequence's ranks."""
        return CollectiveTransfer(
            kind=kind, num_bytes=num_bytes, num_ranks=self.ranks, dtype=self.dtype
        )

    def compulsory_bytes(self) -> Num:
        """A rank's own Q, K and V once, its O once."""
        parcels = Parcels.of(self.whole(), self.ranks)
        return parcels.query + parcels.keys + parcels.output

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k and v of the whole sequence."""
        return self.whole().inputs(rng)

    def reference(self, inputs: Arrays) -> Arrays:
        """Attention of the whole sequence."""
        return self.whole().reference(inputs)


@dataclass(frozen=True, kw_only=True)
class RingAttention(SpreadAttention):
    """The strategy's steps on the busiest rank, and all ranks' steps to prove them.

    >>> op = RingAttention(num_heads=32, len_seq=8192, head_dim=128, num_ranks=8)
    >>> [(stage.name, stage.times) for stage in op.stages()]
    [('step_0', 1), ('step_1', 6), ('step_7', 1)]
    """

    name: ClassVar[str] = "ring_attention"
    strategy: str = "ring_attention"

    def check(self) -> None:
        """A fused strategy that goes in steps."""
        if self.how().moves not in RINGS or not self.how().fused:
            raise InputError(
                f"{self.name}: {self.strategy} does not go in steps of fused attention; ask for "
                f"its own op (see `ridgeplan systems`)"
            )
        super().check()

    def how(self) -> Strategy:
        """The named strategy."""
        return strategy(self.strategy)

    def busiest(self) -> int:
        """The rank that is counted."""
        return 0 if self.how().moves == QUERY else self.ranks - 1

    def steps(self) -> int:
        """Steps that compute."""
        return num_steps(self.how(), self.ranks, causal=self.causal)

    def stages(self) -> tuple[Stage, ...]:
        """The rounds, those that are alike together."""
        groups: list[tuple[object, int, int]] = []
        for step in range(self.steps() + 1):
            pattern = self._pattern(step)
            if groups and groups[-1][0] == pattern:
                groups[-1] = (pattern, groups[-1][1], groups[-1][2] + 1)
            elif pattern != ((), (), ()):
                groups.append((pattern, step, 1))
        return tuple(Stage(f"step_{at}", self.round(at), times) for _, at, times in groups)

    def round(self, step: int) -> Round:
        """What the busiest rank does in a step."""
        rank, whole = self.busiest(), self.whole()
        work, sent = self._work(rank, step), self._sent_bytes(step)
        return Round(
            chunk=chunk(self.how(), whole, self.ranks, *work) if work else None,
            merges=tuple(self._merge(part) for part in self._merged(step)),
            send=self.transfer("send_recv", sent) if np.any(sent) else None,
        )

    def _pattern(self, step: int) -> tuple[object, ...]:
        """What tells rounds apart, whatever the sizes."""
        work = self._work(self.busiest(), step)
        met = meeting(self.how(), *work, causal=self.causal) if work else None
        passed = tuple((m.what, m.source == self.busiest()) for m in self._own_messages(step))
        return met or (), self._merged(step), passed

    def _work(self, rank: int, step: int) -> tuple[int, int] | None:
        if step >= self.steps():
            return None
        work = assignment(self.how(), self.ranks, rank, step, causal=self.causal)
        return work if work and chunk(self.how(), self.whole(), self.ranks, *work) else None

    def _own_messages(self, step: int) -> list[Message]:
        found = messages(self.how(), self.whole(), self.ranks, step)
        return [m for m in found if self.busiest() in (m.source, m.target)]

    def _sent_bytes(self, step: int) -> Num:
        """The larger of what comes and what goes: a port works in both directions at once."""
        mine = self._own_messages(step)
        going = [m.num_bytes for m in mine if m.source == self.busiest()]
        coming = [m.num_bytes for m in mine if m.target == self.busiest()]
        return maximum(sum(going, start=0.0), sum(coming, start=0.0))

    def _merged(self, step: int) -> tuple[str, ...]:
        """Parts of the busiest rank's queries whose partial outputs are there after a step."""
        rank, found = self.busiest(), []
        work = self._work(rank, step)
        if step and work and work[0] == rank:
            found.append(self._part(*work))
        for other in range(self.ranks):
            arrived = self._work(other, step - 1) if step >= 2 and other != rank else None
            if arrived and arrived[0] == rank:
                found.append(self._part(*arrived))
        return tuple(found)

    def _part(self, queries: int, keys: int) -> str:
        met = meeting(self.how(), queries, keys, causal=self.causal)
        assert met is not None
        return met.queries

    def _merge(self, part: str) -> CombineParts:
        rows = part_length(part, self.len_seq // self.ranks)
        return CombineParts(
            rows=self.batch * self.num_heads * rows, dim=self.head_dim, dtype=self.dtype
        )

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """All ranks in step; each merges what it has and what comes back."""
        machines = [Machine(machine.fast_bytes) for _ in range(self.ranks)]
        machines[self.busiest()] = machine
        layout, length = self.how().layout, int(self.len_seq)
        if not self.causal and layout != "striped":
            layout = "contiguous"
        places = [tokens_of(layout, self.ranks, length, r) for r in range(self.ranks)]
        own: list[Arrays] = [{} for _ in range(self.ranks)]
        flying: list[tuple[int, int, str, Arrays]] = []
        for step in range(self.steps() + 1):
            arriving, flying = flying, []
            for rank, computer in enumerate(machines):
                work = self._work(rank, step)
                if work:
                    part, found = self._run(computer, inputs, places, *work)
                    if step == 0:
                        own[rank] = found
                    elif work[0] == rank:
                        self._put(computer, own[rank], part, found)
                    else:
                        flying.append((work[0], rank, part, found))
            for owner, _, part, found in arriving:
                self._put(machines[owner], own[owner], part, found)
            num_bytes = float(self._sent_bytes(step))
            if num_bytes:
                spread_over(machine, num_bytes, num_bytes, self.dtype)
        return {name: _joined(places, [arrays[name] for arrays in own]) for name in ("o", "lse")}

    def _run(
        self, machine: Machine, inputs: Arrays, places: list[Values], queries: int, keys: int
    ) -> tuple[str, Arrays]:
        """The chunk of two ranks."""
        met = meeting(self.how(), queries, keys, causal=self.causal)
        op = chunk(self.how(), self.whole(), self.ranks, queries, keys)
        assert met is not None and op is not None
        length = len(places[0])
        rows = places[queries][part_slice(met.queries, length)]
        cols = places[keys][part_slice(met.keys, length)]
        given = {"q": inputs["q"][:, :, rows]}
        given |= {name: inputs[name][:, :, cols] for name in ("k", "v")}
        return met.queries, op.program(machine, given)

    def _put(self, machine: Machine, own: Arrays, part: str, found: Arrays) -> None:
        """Merge a partial output into the owner's."""
        at = part_slice(part, own["o"].shape[2])
        pairs = {"parts": "o", "lse": "lse"}
        given = {
            name: np.stack([own[n][:, :, at], found[n]]).reshape(2, -1, found[n].shape[-1])
            for name, n in pairs.items()
        }
        merged = self._merge(part).program(machine, given)
        for name in ("o", "lse"):
            own[name][:, :, at] = merged[name].reshape(found[name].shape)


def _joined(places: Iterable[Values], chunks: Iterable[Values]) -> Values:
    """Ranks' rows back where they stand in the sequence."""
    order = np.concatenate(list(places))
    return np.concatenate(list(chunks), axis=2)[:, :, np.argsort(order)]


@dataclass(frozen=True, kw_only=True)
class UlyssesAttention(SpreadAttention):
    """Heads for tokens: all-to-all of Q, K, V, whole attention of num_heads / P heads, O back.

    >>> op = UlyssesAttention(num_heads=32, len_seq=8192, head_dim=128, num_ranks=8)
    >>> op.sent_bytes() == 4 * (8192 / 8) * 32 * 128 * 2
    True
    """

    name: ClassVar[str] = "ulysses_attention"

    def how(self) -> Strategy:
        """DeepSpeed-Ulysses."""
        return strategy("ulysses")

    def _parcels(self) -> tuple[Num, Num]:
        parcels = Parcels.of(self.whole(), self.ranks)
        return parcels.query + parcels.keys, parcels.output

    def sent_bytes(self) -> Num:
        """Buffers of both all-to-alls: Q, K, V and O of a rank's tokens."""
        return sum(self._parcels(), start=0.0)

    def local(self) -> FlashAttention2:
        """A rank's heads of the whole sequence."""
        return self.whole().over(
            num_heads=self.num_heads // self.ranks, num_kv_heads=self.kv_heads // self.ranks
        )

    def stages(self) -> tuple[Stage, ...]:
        """Scatter heads, attend, gather heads."""
        there, back = (self.transfer("all_to_all", b) for b in self._parcels())
        return Stage("scatter", there), Stage("attend", self.local()), Stage("gather", back)

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Every rank its heads; the first one counts."""
        found: list[Arrays] = []
        for rank in range(self.ranks):
            computer = Machine(machine.fast_bytes) if rank else machine
            given = {name: np.split(x, self.ranks, axis=1)[rank] for name, x in inputs.items()}
            found.append(self.local().program(computer, given))
        for num_bytes in self._parcels():
            spread_over(machine, float(num_bytes), float(num_bytes), self.dtype)
        return {n: np.concatenate([x[n] for x in found], axis=1) for n in ("o", "lse")}


@dataclass(frozen=True, kw_only=True)
class RingSelfAttention(SpreadAttention):
    """Scores of a rank's queries against all keys, written; K goes round for them, then V.

    Bidirectional, as in BERT; a causal mask would be computed and masked, and save nothing.

    >>> op = RingSelfAttention(num_heads=12, len_seq=512, head_dim=64, num_ranks=4)
    >>> op.sent_elements() == 2 * 3 * 12 * 128 * 64
    True
    """

    name: ClassVar[str] = "ring_self_attention"
    causal: bool = False

    def check(self) -> None:
        """No mask; heads of their own keys."""
        if self.causal or self.num_kv_heads is not None:
            raise InputError(
                f"{self.name}: counted without a mask and with keys for each head; leave causal "
                f"and num_kv_heads out"
            )
        super().check()

    def how(self) -> Strategy:
        """Li et al."""
        return strategy("ring_self_attention")

    def _sent_bytes(self) -> Num:
        """K of a rank, or V."""
        return Parcels.of(self.whole(), self.ranks).keys / 2

    def sent_elements(self) -> Num:
        """K and V pass P - 1 neighbours: 2 (P - 1) B Z (L / P) A elements."""
        return 2 * (self.ranks - 1) * self._sent_bytes() / self.dtype.bytes_per_element

    def parts(self) -> tuple[BatchedMatmul, Softmax, BatchedMatmul]:
        """Scores of one chunk, softmax of whole rows, outputs of one chunk."""
        streams, rows = self.batch * self.num_heads, self.len_seq // self.ranks
        scores = BatchedMatmul(batch=streams, m=rows, n=rows, k=self.head_dim, dtype=self.dtype)
        softmax = Softmax(rows=streams * rows, cols=self.len_seq, dtype=self.dtype)
        output = BatchedMatmul(batch=streams, m=rows, n=self.head_dim, k=rows, dtype=self.dtype)
        return scores, softmax, output

    def addition(self) -> Elementwise:
        """Outputs of one chunk added to those before."""
        return add(Parcels.of(self.whole(), self.ranks).output / self.dtype.bytes_per_element,
                   self.dtype)  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """P - 1 products beside their sends and one alone, twice; softmax between."""
        scores, softmax, output = self.parts()
        send = self.transfer("send_recv", self._sent_bytes())
        ring = [Round(chunk=op, merges=(), send=send) for op in (scores, output)]
        return (
            Stage("scores", ring[0], self.ranks - 1),
            Stage("last_scores", scores),
            Stage("softmax", softmax),
            Stage("outputs", ring[1], self.ranks - 1),
            Stage("last_output", output),
            Stage("sums", self.addition(), self.ranks - 1),
        )

    def reference(self, inputs: Arrays) -> Arrays:
        """Whole attention."""
        p, _ = probabilities(self.whole(), inputs)
        return {"o": p @ inputs["v"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Every rank its rows; the first one counts."""
        found = []
        for rank in range(self.ranks):
            computer = Machine(machine.fast_bytes) if rank else machine
            found.append(self._rank(computer, inputs, rank))
        for _ in range(2 * (self.ranks - 1)):
            num_bytes = float(self._sent_bytes())
            spread_over(machine, num_bytes, num_bytes, self.dtype)
        return {"o": np.concatenate(found, axis=2)}

    def _rank(self, machine: Machine, inputs: Arrays, rank: int) -> Values:
        """Stage 1 rings K, stage 2 rings V (section 3.2.1)."""
        scores, softmax, output = self.parts()
        heads = {n: x.reshape(-1, *x.shape[2:]) for n, x in inputs.items()}
        cut = partial(np.split, indices_or_sections=self.ranks, axis=1)
        query = cut(heads["q"])[rank] / np.sqrt(int(self.head_dim))
        rows = [
            scores.program(machine, {"a": query, "b": key.swapaxes(1, 2)})["c"]
            for key in cut(heads["k"])
        ]
        whole = np.concatenate(rows, axis=2)
        flat = softmax.program(machine, {"x": whole.reshape(-1, whole.shape[-1])})["y"]
        shares = np.split(flat.reshape(whole.shape), self.ranks, axis=2)
        total = None
        for share, value in zip(shares, cut(heads["v"]), strict=True):
            part = output.program(machine, {"a": share, "b": value})["c"]
            if total is None:
                total = part
            else:
                pair = {"x0": total.reshape(-1), "x1": part.reshape(-1)}
                total = self.addition().program(machine, pair)["y0"].reshape(part.shape)
        assert total is not None
        return total.reshape(*inputs["q"].shape[:2], -1, total.shape[-1])
