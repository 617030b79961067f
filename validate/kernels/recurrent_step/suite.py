"""Fused recurrent layers in the profiling suite, beside cuDNN and torch step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.compiled import compilation
from validate.kernels.recurrent_step import kernel, reference
from validate.kernels.spec import TRITON, Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.op import Op
from workloads.ops.fused_rnn import FusedRnn

Run = Callable[[], tuple[torch.Tensor, ...]]
NAME: Final = "recurrent_step"
TOLERANCES: Final = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
"""States that are fed back in 16 bits are rounded at every step."""
SHIPPED: Final = ("bf16", "fp16", "fp32")
NAMES: Final = ("batch", "heads", "head_dim", "len_seq")
MOST_DIM: Final = {"bf16": 128, "fp16": 128, "fp32": 32, "tf32": 32}
"""Units a head whose weights stay on chip beside the sums."""
RESIDENT_BYTES: Final = 384
"""Of weights a thread: 96 registers, and as many again for sums and states."""


def case(cell: str, dtype: str, sizes: tuple[int, ...]) -> Case:
    """A layer of `heads` heads of `head_dim` units."""
    params = dict(zip(NAMES, sizes, strict=True))
    return Case(op=NAME, dtype=dtype, params={"cell": cell, **params})


def _op(case: Case) -> Op:
    p = case.params
    return FusedRnn(
        cell=p["cell"], batch=p["batch"], num_heads=p["heads"], head_dim=p["head_dim"],
        len_seq=p["len_seq"], dtype=format_of(case.dtype),
    )  # fmt: skip


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Weights of products of order one; an sLSTM's normaliser starts at or above one."""
    batch, heads, dim, steps = (int(case.params[name]) for name in NAMES)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return formats.random(
            *shape, dtype=case.dtype, generator=generator, device=device, scale=scale
        )  # fmt: skip

    first = draw(kernel.STATES[case.params["cell"]], batch, heads, dim, scale=0.5)
    if case.params["cell"] == "slstm":
        first[2] = 1 + first[2].abs()
    return {
        "x": draw(steps, batch, kernel.GATES, heads, dim),
        "r": draw(heads, kernel.GATES, dim, dim, scale=dim**-0.5),
        "b": draw(kernel.GATES, heads, dim),
        "first": first,
    }


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    found = reference.recurrence(
        case.params["cell"], *(inputs[name] for name in ("x", "r", "b", "first"))
    )
    return (found[0], *found[1:, -1])


def fits(dim: int, dtype: str, launch: Launch) -> bool:
    """Do a head's weights stay in the registers of that many warps, and do its sums, of which
    eight warps repeat a square of 32?"""
    wide = kernel.width(dim)
    if launch.meta["BM"] > 16 and wide < 64:
        return False
    held = kernel.GATES * wide * wide * format_of(dtype).bytes_per_element
    return wide <= MOST_DIM[dtype] and held <= RESIDENT_BYTES * 32 * launch.num_warps


def _launches(case: Case, arch: int) -> Sequence[Launch]:
    dim = int(case.params["head_dim"])
    return [x for x in kernel.LAUNCHES if x.suits(arch) and fits(dim, case.dtype, x)]


def _refusal(case: Case, arch: int) -> str | None:
    batch, heads, dim = (int(case.params[name]) for name in NAMES[:3])
    if kernel.GATES * batch * heads * dim > kernel.MOST_NUMBERS:
        return "more pre-activations a step than 32 bits tell apart"
    return None if _launches(case, arch) else "a head's weights do not stay on chip"


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    return kernel.Recurrence(inputs, case.params["cell"], case.dtype, launch)


# ---- others --------------------------------------------------------------------------------


