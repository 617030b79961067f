"""The selective scan of the profiling suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.compiled import compilation
from validate.kernels.selective_scan import reference
from validate.kernels.selective_scan.kernel import (
    LANES_WANTED,
    LAUNCHES,
    SelectiveScan,
    hand_on,
    scan_segments,
)
from validate.kernels.spec import TRITON, Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.op import Op
from workloads.ops import selective_scan as counted

NAME: Final = "selective_scan"
TOLERANCES: Final = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
STATES: Final = 16
"""States of a channel in Mamba-1's models."""


def _case(dtype: str, batch: int, len_seq: int, channels: int, d_state: int = STATES) -> Case:
    sizes = {"batch": batch, "len_seq": len_seq, "channels": channels, "d_state": d_state}
    return Case(op=NAME, dtype=dtype, params=sizes)


def _op(case: Case) -> Op:
    p = case.params
    return counted.SelectiveScan(
        batch=p["batch"], len_seq=p["len_seq"], channels=p["channels"], state_dim=p["d_state"],
        dtype=format_of(case.dtype),
    )  # fmt: skip


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """delta's bias near softplus^-1 of 0.001 to 0.1, A from -1 to -N, as models begin."""
    p = case.params
    wide = (p["batch"], p["len_seq"], p["channels"])
    shared = (*wide[:2], p["d_state"])

    def draw(*shape: int, dtype: str = case.dtype, scale: float = 1.0) -> torch.Tensor:
        return formats.random(
            *shape, dtype=dtype, generator=generator, device=device, scale=scale
        )  # fmt: skip

    ramp = torch.arange(1, p["d_state"] + 1, dtype=torch.float32, device=device)
    return {
        "x": draw(*wide), "delta": draw(*wide), "z": draw(*wide),
        "b": draw(*shared), "c": draw(*shared),
        "bias": draw(p["channels"], dtype="fp32") - 3,
        "a": -ramp * torch.exp(draw(p["channels"], p["d_state"], dtype="fp32", scale=0.3)),
        "d": draw(p["channels"], dtype="fp32"),
    }  # fmt: skip


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return reference.selective_scan(**{name: x.double() for name, x in inputs.items()})


def _launches(case: Case, arch: int) -> Sequence[Launch]:
    """Time in segments first where the channels alone do not fill a GPU."""
    full = case.params["batch"] * case.params["channels"] >= LANES_WANTED
    return sorted(LAUNCHES, key=lambda launch: launch.meta["CUT"] == int(full))


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Any:
    assert launch is not None
    return SelectiveScan(dict(inputs), launch)


def _binaries(dtype: str, launch: Launch) -> list[Compilation]:
    tile = {"STATES": STATES, "BLOCK": launch.meta["BLOCK"]}
    names = ("x_ptr", "delta_ptr", "b_ptr", "c_ptr", "z_ptr", "y_ptr")
    pointers = dict.fromkeys(names, formats.TRITON[dtype])
    others = ("bias_ptr", "a_ptr", "d_ptr", "start_ptr", "end_ptr", "sum_ptr")
    pointers |= dict.fromkeys(others, "fp32")
    cut = bool(launch.meta["CUT"])
    passes = {"y": True, "ends": False} if cut else {"y": True}
    return [
        compilation(
            NAME, scan_segments, launch, pointers, {"OUTPUT": output, "CUT": cut, **tile},
            f"{dtype}-{label}",
        )
        for label, output in passes.items()
    ]  # fmt: skip


def _hand_on(launch: Launch) -> Compilation:
    pointers = dict.fromkeys(("a_ptr", "end_ptr", "sum_ptr", "start_ptr"), "fp32")
    tile = {"STATES": STATES, "BLOCK": launch.meta["BLOCK"]}
    return compilation(NAME, hand_on, launch, pointers, tile)


def _compilations() -> tuple[Compilation, ...]:
    scans = [b for dtype in TOLERANCES for launch in LAUNCHES for b in _binaries(dtype, launch)]
    return (*scans, *(_hand_on(launch) for launch in LAUNCHES if launch.meta["CUT"]))


_CHECKED: Final = ((1, 1, 1, 16), (2, 9, 32, 16), (1, 33, 40, 16), (2, 12, 65, 5))
_TIMED: Final = (
    (1, 256, 1536), (1, 2048, 1536), (8, 512, 1536), (1, 2048, 5120), (1, 8192, 4096),
    (8, 2048, 2048), (16, 2048, 2048), (8, 2048, 5120), (1, 65536, 4096), (32, 2048, 4096),
    (8, 4096, 8192),
)  # fmt: skip

SPECS: Final = (
    KernelSpec(
        name=NAME, op=_op, inputs=_inputs, reference=_reference,
        implementations=(Implementation(name=TRITON, prepare=_prepare, launches=_launches),),
        checks=(
            _case("fp32", 1, 130, 8),
            *(_case(dtype, *s) for dtype in ("fp32", "fp16") for s in _CHECKED),
        ),
        grid=tuple(_case(dtype, *s) for s in _TIMED for dtype in ("bf16", "fp32")),
        compilations=_compilations, tolerances=TOLERANCES,
        source="Gu and Dao 2023, arXiv 2312.00752, section 3.3",
    ),
)  # fmt: skip
