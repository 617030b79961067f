"""The matrix ceiling as a profiled kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch

from hwmodels import dtypes
from hwmodels.dtypes import DType
from validate.kernels import formats
from validate.kernels.multiprocessors import OF_ARCHITECTURE
from validate.kernels.spec import Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.kernels.tensor_core import kernel
from validate.kernels.tensor_core.reference import chain
from validate.record import Case
from workloads.numeric import Num
from workloads.op import Op
from workloads.work import Work

NAME: Final = "tensor_core_ceiling"
DEPTHS: Final = {"tf32": 64, "fp16": 128, "bf16": 128, "fp8": 256}
"""k of a tile: 64 KB of operands in every format."""


@dataclass(frozen=True, kw_only=True)
class ChainedProducts(Op):
    """`programs` tiles [m, n], each the sum of `iterations` equal products of depth k on chip.

    Slow memory sees the operands once and the float32 sums once, whatever the iterations.
    """

    name: ClassVar[str] = "chained_products"
    programs: Num
    iterations: Num
    m: Num
    n: Num
    k: Num
    dtype: DType = dtypes.BF16

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Nothing to choose."""
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """2 m n k flops per product."""
        stored = dtypes.FP32 if self.dtype == dtypes.TF32 else self.dtype
        flops = 2 * self.programs * self.iterations * self.m * self.n * self.k
        operands = self.programs * (self.m + self.n) * self.k * stored.bytes_per_element
        return Work(
            tensor_flops={self.dtype: flops},
            read_bytes=operands,
            write_bytes=self.programs * self.m * self.n * dtypes.FP32.bytes_per_element,
            launches=1,
        )

    def compulsory_bytes(self) -> Num:
        """Operands and sums, once."""
        return self.work(0.0).bytes


def case(programs: int, iterations: int, dtype: str) -> Case:
    """A chain per program."""
    return Case(op=NAME, dtype=dtype, params={"programs": programs, "iterations": iterations})


def op(case: Case) -> ChainedProducts:
    """The chains that the case counts as."""
    return ChainedProducts(
        programs=case.params["programs"],
        iterations=case.params["iterations"],
        m=kernel.BLOCK,
        n=kernel.BLOCK,
        k=DEPTHS[case.dtype],
        dtype=dtypes.dtype(case.dtype),
    )


def inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal tiles: zeros would draw less power and run faster."""
    shape = (int(case.params["programs"]), kernel.BLOCK, DEPTHS[case.dtype])
    fixed: dict[str, Any] = {"dtype": case.dtype, "generator": generator, "device": device}
    return {"a": formats.random(*shape, **fixed), "b": formats.random(*shape, **fixed)}


def reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The float64 sum of the chain."""
    return (chain(inputs["a"], inputs["b"], int(case.params["iterations"])),)


def _fold(iterations: int) -> int:
    """FOLD, or less for a chain that it does not divide (checks)."""
    return next(fold for fold in (kernel.FOLD, 2, 1) if iterations % fold == 0)


def prepare(
    case: Case, inputs: Inputs, launch: Launch | None
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Our kernel."""
    assert launch is not None
    iterations = int(case.params["iterations"])
    return kernel.prepare(inputs["a"], inputs["b"], iterations, launch, _fold(iterations))


def launches(case: Case, arch: int) -> tuple[Launch, ...]:
    """All that suit."""
    return tuple(launch for launch in kernel.LAUNCHES if launch.suits(arch))


def refusal(case: Case, arch: int) -> str | None:
    """fp8 needs Ada or later."""
    if case.dtype == "fp8" and arch < 89:
        return "fp8 needs compute capability 8.9"
    return None


CHECKS: Final = (
    *(case(*sizes, "fp16") for sizes in ((1, 1), (2, 1), (1, 3), (1, 4))),
    *(case(1, iterations, dtype) for dtype in ("bf16", "tf32") for iterations in (1, 2)),
)
GRID: Final = tuple(
    case(programs, 2048, dtype)
    for dtype in DEPTHS
    for programs in (*OF_ARCHITECTURE.values(), 2 * OF_ARCHITECTURE[90])
)
"""One program per multiprocessor of each chip, and two per one of Hopper's: on another chip than
it was meant for, a case leaves multiprocessors idle; the best rate is the ceiling."""


def _compilation(dtype: str, launch: Launch) -> Compilation:
    constants = kernel.constants(DEPTHS[dtype])
    stored = "*" + formats.TRITON[dtype]
    arch = max(launch.least_arch, 89) if dtype == "fp8" else launch.least_arch
    return Compilation(
        kernel=NAME,
        function=kernel.chained_dots,
        signature={
            "a_ptr": stored,
            "b_ptr": stored,
            "c_ptr": "*fp32",
            "rounds": "i32",
            "fold": "i32",
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants,
        launch=Launch(
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            least_arch=arch,
            most_arch=launch.most_arch,
        ),
        aligned=("a_ptr", "b_ptr", "c_ptr"),
        label=dtype,
    )


def compilations() -> tuple[Compilation, ...]:
    """Every format and launch."""
    return tuple(_compilation(dtype, x) for dtype in DEPTHS for x in kernel.LAUNCHES)


SPECS: Final = (
    KernelSpec(
        name=NAME,
        op=op,
        inputs=inputs,
        reference=reference,
        implementations=(
            Implementation(name="triton", prepare=prepare, launches=launches, refusal=refusal),
        ),
        checks=CHECKS,
        grid=GRID,
        compilations=compilations,
        tolerances={"fp16": 1e-4, "bf16": 1e-4, "tf32": 1e-3, "fp8": 5e-2},
        source="own: register- and shared-memory-resident operands",
    ),
)
