"""Chunked linear attention with decays in the profiling suite, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.compiled import compilation
from validate.kernels.gated_linear_attention import kernel, reference
from validate.kernels.spec import TRITON, Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.op import Op
from workloads.ops.linear_recurrence import LinearRecurrence
from workloads.ops.linear_recurrence_backward import LinearRecurrenceBackward

FORWARD: Final = "gated_linear_attention"
BACKWARD: Final = "gated_linear_attention_backward"
TOLERANCES: Final = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
SHIPPED: Final = ("fp32", "fp16", "bf16")
NAMES: Final = ("batch", "len_seq", "heads", "key_dim", "value_dim")


def _case(name: str, dtype: str, decay: str, sizes: tuple[int, ...]) -> Case:
    params = dict(zip(NAMES, sizes, strict=True))
    return Case(op=name, dtype=dtype, params={**params, "decay": decay})


def _op(case: Case) -> Op:
    """Counted in chunks of 64, as the kernels for 16 bits take them; wider keys in chunks that one
    multiprocessor's fast memory holds beside their state, as the count asks."""
    p = case.params
    count = LinearRecurrenceBackward if case.op == BACKWARD else LinearRecurrence
    return count(
        batch=p["batch"], num_heads=p["heads"], len_seq=p["len_seq"], key_dim=p["key_dim"],
        value_dim=p["value_dim"], chunk=64 if p["key_dim"] <= 128 else 32, decay=p["decay"],
        dtype=format_of(case.dtype),
    )  # fmt: skip


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Queries of unit length in the mean; decays between hardly and nine tenths a step."""
    p = case.params
    tokens = (p["batch"], p["len_seq"], p["heads"])

    def draw(width: int, dtype: str = case.dtype, scale: float = 1.0) -> torch.Tensor:
        return formats.random(
            *tokens, width, dtype=dtype, generator=generator, device=device, scale=scale
        )  # fmt: skip

    found = {
        "q": draw(p["key_dim"], scale=p["key_dim"] ** -0.5),
        "k": draw(p["key_dim"]), "v": draw(p["value_dim"]),
    }  # fmt: skip
    if p["decay"] != "none":
        g = torch.nn.functional.logsigmoid(2 + draw(p["key_dim"], "fp32"))
        found["g"] = g if p["decay"] == "channel" else g[..., 0].contiguous()
    if case.op == BACKWARD:
        found["do"] = draw(p["value_dim"])
    return found


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    q, k, v = (inputs[name].double() for name in "qkv")
    g = inputs["g"].double() if "g" in inputs else None
    if case.op == BACKWARD:
        return reference.gradients(q, k, v, g, inputs["do"].double())
    return (reference.gated_linear_attention(q, k, v, g),)


def _launches(case: Case, arch: int) -> Sequence[Launch]:
    return tuple(x for x in kernel.LAUNCHES if x.suits(arch) and fits(case.dtype, x))


def fits(dtype: str, launch: Launch) -> bool:
    """Operands of fp32 take the smallest tile, others the larger ones."""
    return (launch.meta["CHUNK"] <= 32) == (dtype in ("fp32", "tf32"))


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Any:
    assert launch is not None
    make = kernel.Backward if case.op == BACKWARD else kernel.Forward
    return make(inputs, case.params["decay"], case.dtype, launch)


def _binary(
    name: str, function: Any, dtype: str, launch: Launch, label: str, **constants: Any
) -> Compilation:
    """One binary; arrays of gates, of decay gradients and of partial sums are fp32."""
    wide: tuple[str, ...] = ("g_ptr", "dg_ptr", "near_dq_ptr", "near_dk_ptr")
    if function is kernel.channel_input_gradients:
        wide = ("g_ptr", "dq_ptr", "dk_ptr")
    pointers = {
        arg: "fp32" if arg in wide else formats.TRITON[dtype]
        for arg in function.arg_names
        if arg.endswith("_ptr")
    }
    tile = {key: size for key, size in launch.meta.items() if key in function.arg_names}
    if function in (kernel.channel_scores, kernel.channel_input_gradients):
        tile["BK"] = kernel.SCORE_KEYS
    if function is kernel.chunk_input_gradients:
        tile["BK"] = kernel.gradient_keys(launch)
    constants |= tile | {"PRECISION": kernel.PRECISIONS[dtype]}
    return compilation(name, function, launch, pointers, constants, f"{dtype}-{label}")


def _of_launch(name: str, dtype: str, launch: Launch) -> list[Compilation]:
    back, found, sub = name == BACKWARD, [], {"SUB": kernel.SUB}
    for decay, code in kernel.DECAYS.items():
        label = f"{decay}-mirror" if back else decay
        for function in (kernel.chunk_states, kernel.chunk_outputs):
            found.append(_binary(name, function, dtype, launch, label, DECAY=code, MIRROR=back))
        if back:
            one = kernel.chunk_input_gradients
            found.append(_binary(name, one, dtype, launch, decay, DECAY=code))
    if not back:
        found.append(_binary(name, kernel.channel_scores, dtype, launch, "channel", **sub))
        return found
    found.append(_binary(name, kernel.score_gradients, dtype, launch, "any"))
    channel = kernel.channel_input_gradients
    found.append(_binary(name, channel, dtype, launch, "channel", **sub))
    return found


def _compilations(name: str) -> tuple[Compilation, ...]:
    return tuple(
        binary
        for dtype in SHIPPED
        for launch in kernel.LAUNCHES
        if fits(dtype, launch)
        for binary in _of_launch(name, dtype, launch)
    )


_CHECKED: Final = (
    ("channel", (1, 1, 1, 16, 16)), ("channel", (1, 37, 1, 24, 20)),
    ("channel", (1, 16, 1, 40, 16)), ("scalar", (1, 33, 1, 16, 24)),
    ("scalar", (2, 70, 1, 20, 16)), ("none", (1, 37, 2, 16, 16)),
)  # fmt: skip
_TIMED: Final = (
    (1, 256, 4, 128, 128), (1, 1024, 16, 128, 128), (1, 4096, 16, 64, 64), (4, 2048, 16, 128, 128),
    (1, 16384, 16, 128, 128), (8, 4096, 16, 128, 128), (8, 4096, 4, 256, 512),
    (1, 65536, 32, 128, 128), (16, 4096, 32, 64, 128), (32, 4096, 32, 128, 128),
)  # fmt: skip


def _checks(name: str) -> tuple[Case, ...]:
    both = [_case(name, dtype, *given) for dtype in ("fp32", "fp16") for given in _CHECKED]
    return tuple(both)


def _grid(name: str) -> tuple[Case, ...]:
    most = _TIMED[:-1] if name == BACKWARD else _TIMED
    cases = [_case(name, "bf16", decay, s) for s in most for decay in kernel.DECAYS]
    return (*cases, *(_case(name, "fp16", "scalar", s) for s in (_TIMED[3], _TIMED[5])))


def _spec(name: str) -> KernelSpec:
    return KernelSpec(
        name=name, op=_op, inputs=_inputs, reference=_reference,
        implementations=(Implementation(name=TRITON, prepare=_prepare, launches=_launches),),
        checks=_checks(name), grid=_grid(name), compilations=lambda: _compilations(name),
        tolerances=TOLERANCES, source="Yang et al. 2024, arXiv 2312.06635, sections 4.2 to 4.4",
    )  # fmt: skip


SPECS: Final = (_spec(FORWARD), _spec(BACKWARD))
