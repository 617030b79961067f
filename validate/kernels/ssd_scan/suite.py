"""Mamba-2's scan in the profiling suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.compiled import compilation
from validate.kernels.spec import TRITON, Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.kernels.ssd_scan import kernel, reference
from validate.record import Case
from workloads.op import Op
from workloads.ops.chunk_scan import MambaChunkScan

NAME: Final = "ssd_scan"
TOLERANCES: Final = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
SHIPPED: Final = ("fp32", "fp16", "bf16")
SIZES: Final = ("batch", "len_seq", "heads", "groups", "head_dim", "d_state")
STATES: Final = 128
"""States of a head in Mamba-2's models: what is compiled ahead of time."""
TAPS: Final = 4
"""Width of the short convolution beside it in the published rows' models; it is not run here."""


def _case(dtype: str, *sizes: int) -> Case:
    return Case(op=NAME, dtype=dtype, params=dict(zip(SIZES, sizes, strict=True)))


def _op(case: Case) -> Op:
    p = case.params
    return MambaChunkScan(
        batch=p["batch"], len_seq=p["len_seq"], num_heads=p["heads"], num_groups=p["groups"],
        head_dim=p["head_dim"], state_dim=p["d_state"],
        chunk=kernel.LAUNCHES[0].meta["CHUNK"], dtype=format_of(case.dtype),
    )  # fmt: skip


def _row(case: Case) -> tuple[str, str, Mapping[str, Any]]:
    p = case.params
    params = {
        "batch": p["batch"], "seq": p["len_seq"], "d_conv": TAPS, "d_state": p["d_state"],
        "heads": p["heads"], "head_dim": p["head_dim"], "groups": p["groups"],
        "chunk": kernel.LAUNCHES[0].meta["CHUNK"],
    }  # fmt: skip
    return "scan_conv1d", "mamba2_context_mamba_chunk_scan_combined", params


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """a from -1 to -16 and steps of about 0.05, as models begin."""
    p = case.params
    tokens = (p["batch"], p["len_seq"])

    def draw(*shape: int, dtype: str = case.dtype) -> torch.Tensor:
        return formats.random(*shape, dtype=dtype, generator=generator, device=device)

    shared = (*tokens, p["groups"], p["d_state"])
    return {
        "x": draw(*tokens, p["heads"], p["head_dim"]), "dt": draw(*tokens, p["heads"]),
        "bias": draw(p["heads"], dtype="fp32") - 3, "b": draw(*shared), "c": draw(*shared),
        "a": -(1 + 15 * torch.sigmoid(draw(p["heads"], dtype="fp32"))),
        "d": draw(p["heads"], dtype="fp32"),
    }  # fmt: skip


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return reference.ssd_scan(**{name: x.double() for name, x in inputs.items()})


def fits(dtype: str, launch: Launch) -> bool:
    """Products of fp32 operands take the smallest tile, others the larger ones."""
    return (launch.meta["ROWS"] <= 32) == (dtype in ("fp32", "tf32"))


def _launches(case: Case, arch: int) -> Sequence[Launch]:
    return tuple(x for x in kernel.LAUNCHES if x.suits(arch) and fits(case.dtype, x))


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Any:
    assert launch is not None
    return kernel.SsdScan(inputs, case.dtype, launch)


def _binary(function: Any, dtype: str, launch: Launch) -> Compilation:
    wide = ("bias_ptr", "a_ptr", "d_ptr", "last_ptr")
    pointers = {
        arg: "fp32" if arg in wide else formats.TRITON[dtype]
        for arg in function.arg_names
        if arg.endswith("_ptr")
    }
    width = kernel.width_of_states(STATES, launch)
    constants = {**launch.meta, "BN": width, "PRECISION": kernel.PRECISIONS[dtype]}
    return compilation(NAME, function, launch, pointers, constants, dtype)


def _compilations() -> tuple[Compilation, ...]:
    return tuple(
        _binary(function, dtype, launch)
        for dtype in SHIPPED
        for launch in kernel.LAUNCHES
        if fits(dtype, launch)
        for function in (kernel.chunk_states, kernel.chunk_outputs)
    )


_CHECKED: Final = (
    (1, 1, 4, 1, 16, 16), (1, 70, 2, 1, 24, 16), (1, 130, 2, 2, 16, 20),
    (2, 33, 4, 2, 16, 70), (1, 64, 1, 1, 64, 64),
)  # fmt: skip
_TIMED: Final = (
    (1, 256, 24, 1, 64, 128), (1, 2048, 24, 1, 64, 128), (1, 8192, 64, 1, 64, 128),
    (8, 1024, 80, 1, 64, 128), (8, 2048, 128, 8, 64, 128), (1, 32768, 64, 8, 64, 64),
    (8, 4096, 80, 1, 64, 128), (8, 4096, 256, 8, 64, 128), (16, 4096, 128, 8, 64, 64),
    (1, 131072, 64, 8, 64, 128), (32, 4096, 128, 8, 64, 128),
)  # fmt: skip

SPECS: Final = (
    KernelSpec(
        name=NAME, op=_op, inputs=_inputs, reference=_reference,
        implementations=(Implementation(name=TRITON, prepare=_prepare, launches=_launches),),
        checks=tuple(_case(dtype, *s) for dtype in ("fp32", "fp16") for s in _CHECKED),
        grid=tuple(_case(d, *s) for s in _TIMED for d in ("bf16", "fp16")),
        compilations=_compilations, tolerances=TOLERANCES, row=_row,
        source="Dao and Gu 2024, arXiv 2405.21060, section 6",
    ),
)  # fmt: skip
