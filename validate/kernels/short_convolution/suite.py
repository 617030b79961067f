"""Short convolutions in the profiling suite, forward and backward, beside torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F

from hwmodels.dtypes import FP32
from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.compiled import compilation
from validate.kernels.short_convolution import kernel, reference
from validate.kernels.spec import TRITON, Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.numeric import Num
from workloads.op import Op
from workloads.ops.short_conv import ACTIVATION_SPECIAL_OPS, ShortConv
from workloads.work import Work

Run = Callable[[], tuple[torch.Tensor, ...]]
FORWARD: Final = "short_convolution"
BACKWARD: Final = "short_convolution_backward"
TOLERANCES: Final = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
SHIPPED: Final = ("bf16", "fp16", "fp32")
NAMES: Final = ("batch", "len_seq", "channels", "width")
GRADIENT_FLOPS: Final = 6
"""Of dz from z, dy and a sigmoid."""


@dataclass(frozen=True, kw_only=True)
class ShortConvGradient(ShortConv):
    """dx, dw and db from x and dy, z made again where a SiLU needs it.

        bytes = 3 B L C e + C W (e + 4) + 4 C,   vector flops = B L C (4 W + 1)
        activation: + 2 W + 6 flops and 2 special functions an element

    x and dy read, dx written; gradients of the few weights are fp32. Ignored: sums of tiles.
    """

    name: ClassVar[str] = "short_conv_gradient"

    def work(self, fast_bytes: Num) -> Work:
        """Counts as in the class docstring, one launch for dx and one for the sums."""
        e, n, act = self.dtype.bytes_per_element, self.elements(), int(self.activation)
        flops = 4 * self.width + 1 + act * (2 * self.width + GRADIENT_FLOPS)
        return Work(
            vector_flops=n * flops,
            special_ops=n * ACTIVATION_SPECIAL_OPS * act,
            read_bytes=(2 * n + self.channels * self.width) * e,
            write_bytes=n * e + self.channels * (self.width + 1) * FP32.bytes_per_element,
            launches=2,
        )

    def compulsory_bytes(self) -> Num:
        """All arrays once."""
        return self.work(0.0).bytes


def case(
    name: str, dtype: str, sizes: tuple[int, ...], *, bias: bool = True, activation: bool = True
) -> Case:
    """A convolution of x[batch, len_seq, channels] by w[channels, width]."""
    params = dict(zip(NAMES, sizes, strict=True))
    flags = {"bias": int(bias), "activation": int(activation)}
    return Case(op=name, dtype=dtype, params={**params, **flags})


def _op(case: Case) -> Op:
    p = case.params
    count = ShortConvGradient if case.op == BACKWARD else ShortConv
    return count(
        **{name: p[name] for name in NAMES}, activation=bool(p["activation"]),
        dtype=format_of(case.dtype),
    )  # fmt: skip


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    batch, length, channels, width = (int(case.params[name]) for name in NAMES)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return formats.random(
            *shape, dtype=case.dtype, generator=generator, device=device, scale=scale
        )  # fmt: skip

    found = {"x": draw(batch, length, channels), "w": draw(channels, width, scale=width**-0.5)}
    if case.params["bias"]:
        found["bias"] = draw(channels)
    if case.op == BACKWARD:
        found["dy"] = draw(batch, length, channels)
    return found


def _silu(case: Case) -> bool:
    return bool(case.params["activation"])


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x, w = inputs["x"].double(), inputs["w"].double()
    bias = inputs["bias"].double() if "bias" in inputs else None
    if case.op == BACKWARD:
        dy = inputs["dy"].double()
        return reference.gradients(x, w, bias, dy, activation=_silu(case))
    return (reference.short_convolution(x, w, bias, activation=_silu(case)),)


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    x, w, bias = inputs["x"], inputs["w"], inputs.get("bias")
    if case.op == BACKWARD:
        return kernel.prepare_backward(x, w, bias, inputs["dy"], launch, silu=_silu(case))
    return kernel.prepare_forward(x, w, bias, launch, silu=_silu(case))


def _launches(case: Case, arch: int) -> Sequence[Launch]:
    given = kernel.BACKWARD_LAUNCHES if case.op == BACKWARD else kernel.LAUNCHES
    return [x for x in given if x.suits(arch)]


def _refusal(case: Case, arch: int) -> str | None:
    wide = case.params["width"] > kernel.MOST_TAPS
    return f"more than {kernel.MOST_TAPS} taps" if wide else None


# ---- torch's -------------------------------------------------------------------------------


def _exact() -> AbstractContextManager[None]:
    """Products of fp32 numbers whole: by default torch lets cuDNN round their operands to tf32."""
    found: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return found


def _torch(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    """torch.conv1d, a group a channel, on its own layout [batch, channels, len_seq]."""
    x = inputs["x"].transpose(1, 2).contiguous()
    w, bias = inputs["w"][:, None], inputs.get("bias")
    channels, _, width = w.shape
    length = x.shape[2]

    def run() -> tuple[torch.Tensor, ...]:
        with _exact():
            y = F.conv1d(x, w, bias, padding=width - 1, groups=channels)[..., :length]
        return ((F.silu(y) if _silu(case) else y).transpose(1, 2),)

    return run


def _torch_backward(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    """torch's gradients of the same, z kept from the forward pass."""
    x = inputs["x"].transpose(1, 2).contiguous()
    dy = inputs["dy"].transpose(1, 2).contiguous()
    w, bias = inputs["w"][:, None].contiguous(), inputs.get("bias")
    channels, _, width = w.shape
    length = x.shape[2]
    z = F.conv1d(x, w, bias, padding=width - 1, groups=channels)[..., :length].contiguous()
    mask = [True, True, bias is not None]
    sizes = None if bias is None else [channels]

    def run() -> tuple[torch.Tensor, ...]:
        dz = torch.ops.aten.silu_backward(dy, z) if _silu(case) else dy
        with _exact():
            dx, dw, db = torch.ops.aten.convolution_backward(
                F.pad(dz, (0, width - 1)), x, w, sizes, [1], [width - 1], [1], False, [0],
                channels, mask,
            )  # fmt: skip
        found = (dx.transpose(1, 2), dw[:, 0])
        return found if bias is None else (*found, db)

    return run


