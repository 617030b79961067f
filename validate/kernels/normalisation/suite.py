"""The row reductions as profiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F

from hwmodels import dtypes
from validate.kernels import formats
from validate.kernels.normalisation import kernel, norm, reference, softmax
from validate.kernels.spec import Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.ops.norm import LayerNorm, RmsNorm
from workloads.ops.norm_backward import RmsNormBackward
from workloads.ops.softmax import Softmax
from workloads.ops.softmax_backward import SoftmaxBackward

Run = Callable[[], tuple[torch.Tensor, ...]]
FORMATS: Final = ("bf16", "fp16", "fp32")
TOLERANCES: Final = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
SPREAD: Final = 3.0
"""Standard deviation of logits."""


def _case(op: str, dtype: str, rows: int, cols: int) -> Case:
    return Case(op=op, dtype=dtype, params={"rows": rows, "cols": cols})


def _shape(case: Case) -> tuple[int, int]:
    return int(case.params["rows"]), int(case.params["cols"])


def _sizes(case: Case) -> dict[str, Any]:
    rows, cols = _shape(case)
    return {"rows": rows, "cols": cols, "dtype": dtypes.dtype(case.dtype)}


def _row(case: Case) -> tuple[str, str, Mapping[str, Any]]:
    rows, cols = _shape(case)
    return "elementwise", case.op, {"rows": rows, "cols": cols, "elements": rows * cols}


def _normal(
    case: Case, generator: torch.Generator, device: torch.device, *shape: int, scale: float = 1.0
) -> torch.Tensor:
    dtype = case.dtype
    return formats.random(*shape, dtype=dtype, generator=generator, device=device, scale=scale)


def _forward_launches(case: Case, arch: int) -> tuple[Launch, ...]:
    return kernel.fitting(kernel.WHOLE, kernel.CHUNKED, _shape(case)[1])


def _softmax_launches(case: Case, arch: int) -> tuple[Launch, ...]:
    return kernel.fitting(kernel.SOFTMAX, kernel.CHUNKED, _shape(case)[1])


def _layer_launches(case: Case, arch: int) -> tuple[Launch, ...]:
    return kernel.fitting(kernel.LAYER, kernel.CHUNKED, _shape(case)[1])


def _backward_launches(case: Case, arch: int) -> tuple[Launch, ...]:
    return kernel.fitting(kernel.BACKWARD, kernel.CHUNKED, _shape(case)[1])


_RAGGED: Final = (
    (1, 1), (17, 100), (3, 1024), (5, 1025), (2, 3000), (9, 128), (1, 5000), (1, 8193), (1, 17_000),
)  # fmt: skip
_SMALL: Final = ((7, 77), (3, 4096))
_SHAPES: Final = (
    (16, 4096), (256, 4096), (4096, 1024), (4096, 4096), (4096, 8192), (16384, 128),
    (16384, 1024), (16384, 4096), (16384, 5120), (16384, 8192), (65536, 4096), (65536, 8192),
    (4096, 16384), (8192, 32768), (2048, 131072),
)  # fmt: skip


def _gradient_checks(op: str) -> tuple[Case, ...]:
    """Without single columns, whose gradients cancel to nothing."""
    return tuple(c for c in _checks(op) if 1 < _shape(c)[1] <= 5000)


def _checks(op: str) -> tuple[Case, ...]:
    whole = [_case(op, "fp32", *shape) for shape in _RAGGED]
    return (*whole, *(_case(op, d, *shape) for d in ("fp16", "bf16") for shape in _SMALL))


def _grid(op: str) -> tuple[Case, ...]:
    found = [_case(op, "bf16", *shape) for shape in _SHAPES]
    found += [_case(op, dtype, *shape) for dtype in ("fp16", "fp32") for shape in _SHAPES[3:11:3]]
    return tuple(sorted(found, key=lambda c: _shape(c)[0] * _shape(c)[1]))


_SIZE: Final = {"rows": "i32", "cols": "i32"}
_LONG: Final = {"cols": "i32"}


def _compiled(
    spec: str, function: Any, arrays: str, scalars: Mapping[str, str], launch: Launch, dtype: str,
    *, wide: tuple[str, ...] = (),
) -> Compilation:  # fmt: skip
    """`arrays` are the pointer arguments; those of `wide` are float32."""
    stored = "*" + formats.TRITON[dtype]
    pointers = {name: "*fp32" if name in wide else stored for name in arrays.split()}
    fixed = kernel.constants(launch) if "STAGES" in function.arg_names else launch.meta
    return Compilation(
        kernel=spec,
        function=function,
        signature={**pointers, **scalars, **dict.fromkeys(fixed, "constexpr")},
        constants=fixed,
        launch=launch,
        aligned=(*pointers, *(name for name in scalars if name == "cols")),
        label=dtype,
    )


def _both(
    spec: str, whole: Any, chunked: Any, arrays: str, launches: tuple[Launch, ...],
    scalars: Mapping[str, str], *, wide: tuple[str, ...] = (), partial: str = "",
) -> tuple[Compilation, ...]:  # fmt: skip
    """Every format and launch of a kernel in its two forms; `partial` only the first takes."""
    rows, long = {**_SIZE, **scalars}, {**_LONG, **scalars}
    return tuple(
        _compiled(spec, whole, f"{arrays} {partial}", rows, x, dtype, wide=wide)
        if kernel.whole(x)
        else _compiled(spec, chunked, arrays, long, x, dtype, wide=wide)
        for dtype in FORMATS
        for x in (*launches, *kernel.CHUNKED)
    )


# ---- softmax -------------------------------------------------------------------------------


def _logits(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    return {"x": _normal(case, generator, device, *_shape(case), scale=SPREAD)}


def _softmax_prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    return kernel.prepare_softmax(inputs["x"], launch)


def _softmax_compilations() -> tuple[Compilation, ...]:
    return _both(
        "softmax", softmax.softmax_rows, softmax.softmax_chunks, "x_ptr y_ptr", kernel.SOFTMAX, {}
    )


SOFTMAX: Final = KernelSpec(
    name="softmax",
    op=lambda case: Softmax(**_sizes(case)),
    inputs=_logits,
    reference=lambda case, inputs: (reference.softmax(inputs["x"]),),
    implementations=(
        Implementation(name="triton", prepare=_softmax_prepare, launches=_softmax_launches),
        Implementation(
            name="torch",
            prepare=lambda case, inputs, launch: lambda: (F.softmax(inputs["x"], dim=-1),),
            vendor="torch",
        ),
    ),
    checks=_checks("softmax"),
    grid=_grid("softmax"),
    compilations=_softmax_compilations,
    tolerances=TOLERANCES,
    source="online softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867)",
    row=_row,
)


def _softmax_grads(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """dy is drawn orthogonal to nothing: y comes from logits, as a forward pass leaves it."""
    x = _normal(case, generator, device, *_shape(case), scale=SPREAD)
    y = torch.softmax(x.float(), dim=-1).to(x.dtype)
    return {"y": y, "dy": _normal(case, generator, device, *_shape(case))}


def _softmax_backward_prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    return kernel.prepare_softmax_backward(inputs["y"], inputs["dy"], launch)


def _softmax_backward_torch(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    y, dy = inputs["y"], inputs["dy"]
    backward = torch.ops.aten._softmax_backward_data
    return lambda: (backward(dy, y, -1, y.dtype),)


def _softmax_backward_compilations() -> tuple[Compilation, ...]:
    return _both(
        "softmax_backward", softmax.softmax_backward_rows, softmax.softmax_backward_chunks,
        "y_ptr dy_ptr dx_ptr", kernel.BACKWARD, {},
    )  # fmt: skip


SOFTMAX_BACKWARD: Final = KernelSpec(
    name="softmax_backward",
    op=lambda case: SoftmaxBackward(**_sizes(case)),
    inputs=_softmax_grads,
    reference=lambda case, inputs: (reference.softmax_backward(inputs["y"], inputs["dy"]),),
    implementations=(
        Implementation(
            name="triton", prepare=_softmax_backward_prepare, launches=_backward_launches
        ),
        Implementation(name="torch", prepare=_softmax_backward_torch, vendor="torch"),
    ),
    checks=_gradient_checks("softmax_backward"),
    grid=_grid("softmax_backward"),
    compilations=_softmax_backward_compilations,
    tolerances=TOLERANCES,
    source="dx = y (dy - sum(y dy))",
)

# ---- RMS norm ------------------------------------------------------------------------------


def _norm_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Rows with a mean, and weights around one."""
    rows, cols = _shape(case)
    return {
        "x": _normal(case, generator, device, rows, cols, scale=2.0) + 0.5,
        "w": _normal(case, generator, device, cols, scale=0.2) + 1.0,
        "b": _normal(case, generator, device, cols),
    }


