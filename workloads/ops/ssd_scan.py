"""Mamba-2's recurrence, over sequences in chunks and for one new token, heads sharing B and C.

    dt_t = softplus(dt_t + bias),    a_t = e^(a dt_t),    a < 0
    S_t  = a_t S_{t-1} + B_t (dt_t x_t)^T,    y_t = S_t^T C_t + D x_t

per head with a state S of state_dim x head_dim (N, P); the heads of a group share B_t and C_t (Dao
and Gu 2024, arXiv 2405.21060, section 6: state-space duality). A chunk of c tokens, G the running
sums of a dt, U = dt x, is worked on as

    Y = e^G (C S) + (C B^T * e^(G_i - G_j), lower triangle) U
    S = e^(G_c) S + B^T (e^(G_c - G) U)

C B^T once a group, the rest once a head. No exponent is ever positive. Ignored: biases of the
convolution before it, and the limits that some models put on dt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Tile, Values, slices
from workloads.numeric import Num, any_true, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, checked_size, require_fit
from workloads.ops.attention import MASK_FLOPS
from workloads.ops.chunk_scan import MambaChunkScan
from workloads.ops.delta_rule import GatedDeltaStep
from workloads.ops.flash_attention import transposed
from workloads.work import Work

FP32_BYTES: Final = FP32.bits // 8
KERNEL_CHUNK: Final = 256
"""Tokens of a chunk in the published kernel, whose timing is known; a longer chunk stays."""


@dataclass(frozen=True, kw_only=True)
class Ssd(ProvedOp):
    """What both forms share: heads in groups, the state, and D where `skip` is set."""

    batch: Num = 1
    num_heads: Num
    num_groups: Num = 1
    head_dim: Num = 64
    state_dim: Num = 128
    skip: bool = True
    dtype: DType = BF16
    state_dtype: DType = FP32

    def check(self) -> None:
        """Groups of one size."""
        if any_true(self.num_heads % self.num_groups != 0):
            raise InputError(
                f"{self.name}: num_groups = {self.num_groups} must divide num_heads = "
                f"{self.num_heads}"
            )

    @property
    def parameters(self) -> int:
        """Numbers of a head in fp32: a, the bias of dt, and D."""
        return 2 + self.skip

    def state_elements(self) -> Num:
        """Numbers of all states."""
        return self.batch * self.num_heads * self.state_dim * self.head_dim

    def state_bytes(self) -> Num:
        """All states in `state_dtype`: what decoding keeps."""
        return self.state_elements() * self.state_dtype.bytes_per_element

    def token_numbers(self) -> Num:
        """Numbers of x, dt, B and C of one token."""
        return self.num_heads * (self.head_dim + 1) + 2 * self.num_groups * self.state_dim

    def token_bytes(self) -> Num:
        """x, dt, B and C of one token."""
        return self.token_numbers() * self.dtype.bytes_per_element

    def head_inputs(self, rng: np.random.Generator) -> dict[str, Values]:
        """a, bias and D of each head; a from a decay that forgets at once to hardly any."""
        heads = int(self.num_heads)
        found = {"a": -(10 ** rng.uniform(-4, 1.5, heads)), "bias": rng.uniform(-4, 2, heads)}
        return found | ({"d": rng.standard_normal(heads)} if self.skip else {})

    def token_inputs(self, rng: np.random.Generator, *shape: int) -> dict[str, Values]:
        """x[*shape, heads, P], dt[*shape, heads], b and c [*shape, groups, N]."""
        heads, groups, n = int(self.num_heads), int(self.num_groups), int(self.state_dim)
        return {
            "x": rng.standard_normal((*shape, heads, int(self.head_dim))),
            "dt": rng.uniform(-8, 4, (*shape, heads)),
            "b": rng.standard_normal((*shape, groups, n)),
            "c": rng.standard_normal((*shape, groups, n)),
        }

    def stepped(self, token: Arrays, state: Values, heads: Arrays) -> tuple[Values, Values]:
        """Naively one step of all heads: y[batch, heads, P] and the state[batch, heads, N, P]."""
        share = int(self.num_heads) // int(self.num_groups)
        b, c = (np.repeat(token[name], share, axis=1) for name in ("b", "c"))
        dt = np.logaddexp(0, token["dt"] + heads["bias"])
        decay = np.exp(heads["a"] * dt)[..., None, None]
        state = decay * state + b[..., None] * (dt[..., None] * token["x"])[:, :, None]
        y = np.einsum("bhn,bhnp->bhp", c, state)
        return (y + heads["d"][:, None] * token["x"] if self.skip else y), state

    def _place(self, machine: Machine, inputs: Arrays) -> dict[str, SlowArray]:
        formats = dict.fromkeys(("a", "bias", "d"), FP32) | {"state": self.state_dtype}
        return {key: machine.place(v, formats.get(key, self.dtype)) for key, v in inputs.items()}

    def _heads(self, group: int) -> range:
        share = int(self.num_heads) // int(self.num_groups)
        return range(group * share, (group + 1) * share)


@dataclass(frozen=True, kw_only=True)
class SsdScan(Ssd):
    """x[batch, len_seq, num_heads, head_dim] in chunks, from an empty state; the last one written.

    `held` heads of a group pass through the sequence together, so that C B^T is made and B, C are
    read p = ceil(heads of a group / held) times. Per sequence, sums over its chunks of c tokens:

        tensor flops   2 c^2 N p a group;  2 c^2 P + 4 c N P a head
        bytes          2 c N p a group;  x, y, dt once

    >>> op = SsdScan(len_seq=128, num_heads=1, head_dim=64, chunk=64)
    >>> op.work(2**18).tensor_flops[BF16] == 2 * (2 * 64**2 * (128 + 64) + 4 * 64 * 128 * 64)
    True
    """

    name: ClassVar[str] = "ssd_scan"
    len_seq: Num
    chunk: int = 64
    keep_state: bool = True

    def check(self) -> None:
        """Groups of one size; a chunk of one whole number of tokens."""
        super().check()
        checked_size(self.name, "chunk", self.chunk)

    def stages(self) -> tuple[Stage, ...]:
        """Timed as the published kernels."""
        scan = MambaChunkScan(
            batch=self.batch, len_seq=self.len_seq, num_heads=self.num_heads,
            head_dim=self.head_dim, num_groups=self.num_groups, state_dim=self.state_dim,
            chunk=max(self.chunk, KERNEL_CHUNK), dtype=self.dtype, state_dtype=self.state_dtype,
        )  # fmt: skip
        return (Stage("scan", scan),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """`held` heads' states beside what one chunk of one head takes."""
        c, n, p = minimum(self.chunk, self.len_seq), self.state_dim, self.head_dim
        e = self.dtype.bytes_per_element
        beside = 2 * c * n * e + 8 * c * c + c * p * (e + 12) + c * (e + 16) + FP32_BYTES
        head = FP32_BYTES * (n * p + self.parameters)
        what = "a chunk and the state of a head; a shorter chunk takes less"
        require_fit(self.name, fast_bytes, beside + head, what)
        share = self.num_heads // self.num_groups
        return {"held": minimum(share, floor((fast_bytes - beside) / head))}

    def chunk_squares(self) -> Num:
        """Sum of the squares of the chunks' lengths."""
        return self._chunks()[1]

    def _chunks(self) -> tuple[Num, Num]:
        """How many, and the sum of their lengths' squares."""
        whole = self.len_seq // self.chunk
        rest = self.len_seq - whole * self.chunk
        return ceil_div(self.len_seq, self.chunk), whole * self.chunk**2 + rest * rest

    def work(self, fast_bytes: Num) -> Work:
        """Sums over chunks as in the class docstring; an exponential a score."""
        n, p, length = self.state_dim, self.head_dim, self.len_seq
        share = self.num_heads // self.num_groups
        passes = ceil_div(share, self.tiling(fast_bytes)["held"])
        chunks, squares = self._chunks()
        groups, heads = self.batch * self.num_groups, self.batch * self.num_heads
        tensor = groups * passes * 2 * squares * n
        tensor = tensor + heads * (2 * squares * p + 4 * length * n * p)
        vector = squares * (2 + MASK_FLOPS) + 5 * length
        vector = vector + length * p * (4 + 2 * self.skip) + chunks * n * p
        e = self.dtype.bytes_per_element
        shared = groups * (passes - 1) * 2 * length * n * e
        states = self.keep_state * self.state_bytes()
        return Work(
            tensor_flops={self.dtype: tensor},
            vector_flops=heads * vector,
            special_ops=heads * (squares + 4 * length + chunks),
            read_bytes=self._input_bytes() + shared,
            write_bytes=heads * length * p * e + states,
        )

    def _input_bytes(self) -> Num:
        parameters = self.batch * self.num_heads * self.parameters * FP32_BYTES
        return self.batch * self.len_seq * self.token_bytes() + parameters

    def compulsory_bytes(self) -> Num:
        """Inputs, y and the last states once."""
        y = self.batch * self.len_seq * self.num_heads * self.head_dim
        states = self.keep_state * self.state_bytes()
        return self._input_bytes() + y * self.dtype.bytes_per_element + states

    def min_flops(self) -> Mapping[DType, Num]:
        """The recurrence itself: update and output, 2 N P each."""
        return {self.dtype: 4 * self.state_elements() * self.len_seq}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, dt, b, c of every token; a, bias and d of every head."""
        tokens = self.token_inputs(rng, int(self.batch), int(self.len_seq))
        return tokens | self.head_inputs(rng)

    def reference(self, inputs: Arrays) -> Arrays:
        """Token by token."""
        shape = (self.batch, self.num_heads, self.state_dim, self.head_dim)
        state, y = np.zeros([int(n) for n in shape]), np.empty_like(inputs["x"])
        for t in range(int(self.len_seq)):
            token = {name: inputs[name][:, t] for name in ("x", "dt", "b", "c")}
            y[:, t], state = self.stepped(token, state, inputs)
        return {"y": y} | ({"state": state} if self.keep_state else {})

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: sequences, groups and blocks of heads in turn, each through the chunks."""
        slow = self._place(machine, inputs)
        shape = [int(n) for n in (self.batch, self.num_heads, self.state_dim, self.head_dim)]
        slow |= {
            "y": machine.empty(inputs["x"].shape, self.dtype),
            "last": machine.empty(tuple(shape), self.state_dtype),
        }
        held = int(self.tiling(machine.fast_bytes)["held"])
        with machine.kernel():
            for at in range(shape[0]):
                for group in range(int(self.num_groups)):
                    heads = self._heads(group)
                    for part in slices(len(heads), held):
                        with machine.scope():
                            self._pass(machine, slow, (at, group), heads[part])
        found = {"y": slow["y"].values}
        return found | ({"state": slow["last"].values} if self.keep_state else {})

    def _pass(
        self, mc: Machine, slow: dict[str, SlowArray], at: tuple[int, int], heads: range
    ) -> None:
        """Some heads of a group through all chunks of a sequence."""
        row, group = at
        names = ("a", "bias", "d")[: self.parameters]
        numbers = {h: {name: mc.load(slow[name], [h]) for name in names} for h in heads}
        states = {h: mc.full((int(self.state_dim), int(self.head_dim)), 0.0) for h in heads}
        for rows in slices(int(self.len_seq), int(self.chunk)):
            with mc.scope():
                b, c = (mc.load(slow[name], (row, rows, group)) for name in ("b", "c"))
                with transposed(b):
                    inner = mc.matmul(c, b, self.dtype)
                for h in heads:
                    with mc.scope():
                        self._chunk(mc, slow, (row, rows, h), (b, c, inner), states[h], numbers[h])
        if self.keep_state:
            for h in heads:
                mc.store(states[h], slow["last"], (row, h))

    def _chunk(
        self,
        mc: Machine,
        slow: dict[str, SlowArray],
        at: tuple[int, slice, int],
        shared: tuple[Tile, Tile, Tile],
        state: Tile,
        numbers: dict[str, Tile],
    ) -> None:
        """One chunk of one head."""
        b, c, inner = shared
        dt = softplus(mc, mc.load(slow["dt"], at), numbers["bias"])[:, None]
        sums = mc.vector(np.cumsum(numbers["a"].values * dt, axis=0), per_element=2)
        x = mc.load(slow["x"], at)
        u = mc.vector(x.values * dt)
        gap = mc.vector(np.minimum(sums.values - sums.values.T, 0))
        mc.special(np.exp(gap.values), into=gap)
        mc.vector(gap.values * inner.values, into=gap)
        mc.vector(np.tril(gap.values), per_element=MASK_FLOPS, into=gap)
        out = mc.matmul(gap, u, self.dtype)
        seen, factor = mc.matmul(c, state, self.dtype), mc.special(np.exp(sums.values))
        mc.vector(out.values + factor.values * seen.values, per_element=2, into=out)
        if self.skip:
            mc.vector(out.values + numbers["d"].values * x.values, per_element=2, into=out)
        mc.store(out, slow["y"], at)
        left = mc.vector(sums.values[-1:] - sums.values)
        mc.special(np.exp(left.values), into=left)
        mc.vector(u.values * left.values, into=u)
        last = mc.special(np.exp(sums.values[-1:]))
        mc.vector(state.values * last.values, into=state)
        with transposed(b):
            mc.matmul(b, u, self.dtype, into=state)


