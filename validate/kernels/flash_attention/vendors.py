"""The framework's attention as baselines: SDPA by backend, and FlashAttention's own entry.

Each backend is an implementation of its own, so that a record names the kernel that ran. What a
backend cannot do is refused beforehand with the reason; SDPA would fall back in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from validate.kernels.flash_attention.kernel import Packed
from validate.kernels.flash_attention.reference import Mask
from validate.kernels.flash_attention.tiles import HALVES
from validate.kernels.spec import Implementation, Inputs, Launch
from validate.record import Case

BACKENDS: Final = {
    "sdpa-flash": (SDPBackend.FLASH_ATTENTION, "flash-attention"),
    "sdpa-cudnn": (SDPBackend.CUDNN_ATTENTION, "cudnn"),
    "sdpa-efficient": (SDPBackend.EFFICIENT_ATTENTION, "xformers"),
    "sdpa-math": (SDPBackend.MATH, "torch"),
}
"""Backend and the library its kernels come from, by the name of the implementation."""
MATH_BYTES: Final = 2**34
"""Scores that the unfused form may hold: beyond it a run only shows what was known."""

Run = Callable[[], tuple[torch.Tensor, ...]]


def mask_of(case: Case) -> Mask:
    """The mask that a case's params state."""
    p = case.params
    return Mask(bool(p.get("causal", 0)), p.get("window", 0), p.get("sinks", 0))


def scale_of(case: Case) -> float:
    """1 / sqrt(head_dim)."""
    return float(case.params["head_dim"] ** -0.5)


def packed_of(case: Case, inputs: Inputs) -> Packed | None:
    """Where the sequences of a packed case end; None of a dense one."""
    if "cu_q" not in inputs:
        return None
    longest = (max(case.params[name]) for name in ("lens_q", "lens_kv"))
    return Packed(inputs["cu_q"], inputs["cu_k"], *longest)


def forward(name: str) -> Implementation:
    """One backend of SDPA, forward."""
    backend, vendor = BACKENDS[name]

    def prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        rows = torch.arange(q.shape[2], device=q.device)
        plain = _is_plain(case)
        seen = None if plain else mask_of(case).seen(rows, q.shape[2], k.shape[2])
        causal = plain and mask_of(case).causal and q.shape[2] > 1

        def run() -> tuple[torch.Tensor, ...]:
            with sdpa_kernel(backend):
                o = scaled_dot_product_attention(
                    q, k, v, attn_mask=seen, is_causal=causal, scale=scale_of(case),
                    enable_gqa=q.shape[1] != k.shape[1],
                )  # fmt: skip
            return (o,)

        return run

    return Implementation(
        name=name, prepare=prepare, vendor=vendor,
        refusal=lambda case, arch: refusal(name, case, arch),
    )  # fmt: skip


def _is_plain(case: Case) -> bool:
    """No mask, or the causal one where SDPA's top-left alignment is ours."""
    p, mask = case.params, mask_of(case)
    square = p["seq_q"] in (1, p["seq_kv"])
    return not mask.window and (not mask.causal or square)


def refusal(name: str, case: Case, arch: int) -> str | None:
    """Why a backend cannot run a dense case."""
    p = case.params
    if arch < 80:
        return "needs a GPU of compute capability 8.0 or later"
    if p.get("sink_logits", 0):
        return "torch has no learned sinks"
    if name == "sdpa-math":
        scores = 8 * p["batch"] * p["heads_q"] * p["seq_q"] * p["seq_kv"]
        return "its scores would not fit beside the rest" if scores > MATH_BYTES else None
    if not _is_plain(case):
        return "its masks are none, or causal over equal lengths"
    if name == "sdpa-efficient":
        return "no grouped heads" if p["heads_q"] != p["heads_kv"] else None
    if case.dtype not in HALVES:
        return f"no kernel in {case.dtype}"
    most = 128 if name == "sdpa-cudnn" else 256
    return f"head_dim above {most}" if p["head_dim"] > most else None


# ---- FlashAttention's entry, which also takes windows and packed sequences --------------------


def flash_refusal(case: Case, arch: int) -> str | None:
    """Why FlashAttention-2 in torch cannot run a case."""
    p = case.params
    if arch < 80:
        return "needs a GPU of compute capability 8.0 or later"
    if case.dtype not in HALVES:
        return f"no kernel in {case.dtype}"
    if p.get("sinks", 0) or p.get("sink_logits", 0):
        return "torch's FlashAttention-2 has no sinks"
    return "head_dim above 256" if p["head_dim"] > 256 else None


