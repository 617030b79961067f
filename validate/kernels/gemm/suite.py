"""The matrix product as a profiled kernel: shapes, baselines, shipped binaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from triton import cdiv

from hwmodels import dtypes
from validate.kernels import formats
from validate.kernels.gemm import kernel
from validate.kernels.gemm.reference import product
from validate.kernels.judge import poisoned
from validate.kernels.multiprocessors import typical_multiprocessors
from validate.kernels.spec import Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.ops.matmul import Matmul

NAME: Final = "gemm"
TRIED: Final = 4
"""Launches worth timing per shape, the most promising first."""
ALIGNMENT_BYTES: Final = 16
"""What the tensor memory accelerator, and cuBLAS in fp8, ask of every row."""
FLOPS_PER_S: Final = {"tf32": 3.7e12, "fp32": 0.4e12, "fp16": 7.5e12, "bf16": 7.5e12, "fp8": 15e12}
"""Dense matrix rate of one multiprocessor of an H100, rounded: it only orders launches."""
L2_BYTES_PER_S: Final = 40e9
"""L2 bandwidth of one multiprocessor, rounded: it only orders launches."""
REDUCTION_S: Final = 3e-6
"""A second, small kernel."""


def case(m: int, n: int, k: int, dtype: str = "bf16") -> Case:
    """C[m, n] = A[m, k] W[n, k]^T in a format."""
    return Case(op=NAME, dtype=dtype, params={"m": m, "n": n, "k": k})


def sizes(case: Case) -> tuple[int, int, int]:
    """m, n, k."""
    return int(case.params["m"]), int(case.params["n"]), int(case.params["k"])


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal operands, whose products have variance k."""
    m, n, k = sizes(case)
    fixed: dict[str, Any] = {"dtype": case.dtype, "generator": generator, "device": device}
    return {"a": formats.random(m, k, **fixed), "w": formats.random(n, k, **fixed)}


def reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The float64 product."""
    return (product(inputs["a"], inputs["w"]),)


def op(case: Case) -> Matmul:
    """The product that the case counts as."""
    m, n, k = sizes(case)
    dtype = dtypes.dtype(case.dtype)
    stored = dtypes.FP32 if case.dtype == "tf32" else dtype
    written = dtypes.dtype(kernel.OUTPUTS[case.dtype])
    return Matmul(m=m, n=n, k=k, dtype=stored, out_dtype=written, math_dtype=dtype)


def row(case: Case) -> tuple[str, str, Mapping[str, Any]] | None:
    """As public tables name it; their fp8 rows time the quantiser too, so those have none."""
    return None if case.dtype == "fp8" else ("gemm", "gemm", dict(case.params))


# ---- ours ----------------------------------------------------------------------------------


def estimate_s(launch: Launch, case: Case, arch: int) -> float:
    """Waves of programs, each bound by the matrix units or by L2: an order, no prediction."""
    m, n, k = sizes(case)
    meta, width = launch.meta, kernel.WIDTHS[case.dtype]
    block_m, block_n, block_k = meta["BLOCK_M"], meta["BLOCK_N"], meta["BLOCK_K"]
    split = meta.get("SPLIT_K", 1)
    jobs = cdiv(m, block_m) * cdiv(n, block_n) * split
    steps = cdiv(cdiv(k, block_k), split)
    flops_s = 2 * block_m * block_n * block_k / FLOPS_PER_S[case.dtype]
    bytes_s = (block_m + block_n) * block_k * width / L2_BYTES_PER_S
    waves: int = cdiv(jobs, typical_multiprocessors(arch))
    parts_s = REDUCTION_S + 2 * 4 * m * n * split / (1e2 * L2_BYTES_PER_S) if split > 1 else 0.0
    return float(waves * steps * max(flops_s, bytes_s) + parts_s)


def _best(launches: Sequence[Launch], case: Case, arch: int) -> tuple[Launch, ...]:
    suited = [launch for launch in launches if launch.suits(arch)]
    return tuple(sorted(suited, key=lambda x: estimate_s(x, case, arch))[:TRIED])


def launches(case: Case, arch: int) -> tuple[Launch, ...]:
    """Pointer launches worth trying."""
    return _best(kernel.launches_of(case.dtype), case, arch)


def tma_launches(case: Case, arch: int) -> tuple[Launch, ...]:
    """Descriptor launches worth trying."""
    return _best(kernel.tma_launches_of(case.dtype), case, arch)


def prepare(
    case: Case, inputs: Inputs, launch: Launch | None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Our kernel with pointer loads."""
    assert launch is not None
    out = formats.TORCH[kernel.OUTPUTS[case.dtype]]
    return kernel.prepare(inputs["a"], inputs["w"], case.dtype, out, launch)