@dataclass(frozen=True, kw_only=True)
class SsdStep(Ssd):
    """One new token a sequence: every state is read, updated and written by vector lanes.

    >>> op = SsdStep(batch=32, num_heads=128, num_groups=8)
    >>> op.work(2**17).bytes / (2 * op.state_bytes()) < 1.02   # the states outweigh the rest
    True
    """

    name: ClassVar[str] = "ssd_step"

    def stages(self) -> tuple[Stage, ...]:
        """Timed as the step of a delta rule, which moves the same arrays."""
        step = GatedDeltaStep(
            batch=self.batch, num_heads=self.num_heads, num_key_heads=self.num_groups,
            key_dim=self.state_dim, value_dim=self.head_dim, dtype=self.dtype,
            state_dtype=self.state_dtype,
        )  # fmt: skip
        return (Stage("step", step),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No choice: a state at a time, beside the parameters of a group."""
        n, p, e = self.state_dim, self.head_dim, self.dtype.bytes_per_element
        numbers = FP32_BYTES * self.parameters * (self.num_heads // self.num_groups)
        token = 2 * n * e + p * (e + 8) + e + 8
        state = n * p * self.state_dtype.bytes_per_element
        require_fit(self.name, fast_bytes, numbers + token + state, "the state of one head")
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """5 flops a state element, 3 special functions a head; the states in and out."""
        self.tiling(fast_bytes)
        heads, p = self.batch * self.num_heads, self.head_dim
        numbers = self.num_heads * self.parameters * FP32_BYTES
        return Work(
            vector_flops=heads * (3 + p * (1 + 2 * self.skip)) + 5 * self.state_elements(),
            special_ops=3 * heads,
            read_bytes=self.batch * self.token_bytes() + numbers + self.state_bytes(),
            write_bytes=heads * p * self.dtype.bytes_per_element + self.state_bytes(),
        )

    def compulsory_bytes(self) -> Num:
        """Everything once: nothing is read twice."""
        y = self.batch * self.num_heads * self.head_dim * self.dtype.bytes_per_element
        numbers = self.num_heads * self.parameters * FP32_BYTES
        return self.batch * self.token_bytes() + numbers + y + 2 * self.state_bytes()

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x, dt, b, c of one token, a, bias and d of every head, the states."""
        shape = (self.batch, self.num_heads, self.state_dim, self.head_dim)
        state = rng.standard_normal([int(n) for n in shape])
        return self.token_inputs(rng, int(self.batch)) | self.head_inputs(rng) | {"state": state}

    def reference(self, inputs: Arrays) -> Arrays:
        """All heads at once."""
        y, state = self.stepped(inputs, inputs["state"], inputs)
        return {"y": y, "state": state}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: groups in turn, their parameters read once."""
        slow = self._place(machine, inputs)
        slow["y"] = machine.empty(inputs["x"].shape, self.dtype)
        with machine.kernel():
            for group in range(int(self.num_groups)):
                with machine.scope():
                    self._group(machine, slow, group)
        return {"y": slow["y"].values, "state": slow["state"].values}

    def _group(self, mc: Machine, slow: dict[str, SlowArray], group: int) -> None:
        heads, names = self._heads(group), ("a", "bias", "d")[: self.parameters]
        numbers = {h: {name: mc.load(slow[name], [h]) for name in names} for h in heads}
        for row in range(int(self.batch)):
            with mc.scope():
                b, c = (mc.load(slow[name], (row, group)) for name in ("b", "c"))
                for h in heads:
                    with mc.scope():
                        self._head(mc, slow, (row, h), (b, c), numbers[h])

    def _head(
        self,
        mc: Machine,
        slow: dict[str, SlowArray],
        at: tuple[int, int],
        shared: tuple[Tile, Tile],
        numbers: dict[str, Tile],
    ) -> None:
        b, c = shared
        dt = softplus(mc, mc.load(slow["dt"], (at[0], [at[1]])), numbers["bias"])
        decay = mc.vector(numbers["a"].values * dt)
        mc.special(np.exp(decay.values), into=decay)
        x, state = mc.load(slow["x"], at), mc.load(slow["state"], at)
        u = mc.vector(x.values * dt)
        new = decay.values * state.values + np.outer(b.values, u.values)
        mc.vector(new, per_element=3, into=state)
        mc.count(vector=2 * new.size)
        y = mc.hold(c.values @ state.values)
        if self.skip:
            mc.vector(y.values + numbers["d"].values * x.values, per_element=2, into=y)
        mc.store(y, slow["y"], at)
        mc.store(state, slow["state"], at)


def softplus(mc: Machine, raw: Tile, bias: Tile) -> Values:
    """log(1 + e^(raw + bias)): two flops and two special functions an element."""
    found = mc.vector(raw.values + bias.values, per_element=2)
    return mc.special(np.logaddexp(0, found.values), per_element=2, into=found).values
