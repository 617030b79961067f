"""The associative scan of the profiling suite: its cases, counts, truth and implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.associative_scan import reference
from validate.kernels.associative_scan.kernel import (
    CARRIED,
    CARRY,
    CUT,
    LAUNCHES,
    SEGMENTS_WANTED,
    Scan,
    scan_rows,
    segment_totals,
)
from validate.kernels.compiled import compilation
from validate.kernels.spec import TRITON, Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.op import Op
from workloads.ops.elementwise import Elementwise

FORWARD: Final = "associative_scan"
BACKWARD: Final = "associative_scan_backward"
TOLERANCES: Final = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}


def _case(name: str, dtype: str, rows: int, len_seq: int, decay: str = "random") -> Case:
    return Case(op=name, dtype=dtype, params={"rows": rows, "len_seq": len_seq, "decay": decay})


def _op(case: Case) -> Op:
    """Arrays streamed once: a, b in and h out; backward a, h, dh in and da, db out. (The op
    `associative_scan` would also write the products of a, which nothing here asks for.)"""
    p, backward = case.params, case.op == BACKWARD
    return Elementwise(
        num_elements=p["rows"] * p["len_seq"], num_inputs=3 if backward else 2,
        num_outputs=2 if backward else 1, vector_flops_per_element=3 if backward else 2,
        dtype=format_of(case.dtype),
    )  # fmt: skip


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """a in (0, 1), of all signs where `decay` is 'signed', 1 where it is 'none'."""
    shape = (case.params["rows"], case.params["len_seq"])
    decay = case.params["decay"]
    raw = formats.random(*shape, dtype="fp32", generator=generator, device=device)
    a = torch.ones_like(raw) if decay == "none" else torch.sigmoid(2 + raw)
    a = a * torch.sign(raw) if decay == "signed" else a
    b = formats.random(*shape, dtype=case.dtype, generator=generator, device=device)
    found = {"a": a.to(formats.TORCH[case.dtype]), "b": b}
    if case.op == BACKWARD:
        found["dh"] = formats.random(*shape, dtype=case.dtype, generator=generator, device=device)
        (found["h"],) = Scan(found["a"], b, _launches(case, 0)[0])()
    return found


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    a, b = inputs["a"].double(), inputs["b"].double()
    if case.op == BACKWARD:
        return reference.gradients(a, b, inputs["dh"].double())
    return (reference.scan(a, b),)


def _launches(case: Case, arch: int) -> Sequence[Launch]:
    """Rows whole where they fill a GPU, in segments first where they do not."""
    whole = case.params["rows"] >= SEGMENTS_WANTED // 2
    return CARRIED + CUT if whole else CUT + CARRIED


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Any:
    assert launch is not None
    if case.op == BACKWARD:
        return Scan(inputs["a"], inputs["dh"], launch, state=inputs["h"])
    return Scan(inputs["a"], inputs["b"], launch)


def _cumsum(case: Case, inputs: Inputs, launch: Launch | None) -> Any:
    b = inputs["b"]
    out = torch.empty_like(b)

    def run() -> tuple[torch.Tensor, ...]:
        torch.cumsum(b, dim=1, out=out)
        return (out,)

    return run


def _no_cumsum(case: Case, arch: int) -> str | None:
    return None if case.params["decay"] == "none" else "torch has no scan with decays"


def _binary(name: str, dtype: str, launch: Launch, *, totals: bool) -> Compilation:
    kind, reverse = formats.TRITON[dtype], name == BACKWARD
    label = f"{dtype}-back" if reverse else dtype
    tile = {"BLOCK": launch.meta["BLOCK"], "ROWS": launch.meta["ROWS"]}
    constants: dict[str, Any] = {"REVERSE": reverse, "STAGES": launch.num_stages, **tile}
    if totals:
        pointers = dict.fromkeys(("a_ptr", "b_ptr"), kind)
        pointers |= dict.fromkeys(("total_a_ptr", "total_b_ptr"), "fp32")
        return compilation(name, segment_totals, launch, pointers, constants, label)
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "state_ptr", "out_ptr", "da_ptr"), kind)
    pointers["before_ptr"] = "fp32"
    constants["CUT"] = bool(launch.meta["CUT"])
    return compilation(name, scan_rows, launch, pointers, constants, label)


def _compilations(name: str) -> tuple[Compilation, ...]:
    shipped = [
        _binary(name, dtype, launch, totals=False) for dtype in TOLERANCES for launch in LAUNCHES
    ]
    totals = [_binary(name, dtype, launch, totals=True) for dtype in TOLERANCES for launch in CUT]
    carry = [_binary(FORWARD, "fp32", CARRY, totals=False)] if name == FORWARD else []
    return tuple(shipped + totals + carry)


_CHECKED: Final = ((1, 1), (3, 17), (2, 64), (5, 100), (1, 200))
_WIDE: Final = ((4096, 2048), (16384, 2048), (4096, 16384), (16384, 16384), (65536, 4096))
_LONG: Final = ((1, 2**20), (1, 2**24), (1, 2**28), (32, 2**16), (64, 2**20), (256, 2**18))
_SMALL: Final = ((128, 2048), (1024, 512), (2048, 8192))


def _checks(name: str) -> tuple[Case, ...]:
    random = [_case(name, dtype, *size) for dtype in ("fp32", "fp16") for size in _CHECKED]
    more = [_case(name, "fp32", 2, 40, "signed")]
    return (*random, *more, *([_case(name, "fp32", 2, 40, "none")] if name == FORWARD else []))


def _grid(name: str) -> tuple[Case, ...]:
    sizes = sorted((*_SMALL, *_WIDE, *_LONG), key=lambda s: s[0] * s[1])
    cases = [_case(name, dtype, *size) for size in sizes for dtype in ("bf16", "fp32")]
    sums = [_case(name, "fp32", *size, "none") for size in (_WIDE[2], _LONG[1], _LONG[4])]
    return (*cases, *(sums if name == FORWARD else []))


def _spec(name: str, *others: Implementation) -> KernelSpec:
    return KernelSpec(
        name=name, op=_op, inputs=_inputs, reference=_reference,
        implementations=(
            Implementation(name=TRITON, prepare=_prepare, launches=_launches), *others,
        ),
        checks=_checks(name), grid=_grid(name), compilations=lambda: _compilations(name),
        tolerances=TOLERANCES,
        source="Blelloch 1990, Prefix sums and their applications (CMU-CS-90-190)",
    )  # fmt: skip


SPECS: Final = (
    _spec(
        FORWARD,
        Implementation(name="torch", prepare=_cumsum, refusal=_no_cumsum, vendor="torch"),
    ),
    _spec(BACKWARD),
)