def prepare_tma(
    case: Case, inputs: Inputs, launch: Launch | None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Our kernel with tensor descriptors."""
    assert launch is not None
    out = formats.TORCH[kernel.OUTPUTS[case.dtype]]
    return kernel.prepare_tma(inputs["a"], inputs["w"], case.dtype, out, launch)


def _no_fp8(case: Case, arch: int) -> str | None:
    if case.dtype == "fp8" and arch < kernel.FP8_ARCH:
        return "fp8 needs compute capability 8.9"
    return None


def _misaligned(case: Case) -> bool:
    _, n, k = sizes(case)
    written = kernel.WIDTHS[kernel.OUTPUTS[case.dtype]]
    return bool(k * kernel.WIDTHS[case.dtype] % ALIGNMENT_BYTES or n * written % ALIGNMENT_BYTES)


def tma_refusal(case: Case, arch: int) -> str | None:
    """Descriptors need Hopper and rows of whole 16 bytes."""
    if arch < 90:
        return "tensor descriptors need compute capability 9.0"
    if case.dtype == "fp32":
        return "fp32 without tf32 has no matrix units to feed"
    return "rows are no multiple of 16 bytes" if _misaligned(case) else None


# ---- the baseline --------------------------------------------------------------------------


def torch_refusal(case: Case, arch: int) -> str | None:
    """cuBLAS takes fp8 from Ada on and in multiples of 16."""
    if case.dtype == "fp8" and any(size % 16 for size in sizes(case)[1:]):
        return "torch's fp8 product needs n and k in multiples of 16"
    return _no_fp8(case, arch)


def torch_prepare(
    case: Case, inputs: Inputs, launch: Launch | None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """torch.matmul, or in fp8 the scaled product with scales of one."""
    a, w = inputs["a"], inputs["w"].t()
    if case.dtype == "fp8":
        one = torch.ones((), dtype=torch.float32, device=a.device)

        def scaled() -> tuple[torch.Tensor, ...]:
            c = torch._scaled_mm(
                a, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
            return (c,)

        return scaled
    c = poisoned(a.shape[0], w.shape[1], dtype=a.dtype, device=a.device)
    how = "tf32" if case.dtype == "tf32" else "ieee"

    def run() -> tuple[torch.Tensor, ...]:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = how
        try:
            torch.matmul(a, w, out=c)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        return (c,)

    return run


# ---- shapes --------------------------------------------------------------------------------

_RAGGED: Final = (
    (1, 1, 1),
    (16, 64, 128),
    (64, 64, 64),
    (17, 65, 33),
    (100, 70, 130),
    (5, 200, 300),
)

_FEW: Final = ((17, 65, 33), (70, 48, 96))

CHECKS: Final[tuple[Case, ...]] = (
    *(case(*mnk, dtype) for dtype in ("fp32", "fp16") for mnk in _RAGGED),
    *(case(*mnk, dtype) for dtype in ("bf16", "tf32", "fp8") for mnk in _FEW),
)  # fmt: skip

_LINEARS: Final = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (8192, 28672),
)  # fmt: skip
"""(n, k) of the linear layers of 8B and 70B decoders."""
_TOKENS: Final = (1, 16, 64, 256, 1024, 4096)
_OTHERS: Final = (
    (512, 512, 512), (1000, 1000, 1000), (1024, 1024, 1024), (2048, 2048, 2048),
    (4096, 4096, 4096), (8192, 8192, 8192), (16384, 16384, 16384), (128, 128, 65536),
    (8192, 128256, 4096), (16384, 28672, 4096), (16384, 4096, 14336), (8192, 320, 4096),
)  # fmt: skip
"""Squares, a deep product, a vocabulary, large batches, a narrow product."""


def _grid() -> Iterator[Case]:
    yield from (case(m, n, k) for m in _TOKENS for n, k in _LINEARS[:4])
    yield from (case(m, n, k) for m in (1, 256, 4096) for n, k in _LINEARS[4:])
    yield from (case(*mnk) for mnk in _OTHERS)
    for dtype in ("fp16", "fp8", "tf32"):
        yield from (case(s, s, s, dtype) for s in (1024, 4096, 8192))
    yield from (case(m, 28672, 4096, "fp8") for m in (16, 4096))
    yield case(4096, 14336, 4096, "fp16")


GRID: Final = tuple(sorted(_grid(), key=lambda c: (float(op(c).compulsory_bytes()), c.key)))

# ---- shipped binaries ----------------------------------------------------------------------

FORMATS: Final = ("bf16", "fp16", "fp8", "tf32", "fp32")
_SIZES: Final = {"m": "i32", "n": "i32", "k": "i32"}


def _pointer(dtype: str, launch: Launch) -> Compilation:
    constants = {**launch.meta, **kernel.constants(dtype)}
    stored = "*" + formats.TRITON[dtype]
    written = "*fp32" if launch.meta["SPLIT_K"] > 1 else "*" + kernel.OUTPUTS[dtype]
    return Compilation(
        kernel=NAME,
        function=kernel.gemm,
        signature={
            "a_ptr": stored,
            "w_ptr": stored,
            "c_ptr": written,
            **_SIZES,
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants,
        launch=launch,
        aligned=("a_ptr", "w_ptr", "c_ptr", *_SIZES),
        label=dtype,
    )


def _descriptor(dtype: str, launch: Launch) -> Compilation:
    meta, constants = launch.meta, {**launch.meta, **kernel.constants(dtype)}
    stored_n = meta["BLOCK_N"] // (2 if meta["HALVES"] else 1)

    def described(name: str, rows: int, cols: int) -> str:
        return f"tensordesc<{name}[{rows}, {cols}]>"

    stored, written = formats.TRITON[dtype], kernel.OUTPUTS[dtype]
    return Compilation(
        kernel=NAME,
        function=kernel.gemm_tma,
        signature={
            "a_desc": described(stored, meta["BLOCK_M"], meta["BLOCK_K"]),
            "w_desc": described(stored, meta["BLOCK_N"], meta["BLOCK_K"]),
            "c_desc": described(written, meta["BLOCK_M"], stored_n),
            **_SIZES,
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants,
        launch=launch,
        aligned=tuple(_SIZES),
        label=dtype,
    )


def _sums(dtype: str, split: int) -> Compilation:
    constants = {"SPLIT_K": split, "BLOCK": kernel.REDUCED_AT_ONCE}
    return Compilation(
        kernel=NAME,
        function=kernel.add_parts,
        signature={
            "parts_ptr": "*fp32",
            "c_ptr": "*" + kernel.OUTPUTS[dtype],
            "num_elements": "i32",
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants,
        launch=Launch(meta=constants, num_warps=4, num_stages=3, least_arch=80),
        aligned=("parts_ptr", "c_ptr", "num_elements"),
        label=kernel.OUTPUTS[dtype],
    )


def compilations() -> tuple[Compilation, ...]:
    """Both kernels in every format and launch, and the sum of split products."""
    splits = sorted({x.meta["SPLIT_K"] for x in kernel.LAUNCHES} - {1})
    return (
        *(_pointer(d, x) for d in FORMATS for x in kernel.launches_of(d)),
        *(_descriptor(d, x) for d in FORMATS for x in kernel.tma_launches_of(d)),
        *(_sums(d, split) for d in ("bf16", "fp16", "fp32") for split in splits),
    )


SPECS: Final = (
    KernelSpec(
        name=NAME,
        op=op,
        inputs=inputs,
        reference=reference,
        implementations=(
            Implementation(name="triton", prepare=prepare, launches=launches, refusal=_no_fp8),
            Implementation(
                name="triton-tma",
                prepare=prepare_tma,
                launches=tma_launches,
                refusal=tma_refusal,
            ),
            Implementation(
                name="torch", prepare=torch_prepare, refusal=torch_refusal, vendor="cublas"
            ),
        ),
        checks=CHECKS,
        grid=GRID,
        compilations=compilations,
        tolerances={"fp32": 1e-5, "tf32": 1e-3, "fp16": 2e-3, "bf16": 1e-2, "fp8": 5e-2},
        source="tiled product with split k: NVIDIA CUTLASS documentation, 'Efficient GEMM'",
        row=row,
    ),
)
