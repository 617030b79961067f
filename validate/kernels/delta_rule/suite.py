"""The (gated) delta rule in the profiling suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.compiled import compilation
from validate.kernels.delta_rule import kernel, reference
from validate.kernels.gated_linear_attention.kernel import chunk_outputs
from validate.kernels.spec import TRITON, Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.op import Op
from workloads.ops.delta_rule import GatedDeltaRule

NAME: Final = "delta_rule"
TOLERANCES: Final = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
SHIPPED: Final = ("fp32", "fp16", "bf16")
SIZES: Final = ("batch", "len_seq", "key_heads", "heads", "key_dim", "value_dim")
KEYS: Final = {"fp32": 64, "tf32": 64, "fp16": 128, "bf16": 128}
"""Widest keys of a head whose states stay in registers: what is compiled ahead of time. Models
that use the rule have 128 in 16 bits."""
TAPS: Final = 4
"""Width of the short convolution beside it in the published rows' models; it is not run here."""


def _case(dtype: str, decay: str, sizes: tuple[int, ...]) -> Case:
    params = dict(zip(SIZES, sizes, strict=True))
    return Case(op=NAME, dtype=dtype, params={**params, "decay": decay})


def _op(case: Case) -> Op:
    p = case.params
    return GatedDeltaRule(
        batch=p["batch"], len_seq=p["len_seq"], num_heads=p["heads"],
        num_key_heads=p["key_heads"], key_dim=p["key_dim"], value_dim=p["value_dim"],
        dtype=format_of(case.dtype),
    )  # fmt: skip


def _row(case: Case) -> tuple[str, str, Mapping[str, Any]]:
    p = case.params
    params = {
        "batch": p["batch"], "seq": p["len_seq"], "d_conv": TAPS, "heads_k": p["key_heads"],
        "dk": p["key_dim"], "heads_v": p["heads"], "dv": p["value_dim"],
    }  # fmt: skip
    return "scan_conv1d", "gdn_context_chunk_gated_delta_rule_triton", params


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Keys and queries of unit length, as the models make them; b in (0, 1)."""
    p = case.params
    tokens = (p["batch"], p["len_seq"])

    def draw(*shape: int, dtype: str = case.dtype) -> torch.Tensor:
        return formats.random(*tokens, *shape, dtype=dtype, generator=generator, device=device)

    def unit() -> torch.Tensor:
        raw = draw(p["key_heads"], p["key_dim"], dtype="fp32")
        return torch.nn.functional.normalize(raw, dim=-1).to(formats.TORCH[case.dtype])

    gates = draw(p["heads"], dtype="fp32"), draw(p["heads"], dtype="fp32")
    found = {"q": unit(), "k": unit(), "v": draw(p["heads"], p["value_dim"])}
    found["beta"] = torch.sigmoid(gates[0])
    if p["decay"] != "none":
        found["g"] = torch.nn.functional.logsigmoid(3 + gates[1])
    return found


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    given = {name: x.double() for name, x in inputs.items()}
    return reference.delta_rule(**{"g": None, **given})


def fits(dtype: str, launch: Launch) -> bool:
    """Operands of fp32 take the smallest tile, others the larger ones."""
    return (launch.meta["CHUNK"] <= 32) == (dtype in ("fp32", "tf32"))


def _launches(case: Case, arch: int) -> Sequence[Launch]:
    return tuple(x for x in kernel.LAUNCHES if x.suits(arch) and fits(case.dtype, x))


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Any:
    assert launch is not None
    return kernel.DeltaRule(inputs, case.params["decay"], case.dtype, launch)


def _refusal(case: Case, arch: int) -> str | None:
    most = KEYS[case.dtype]
    return f"a head of more than {most} keys" if case.params["key_dim"] > most else None


def _binary(function: Any, decay: str, dtype: str, launch: Launch) -> Compilation:
    wide = ("beta_ptr", "g_ptr", "inverses_ptr", "last_ptr")
    pointers = {
        arg: "fp32" if arg in wide else formats.TRITON[dtype]
        for arg in function.arg_names
        if arg.endswith("_ptr")
    }
    sizes = kernel.pair_tile(launch) if function is kernel.chunk_pairs else launch.meta
    tile: dict[str, Any] = {**sizes, "SUB": kernel.SUB, "KEYS": KEYS[dtype], "MIRROR": False}
    tile |= {"DECAY": kernel.DECAYS[decay], "PRECISION": kernel.PRECISIONS[dtype]}
    constants = {name: value for name, value in tile.items() if name in function.arg_names}
    one = replace(launch, num_warps=1) if function is kernel.diagonal_inverses else launch
    return compilation(NAME, function, one, pointers, constants, f"{dtype}-{decay}")


def _compilations() -> tuple[Compilation, ...]:
    functions = (kernel.diagonal_inverses, kernel.chunk_pairs, kernel.chunk_states)
    return tuple(
        _binary(function, decay, dtype, launch)
        for dtype in SHIPPED
        for launch in kernel.LAUNCHES
        if fits(dtype, launch)
        for decay in kernel.DECAYS
        for function in (*functions, chunk_outputs)
    )


_CHECKED: Final = (
    ("scalar", (1, 1, 1, 1, 16, 16)), ("scalar", (1, 70, 1, 2, 24, 20)),
    ("scalar", (2, 33, 1, 1, 40, 16)), ("none", (1, 64, 1, 1, 16, 40)),
    ("none", (1, 37, 2, 2, 16, 16)),
)  # fmt: skip
_TIMED: Final = (
    (1, 256, 16, 32, 128, 128), (1, 2048, 16, 32, 128, 128), (8, 512, 16, 32, 128, 128),
    (1, 8192, 16, 64, 128, 128), (8, 2048, 16, 32, 128, 128), (1, 32768, 16, 32, 128, 128),
    (8, 4096, 16, 64, 128, 128), (16, 4096, 32, 32, 64, 64), (32, 4096, 16, 32, 128, 128),
)  # fmt: skip

SPECS: Final = (
    KernelSpec(
        name=NAME, op=_op, inputs=_inputs, reference=_reference,
        implementations=(
            Implementation(name=TRITON, prepare=_prepare, launches=_launches, refusal=_refusal),
        ),
        checks=tuple(_case(dtype, *given) for dtype in ("fp32", "fp16") for given in _CHECKED),
        grid=(
            *(_case("bf16", decay, s) for s in _TIMED for decay in ("scalar", "none")),
            *(_case("fp16", "scalar", s) for s in (_TIMED[1], _TIMED[4])),
        ),
        compilations=_compilations, tolerances=TOLERANCES, row=_row,
        source="Yang et al. 2024, arXiv 2406.06484, section 3.2; arXiv 2412.06464, section 3.3",
    ),
)  # fmt: skip
