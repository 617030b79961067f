"""cuDNN's image convolutions in the profiling suite, for their records: none of ours is beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F

from hwmodels.dtypes import FP32, TF32
from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.spec import Implementation, Inputs, KernelSpec, Launch
from validate.kernels.vendor_convolution.reference import convolution, output_size
from validate.record import Case
from workloads.op import Op
from workloads.ops.conv2d import DIRECTIONS, Conv2d

NAMES: Final = ("n", "c", "h", "w", "k", "r", "s", "pad_h", "pad_w", "stride_h", "stride_w")
LAYOUTS: Final = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
TOLERANCES: Final = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
"""fp32 as wide as Winograd's algorithm needs."""


def case(direction: str, dtype: str, sizes: tuple[int, ...], layout: str = "nchw") -> Case:
    """One direction of a convolution; sizes as `NAMES`."""
    params = {**dict(zip(NAMES, sizes, strict=True)), "layout": layout}
    return Case(op=f"conv2d_{direction}", dtype=dtype, params=params)


def _direction(case: Case) -> str:
    return case.op.removeprefix("conv2d_")


def _op(case: Case) -> Op:
    """The library times its algorithms and takes the fastest: 'best'."""
    p = case.params
    out_h, out_w = output_size(case)
    return Conv2d(
        batch=p["n"], in_channels=p["c"], height=p["h"], width=p["w"], out_channels=p["k"],
        out_height=out_h, out_width=out_w, kernel_h=p["r"], kernel_w=p["s"],
        stride=max(p["stride_h"], p["stride_w"]), direction=_direction(case), algorithm="best",
        dtype=FP32 if case.dtype == "tf32" else format_of(case.dtype),
        math_dtype=TF32 if case.dtype == "tf32" else None,
    )  # fmt: skip


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    p, layout = case.params, LAYOUTS[case.params["layout"]]

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = formats.random(
            *shape, dtype=case.dtype, generator=generator, device=device, scale=scale
        )  # fmt: skip
        return drawn.contiguous(memory_format=layout)

    return {
        "x": draw(p["n"], p["c"], p["h"], p["w"]),
        "w": draw(p["k"], p["c"], p["r"], p["s"], scale=(p["c"] * p["r"] * p["s"]) ** -0.5),
        "dy": draw(p["n"], p["k"], *output_size(case)),
    }


def _steps(case: Case) -> tuple[tuple[int, int], tuple[int, int]]:
    """Stride and padding."""
    p = case.params
    return (p["stride_h"], p["stride_w"]), (p["pad_h"], p["pad_w"])


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    x, w, dy = inputs["x"], inputs["w"], inputs["dy"]
    return (convolution(_direction(case), x, w, dy, *_steps(case)),)


def _prepare(
    case: Case, inputs: Inputs, launch: Launch | None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The fastest algorithm that cuDNN finds by trying, tf32 only where the case says so."""
    x, w, dy = inputs["x"], inputs["w"], inputs["dy"]
    stride, padding = _steps(case)
    direction, tf32 = _direction(case), case.dtype == "tf32"
    wanted = [direction == "bwd_data", direction == "bwd_weight", False]

    def run() -> tuple[torch.Tensor, ...]:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            if direction == "fwd":
                return (F.conv2d(x, w, stride=stride, padding=padding),)
            found = torch.ops.aten.convolution_backward(
                dy, x, w, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
            )
        return (found[0] if direction == "bwd_data" else found[1],)

    return run


def _row(case: Case) -> tuple[str, str, Mapping[str, Any]]:
    params = {name: case.params[name] for name in NAMES}
    return "conv2d", case.op, {**params, "layout": case.params["layout"]}


_CHECKED: Final = (
    (1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1), (2, 3, 9, 7, 5, 3, 3, 1, 1, 1, 1),
    (1, 4, 12, 20, 6, 5, 3, 2, 1, 2, 2), (3, 2, 8, 8, 4, 1, 1, 0, 0, 2, 2),
)  # fmt: skip
_TIMED: Final = (
    (32, 3, 224, 224, 64, 7, 7, 3, 3, 2, 2), (32, 64, 56, 56, 64, 3, 3, 1, 1, 1, 1),
    (32, 256, 56, 56, 128, 1, 1, 0, 0, 2, 2), (32, 128, 28, 28, 128, 3, 3, 1, 1, 1, 1),
    (32, 512, 7, 7, 512, 3, 3, 1, 1, 1, 1), (128, 256, 14, 14, 1024, 1, 1, 0, 0, 1, 1),
    (16, 32, 341, 79, 32, 5, 10, 0, 0, 2, 2), (8, 320, 64, 64, 320, 3, 3, 1, 1, 1, 1),
)  # fmt: skip
"""Layers of ResNet-50 (a first one, 3 x 3, 1 x 1, strided), of a speech model, of a diffusion
model."""


def _grid(direction: str) -> tuple[Case, ...]:
    half = [case(direction, "bf16", sizes, "nhwc") for sizes in _TIMED]
    other = [case(direction, "fp16", sizes, "nchw") for sizes in _TIMED[1:4]]
    wide = [case(direction, dtype, _TIMED[3]) for dtype in ("fp32", "tf32")]
    return (*half, *other, *wide)


def _spec(direction: str) -> KernelSpec:
    return KernelSpec(
        name=f"conv2d_{direction}", op=_op, inputs=_inputs, reference=_reference,
        implementations=(Implementation(name="cudnn", prepare=_prepare, vendor="cudnn"),),
        checks=tuple(
            case(direction, dtype, sizes, layout)
            for dtype in ("fp32", "fp16")
            for layout in LAYOUTS
            for sizes in _CHECKED
        ),
        grid=_grid(direction), compilations=lambda: (), tolerances=TOLERANCES,
        source="Chetlur et al. 2014, arXiv 1410.0759 (cuDNN)", row=_row,
    )  # fmt: skip


SPECS: Final = tuple(_spec(direction) for direction in DIRECTIONS)