def _row(case: Case) -> tuple[str, str, Mapping[str, Any]] | None:
    """Published rows have neither bias nor activation."""
    p = case.params
    if case.op == BACKWARD or p["activation"] or p["bias"]:
        return None
    params = {
        "batch": p["batch"], "seq": p["len_seq"], "d_model": p["channels"],
        "kernel": p["width"], "layout": "BLH", "direction": "fwd",
    }  # fmt: skip
    return "scan_conv1d", "depthwise_conv1d_fwd", params


# ---- binaries ------------------------------------------------------------------------------

_WIDTHS: Final = (4, 3, 7)
"""Taps of binaries that are inspected: those of state-space models, the least, the most common
long one."""


def _binary(
    name: str, function: Any, dtype: str, launch: Launch, label: str, **constants: Any
) -> Compilation:
    stored = formats.TRITON[dtype]
    pointers = {
        arg: "fp32" if arg == "sums_ptr" or function is kernel.sums_of_rows else stored
        for arg in function.arg_names
        if arg.endswith("_ptr")
    }
    return compilation(name, function, launch, pointers, constants, label)


def _compilations(name: str) -> tuple[Compilation, ...]:
    back, found = name == BACKWARD, []
    function = kernel.backward if back else kernel.forward
    for dtype in SHIPPED:
        for launch in kernel.BACKWARD_LAUNCHES if back else kernel.LAUNCHES:
            for width in _WIDTHS if dtype == "bf16" else _WIDTHS[:1]:
                fixed = {**launch.meta, "WIDTH": width, "BIAS": True, "SILU": True}
                label = f"{dtype}-{width}"
                found.append(_binary(name, function, dtype, launch, label, **fixed))
    if back:
        tile = {"BR": kernel.SUM_ROWS, "BN": kernel.SUM_COLS}
        launch = Launch(num_warps=kernel.SUM_WARPS, num_stages=2)
        found.append(_binary(name, kernel.sums_of_rows, "fp32", launch, "fp32", **tile))
    return tuple(found)


# ---- cases ---------------------------------------------------------------------------------

_CHECKED: Final = (
    ((1, 1, 1, 3), True, True), ((1, 33, 20, 4), True, True), ((1, 32, 64, 4), False, True),
    ((1, 40, 70, 7), True, False), ((3, 2, 20, 5), False, False),
)  # fmt: skip
_TIMED: Final = (
    (1, 256, 768, 4), (1, 4096, 4096, 4), (8, 2048, 1536, 4), (16, 1024, 768, 5),
    (16, 8192, 768, 3), (4, 8192, 4096, 4), (1, 131072, 5120, 4), (16, 8192, 2048, 7),
    (7, 3001, 1000, 4), (16, 8192, 5120, 4),
)  # fmt: skip


def _checks(name: str) -> tuple[Case, ...]:
    return tuple(
        case(name, dtype, sizes, bias=bias, activation=activation)
        for dtype in ("fp32", "fp16")
        for sizes, bias, activation in _CHECKED
    )


def _grid(name: str) -> tuple[Case, ...]:
    found = [
        case(name, "bf16", sizes, bias=flag, activation=flag)
        for sizes in _TIMED
        for flag in (True, False)
    ]
    return (*found, *(case(name, dtype, _TIMED[5]) for dtype in ("fp16", "fp32")))


def _spec(name: str) -> KernelSpec:
    baseline = _torch_backward if name == BACKWARD else _torch
    return KernelSpec(
        name=name, op=_op, inputs=_inputs, reference=_reference,
        implementations=(
            Implementation(name=TRITON, prepare=_prepare, launches=_launches, refusal=_refusal),
            Implementation(name="cudnn", prepare=baseline, vendor="cudnn"),
        ),
        checks=_checks(name), grid=_grid(name), compilations=lambda: _compilations(name),
        tolerances=TOLERANCES, source="Dao and Gu 2024, arXiv 2405.21060, section 7", row=_row,
    )  # fmt: skip


SPECS: Final = (_spec(FORWARD), _spec(BACKWARD))