def _flash_arguments(case: Case, inputs: Inputs) -> dict[str, Any]:
    """Q, K, V in its layout [b, len, h, d] or packed, with lengths and mask."""
    packed = packed_of(case, inputs)
    names = ("q", "k", "v")
    if packed is None:
        tensors = [inputs[n].transpose(1, 2) for n in names]
        ends: tuple[Any, ...] = (None, None, tensors[0].shape[1], tensors[1].shape[1])
    else:
        tensors = [inputs[n] for n in names]
        ends = (packed.cu_q, packed.cu_k, packed.max_q, packed.max_k)
    mask = mask_of(case)
    return {
        "tensors": tensors, "ends": ends, "causal": mask.causal,
        "window": {"window_size_left": mask.window - 1, "window_size_right": 0}
        if mask.window else {},
    }  # fmt: skip


def _flash_forward(case: Case, a: dict[str, Any]) -> Any:
    return torch.ops.aten._flash_attention_forward(
        *a["tensors"], *a["ends"], 0.0, a["causal"], False, scale=scale_of(case), **a["window"]
    )


def _prepare_flash(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    arguments = _flash_arguments(case, inputs)
    dense = "cu_q" not in inputs

    def run() -> tuple[torch.Tensor, ...]:
        o = _flash_forward(case, arguments)[0]
        return (o.transpose(1, 2) if dense else o,)

    return run


def _prepare_flash_backward(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    arguments = _flash_arguments(case, inputs)
    dense = "cu_q" not in inputs
    o, lse, state, unused, _ = _flash_forward(case, arguments)
    do = inputs["do"].transpose(1, 2) if dense else inputs["do"]

    def run() -> tuple[torch.Tensor, ...]:
        found = torch.ops.aten._flash_attention_backward(
            do, *arguments["tensors"], o, lse, *arguments["ends"], 0.0, arguments["causal"],
            state, unused, scale=scale_of(case), **arguments["window"],
        )  # fmt: skip
        return tuple(x.transpose(1, 2) if dense else x for x in found[:3])

    return run


FLASH: Final = Implementation(
    name="flash-attention", prepare=_prepare_flash, refusal=flash_refusal,
    vendor="flash-attention",
)  # fmt: skip
FLASH_BACKWARD: Final = Implementation(
    name="flash-attention", prepare=_prepare_flash_backward, refusal=flash_refusal,
    vendor="flash-attention",
)  # fmt: skip


def _prepare_cudnn_backward(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    tensors = [inputs[n] for n in ("q", "k", "v")]
    causal, scale = mask_of(case).causal, scale_of(case)
    aten = torch.ops.aten
    found = aten._scaled_dot_product_cudnn_attention(
        *tensors, None, True, 0.0, causal, False, scale=scale
    )
    o, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = found

    def run() -> tuple[torch.Tensor, ...]:
        found = aten._scaled_dot_product_cudnn_attention_backward(
            inputs["do"], *tensors, o, lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0,
            causal, scale=scale,
        )  # fmt: skip
        return tuple(found)

    return run


def _prepare_efficient_backward(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    tensors = [inputs[n] for n in ("q", "k", "v")]
    causal, scale = mask_of(case).causal, scale_of(case)
    aten = torch.ops.aten
    o, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        *tensors, None, True, 0.0, causal, scale=scale
    )
    wanted = [True, True, True, False]

    def run() -> tuple[torch.Tensor, ...]:
        found = aten._scaled_dot_product_efficient_attention_backward(
            inputs["do"], *tensors, None, o, lse, seed, offset, 0.0, wanted, causal, scale=scale
        )
        return tuple(found[:3])

    return run


CUDNN_BACKWARD: Final = Implementation(
    name="sdpa-cudnn", prepare=_prepare_cudnn_backward, vendor="cudnn",
    refusal=lambda case, arch: refusal("sdpa-cudnn", case, arch),
)  # fmt: skip
EFFICIENT_BACKWARD: Final = Implementation(
    name="sdpa-efficient", prepare=_prepare_efficient_backward, vendor="xformers",
    refusal=lambda case, arch: refusal("sdpa-efficient", case, arch),
)  # fmt: skip
