"""Long convolutions in the profiling suite, beside torch's transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.compiled import compilation
from validate.kernels.fft_convolution import kernel, reference, tables
from validate.kernels.spec import TRITON, Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.op import Op
from workloads.ops.flash_fft_conv import FlashFFTConv

NAME: Final = "fft_convolution"
TOLERANCES: Final = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
"""bf16 operands are rounded nine times, 0.15 % each by rms, on the way through four products."""
SHIPPED: Final = ("fp16", "bf16", "fp32")
NAMES: Final = ("batch", "channels", "len_seq")


def case(dtype: str, sizes: tuple[int, ...], *, gated: bool = True, circular: bool = False) -> Case:
    """A convolution of [batch, channels, len_seq]."""
    params = {
        **dict(zip(NAMES, sizes, strict=True)),
        "gated": int(gated),
        "circular": int(circular),
    }
    return Case(op=NAME, dtype=dtype, params=params)


def _op(case: Case) -> Op:
    p = case.params
    return FlashFFTConv(
        batch=p["batch"], channels=p["channels"], len_seq=p["len_seq"], gated=bool(p["gated"]),
        circular=bool(p["circular"]), dtype=format_of(case.dtype),
    )  # fmt: skip


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Filters that decay to a fiftieth, of norm about one, in fp32."""
    batch, channels, length = (int(case.params[name]) for name in NAMES)

    def draw(*shape: int, dtype: str = case.dtype) -> torch.Tensor:
        return formats.random(*shape, dtype=dtype, generator=generator, device=device)

    decay = torch.exp(torch.arange(length, device=device) * (-4.0 / length))
    scale = (8.0 / length) ** 0.5
    found = {
        "u": draw(batch, channels, length),
        "k": draw(channels, length, dtype="fp32") * decay * scale,
    }
    if case.params["gated"]:
        found |= {"v": draw(batch, channels, length), "w": draw(batch, channels, length)}
    return found


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    u = inputs["u"].double()
    if "w" in inputs:
        u = u * inputs["w"].double()
    y = reference.convolution(u, inputs["k"], circular=bool(case.params["circular"]))
    return (y * inputs["v"].double() if "v" in inputs else y,)


def _launches(case: Case, arch: int) -> Sequence[Launch]:
    """Fused before split, then as listed."""
    fit = [x for x in launches_of(case.dtype) if x.suits(arch)]
    found = [(kernel.factors(int(case.params["len_seq"]), x), x) for x in fit]
    most = 3 if halves(case.dtype) else 2
    kept = [pair for pair in found if 0 < len(pair[0]) <= most]
    return [x for _, x in sorted(kept, key=lambda pair: len(pair[0]))]


def halves(dtype: str) -> bool:
    """Is it a format of 16 bits? Rows of others are transformed whole or not at all."""
    return dtype in ("fp16", "bf16")


def launches_of(dtype: str) -> tuple[Launch, ...]:
    """The tile sets whose rows, both parts in that format, stay in registers."""
    return kernel.LAUNCHES if halves(dtype) else kernel.NARROW


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Any:
    assert launch is not None
    return kernel.Convolution(
        inputs, case.dtype, launch, circular=bool(case.params["circular"])
    )  # fmt: skip


def _refusal(case: Case, arch: int) -> str | None:
    length = int(case.params["len_seq"])
    if case.params["circular"] and tables.num_points(length) != length:
        return "a transform of more points than the sequence does not wrap where it should"
    return (
        None if _launches(case, arch) else f"no tile set transforms as many points in {case.dtype}"
    )


