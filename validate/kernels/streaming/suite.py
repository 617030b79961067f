"""What streams, as profiled kernels: copy, triad, L2 reads, maps, the SwiGLU gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F

from hwmodels import dtypes
from validate.kernels import formats
from validate.kernels.judge import poisoned
from validate.kernels.spec import (
    Compilation,
    Implementation,
    Inputs,
    KernelSpec,
    Launch,
)
from validate.kernels.streaming import kernel, reference
from validate.record import Case
from workloads.numeric import Num, ceil_div
from workloads.op import Op
from workloads.ops.elementwise import FORMULAS, Elementwise
from workloads.ops.elementwise import gelu as gelu_op
from workloads.ops.row_map import RowMap
from workloads.work import Work

Run = Callable[[], tuple[torch.Tensor, ...]]
TOLERANCES: Final = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
SCALE: Final = 0.7
"""s of the triad."""
FORMATS: Final = ("fp32", "fp16", "bf16")
STRIDE: Final = 37
"""Spans between two passes of `l2_read`: another multiprocessor's neighbourhood."""


@dataclass(frozen=True, kw_only=True)
class RepeatedRead(Op):
    """`num_elements` float32 numbers summed `passes` times: the bytes are those out of L2."""

    name: ClassVar[str] = "repeated_read"
    num_elements: Num
    passes: Num

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Nothing to choose."""
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """Every pass reads everything, as long as no fast memory keeps it."""
        read = self.num_elements * self.passes
        return Work(
            vector_flops=read,
            read_bytes=read * dtypes.FP32.bytes_per_element,
            write_bytes=ceil_div(self.num_elements, kernel.SPAN) * dtypes.FP32.bytes_per_element,
            launches=1,
        )

    def compulsory_bytes(self) -> Num:
        """The array once."""
        return self.num_elements * dtypes.FP32.bytes_per_element


def _launches(case: Case, arch: int) -> tuple[Launch, ...]:
    return tuple(launch for launch in kernel.LAUNCHES if launch.suits(arch))


def _elements(case: Case) -> int:
    return int(case.params["elements"])


def _random(
    case: Case, generator: torch.Generator, device: torch.device, *names: str
) -> dict[str, torch.Tensor]:
    fixed: dict[str, Any] = {"dtype": case.dtype, "generator": generator, "device": device}
    return {name: formats.random(_elements(case), **fixed) for name in names}


def _compilation(
    spec: str, function: Any, pointers: Mapping[str, str], scalars: Mapping[str, str],
    launch: Launch, *, label: str, **constants: Any,
) -> Compilation:  # fmt: skip
    fixed = {**launch.meta, **constants}
    return Compilation(
        kernel=spec,
        function=function,
        signature={**pointers, **scalars, **dict.fromkeys(fixed, "constexpr")},
        constants=fixed,
        launch=launch,
        aligned=(*pointers, *(name for name, kind in scalars.items() if kind == "i32")),
        label=label,
    )


# ---- copy ----------------------------------------------------------------------------------


def _copy_prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    return kernel.prepare_copy(inputs["b"], launch)


def _copy_torch(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    b = inputs["b"]
    a = poisoned(*b.shape, dtype=b.dtype, device=b.device)
    return lambda: (a.copy_(b),)


_RAGGED: Final = (1, 1000, 1024, 2048, 5000, 8193)
_SIZES: Final = (2**16, 2**20, 2**22, 2**24, 2**26, 2**28)


def _cases(op: str, sizes: tuple[int, ...], dtypes: tuple[str, ...], **more: Any) -> list[Case]:
    return [
        Case(op=op, dtype=dtype, params={**more, "elements": n}) for dtype in dtypes for n in sizes
    ]


def _stream(case: Case, num_inputs: int, flops: int) -> Elementwise:
    return Elementwise(
        num_elements=_elements(case),
        num_inputs=num_inputs,
        vector_flops_per_element=flops,
        dtype=dtypes.dtype(case.dtype),
    )


def _copy_compilations() -> tuple[Compilation, ...]:
    pointers = {"b_ptr": "*fp32", "a_ptr": "*fp32"}
    return tuple(
        _compilation("copy", kernel.copy, pointers, {"num_elements": "i32"}, launch, label="fp32")
        for launch in kernel.LAUNCHES
    )


COPY: Final = KernelSpec(
    name="copy",
    op=lambda case: _stream(case, 1, 0),
    inputs=lambda case, generator, device: _random(case, generator, device, "b"),
    reference=lambda case, inputs: (inputs["b"].double(),),
    implementations=(
        Implementation(name="triton", prepare=_copy_prepare, launches=_launches),
        Implementation(name="torch", prepare=_copy_torch, vendor="torch"),
    ),
    checks=tuple(_cases("copy", _RAGGED, ("fp32",))),
    grid=tuple(_cases("copy", (*_SIZES, 2**29), ("fp32",))),
    compilations=_copy_compilations,
    tolerances={"fp32": 0.0},
    source="McCalpin 1995, STREAM",
)

# ---- triad ---------------------------------------------------------------------------------


def _triad_prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    return kernel.prepare_triad(inputs["b"], inputs["c"], SCALE, launch)


def _triad_torch(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    b, c = inputs["b"], inputs["c"]
    a = poisoned(*b.shape, dtype=b.dtype, device=b.device)
    return lambda: (torch.add(b, c, alpha=SCALE, out=a),)


def _triad_compilations() -> tuple[Compilation, ...]:
    pointers = {"b_ptr": "*fp32", "c_ptr": "*fp32", "a_ptr": "*fp32"}
    scalars = {"scale": "fp32", "num_elements": "i32"}
    return tuple(
        _compilation("triad", kernel.triad, pointers, scalars, launch, label="fp32")
        for launch in kernel.LAUNCHES
    )


TRIAD: Final = KernelSpec(
    name="triad",
    op=lambda case: _stream(case, 2, 2),
    inputs=lambda case, generator, device: _random(case, generator, device, "b", "c"),
    reference=lambda case, inputs: (reference.triad(inputs["b"], inputs["c"], SCALE),),
    implementations=(
        Implementation(name="triton", prepare=_triad_prepare, launches=_launches),
        Implementation(name="torch", prepare=_triad_torch, vendor="torch"),
    ),
    checks=tuple(_cases("triad", _RAGGED, ("fp32",))),
    grid=tuple(_cases("triad", (*_SIZES, 3 * 2**27), ("fp32",))),
    compilations=_triad_compilations,
    tolerances={"fp32": 1e-5},
    source="McCalpin 1995, STREAM",
)

# ---- L2 ------------------------------------------------------------------------------------


def _l2_prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    return kernel.prepare_l2_read(inputs["x"], int(case.params["passes"]), STRIDE, launch)


def _l2_reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    passes = int(case.params["passes"])
    return (reference.repeated_sums(inputs["x"], kernel.SPAN, passes, STRIDE),)


def _l2_compilations() -> tuple[Compilation, ...]:
    pointers = {"x_ptr": "*fp32", "sums_ptr": "*fp32"}
    scalars = {"num_elements": "i32", "num_spans": "i32", "passes": "i32", "stride": "i32"}
    found = []
    for launch in kernel.L2_LAUNCHES:
        one = _compilation(
            "l2_read", kernel.l2_read, pointers, scalars, launch, label="fp32", SPAN=kernel.SPAN
        )
        found.append(one)
    return tuple(found)


def _l2_cases(passes: int, *sizes: int) -> tuple[Case, ...]:
    return tuple(_cases("l2_read", sizes, ("fp32",), passes=passes))


L2_READ: Final = KernelSpec(
    name="l2_read",
    op=lambda case: RepeatedRead(num_elements=_elements(case), passes=case.params["passes"]),
    inputs=lambda case, generator, device: _random(case, generator, device, "x"),
    reference=_l2_reference,
    implementations=(
        Implementation(
            name="triton",
            prepare=_l2_prepare,
            launches=lambda case, arch: kernel.L2_LAUNCHES,
        ),
    ),
    checks=(*_l2_cases(1, 1, 4096, 5000), *_l2_cases(5, 1000, 3 * 4096, 40_001)),
    grid=_l2_cases(64, 2**19, 2**20, 2**21, 2**22, 3 * 2**21),
    compilations=_l2_compilations,
    tolerances={"fp32": 1e-5},
    source="own: spans that change their multiprocessor from pass to pass",
)

# ---- maps ----------------------------------------------------------------------------------

_TORCH_MAPS: Final[Mapping[str, Callable[..., torch.Tensor]]] = {
    "add": torch.add,
    "mul": torch.mul,
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


def _operands(case: Case) -> tuple[str, ...]:
    return ("x", "y") if case.params["map"] in kernel.BINARY else ("x",)


def _map_op(case: Case) -> Elementwise:
    """As the published rows of that name count."""
    name, n, dtype = case.params["map"], _elements(case), dtypes.dtype(case.dtype)
    if name == "gelu":
        return gelu_op(n, dtype)
    return Elementwise(
        num_elements=n,
        num_inputs=len(_operands(case)),
        vector_flops_per_element=0 if name == "tanh" else 1,
        special_ops_per_element=1 if name == "tanh" else 0,
        dtype=dtype,
    )


def _map_reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    truth = reference.MAPS[case.params["map"]]
    return (truth(*(inputs[name].double() for name in _operands(case))),)


def _map_prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    return kernel.prepare_map(case.params["map"], inputs["x"], inputs.get("y"), launch)


def _map_torch(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    run, operands = _TORCH_MAPS[case.params["map"]], [inputs[name] for name in _operands(case)]
    return lambda: (run(*operands),)


def _map_row(case: Case) -> tuple[str, str, Mapping[str, Any]]:
    sizes = {"elements": _elements(case), "inputs": len(_operands(case))}
    return "elementwise", str(case.params["map"]), sizes


def _map_compilations() -> tuple[Compilation, ...]:
    found = []
    for dtype in FORMATS:
        stored = "*" + formats.TRITON[dtype]
        pointers = dict.fromkeys(("x_ptr", "y_ptr", "out_ptr"), stored)
        for name in (*kernel.BINARY, *kernel.UNARY):
            for launch in kernel.LAUNCHES:
                one = _compilation(
                    "elementwise", kernel.elementwise, pointers, {"num_elements": "i32"},
                    launch, label=f"{name}-{dtype}", MAP=name,
                )  # fmt: skip
                found.append(one)
    return tuple(found)


def _map_checks() -> list[Case]:
    found = []
    for name in (*kernel.BINARY, *kernel.UNARY):
        found += _cases("elementwise", (1, 1000, 2048), ("fp32",), map=name)
        found += _cases("elementwise", (5000,), ("fp16", "bf16"), map=name)
    return found


def _map_grid() -> list[Case]:
    found = []
    for name in ("add", "gelu"):
        found += _cases("elementwise", (*_SIZES, 2**29), ("bf16",), map=name)
    for name in (*kernel.BINARY, *kernel.UNARY):
        found += _cases("elementwise", (2**20, 2**27), ("fp32", "fp16"), map=name)
    return found


ELEMENTWISE: Final = KernelSpec(
    name="elementwise",
    op=_map_op,
    inputs=lambda case, generator, device: _random(case, generator, device, *_operands(case)),
    reference=_map_reference,
    implementations=(
        Implementation(name="triton", prepare=_map_prepare, launches=_launches),
        Implementation(name="torch", prepare=_map_torch, vendor="torch"),
    ),
    checks=tuple(_map_checks()),
    grid=tuple(_map_grid()),
    compilations=_map_compilations,
    tolerances=TOLERANCES,
    source="pointwise maps; GELU in its tanh form, Hendrycks and Gimpel 2016 (arXiv 1606.08415)",
    row=_map_row,
)

# ---- the gate ------------------------------------------------------------------------------


def _gated(dtype: str, rows: int, cols: int) -> Case:
    return Case(op="swiglu", dtype=dtype, params={"rows": rows, "cols": cols})


def _shape(case: Case) -> tuple[int, int]:
    return int(case.params["rows"]), int(case.params["cols"])


def _gate_op(case: Case) -> RowMap:
    rows, cols = _shape(case)
    counts = FORMULAS["silu_mul"]
    return RowMap(
        rows=rows,
        cols=cols,
        num_inputs=2,
        vector_flops_per_element=counts.vector_flops,
        special_ops_per_element=counts.special_ops,
        dtype=dtypes.dtype(case.dtype),
    )


def _gate_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    rows, cols = _shape(case)
    fixed: dict[str, Any] = {"dtype": case.dtype, "generator": generator, "device": device}
    return {"x": formats.random(rows, 2 * cols, **fixed)}


def _gate_prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    return kernel.prepare_swiglu(inputs["x"], launch)


def _gate_launches(case: Case, arch: int) -> tuple[Launch, ...]:
    """Blocks that a row fills to the half at least; the smallest one always does."""
    least = min(launch.meta["BLOCK"] for launch in kernel.LAUNCHES)
    limit = max(least, 2 * int(case.params["cols"]))
    return tuple(x for x in _launches(case, arch) if x.meta["BLOCK"] < limit or limit == least)


def _gate_torch(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    g, u = inputs["x"].chunk(2, dim=-1)
    return lambda: (F.silu(g) * u,)


def _gate_row(case: Case) -> tuple[str, str, Mapping[str, Any]]:
    rows, cols = _shape(case)
    return "elementwise", "silu_and_mul", {"rows": rows, "cols": cols, "elements": rows * cols}


def _gate_compilations() -> tuple[Compilation, ...]:
    found = []
    for dtype in FORMATS:
        stored = "*" + formats.TRITON[dtype]
        pointers = {"x_ptr": stored, "out_ptr": stored}
        for launch in kernel.LAUNCHES:
            one = _compilation(
                "swiglu", kernel.swiglu, pointers, {"cols": "i32"}, launch, label=dtype
            )
            found.append(one)
    return tuple(found)


SWIGLU: Final = KernelSpec(
    name="swiglu",
    op=_gate_op,
    inputs=_gate_inputs,
    reference=lambda case, inputs: (reference.gate(inputs["x"]),),
    implementations=(
        Implementation(name="triton", prepare=_gate_prepare, launches=_gate_launches),
        Implementation(name="torch", prepare=_gate_torch, vendor="torch"),
    ),
    checks=(
        *(_gated("fp32", *s) for s in ((1, 1), (3, 1000), (2, 2048), (2, 5000), (7, 33))),
        *(_gated(dtype, 3, 1025) for dtype in ("fp16", "bf16")),
    ),
    grid=tuple(
        _gated(dtype, rows, cols)
        for dtype in ("bf16", "fp16")
        for rows in (16, 256, 4096, 16384)
        for cols in (4096, 14336, 28672)
    ),
    compilations=_gate_compilations,
    tolerances=TOLERANCES,
    source="Shazeer 2020 (arXiv 2002.05202)",
    row=_gate_row,
)

SPECS: Final = (COPY, TRIAD, L2_READ, ELEMENTWISE, SWIGLU)