def _rmsnorm_prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    run = kernel.prepare_rmsnorm(inputs["x"], inputs["w"], launch)
    return lambda: run()[:1]


def _rmsnorm_torch(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    x, w = inputs["x"], inputs["w"]
    return lambda: (F.rms_norm(x, w.shape, w, reference.EPSILON),)


def _rmsnorm_compilations() -> tuple[Compilation, ...]:
    return _both(
        "rmsnorm", norm.rmsnorm_rows, norm.rmsnorm_chunks, "x_ptr w_ptr y_ptr rstd_ptr",
        kernel.WHOLE, {"epsilon": "fp32"}, wide=("rstd_ptr",),
    )  # fmt: skip


RMSNORM: Final = KernelSpec(
    name="rmsnorm",
    op=lambda case: RmsNorm(**_sizes(case)),
    inputs=_norm_inputs,
    reference=lambda case, inputs: (reference.rmsnorm(inputs["x"], inputs["w"]),),
    implementations=(
        Implementation(name="triton", prepare=_rmsnorm_prepare, launches=_forward_launches),
        Implementation(name="torch", prepare=_rmsnorm_torch, vendor="torch"),
    ),
    checks=_checks("rmsnorm"),
    grid=_grid("rmsnorm"),
    compilations=_rmsnorm_compilations,
    tolerances=TOLERANCES,
    source="Zhang and Sennrich 2019 (arXiv 1910.07467)",
    row=_row,
)


def _rmsnorm_grads(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    forward = _norm_inputs(case, generator, device)
    rstd = (forward["x"].float().square().mean(dim=-1) + reference.EPSILON).rsqrt()
    dy = _normal(case, generator, device, *_shape(case))
    return {"x": forward["x"], "w": forward["w"], "rstd": rstd, "dy": dy}


def _rmsnorm_truth(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return reference.rmsnorm_backward(inputs["x"], inputs["w"], inputs["rstd"], inputs["dy"])


def _rmsnorm_backward_prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    x, w, rstd, dy = (inputs[name] for name in ("x", "w", "rstd", "dy"))
    return kernel.prepare_rmsnorm_backward(x, w, rstd, dy, launch)


def _rmsnorm_backward_torch(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    x, w, rstd, dy = (inputs[name] for name in ("x", "w", "rstd", "dy"))
    backward = torch.ops.aten._fused_rms_norm_backward
    saved = rstd[:, None]
    return lambda: tuple(backward(dy, x, list(w.shape), saved, w, [True, True]))


def _no_cuda(case: Case, arch: int) -> str | None:
    return None if torch.cuda.is_available() else "torch's fused gradient runs on CUDA alone"


def _rmsnorm_backward_compilations() -> tuple[Compilation, ...]:
    spec, wide = "rmsnorm_backward", ("rstd_ptr", "sums_ptr")
    slices = Launch(meta={"ROWS": kernel.SLICE_ROWS, "COLS": kernel.SLICE_COLS}, num_stages=3)
    sums = Launch(meta={"ROWS": kernel.SUM_ROWS, "COLS": kernel.SUM_COLS}, num_stages=3)
    found = list(
        _both(
            spec, norm.rmsnorm_backward_rows, norm.rmsnorm_backward_chunks,
            "x_ptr w_ptr rstd_ptr dy_ptr dx_ptr", kernel.BACKWARD, {}, wide=wide,
            partial="sums_ptr",
        )
    )  # fmt: skip
    for dtype in FORMATS:
        found += [
            _compiled(
                spec, norm.rmsnorm_weight_sums, "x_ptr rstd_ptr dy_ptr sums_ptr",
                {**_SIZE, "per_slice": "i32"}, slices, dtype, wide=wide,
            ),
            _compiled(
                spec, norm.add_sums, "sums_ptr dw_ptr", {"parts": "i32", "cols": "i32"}, sums,
                dtype, wide=wide,
            ),
        ]  # fmt: skip
    return tuple(found)


RMSNORM_BACKWARD: Final = KernelSpec(
    name="rmsnorm_backward",
    op=lambda case: RmsNormBackward(**_sizes(case)),
    inputs=_rmsnorm_grads,
    reference=_rmsnorm_truth,
    implementations=(
        Implementation(
            name="triton", prepare=_rmsnorm_backward_prepare, launches=_backward_launches
        ),
        Implementation(
            name="torch", prepare=_rmsnorm_backward_torch, refusal=_no_cuda, vendor="torch"
        ),
    ),
    checks=_gradient_checks("rmsnorm_backward"),
    grid=_grid("rmsnorm_backward"),
    compilations=_rmsnorm_backward_compilations,
    tolerances=TOLERANCES,
    source="gradient of Zhang and Sennrich 2019 (arXiv 1910.07467), weight sums without atomics",
)

# ---- layer norm ----------------------------------------------------------------------------


def _layernorm_prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    run = kernel.prepare_layernorm(inputs["x"], inputs["w"], inputs["b"], launch)
    return lambda: run()[:1]


def _layernorm_torch(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    x, w, b = inputs["x"], inputs["w"], inputs["b"]
    return lambda: (F.layer_norm(x, w.shape, w, b, reference.EPSILON),)


def _layernorm_compilations() -> tuple[Compilation, ...]:
    return _both(
        "layernorm", norm.layernorm_rows, norm.layernorm_chunks,
        "x_ptr w_ptr b_ptr y_ptr mean_ptr rstd_ptr", kernel.LAYER, {"epsilon": "fp32"},
        wide=("mean_ptr", "rstd_ptr"),
    )  # fmt: skip


LAYERNORM: Final = KernelSpec(
    name="layernorm",
    op=lambda case: LayerNorm(**_sizes(case)),
    inputs=_norm_inputs,
    reference=lambda case, inputs: (
        reference.layernorm(inputs["x"], inputs["w"].double(), inputs["b"].double()),
    ),
    implementations=(
        Implementation(name="triton", prepare=_layernorm_prepare, launches=_layer_launches),
        Implementation(name="torch", prepare=_layernorm_torch, vendor="torch"),
    ),
    checks=_checks("layernorm"),
    grid=_grid("layernorm"),
    compilations=_layernorm_compilations,
    tolerances=TOLERANCES,
    source="Ba et al. 2016 (arXiv 1607.06450); Welford 1962, Chan et al. 1979 in chunks",
    row=_row,
)

SPECS: Final = (SOFTMAX, SOFTMAX_BACKWARD, RMSNORM, RMSNORM_BACKWARD, LAYERNORM)