def _torch(
    case: Case, inputs: Inputs, launch: Launch | None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Transforms in fp32 (fp64 is not asked of it), the filter's spectrum made beforehand."""
    u, length = inputs["u"], int(case.params["len_seq"])
    points = length if case.params["circular"] else 2 << (length - 1).bit_length()
    spectrum = torch.fft.rfft(inputs["k"], points)
    w, v = inputs.get("w"), inputs.get("v")

    def run() -> tuple[torch.Tensor, ...]:
        x = u if w is None else u * w
        z = torch.fft.rfft(x.float(), points) * spectrum
        y = torch.fft.irfft(z, points)[..., :length].to(u.dtype)
        return (y if v is None else y * v,)

    return run


def _row(case: Case) -> tuple[str, str, Mapping[str, Any]] | None:
    """Published rows are of transforms as long as the sequence: circular ones."""
    p = case.params
    if not p["circular"]:
        return None
    params = {
        "batch": p["batch"], "d_model": p["channels"], "seq": p["len_seq"],
        "gated": p["gated"], "direction": "fwd",
    }  # fmt: skip
    return "scan_conv1d", "fftconv_gated_fwd", params


# ---- binaries ------------------------------------------------------------------------------


def _binary(function: Any, dtype: str, launch: Launch, label: str, **constants: Any) -> Compilation:
    pointers = {
        arg: formats.TRITON[dtype] for arg in function.arg_names if arg.endswith("_ptr")
    }  # fmt: skip
    constants |= {"PRECISION": kernel.PRECISIONS[dtype]}
    return compilation(NAME, function, launch, pointers, constants, f"{dtype}-{label}")


def _of_dtype(dtype: str) -> list[Compilation]:
    found = []
    for launch in launches_of(dtype):
        for gated in (False, True):
            label = "gated" if gated else "plain"
            fixed = {**launch.meta, "WHOLE": True, "GATED": gated}
            found.append(_binary(kernel.monarch, dtype, launch, label, **fixed))
        if not halves(dtype):
            continue
        fixed = {**launch.meta, "WHOLE": False, "GATED": False}
        found.append(_binary(kernel.monarch, dtype, launch, "inner", **fixed))
    return found + _outer_of(dtype) if halves(dtype) else found


def _outer_of(dtype: str) -> list[Compilation]:
    found = []
    for size in kernel.OUTER_FACTORS:
        launch = Launch(num_warps=kernel.OUTER_WARPS, num_stages=1)
        for function in (kernel.outer_forward, kernel.outer_inverse):
            for gated in (False, True):
                label = f"{size}-gated" if gated else f"{size}-plain"
                fixed = {"N": size, "COLS": kernel.OUTER_COLS, "GATED": gated}
                found.append(_binary(function, dtype, launch, label, **fixed))
    return found


def _compilations() -> tuple[Compilation, ...]:
    return tuple(found for dtype in SHIPPED for found in _of_dtype(dtype))


# ---- cases ---------------------------------------------------------------------------------

_CHECKED: Final = (
    ((1, 1, 1), True, False), ((2, 3, 100), True, False), ((1, 9, 256), False, False),
    ((2, 5, 300), False, False), ((1, 5, 1000), True, False), ((1, 2, 1024), True, True),
)  # fmt: skip
_LONG: Final = (
    ((1, 1, 2047), False, False), ((1, 2, 4096), True, False), ((1, 1, 8192), False, True),
    ((1, 1, 16000), True, False),
)  # fmt: skip
_TIMED: Final = (
    (1, 768, 256), (16, 768, 256), (64, 768, 256), (64, 768, 1024), (16, 768, 4096),
    (64, 768, 4096), (64, 768, 8192), (1, 768, 16384), (16, 768, 16384), (32, 768, 16384),
    (8, 768, 32768), (16, 768, 32768), (8, 768, 65536), (7, 1000, 3000),
)  # fmt: skip


def _grid() -> tuple[Case, ...]:
    found = [case("bf16", sizes, gated=g) for sizes in _TIMED for g in (True, False)]
    for sizes in ((64, 768, 256), (64, 768, 1024), (64, 768, 4096), (64, 768, 8192)):
        found += [case("fp16", sizes, gated=g, circular=True) for g in (True, False)]
    for sizes in ((16, 768, 256), (16, 768, 1024)):
        found.append(case("fp32", sizes))
    return tuple(found)


SPEC: Final = KernelSpec(
    name=NAME,
    op=_op,
    inputs=_inputs,
    reference=_reference,
    implementations=(
        Implementation(name=TRITON, prepare=_prepare, launches=_launches, refusal=_refusal),
        Implementation(name="torch-fft", prepare=_torch, vendor="cufft"),
    ),
    checks=tuple(
        case(dtype, sizes, gated=gated, circular=circular)
        for dtype in ("fp32", "fp16")
        for sizes, gated, circular in (*_CHECKED, *(_LONG if halves(dtype) else ()))
    ),
    grid=_grid(),
    compilations=_compilations,
    tolerances=TOLERANCES,
    source="Fu et al. 2023, arXiv 2311.05908 (FlashFFTConv)",
    row=_row,
)
SPECS: Final = (SPEC,)
