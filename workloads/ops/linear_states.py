"""Causal linear attention of a sequence on several ranks: LASP-2 (Sun et al., arXiv 2502.07563).

A rank t of P holds c = N / P tokens. Per head, with states of d x d:

    M_t = K_t^T V_t            2 c d^2 flops
    all-gather of M            B H d^2 elements from each rank, whatever N is; beside it
    O_intra                    linear attention of the chunk itself, worked on in sub-chunks
    M_1 + ... + M_{t-1}        t - 2 additions: P - 2 on the last rank, which is counted
    O_inter = Q_t (that sum)   2 c d^2 flops, and an addition to O_intra

(algorithm 2, with mask). LASP-1 (arXiv 2404.02882) passes the running sum from rank to rank:
`num_sends` says how many serial messages that is. Unnormalised, without decay, as the paper's basic
linear attention. Ignored: the norm of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from workloads.machine import Machine, Values
from workloads.numeric import Num, minimum
from workloads.op import Arrays, ProvedOp, Stage
from workloads.ops.elementwise import Elementwise, add
from workloads.ops.linear_recurrence import LinearRecurrence
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.recurrent_attention import SUB_CHUNK
from workloads.ops.sequence_attention import Round, SpreadAttention, spread_over
from workloads.sequence_parallel import Parcels, Strategy, state_bytes, strategy


@dataclass(frozen=True, kw_only=True)
class LinearStates(SpreadAttention):
    """Q, K, V, O[batch, num_heads, len_seq, head_dim] of the sequence; states of all heads.

    >>> op = LinearStates(num_heads=16, len_seq=2**21, head_dim=128, num_ranks=64)
    >>> op.gathered_bytes() == 64 * 16 * 128**2 * 2, op.num_sends()
    (True, (2, 126))
    """

    name: ClassVar[str] = "linear_states"
    chunk: Num = 64

    def how(self) -> Strategy:
        """LASP-2."""
        return strategy("lasp2")

    @property
    def length(self) -> Num:
        """Tokens of a rank."""
        return self.len_seq // self.ranks

    def gathered_bytes(self) -> Num:
        """What the all-gather leaves on every rank."""
        return self.ranks * state_bytes(self.whole())

    def num_sends(self) -> tuple[int, int]:
        """Serial messages of a training step: LASP-2's and LASP-1's, forward and backward."""
        return 2, 2 * (self.ranks - 1)

    def state(self) -> BatchedMatmul:
        """K^T V of a rank."""
        d = self.head_dim
        return BatchedMatmul(batch=self._streams, m=d, n=d, k=self.length, dtype=self.dtype)

    def inner(self) -> LinearRecurrence:
        """Linear attention of the rank's own tokens."""
        return LinearRecurrence(
            batch=self.batch, num_heads=self.num_heads, len_seq=self.length,
            key_dim=self.head_dim, chunk=self.chunk, sub_chunk=minimum(SUB_CHUNK, self.chunk),
            dtype=self.dtype,
        )  # fmt: skip

    def outer(self) -> BatchedMatmul:
        """Queries against the sum of states before."""
        d = self.head_dim
        return BatchedMatmul(batch=self._streams, m=self.length, n=d, k=d, dtype=self.dtype)

    @property
    def _streams(self) -> Num:
        return self.batch * self.num_heads

    def _sums(self) -> tuple[Elementwise, Elementwise]:
        """One state added to another, O_inter added to O_intra."""
        states = self._streams * self.head_dim * self.head_dim
        return add(states, self.dtype), add(self._streams * self.length * self.head_dim, self.dtype)

    def stages(self) -> tuple[Stage, ...]:
        """The all-gather beside the chunk's own attention."""
        of_states, of_outputs = self._sums()
        gather = self.transfer("all_gather", self.gathered_bytes())
        return (
            Stage("state", self.state()),
            Stage("inner", Round(chunk=self.inner(), merges=(), send=gather)),
            Stage("sum", of_states, self.ranks - 2),
            Stage("outer", self.outer()),
            Stage("add", of_outputs),
        )

    def compulsory_bytes(self) -> Num:
        """A rank's own tokens, and its state."""
        parcels = Parcels.of(self.whole(), self.ranks)
        return parcels.query + parcels.keys + parcels.output

    def reference(self, inputs: Arrays) -> Arrays:
        """All weights q . k under the mask, at once."""
        weights = np.tril(inputs["q"] @ inputs["k"].swapaxes(2, 3))
        return {"o": weights @ inputs["v"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Every rank its tokens; the last one counts."""
        machines = [Machine(machine.fast_bytes) for _ in range(self.ranks)]
        machines[-1] = machine
        cut = {name: np.split(x, self.ranks, axis=2) for name, x in inputs.items()}
        flat = {name: [x.reshape(-1, *x.shape[2:]) for x in xs] for name, xs in cut.items()}
        states = [
            self.state().program(mc, {"a": key.swapaxes(1, 2), "b": value})["c"]
            for mc, key, value in zip(machines, flat["k"], flat["v"], strict=True)
        ]
        outputs: list[Values] = []
        for rank, mc in enumerate(machines):
            own = {name: xs[rank] for name, xs in cut.items()}
            found = self.inner().program(mc, own)["o"]
            if rank:
                found = self._with_states(mc, flat["q"][rank], states[:rank], found)
            outputs.append(found)
        given = float(self.gathered_bytes())
        spread_over(machine, given / self.ranks, given, self.dtype)
        return {"o": np.concatenate(outputs, axis=2)}

    def _with_states(
        self, machine: Machine, query: Values, states: list[Values], own: Values
    ) -> Values:
        """The chunk's output and what its queries read of the states before."""
        of_states, of_outputs = self._sums()
        total = states[0]
        for state in states[1:]:
            total = _added(machine, of_states, total, state)
        outer = self.outer().program(machine, {"a": query, "b": total})["c"]
        return _added(machine, of_outputs, own, outer.reshape(own.shape))


def _added(machine: Machine, op: ProvedOp, a: Values, b: Values) -> Values:
    pair = {"x0": a.reshape(-1), "x1": b.reshape(-1)}
    return op.program(machine, pair)["y0"].reshape(a.shape)
