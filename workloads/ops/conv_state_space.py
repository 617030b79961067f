"""ConvS5: a linear state space whose state is an image, scanned over the frames of a video.

Smith et al. 2023 (arXiv 2310.19694, section 3). With images u_t[H, W, U], states x_t[H, W, P] of
complex numbers and y_t[H, W, Y],

    x_t = A * x_{t-1} + B * u_t,      y_t = C * x_t          (* a convolution)

    input    B * u_t of all frames at once: one real convolution from U to 2 P channels
    scan     pointwise A (1 x 1, diagonal): over time, for every pixel and channel by itself
    output   C * x_t of all frames: from 2 P real numbers to Y channels

State kernels of k x k compose to kernels of side (k - 1) 2^i + 1 at level i of a parallel scan
(`composed_side`), dense in the channels: such systems run step by step alone. With `recurrent` the
frames run one after another from the state held before them, as in sampling:

    state    the pointwise A on x_{t-1}, or with kernel_a > 1 the convolution A * x_{t-1}, 2 P
             channels to 2 P, and a sum

Ignored: discretising (once for all), D * u_t, the activation and the ResNet block behind a layer;
that JAX multiplies real images by complex kernels with twice the products that are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true, power_of_two, where
from workloads.op import Arrays, Op, ProvedOp, Stage
from workloads.ops.associative_scan import BRENT_KUNG
from workloads.ops.elementwise import Elementwise, add
from workloads.ops.same_conv import SameConv
from workloads.ops.staged import Step, SteppedOp
from workloads.ops.state_scan import COMPLEX, StateScan


@dataclass(frozen=True, kw_only=True)
class ConvStateSpace(SteppedOp):
    """One layer over u[batch, len_seq, height, width, channels]; y has as many channels.

    Convolutions are computed in `math_dtype`, else in the format that all arrays are stored in.

    >>> op = ConvStateSpace(len_seq=300, height=16, width=16, channels=256, state_dim=128)
    >>> input_flops = 2 * 300 * 256 * 9 * 256 * 256      # frames, pixels, taps, U, 2 P
    >>> op.min_flops()[op.dtype] == 2 * input_flops, op.depth(), op.state_bytes() == 2**18
    (True, 17, True)
    """

    name: ClassVar[str] = "conv_state_space"
    cheaper: ClassVar[tuple[str, ...]] = ("chunk",)
    batch: Num = 1
    len_seq: Num
    height: Num
    width: Num
    channels: Num
    state_dim: Num
    kernel_a: Num = 1
    kernel_b: Num = 3
    kernel_c: Num = 3
    chunk: Num = 1024
    algorithm: str = BRENT_KUNG
    recurrent: bool = False
    dtype: DType = FP32
    math_dtype: DType | None = None

    def check(self) -> None:
        """Scans in parallel over pointwise state kernels alone."""
        if not self.recurrent and any_true(self.kernel_a != 1):
            raise InputError(
                f"{self.name}: kernels of kernel_a = {self.kernel_a} grow to (kernel_a - 1) 2^i + 1"
                " in a parallel scan; take kernel_a = 1, or recurrent = true"
            )
        self.scan()

    def composed_side(self, level: int) -> Num:
        """Side of the state kernel that 2^level steps compose to."""
        return (self.kernel_a - 1) * power_of_two(level) + 1

    @property
    def pixels(self) -> Num:
        """Pixels of one frame of every sequence."""
        return self.batch * self.height * self.width

    def state_bytes(self) -> Num:
        """The state that goes from frame to frame: it does not grow with the frames."""
        return self.pixels * COMPLEX * self.state_dim * self.dtype.bytes_per_element

    def depth(self) -> Num:
        """Dependent steps along the frames: combinations of the scan, or frames."""
        return self.len_seq if self.recurrent else self.scan().depth()

    def compulsory_bytes(self) -> Num:
        """Frames in and out, kernels, and in a recurrence the states before and after."""
        e, states = self.dtype.bytes_per_element, COMPLEX * self.state_dim
        taps = self.channels * states * (self.kernel_b**2 + self.kernel_c**2)
        frames = 2 * self.pixels * self.len_seq * self.channels
        state = where(self.kernel_a == 1, states, states**2 * self.kernel_a**2)
        return (frames + taps + state) * e + 2 * self.recurrent * self.state_bytes()

    # ---- stages ------------------------------------------------------------------------------

    @property
    def frames(self) -> Num:
        """Frames that one kernel convolves."""
        return self.batch * (1 if self.recurrent else self.len_seq)

    def convolution(self, inner: Num, outer: Num, side: Num) -> SameConv:
        """Of all frames that run at once."""
        return SameConv(
            batch=self.frames, in_channels=inner, out_channels=outer, height=self.height,
            width=self.width, out_height=self.height, out_width=self.width, kernel_h=side,
            kernel_w=side, dtype=self.dtype, math_dtype=self.math_dtype,
        )  # fmt: skip

    def scan(self) -> StateScan:
        """Over all frames from nothing, or one frame from the state held."""
        return StateScan(
            rows=self.pixels, len_seq=1 if self.recurrent else self.len_seq,
            state_dim=self.state_dim, chunk=self.chunk, algorithm=self.algorithm,
            held=self.recurrent, dtype=self.dtype,
        )  # fmt: skip

    def sum(self) -> Elementwise:
        """A * x and B * u."""
        return add(self.pixels * COMPLEX * self.state_dim, self.dtype)

    def stages(self) -> tuple[Stage, ...]:
        """Each once, or once a frame."""
        times = self.len_seq if self.recurrent else 1
        states = COMPLEX * self.state_dim
        state = [Stage("scan", self.scan(), times)]
        if any_true(self.kernel_a != 1):
            moved = self.convolution(states, states, self.kernel_a)
            state = [Stage("state", moved, times), Stage("sum", self.sum(), times)]
        return (
            Stage("input", self.convolution(self.channels, states, self.kernel_b), times),
            *state,
            Stage("output", self.convolution(states, self.channels, self.kernel_c), times),
        )

    # ---- the program -------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Frames u, kernels b and c, decays or kernels a, and in a recurrence the state x0."""

        def normal(*shape: Num) -> Values:
            return rng.standard_normal([int(n) for n in shape])

        states, image = COMPLEX * self.state_dim, (self.batch, self.height, self.width)
        kb, kc, ka = self.kernel_b, self.kernel_c, self.kernel_a
        made = {
            "u": normal(self.batch, self.len_seq, self.height, self.width, self.channels),
            "b": normal(kb, kb, self.channels, states),
            "c": normal(kc, kc, states, self.channels),
            "a": self.scan().inputs(rng)["a"] if ka == 1 else 0.1 * normal(ka, ka, states, states),
        }
        return made | ({"x0": normal(*image, states)} if self.recurrent else {})

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """All frames through every stage, or frame after frame."""
        u, ops = inputs["u"], {stage.name: stage.op for stage in self.stages()}
        if not self.recurrent:
            return {"y": self._frames(step, ops, inputs, u, None)[1]}
        state, found = inputs["x0"], []
        for t in range(u.shape[1]):
            state, y = self._frames(step, ops, inputs, u[:, t : t + 1], state)
            found.append(y)
        return {"y": np.concatenate(found, axis=1), "state": state}

    def _frames(
        self, step: Step, ops: dict[str, Op], inputs: Arrays, u: Values, before: Values | None
    ) -> tuple[Values, Values]:
        """The last states and the outputs of frames u, which run at once."""
        images = (int(self.frames), *u.shape[2:])
        entered = step(_proved(ops["input"]), {"x": u.reshape(images), "w": inputs["b"]})["y"]
        if "scan" in ops:
            x = self._scanned(step, ops["scan"], entered, inputs["a"], before)
        else:
            assert before is not None  # a frame of a recurrence
            kept = step(_proved(ops["state"]), {"x": before, "w": inputs["a"]})["y"]
            pair = {"x0": kept.reshape(-1), "x1": entered.reshape(-1)}
            x = step(_proved(ops["sum"]), pair)["y0"].reshape(entered.shape)
        y = step(_proved(ops["output"]), {"x": x, "w": inputs["c"]})["y"]
        last = x.reshape(*u.shape[:2], *x.shape[1:])[:, -1]
        return last, y.reshape(u.shape)

    def _scanned(
        self, step: Step, op: Op, entered: Values, decay: Values, before: Values | None
    ) -> Values:
        """States of all frames; a row of the scan is one pixel, a change of order addressing."""
        batch, states = int(self.batch), entered.shape[-1]
        by_frame = entered.reshape(batch, -1, *entered.shape[1:])
        by_pixel = np.moveaxis(by_frame, 1, 3)  # batch, height, width, frames, states
        given = {"u": by_pixel.reshape(int(self.pixels), -1, states), "a": decay}
        if before is not None:
            given["x0"] = before.reshape(-1, states)
        x = step(_proved(op), given)["x"].reshape(by_pixel.shape)
        return np.moveaxis(x, 3, 1).reshape(entered.shape)


def _proved(op: Op) -> ProvedOp:
    assert isinstance(op, ProvedOp)
    return op