def _steps(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    """torch, one step after the other: a batched product, then the cell."""
    x, r, b, first = (inputs[name] for name in ("x", "r", "b", "first"))
    heads, gates, dim, _ = r.shape
    flat = r.transpose(1, 2).reshape(heads, dim, gates * dim)
    given = x.permute(0, 2, 1, 3, 4) + b[:, None]
    cell = reference.CELLS[case.params["cell"]]

    def run() -> tuple[torch.Tensor, ...]:
        states, found = list(first), []
        for now in given:
            made = torch.matmul(states[0].transpose(0, 1), flat).unflatten(-1, (gates, dim))
            states = cell(now + made.permute(2, 1, 0, 3), states)
            found.append(states[0])
        return (torch.stack(found), *states[1:])

    return run


def _cudnn(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    """torch.nn.LSTM of one head; what we are given as pre-activations it multiplies by a unit
    matrix, for it knows no other way in: that product of 16 d^2 terms a row is in its time."""
    x, r, b, first = (inputs[name] for name in ("x", "r", "b", "first"))
    steps, batch, gates, _, dim = x.shape
    layer = torch.nn.LSTM(gates * dim, dim).to(x).eval()
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(gates * dim))
        layer.weight_hh_l0.copy_(r[0].transpose(1, 2).reshape(gates * dim, dim))
        layer.bias_ih_l0.copy_(b.reshape(-1))
        layer.bias_hh_l0.zero_()
    flat = x.reshape(steps, batch, gates * dim)
    start = (first[0].transpose(0, 1).contiguous(), first[1].transpose(0, 1).contiguous())

    tf32 = case.dtype == "tf32"

    def run() -> tuple[torch.Tensor, ...]:
        # torch lets cuDNN round fp32 operands to tf32 unless told not to
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            y, (_, c) = layer(flat, start)
        return y[:, :, None], c.transpose(0, 1)

    return run


def _no_cudnn(case: Case, arch: int) -> str | None:
    if case.params["cell"] != "lstm":
        return "cuDNN has no sLSTM"
    if case.params["heads"] != 1:
        return "cuDNN has no block-diagonal weights"
    if case.dtype != "fp32" and not torch.cuda.is_available():
        return f"torch's LSTM on CPU is checked in fp32 only, not {case.dtype}"
    return None


# ---- binaries ------------------------------------------------------------------------------


def _compilations() -> tuple[Compilation, ...]:
    found = []
    for dtype in SHIPPED:
        for dim in (32, 64, 128):
            for launch in kernel.LAUNCHES:
                if fits(dim, dtype, launch):
                    found += [_binary(cell, dtype, dim, launch) for cell in kernel.STATES]
    return tuple(found)


def _binary(cell: str, dtype: str, dim: int, launch: Launch) -> Compilation:
    names = kernel.recurrence.arg_names
    pointers = {arg: formats.TRITON[dtype] for arg in names if arg.endswith("_ptr")}
    fixed: dict[str, Any] = {
        **launch.meta, "BD": dim, "SLSTM": cell == "slstm",
        "PRECISION": kernel.PRECISIONS[dtype],
    }  # fmt: skip
    return compilation(NAME, kernel.recurrence, launch, pointers, fixed, f"{cell}-{dtype}-{dim}")


# ---- cases ---------------------------------------------------------------------------------

_CHECKED: Final = ((1, 1, 16, 1), (3, 1, 20, 5), (17, 2, 32, 4), (16, 1, 32, 7))
_TIMED: Final = (
    (1, 12, 64, 128), (16, 12, 64, 1024), (16, 6, 128, 1024), (16, 24, 32, 1024),
    (64, 12, 64, 1024), (128, 32, 64, 1024), (16, 1, 128, 1024), (64, 1, 64, 1024),
    (256, 16, 128, 512), (8, 12, 64, 8192), (500, 8, 100, 256),
)  # fmt: skip

SPEC: Final = KernelSpec(
    name=NAME,
    op=_op,
    inputs=_inputs,
    reference=_reference,
    implementations=(
        Implementation(name=TRITON, prepare=_prepare, launches=_launches, refusal=_refusal),
        Implementation(name="cudnn", prepare=_cudnn, refusal=_no_cudnn, vendor="cudnn"),
        Implementation(name="torch", prepare=_steps, vendor="torch"),
    ),
    checks=tuple(
        case(cell, dtype, sizes)
        for cell in kernel.STATES
        for dtype in ("fp32", "fp16")
        for sizes in _CHECKED
    ),
    grid=(
        *(case(cell, "bf16", sizes) for cell in kernel.STATES for sizes in _TIMED),
        case("lstm", "fp16", (16, 12, 64, 1024)),
        case("lstm", "fp32", (16, 24, 32, 1024)),
    ),
    compilations=_compilations,
    tolerances=TOLERANCES,
    source="Poeppel et al. 2024, arXiv 2412.07752 (FlashRNN)",
)
SPECS: Final = (SPEC,)
