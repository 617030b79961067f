"""A layer of linear state spaces, one a channel: by convolution, or step by step.

    y_k = sum_{j <= k} K_{k - j} u_j + D u_k,      K_k = C A^k B

    kernel    K of every channel, in each call (training; a trained model keeps it): `StateKernel`
    convolve  with a library's FFTs: `FFTConvolution`
    skip      D u, added

With `recurrent` the steps run one after another from the states held, as in generation: O(N) a step
and channel for S4 and SpaceTime, O(N^2) for a dense A (two products [A B] [x u], [C D] [x' u]).

S4 (Gu et al. 2022, arXiv 2111.00396), LSSL (Gu et al. 2021, arXiv 2110.13985; one output channel a
feature), SpaceTime (Zhang et al. 2023, arXiv 2303.09489). Ignored: activations and the mixing of
channels around it; SpaceTime's closed-loop forecasting layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values, slices
from workloads.numeric import Num, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.fft_convolution import FFTConvolution
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.staged import Step, SteppedOp
from workloads.ops.state_kernel import CAUCHY, KRYLOV, StateKernel
from workloads.ops.state_spaces import (
    DENSE,
    LOW_RANK,
    complex_vectors,
    dense_form,
    num_parameters,
    random_system,
    step_numbers,
)
from workloads.ops.state_step import FP32_BYTES, SKIP_FLOPS, StateStep, as_stream
from workloads.ops.streamed import Lanes
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class SkipTerm(ProvedOp):
    """y + d u for y, u[batch, channels, len_seq] and d[channels] in fp32.

    >>> SkipTerm(batch=2, channels=8, len_seq=64).work(2**10).bytes == 2 * 8 * 64 * 12 + 8 * 4
    True
    """

    name: ClassVar[str] = "skip_term"
    batch: Num = 1
    channels: Num
    len_seq: Num
    dtype: DType = FP32

    @property
    def array_bytes(self) -> Num:
        """One of the arrays."""
        return self.batch * self.channels * self.len_seq * self.dtype.bytes_per_element

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a pointwise kernel of the same counts."""
        return (Stage("skip", as_stream(self.work(float(2**52)))),)

    def tiling(self, fast_bytes: Num) -> dict[str, Num]:
        """Elements of a row at a time."""
        each = 3 * self.dtype.bytes_per_element
        require_fit(self.name, fast_bytes, FP32_BYTES + each, "one element of every array")
        return {"chunk": minimum(self.len_seq, floor((fast_bytes - FP32_BYTES) / each))}

    def work(self, fast_bytes: Num) -> Work:
        """Arrays once, d once."""
        self.tiling(fast_bytes)
        return Work(
            vector_flops=self.batch * self.channels * self.len_seq * SKIP_FLOPS,
            read_bytes=2 * self.array_bytes + self.channels * FP32_BYTES,
            write_bytes=self.array_bytes,
        )

    def compulsory_bytes(self) -> Num:
        """Arrays once, d once."""
        return 3 * self.array_bytes + self.channels * FP32_BYTES

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """y, u and d."""
        shape = (int(self.batch), int(self.channels), int(self.len_seq))
        y, u = rng.standard_normal((2, *shape))
        return {"y": y, "u": u, "d": rng.standard_normal(shape[1])}

    def reference(self, inputs: Arrays) -> Arrays:
        """With NumPy."""
        return {"y": inputs["y"] + inputs["d"][:, None] * inputs["u"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: d of a channel stays while its rows pass."""
        y, u = (machine.place(inputs[name], self.dtype) for name in ("y", "u"))
        d, out = machine.place(inputs["d"], FP32), machine.empty(inputs["y"].shape, self.dtype)
        chunk = int(self.tiling(machine.fast_bytes)["chunk"])
        with machine.kernel():
            for channel in range(int(self.channels)):
                with machine.scope():
                    factor = Lanes(machine, machine.load(d, channel).values)
                    for row in range(int(self.batch)):
                        for part in slices(int(self.len_seq), chunk):
                            with machine.scope():
                                at = (row, channel, part)
                                left, right = (
                                    Lanes(machine, machine.load(a, at).values) for a in (y, u)
                                )
                                found = left + right * factor
                                machine.store(found.keep(self.dtype), out, at)
        return {"y": out.values}


@dataclass(frozen=True, kw_only=True)
class StateSpaceLayer(SteppedOp):
    """y[batch, channels, len_seq] from u of that shape; parameters and states in fp32.

    `kernel_kept` leaves the kernel's making out, as where a trained model is used.

    >>> op = StateSpaceLayer(batch=4, channels=512, len_seq=4096, state_dim=64)
    >>> op.state_bytes() == 4 * 512 * 64 * 4
    True
    >>> step = op.over(recurrent=True, len_seq=1)
    >>> step.work(2**16).vector_flops == 4 * 512 * (18 * 64 + 2)
    True
    """

    name: ClassVar[str] = "state_space_layer"
    batch: Num = 1
    channels: Num
    len_seq: Num
    state_dim: Num = 64
    method: str = CAUCHY
    recurrent: bool = False
    kernel_kept: bool = False
    dtype: DType = FP32
    math_dtype: DType | None = None

    def check(self) -> None:
        """What the kernel takes; one of the two ways."""
        if self.recurrent and self.kernel_kept:
            raise InputError(
                f"{self.name}: a recurrence has no kernel; leave recurrent or kernel_kept out"
            )
        self.kernel()
        self.stages()

    @property
    def structure(self) -> str:
        """Of A."""
        return self.kernel().structure

    def kernel(self) -> StateKernel:
        """Of all channels."""
        return StateKernel(
            channels=self.channels, state_dim=self.state_dim, len_seq=self.len_seq,
            method=self.method, math_dtype=self.math_dtype,
        )  # fmt: skip

    def convolution(self) -> FFTConvolution:
        """Of all rows."""
        return FFTConvolution(
            batch=self.batch, channels=self.channels, len_seq=self.len_seq, dtype=self.dtype
        )

    def skip(self) -> SkipTerm:
        """D u."""
        return SkipTerm(
            batch=self.batch, channels=self.channels, len_seq=self.len_seq, dtype=self.dtype
        )

    def step_op(self) -> StateStep:
        """One token through structured systems."""
        return StateStep(
            batch=self.batch, channels=self.channels, state_dim=self.state_dim,
            structure=self.structure, dtype=self.dtype,
        )  # fmt: skip

    def product(self, rows: Num) -> BatchedMatmul:
        """One token through dense ones: [A B] [x u], and [C D] [x u]."""
        return BatchedMatmul(
            batch=self.channels, m=rows, n=self.batch, k=self.state_dim + 1, dtype=FP32,
            math_dtype=self.math_dtype,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Kernel, convolution, skip; or the steps."""
        if self.recurrent and self.method == KRYLOV:
            move, read = self.product(self.state_dim), self.product(1)
            return Stage("move", move, self.len_seq), Stage("read", read, self.len_seq)
        if self.recurrent:
            return (Stage("step", self.step_op(), self.len_seq),)
        made = () if self.kernel_kept else (Stage("kernel", self.kernel()),)
        return (*made, Stage("convolve", self.convolution()), Stage("skip", self.skip()))

    def state_bytes(self) -> Num:
        """What generation keeps, whatever the length."""
        return self.batch * self.channels * self.state_dim * FP32_BYTES

    def compulsory_bytes(self) -> Num:
        """u and y, parameters (or kernels) and D; in a recurrence states before and after."""
        e = (
            FP32.bytes_per_element
            if self.recurrent and self.method == KRYLOV
            else (self.dtype.bytes_per_element)
        )
        moved = 2 * self.batch * self.channels * self.len_seq * e
        if self.recurrent:
            numbers = step_numbers(self.structure, self.state_dim) + 1
            return moved + self.channels * numbers * FP32_BYTES + 2 * self.state_bytes()
        kernel = self.channels * self.len_seq * FP32_BYTES
        made = self.kernel().compulsory_bytes() - kernel
        return moved + self.channels * FP32_BYTES + (kernel if self.kernel_kept else made)

    def num_parameters(self) -> Num:
        """Of all systems, D included."""
        return self.channels * (num_parameters(self.structure, self.state_dim) + 1)

    # ---- the program -------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """u, d, the parameters of `state_spaces`, in a recurrence the states x."""
        batch, channels, n = int(self.batch), int(self.channels), int(self.state_dim)
        system = random_system(self.structure, rng, channels, n)
        made = {
            "u": rng.standard_normal((batch, channels, int(self.len_seq))),
            "d": rng.standard_normal(channels),
        }
        if self.recurrent:
            made["x"] = rng.standard_normal((batch, channels, n))
        return made | dict(system)

    def reference(self, inputs: Arrays) -> Arrays:
        """The recurrence with plain matrices, step after step in float64."""
        found, u = dense_form(self.structure, inputs), inputs["u"]
        state = np.zeros((*u.shape[:2], int(self.state_dim)), dtype=found.a.dtype)
        if self.recurrent:
            state = self._whole(inputs["x"])
        y = np.empty_like(u)
        for t in range(u.shape[2]):
            state = np.einsum("hij,bhj->bhi", found.a, state) + found.b * u[:, :, t, None]
            y[:, :, t] = np.real((found.c * state).sum(axis=2)) + inputs["d"] * u[:, :, t]
        return {"y": y} | ({"x": self._halved(state)} if self.recurrent else {})

    def _whole(self, x: Values) -> Values:
        """States with the other half of every pair."""
        if self.structure != LOW_RANK:
            return x
        half = complex_vectors(x.reshape(*x.shape[:2], 2, -1))
        return np.concatenate([half, half.conj()], axis=-1)

    def _halved(self, x: Values) -> Values:
        if self.structure != LOW_RANK:
            return x
        half = x[..., : x.shape[-1] // 2]
        return np.concatenate([half.real, half.imag], axis=-1)

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """All at once, or token after token."""
        if self.recurrent:
            return self._tokens(step, inputs)
        system = {name: v for name, v in inputs.items() if name not in ("u", "d")}
        # a kernel that is kept was made before, and is not counted
        k = self.kernel().reference(system) if self.kernel_kept else step(self.kernel(), system)
        y = step(self.convolution(), {"u": inputs["u"], "k": k["k"]})["y"]
        return step(self.skip(), {"y": y, "u": inputs["u"], "d": inputs["d"]})

    def _tokens(self, step: Step, inputs: Arrays) -> Arrays:
        state, found = inputs["x"], []
        rest = {name: v for name, v in inputs.items() if name not in ("u", "x")}
        for t in range(int(self.len_seq)):
            u = inputs["u"][:, :, t]
            if self.structure == DENSE:
                y, state = self._dense_step(step, rest, state, u)
            else:
                moved = step(self.step_op(), {**rest, "u": u, "x": state})
                y, state = moved["y"], moved["x"]
            found.append(y)
        return {"y": np.stack(found, axis=2), "x": state}

    def _dense_step(
        self, step: Step, system: Arrays, state: Values, u: Values
    ) -> tuple[Values, Values]:
        """Products with a column of u more; side by side is addressing."""
        move = np.concatenate([system["a"], system["b"][:, :, None]], axis=2)
        read = np.concatenate([system["c"], system["d"][:, None]], axis=1)[:, None]
        given = np.concatenate([state, u[:, :, None]], axis=2).transpose(1, 2, 0)
        moved = step(self.product(self.state_dim), {"a": move, "b": given})["c"]
        after = np.concatenate([moved, given[:, -1:]], axis=1)
        y = step(self.product(1), {"a": read, "b": after})["c"][:, 0]
        return y.T, moved.transpose(2, 0, 1)
