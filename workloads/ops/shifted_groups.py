"""Attention in groups, half of the heads shifted by half a group, with sinks that all may see.

S^2-Attn (Chen et al. 2023, arXiv 2309.12307, algorithm 1) cuts N positions into g groups of
G = N / g and attends within each; the second half of the heads first rolls the sequence by G / 2,
so that their groups straddle the others' borders. SinkLoRA (Zhang 2024, arXiv 2406.05678,
section 3) rolls the outputs back into place and lets every query see the first `num_sinks` tokens
besides:

    pairs   H (N (G + 1) / 2 + (N - G) num_sinks)     of N (N + 1) / 2 a head: 1 / g and a little

A query whose group holds the sinks (the first group; in shifted heads the last, which wraps around)
sees them as keys of its group. The others attend to them apart, and the two results are put
together from their logsumexps, so that the softmax is one. Causal in the order of the rolled
sequence, as the published code computes it: the wrapped group joins the end to the start.

Ignored: the rotary positions and projections around it, and the sinks' own view of later tokens,
which a causal model does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true
from workloads.op import Arrays, Stage
from workloads.ops.elementwise import Elementwise
from workloads.ops.flash_attention import FP32_BYTES, FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.shared_prefix import FA2, CombineParts
from workloads.ops.staged import ProvedStagedOp
from workloads.ops.windowed_attention import join_rows, masked, masked_gradient, split_rows


@dataclass(frozen=True, kw_only=True)
class ShiftedGroupAttention(ProvedStagedOp):
    """Self-attention of `len_seq` positions in `num_groups` groups, `num_sinks` seen by all.

    q[batch, num_heads, len_seq, head_dim], k and v alike with num_kv_heads; no sinks by default,
    which is LongLoRA's S^2-Attn. The sinks must lie in one group of the shifted heads.

    >>> op = ShiftedGroupAttention(num_heads=32, len_seq=8192, head_dim=128, num_groups=4,
    ...                            num_sinks=4)
    >>> round(op.min_flops()[BF16] / op.dense().min_flops()[BF16], 4)
    0.2508
    """

    name: ClassVar[str] = "shifted_group_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_groups", "num_kv_heads")
    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_seq: Num
    head_dim: Num
    num_groups: Num = 4
    num_sinks: Num | None = None
    dtype: DType = BF16

    def check(self) -> None:
        """Heads in halves, groups of one length, sinks inside one of them."""
        self.dense()  # refuses heads that do not divide
        if any_true(self.kv_heads % 2 != 0):
            raise InputError(
                f"{self.name}: num_kv_heads = {self.kv_heads} has no half to shift; "
                f"give an even number"
            )
        if any_true((self.len_seq % self.num_groups != 0) | (self.num_groups < 2)):
            raise InputError(
                f"{self.name}: num_groups = {self.num_groups} must be at least 2 and divide "
                f"len_seq = {self.len_seq}; change one of them, or take flash_attention_2"
            )
        if self.num_sinks is not None and any_true(self.num_sinks > self.shift):
            raise InputError(
                f"{self.name}: num_sinks = {self.num_sinks} is more than half a group of "
                f"{self.len_group}; give fewer sinks or fewer groups"
            )

    @property
    def kv_heads(self) -> Num:
        """`num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def len_group(self) -> Num:
        """Positions of a group."""
        return self.len_seq // self.num_groups

    @property
    def shift(self) -> Num:
        """Positions by which the second half of the heads is rolled."""
        return self.len_group // 2

    def _shape(self, batch: Num, len_q: Num, len_kv: Num, causal: bool) -> dict[str, Any]:
        return {
            "batch": batch, "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads,
            "len_q": len_q, "len_kv": len_kv, "head_dim": self.head_dim, "causal": causal,
            "dtype": self.dtype,
        }  # fmt: skip

    def dense(self) -> FlashAttention2:
        """The attention that this one replaces."""
        return FlashAttention2(**self._shape(self.batch, self.len_seq, self.len_seq, True))

    def _shapes(self) -> dict[str, dict[str, Any]]:
        """The attentions: groups as sequences of their own, and the others to the sinks."""
        group = self.len_group
        found = {"groups": self._shape(self.batch * self.num_groups, group, group, True)}
        if self.num_sinks is not None:
            found["sinks"] = self._shape(self.batch, self.len_seq - group, self.num_sinks, False)
        return found

    def parts(self) -> dict[str, FlashAttention2]:
        """The attention kernels by name."""
        return {name: FlashAttention2(**shape) for name, shape in self._shapes().items()}

    def copy(self, heads: Num) -> Elementwise:
        """Half of that many heads copied to their rolled places."""
        elements = self.batch * self.len_seq * (heads // 2) * self.head_dim
        return Elementwise(num_elements=elements, vector_flops_per_element=0, dtype=self.dtype)

    def combine(self) -> CombineParts:
        """Groups and sinks put together, for the rows whose group has no sinks."""
        rows = self.batch * self.num_heads * (self.len_seq - self.len_group)
        return CombineParts(rows=rows, dim=self.head_dim, num_parts=2, dtype=self.dtype)

    def stages(self) -> tuple[Stage, ...]:
        """Roll q, k and v; attend; combine; roll the output back."""
        kernels = [Stage(name, op, kernel=FA2) for name, op in self.parts().items()]
        if self.num_sinks is not None:
            kernels.append(Stage("combine", self.combine()))
        return (
            Stage("shift_q", self.copy(self.num_heads)),
            Stage("shift_kv", self.copy(self.kv_heads), times=2),
            *kernels,
            Stage("reassemble", self.copy(self.num_heads)),
        )

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O of every position once."""
        per_row = 2 * (self.num_heads + self.kv_heads) * self.head_dim
        return self.batch * self.len_seq * per_row * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k and v in the order of the sequence."""
        return self.dense().inputs(rng)

    # ---- addressing ------------------------------------------------------------------------

    def _rolled(self, x: Values, *, back: bool = False) -> Values:
        """x[batch, heads, len, w] with the second half of the heads in the order of its groups."""
        half, shift = x.shape[1] // 2, int(self.shift)
        moved = np.roll(x[:, half:], shift if back else -shift, axis=2)
        return np.concatenate([x[:, :half], moved], axis=1)

    def _far(self, x: Values) -> Values:
        """Of rolled rows, those of groups without the sinks: all but the first, or the last."""
        half, group = x.shape[1] // 2, int(self.len_group)
        return np.concatenate([x[:, :half, group:], x[:, half:, :-group]], axis=1)

    def _with_far(self, x: Values, far: Values) -> Values:
        """Rolled rows with those of `_far` replaced."""
        half, group, found = x.shape[1] // 2, int(self.len_group), x.copy()
        found[:, :half, group:], found[:, half:, :-group] = far[:, :half], far[:, half:]
        return found

    def _sinks(self, x: Values) -> Values:
        """The first rows of the sequence, of every head."""
        sinks = 0 if self.num_sinks is None else int(self.num_sinks)
        return x[:, :, :sinks]

    def _groups(self, x: Values) -> Values:
        return split_rows(x, int(self.num_groups))

    def _copied(self, machine: Machine, x: Values, *, back: bool = False) -> Values:
        """The kernel that rolls one array."""
        found, half = self._rolled(x, back=back), x.shape[1] // 2
        moved = self.copy(x.shape[1]).program(machine, {"x0": found[:, half:].reshape(-1)})
        found[:, half:] = moved["y0"].reshape(found[:, half:].shape)
        return found

    def mask(self) -> Values:
        """[2, len, len]: which key each query sees, in plain and in shifted heads."""
        length, group, shift = int(self.len_seq), int(self.len_group), int(self.shift)
        sinks = 0 if self.num_sinks is None else int(self.num_sinks)
        masks = []
        for moved, home in ((0, 0), (shift, int(self.num_groups) - 1)):
            place = (np.arange(length) - moved) % length
            same = place[:, None] // group == place // group
            far = (place // group != home)[:, None] & (np.arange(length) < sinks)
            masks.append(same & (place <= place[:, None]) | far)
        return np.stack(masks)

    # ---- truth and program -----------------------------------------------------------------

    def _seen(self) -> Values:
        """The masks of all heads."""
        return np.repeat(self.mask(), int(self.num_heads) // 2, axis=0)

    def _forward(self, inputs: Arrays) -> Arrays:
        """Naive: one masked softmax in the order of the sequence."""
        return masked(self.dense(), inputs, self._seen())

    def reference(self, inputs: Arrays) -> Arrays:
        """One masked softmax."""
        return {"o": self._forward(inputs)["o"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        rolled = {n: self._copied(machine, inputs[n]) for n in ("q", "k", "v")}
        parts = self.parts()
        near = parts["groups"].program(machine, {n: self._groups(x) for n, x in rolled.items()})
        found = {n: join_rows(x, int(self.batch)) for n, x in near.items()}
        if "sinks" in parts:
            keys = {n: self._sinks(inputs[n]) for n in ("k", "v")}
            far = parts["sinks"].program(machine, {"q": self._far(rolled["q"]), **keys})
            pairs = {n: (self._far(found[n]), far[n]) for n in ("o", "lse")}
            both = self.combine().program(
                machine,
                {
                    name: np.stack([x.reshape(-1, x.shape[-1]) for x in pairs[n]])
                    for name, n in (("parts", "o"), ("lse", "lse"))
                },
            )
            found["o"] = self._with_far(found["o"], both["o"].reshape(pairs["o"][0].shape))
        return {"o": self._copied(machine, found["o"], back=True)}


@dataclass(frozen=True, kw_only=True)
class ShiftedGroupAttentionBackward(ShiftedGroupAttention):
    """Backward pass: dQ, dK and dV from dO, with the logsumexp over group and sinks.

    The forward pass leaves q, k, v, o and the logsumexp rolled; dO is rolled at the start and the
    gradients are rolled back at the end. Rows that saw the sinks apart add two parts of dQ; the
    sinks' dK and dV add what all of them send.

    >>> shape = dict(num_heads=32, len_seq=8192, head_dim=128, num_groups=4, num_sinks=4)
    >>> forward, backward = ShiftedGroupAttention(**shape), ShiftedGroupAttentionBackward(**shape)
    >>> backward.min_flops()[BF16] / forward.min_flops()[BF16]
    2.5
    """

    name: ClassVar[str] = "shifted_group_attention_backward"

    def gradients(self) -> dict[str, FlashAttention2Backward]:
        """The backward kernels by name."""
        return {name: FlashAttention2Backward(**shape) for name, shape in self._shapes().items()}

    def _total(self, heads: Num, rows: Num) -> Elementwise:
        """The sum of two arrays of that many rows a head."""
        return Elementwise(
            num_elements=self.batch * heads * rows * self.head_dim, num_inputs=2, dtype=self.dtype
        )

    def totals(self) -> dict[str, Elementwise]:
        """What adds the sinks' parts of dQ, and of dK or dV, to those of the groups."""
        if self.num_sinks is None:
            return {}
        return {
            "sum_q": self._total(self.num_heads, self.len_seq - self.len_group),
            "sum_kv": self._total(self.kv_heads, self.num_sinks),
        }

    def stages(self) -> tuple[Stage, ...]:
        """Roll dO, both backward kernels, the sums, roll dQ, dK and dV back."""
        kernels = [Stage(name, op, kernel=FA2) for name, op in self.gradients().items()]
        sums = [Stage(n, op, times=1 + (n == "sum_kv")) for n, op in self.totals().items()]
        return (
            Stage("shift", self.copy(self.num_heads)),
            *kernels,
            *sums,
            Stage("reassemble_q", self.copy(self.num_heads)),
            Stage("reassemble_kv", self.copy(self.kv_heads), times=2),
        )

    def compulsory_bytes(self) -> Num:
        """Q, K, V, O and dO once, dQ, dK and dV once, the logsumexp."""
        per_row = 4 * (self.num_heads + self.kv_heads) * self.head_dim
        row_bytes = per_row * self.dtype.bytes_per_element + self.num_heads * FP32_BYTES
        return self.batch * self.len_seq * row_bytes

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v and do at random, o and lse as the forward pass leaves them, in order."""
        forward = super().inputs(rng)
        found = self._forward(forward)
        return {**forward, **found, "do": rng.standard_normal(found["o"].shape)}

    def reference(self, inputs: Arrays) -> Arrays:
        """The chain rule on whole matrices."""
        return masked_gradient(self.dense(), inputs, self._seen())

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        rolled = {n: self._rolled(inputs[n]) for n in ("q", "k", "v", "o", "lse")}
        rolled["do"] = self._copied(machine, inputs["do"])
        kernels, totals = self.gradients(), self.totals()
        near = kernels["groups"].program(machine, {n: self._groups(x) for n, x in rolled.items()})
        found = {n: join_rows(x, int(self.batch)) for n, x in near.items()}
        if "sinks" in kernels:
            rows = {n: self._far(rolled[n]) for n in ("q", "o", "lse", "do")}
            keys = {n: self._sinks(inputs[n]) for n in ("k", "v")}
            far = kernels["sinks"].program(machine, {**rows, **keys})
            dq = _added(machine, totals["sum_q"], self._far(found["dq"]), far["dq"])
            found["dq"] = self._with_far(found["dq"], dq)
            for name in ("dk", "dv"):
                ordered = self._rolled(found[name], back=True)
                ordered[:, :, : far[name].shape[2]] = _added(
                    machine, totals["sum_kv"], self._sinks(ordered), far[name]
                )
                found[name] = self._rolled(ordered)
        return {n: self._copied(machine, found[n], back=True) for n in ("dq", "dk", "dv")}


def _added(machine: Machine, total: Elementwise, one: Values, other: Values) -> Values:
    """The sum's program on arrays of any shape."""
    found = total.program(machine, {"x0": one.reshape(-1), "x1": other.reshape(-1)})
    summed: Values = found["y0"].reshape(one.shape)
    return summed
