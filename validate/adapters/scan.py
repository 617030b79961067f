"""Short convolutions and linear-recurrent scans: which kernel ran, on which sizes.

Two things are read from the timings, not from the publisher's text: harnesses that run with all
key heads only (`KEY_ONLY`) convolve as many channels as the keys have, whatever the value heads;
and recurrent kernels that are not the packed ones write the state in the activations' format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels.dtypes import FP16, FP32
from simulator.kernel_time.model import REPLAYED, Conditions
from validate.adapters.part import Part, framework, last_name, part, plain_dtype, uncounted
from validate.measurement import Measurement
from validate.recorded import is_own_kernel
from workloads.ops.chunk_scan import MambaChunkScan
from workloads.ops.delta_rule import GatedDeltaRule, GatedDeltaStep
from workloads.ops.fft_convolution import FFTConvolution
from workloads.ops.flash_fft_conv import FlashFFTConv
from workloads.ops.short_conv import ShortConv

VECTOR_TOKENS: Final = 8
"""Tokens that a 16-byte access of Dao's kernel covers; other lengths go element by element."""
KEY_ONLY: Final = ("aic/sglang-0.5.10", "aic/trtllm")


SGLANG: Final = "-sglang"


def _gdn_channels(row: Measurement) -> int:
    p = row.params
    keys = p["heads_k"] * p["dk"]
    if row.source.startswith(KEY_ONLY):
        return int(keys)
    return int(2 * keys + p["heads_v"] * p["dv"])


def _mamba_channels(row: Measurement) -> int:
    p = row.params
    return int(p["heads"] * p["head_dim"] + 2 * p["groups"] * p["d_state"])


def _conv(channels: Callable[[Measurement], int]) -> Callable[[Measurement], tuple[Part, ...]]:
    def adapt(row: Measurement) -> tuple[Part, ...]:
        p = row.params
        sizes = {
            "batch": p["batch"],
            "len_seq": p["seq"],
            "channels": channels(row),
            "width": p["d_conv"],
        }
        cuda = row.source.startswith(KEY_ONLY)
        kernel = "causal-conv1d" if cuda else "triton-conv1d"
        if cuda and framework(row) == "sglang":
            kernel += SGLANG
        if cuda and p["seq"] % VECTOR_TOKENS:
            kernel += "-unaligned"
        return (part(ShortConv, sizes, _replayed(kernel), dtype=plain_dtype(row)),)

    return adapt


def _update(channels: Callable[[Measurement], int]) -> Callable[[Measurement], tuple[Part, ...]]:
    def adapt(row: Measurement) -> tuple[Part, ...]:
        p = row.params
        sizes = {"batch": p["batch"], "channels": channels(row), "width": p["d_conv"]}
        cuda = row.source.startswith(KEY_ONLY)
        kernel = "conv1d-update" if cuda else "triton-conv1d-update"
        return (part(ShortConv, sizes, _replayed(kernel), dtype=plain_dtype(row), update=True),)

    return adapt


def _delta_sizes(row: Measurement) -> dict[str, int]:
    p = row.params
    return {
        "batch": p["batch"],
        "num_heads": p["heads_v"],
        "num_key_heads": p["heads_k"],
        "key_dim": p["dk"],
        "value_dim": p["dv"],
    }


def _delta(kernel: str) -> Callable[[Measurement], tuple[Part, ...]]:
    def adapt(row: Measurement) -> tuple[Part, ...]:
        label = f"{kernel}-trtllm" if framework(row) == "trtllm" else kernel
        sizes = {**_delta_sizes(row), "len_seq": row.params["seq"]}
        return (part(GatedDeltaRule, sizes, _replayed(label), dtype=plain_dtype(row)),)

    return adapt


def _step(kernel: str) -> Callable[[Measurement], tuple[Part, ...]]:
    def adapt(row: Measurement) -> tuple[Part, ...]:
        dtype = plain_dtype(row)
        packed = kernel.endswith("packed")
        label = kernel + SGLANG if framework(row) == "sglang" and not packed else kernel
        final = FP32 if packed else dtype
        return (
            part(
                GatedDeltaStep,
                _delta_sizes(row),
                _replayed(label),
                dtype=dtype,
                state_dtype=FP32,
                final_dtype=final,
            ),
        )

    return adapt


def _mamba(row: Measurement) -> tuple[Part, ...]:
    p = row.params
    sizes = {
        "batch": p["batch"],
        "len_seq": p["seq"],
        "num_heads": p["heads"],
        "head_dim": p["head_dim"],
        "num_groups": p["groups"],
        "state_dim": p["d_state"],
    }
    kernel = "ssd-partial" if p["seq"] % p["chunk"] else "ssd"
    conditions, dtype = _replayed(kernel), plain_dtype(row)
    return (part(MambaChunkScan, sizes, conditions, dtype=dtype, chunk=p["chunk"]),)


def _depthwise(row: Measurement) -> tuple[Part, ...]:
    p = row.params
    if p.get("direction", "fwd") != "fwd":
        uncounted("the backward pass of a short convolution has no count yet")
    sizes = {
        "batch": p["batch"],
        "len_seq": p["seq"],
        "channels": p["d_model"],
        "width": p["kernel"],
    }
    conditions = _replayed(f"depthwise-{last_name(row)}")
    dtype = FP16 if row.dtype == "unknown16" else plain_dtype(row)
    return (part(ShortConv, sizes, conditions, dtype=dtype, activation=False),)


def _fft(row: Measurement) -> tuple[Part, ...]:
    p = row.params
    if p.get("direction", "fwd") != "fwd":
        uncounted("the backward pass of a long convolution has no count yet")
    fused = last_name(row) == "flashfftconv" or is_own_kernel(row.source)
    op = FlashFFTConv if fused else FFTConvolution
    sizes = {"batch": p["batch"], "len_seq": p["seq"], "channels": p["d_model"]}
    flags = {"gated": bool(p.get("gated", 0)), "circular": _is_power_of_two(p["seq"])}
    return (part(op, sizes, _replayed(""), dtype=plain_dtype(row), **flags),)


def _is_power_of_two(length: float) -> bool:
    """The publisher's transforms are as long as the sequence, so that its ends meet."""
    return length >= 1 and not int(length) & (int(length) - 1)


def _replayed(kernel: str) -> Conditions:
    return Conditions(kernel=kernel, l2=REPLAYED)


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
    "gdn_context_causal_conv1d_fn": _conv(_gdn_channels),
    "mamba2_context_causal_conv1d_fn": _conv(_mamba_channels),
    "gdn_generation_causal_conv1d_update": _update(_gdn_channels),
    "mamba2_generation_causal_conv1d_update": _update(_mamba_channels),
    "gdn_context_chunk_gated_delta_rule": _delta("fla"),
    "gdn_context_chunk_gated_delta_rule_triton": _delta("fla"),
    "gdn_context_chunk_gated_delta_rule_flashinfer": _delta("flashinfer"),
    "gdn_generation_fused_recurrent_gated_delta_rule": _step("fused-recurrent"),
    "gdn_generation_fused_recurrent_gated_delta_rule_packed_decode": _step("recurrent-packed"),
    "mamba2_context_mamba_chunk_scan_combined": _mamba,
    "depthwise_conv1d_fwd": _depthwise,
    "fftconv_gated_fwd": _fft,
}
