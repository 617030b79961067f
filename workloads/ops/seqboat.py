"""SeqBoat: attention that only the tokens a gate switches on take part in.

Ren et al. 2023 (arXiv 2306.11197, sections 3.1 and 3.2: sparse modular activation). A state-space
layer mixes all L tokens; a linear gate reads its output and switches on a share r of them. These
are packed side by side, pass a gated attention unit (Hua et al. 2022, arXiv 2202.10447) with a
window of w, and are added back to where they came from:

    scan, mix, gate   all L tokens      2 L d (d + 1) flops
    project           r L tokens        2 r L d (z + 2 e)       shared query and key, values, gate
    attend            r L tokens        2 r L w (z + e)         less where the window is not full
    output            r L tokens        2 r L e d

with width d, z = d / 4 and e = 2 d where nothing else is said (MEGA's proportions, which the paper
takes): O(L d^2 + r L w d), linear in L. What r is, training decides, differently for every layer
and task: `active_frac` and `window` are for the asker to set, their defaults no figures of the
paper. The gate's threshold is run as the top-k of the share it keeps. The state-space layer is one
exponential mean a channel with its decay read along (the paper: several states a channel, decays
fixed). Ignored: the unit's normalisations, scales and rotary positions, SiLU on values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, DType
from workloads.machine import Machine, Values
from workloads.numeric import Num, ceil_div, minimum
from workloads.op import Arrays, ProvedOp, Stage
from workloads.ops.associative_scan import SEQUENTIAL, AssociativeScan
from workloads.ops.elementwise import Elementwise, add, silu_mul
from workloads.ops.matmul import Matmul
from workloads.ops.selection import rounded
from workloads.ops.staged import Step, SteppedOp
from workloads.ops.structured import moved
from workloads.ops.top_k import TopK
from workloads.ops.windowed_attention import WindowedAttention


@dataclass(frozen=True, kw_only=True)
class SeqBoat(SteppedOp):
    """One layer over x[batch, len_seq, dim]; `qk_dim` left out is dim / 4, `expansion` is e / d.

    >>> op = SeqBoat(len_seq=8192, dim=512, active_frac=0.25, window=256)
    >>> op.num_active, op.attend().num_pairs()       # 2048 x 256 less the first window's rest
    (2048, 491648)
    """

    name: ClassVar[str] = "seqboat"
    batch: Num = 1
    len_seq: Num
    dim: Num
    active_frac: Num = 0.25
    window: Num = 256
    qk_dim: Num | None = None
    expansion: Num = 2
    dtype: DType = BF16

    @property
    def num_active(self) -> Num:
        """Tokens of a sequence that are switched on."""
        return minimum(rounded(self.active_frac * self.len_seq), self.len_seq)

    @property
    def key_dim(self) -> Num:
        """Width of the shared query and key."""
        return ceil_div(self.dim, 4) if self.qk_dim is None else self.qk_dim

    @property
    def value_dim(self) -> Num:
        """Width of values and gate."""
        return self.expansion * self.dim

    def compulsory_bytes(self) -> Num:
        """Input, output and weights once."""
        rows = 2 * self.batch * self.len_seq * self.dim
        weights = self.dim * (self.dim + 1 + self.key_dim + 3 * self.value_dim)
        return (rows + weights) * self.dtype.bytes_per_element

    # ---- kernels ---------------------------------------------------------------------------

    def _linear(self, tokens: Num, cols: Num, inner: Num) -> Matmul:
        return Matmul(m=self.batch * tokens, n=cols, k=inner, dtype=self.dtype)

    def attend(self) -> WindowedAttention:
        """Attention over the packed tokens, one head."""
        active = self.num_active
        return WindowedAttention(
            batch=self.batch, num_heads=1, len_q=active, head_dim=self.key_dim,
            head_dim_v=self.value_dim, window=minimum(self.window, active), dtype=self.dtype,
        )  # fmt: skip

    def kernels(self) -> dict[str, ProvedOp]:
        """All stages by name, in the order they run."""
        d, e, active = self.dim, self.value_dim, self.num_active
        picked = self.batch * active
        return {
            "scan": AssociativeScan(
                batch=self.batch * d, len_seq=self.len_seq, algorithm=SEQUENTIAL, dtype=self.dtype
            ),
            "mix": self._linear(self.len_seq, d, d),
            "gate": self._linear(self.len_seq, 1, d),
            "select": TopK(rows=self.batch, cols=self.len_seq, k=active, dtype=self.dtype),
            "pack": Elementwise(
                num_elements=picked * d, vector_flops_per_element=0, dtype=self.dtype
            ),
            "project": self._linear(active, self.key_dim + 2 * e, d),
            "attend": self.attend(),
            "multiply": silu_mul(picked * e, self.dtype),
            "output": self._linear(active, d, e),
            "add": add(picked * d, self.dtype),
        }

    def stages(self) -> tuple[Stage, ...]:
        """Every kernel once."""
        return tuple(Stage(name, op) for name, op in self.kernels().items())

    # ---- truth and program -----------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """x[batch, len_seq, dim], decays of the channels, and the four weights."""
        ops, d = self.kernels(), int(self.dim)
        found = {
            name: rng.standard_normal((int(ops[name].k), int(ops[name].n))) / d**0.5  # type: ignore[attr-defined]
            for name in ("mix", "gate", "project", "output")
        }
        shape = (int(self.batch), int(self.len_seq), d)
        return found | {"x": rng.standard_normal(shape), "decay": rng.uniform(0.1, 0.9, d)}

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Mix all tokens, pack the active ones, attend, add them back."""
        ops, batch, d = self.kernels(), int(self.batch), int(self.dim)

        def linear(name: str, rows: Values) -> Values:
            flat = rows.reshape(1, -1, rows.shape[-1])
            return step(ops[name], {"a": flat, "b": inputs[name][None]})["c"].reshape(
                *rows.shape[:-1], -1
            )

        mixed = linear("mix", self._scanned(step, ops["scan"], inputs))
        scores = linear("gate", mixed)[..., 0]
        active = step(ops["select"], {"x": scores})["index"].astype(np.int64)
        picked = np.take_along_axis(mixed, active[..., None], axis=1)
        pack = ops["pack"]
        assert isinstance(pack, Elementwise)
        packed = moved(step, pack, picked)
        z, e = int(self.key_dim), int(self.value_dim)
        shared, value, gate = np.split(linear("project", packed), [z, z + e], axis=-1)
        heads = {"q": shared[:, None], "k": shared[:, None], "v": value[:, None]}
        o = step(ops["attend"], heads)["o"].reshape(gate.shape)
        given = {"x0": gate.reshape(-1), "x1": o.reshape(-1)}
        out = linear("output", step(ops["multiply"], given)["y0"].reshape(gate.shape))
        total = step(ops["add"], {"x0": packed.reshape(-1), "x1": out.reshape(-1)})["y0"]
        found = mixed.copy()
        np.put_along_axis(found, active[..., None], total.reshape(batch, -1, d), axis=1)
        return {"y": found}

    def _scanned(self, step: Step, scan: ProvedOp, inputs: Arrays) -> Values:
        """h_t = a h_{t-1} + x_t of every channel."""
        x = inputs["x"].swapaxes(1, 2)
        flat = x.reshape(-1, int(self.len_seq), 1)
        decay = np.broadcast_to(inputs["decay"][:, None], x.shape).reshape(flat.shape)
        found = step(scan, {"v0": decay, "v1": flat})["v1"]
        return found.reshape(x.shape).swapaxes(1, 2)
