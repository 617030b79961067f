"""The 2:4 sparse product as a profiled kernel: torch's own, beside the dense one.

There is no Triton kernel here: Triton has no sparse matrix instruction, and a kernel that
multiplies the zeros is `gemm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F

from hwmodels import dtypes
from hwmodels.dtypes import DType
from hwmodels.errors import InputError
from validate.kernels import formats
from validate.kernels.judge import poisoned
from validate.kernels.sparse_gemm.reference import product, pruned
from validate.kernels.spec import Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.numeric import Num
from workloads.op import Op
from workloads.work import Work

Run = Callable[[], tuple[torch.Tensor, ...]]
NAME: Final = "sparse_gemm"
KEPT: Final = 0.5
INDEX_BYTES: Final = 0.25
"""Two bits say which of four places a kept value has."""
LEAST_N, LEAST_K = 32, 64
"""What torch's CUTLASS kernels ask n and k to be multiples of in 16-bit formats; cuSPARSELt
asks less (torch.sparse.SparseSemiStructuredTensor)."""


@dataclass(frozen=True, kw_only=True)
class SparseMatmul(Op):
    """C[m, n] = A[m, k] W[n, k]^T with two of every four neighbours of W kept.

    The flops are those of kept values, half of the dense product's. W is read as kept values
    and two bits each for their places. Ignored: the compression of W, done once per weight.
    """

    name: ClassVar[str] = "sparse_matmul"
    m: Num
    n: Num
    k: Num
    dtype: DType = dtypes.BF16

    def check(self) -> None:
        """Groups of four along k."""
        if self.k % 4:
            raise InputError(f"{self.name}: k = {self.k} must be a multiple of 4 for 2:4 sparsity")

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Not tiled here: `Matmul` is."""
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """2 m n k / 2 flops; everything moved once."""
        e = self.dtype.bytes_per_element
        kept = KEPT * self.n * self.k
        return Work(
            tensor_flops={self.dtype: 2 * self.m * kept},
            read_bytes=self.m * self.k * e + kept * (e + INDEX_BYTES),
            write_bytes=self.m * self.n * e,
            launches=1,
        )

    def compulsory_bytes(self) -> Num:
        """A, the compressed W and C, once."""
        return self.work(0.0).bytes


def case(m: int, n: int, k: int, dtype: str = "bf16") -> Case:
    """C[m, n] = A[m, k] W[n, k]^T with W pruned to 2:4."""
    return Case(op=NAME, dtype=dtype, params={"m": m, "n": n, "k": k})


def _sizes(case: Case) -> tuple[int, int, int]:
    return int(case.params["m"]), int(case.params["n"]), int(case.params["k"])


def op(case: Case) -> SparseMatmul:
    """The sparse product that the case counts as."""
    m, n, k = _sizes(case)
    return SparseMatmul(m=m, n=n, k=k, dtype=dtypes.dtype(case.dtype))


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal operands, W pruned by magnitude."""
    m, n, k = _sizes(case)
    fixed: dict[str, Any] = {"dtype": case.dtype, "generator": generator, "device": device}
    w = formats.random(n, k, **fixed)
    return {"a": formats.random(m, k, **fixed), "w": pruned(w)}


def reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The float64 product with the pruned weight."""
    return (product(inputs["a"], inputs["w"]),)


def refusal(case: Case, arch: int) -> str | None:
    """Sparse matrix units came with Ampere; torch drives them on CUDA alone."""
    if not torch.cuda.is_available():
        return "2:4 products need a CUDA device"
    if arch < 80:
        return "2:4 products need compute capability 8.0"
    _, n, k = _sizes(case)
    if n % LEAST_N or k % LEAST_K:
        return f"n must be a multiple of {LEAST_N} and k of {LEAST_K}"
    if case.dtype not in ("fp16", "bf16"):
        return f"torch has no 2:4 product in {case.dtype}"
    return None


def _sparse(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    """torch's product, the weight compressed beforehand."""
    a = inputs["a"]
    w = torch.sparse.to_sparse_semi_structured(inputs["w"])
    return lambda: (F.linear(a, w),)


def _dense(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    """The dense product with the same pruned weight."""
    a, w = inputs["a"], inputs["w"].t()
    c = poisoned(a.shape[0], w.shape[1], dtype=a.dtype, device=a.device)
    return lambda: (torch.matmul(a, w, out=c),)


_LINEARS: Final = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192))
"""(n, k) of the linear layers of 8B and 70B decoders, and a square."""


def compilations() -> tuple[Compilation, ...]:
    """None: torch's kernels come compiled."""
    return ()


SPECS: Final = (
    KernelSpec(
        name=NAME,
        op=op,
        inputs=inputs,
        reference=reference,
        implementations=(
            Implementation(
                name="torch-2to4", prepare=_sparse, refusal=refusal, vendor="cusparselt"
            ),
            Implementation(name="torch", prepare=_dense, vendor="cublas"),
        ),
        checks=tuple(
            case(*mnk, dtype)
            for dtype in ("fp16", "bf16")
            for mnk in ((1, 32, 64), (17, 64, 128), (100, 96, 192), (33, 160, 64))
        ),
        grid=(
            *(case(m, n, k) for m in (16, 256, 1024, 4096) for n, k in _LINEARS),
            *(case(s, s, s, dtype) for dtype in ("bf16", "fp16") for s in (2048, 8192)),
        ),
        compilations=compilations,
        tolerances={"fp16": 2e-3, "bf16": 1e-2},
        source="Mishra et al. 2021 (arXiv 2104.08378)",
    ),
)
