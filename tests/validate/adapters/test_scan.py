"""Rows of convolutions, scans and streaming kernels as ops, and what is given up."""

from __future__ import annotations

from typing import Any

import pytest

from hwmodels.dtypes import BF16, FP8, FP16, FP32
from simulator.kernel_time.model import REPLAYED
from validate.adapters import Part, Uncounted, parts
from validate.measurement import Measurement
from workloads.ops.chunk_scan import MambaChunkScan
from workloads.ops.delta_rule import GatedDeltaRule, GatedDeltaStep
from workloads.ops.elementwise import Elementwise
from workloads.ops.fft_convolution import FFTConvolution
from workloads.ops.flash_fft_conv import FlashFFTConv
from workloads.ops.row_map import RowMap
from workloads.ops.short_conv import ShortConv
from workloads.ops.softmax import Softmax

DELTA = {"batch": 3, "seq": 64, "tokens": 192, "d_conv": 4, "heads_k": 2, "dk": 128,
         "heads_v": 6, "dv": 64}  # fmt: skip
MAMBA = {"batch": 3, "seq": 64, "d_conv": 4, "d_state": 32, "heads": 8, "head_dim": 16,
         "groups": 2, "chunk": 32}  # fmt: skip
LONG = {"batch": 2, "seq": 256, "d_model": 8}


def row(op: str, params: dict[str, Any], source: str, dtype: str = "bf16") -> Measurement:
    return Measurement(
        family="f", source=source, gpu="H100", device_id="h100-sxm", op=op, dtype=dtype,
        params=params, seconds=1e-5,
    )  # fmt: skip


def only(op: str, params: dict[str, Any], source: str, dtype: str = "bf16") -> tuple[Part, Any]:
    (part,) = parts(row(op, params, source, dtype))
    return part, part.op(**dict(part.fixed), **part.sizes)


@pytest.mark.parametrize(
    ("source", "seq", "kernel", "channels"),
    [
        ("aic/vllm-0.24.0/x", 64, "triton-conv1d", 2 * 256 + 384),
        ("aic/sglang-0.5.14/x", 3, "triton-conv1d", 2 * 256 + 384),
        ("aic/trtllm-1.3/x", 64, "causal-conv1d", 256),
        ("aic/trtllm-1.3/x", 3, "causal-conv1d-unaligned", 256),
        ("aic/sglang-0.5.10/x", 64, "causal-conv1d-sglang", 256),
        ("aic/sglang-0.5.10/x", 4, "causal-conv1d-sglang-unaligned", 256),
    ],
)
def test_context_convolutions(source: str, seq: int, kernel: str, channels: int) -> None:
    part, op = only("gdn_context_causal_conv1d_fn", DELTA | {"seq": seq}, source)
    assert isinstance(op, ShortConv) and not op.update and op.activation
    assert (op.batch, op.len_seq, op.channels, op.width) == (3, seq, channels, 4)
    assert (part.conditions.kernel, part.conditions.l2) == (kernel, REPLAYED)


def test_mamba_convolutions_hold_x_and_both_groups() -> None:
    part, op = only("mamba2_generation_causal_conv1d_update", MAMBA, "aic/trtllm-1.3/x")
    assert op.update and op.channels == 8 * 16 + 2 * 2 * 32
    assert part.conditions.kernel == "conv1d-update"
    part, _ = only("gdn_generation_causal_conv1d_update", DELTA, "aic/vllm-0.24.0/x")
    assert part.conditions.kernel == "triton-conv1d-update"


@pytest.mark.parametrize(
    ("suffix", "source", "kernel"),
    [
        ("", "aic/sglang-0.5.14/x", "fla"),
        ("", "aic/trtllm-1.3/x", "fla-trtllm"),
        ("_triton", "aic/vllm-0.24.0/x", "fla"),
        ("_flashinfer", "aic/vllm-0.24.0/x", "flashinfer"),
    ],
)
def test_delta_rules_in_chunks(suffix: str, source: str, kernel: str) -> None:
    part, op = only(f"gdn_context_chunk_gated_delta_rule{suffix}", DELTA, source)
    assert isinstance(op, GatedDeltaRule) and part.conditions.kernel == kernel
    assert (op.num_heads, op.num_key_heads, op.key_dim, op.value_dim) == (6, 2, 128, 64)


@pytest.mark.parametrize(
    ("suffix", "source", "kernel", "final"),
    [
        ("", "aic/sglang-0.5.9/x", "fused-recurrent-sglang", BF16),
        ("", "aic/trtllm-1.3/x", "fused-recurrent", BF16),
        ("_packed_decode", "aic/sglang-0.5.14/x", "recurrent-packed", FP32),
    ],
)
def test_delta_steps(suffix: str, source: str, kernel: str, final: object) -> None:
    name = f"gdn_generation_fused_recurrent_gated_delta_rule{suffix}"
    part, op = only(name, DELTA, source)
    assert isinstance(op, GatedDeltaStep) and part.conditions.kernel == kernel
    assert (op.state_dtype, op.final_dtype) == (FP32, final)


@pytest.mark.parametrize(("seq", "kernel"), [(64, "ssd"), (65, "ssd-partial")])
def test_chunked_scans(seq: int, kernel: str) -> None:
    part, op = only(
        "mamba2_context_mamba_chunk_scan_combined", MAMBA | {"seq": seq}, "aic/trtllm-1.3/x"
    )
    assert isinstance(op, MambaChunkScan) and op.chunk == 32
    assert (part.conditions.kernel, op.num_groups, op.state_dim) == (kernel, 2, 32)


def test_long_and_depthwise_convolutions() -> None:
    _, op = only("fftconv_gated_fwd", LONG | {"gated": 1}, "flash-fft-conv/readme/pytorch_fft")
    assert isinstance(op, FFTConvolution) and op.gated
    _, op = only("fftconv_gated_fwd", LONG, "flash-fft-conv/readme/flashfftconv", "fp16")
    assert isinstance(op, FlashFFTConv) and not op.gated
    part, op = only(
        "depthwise_conv1d_fwd", LONG | {"kernel": 5}, "flash-fft-conv/readme/cuda", "unknown16"
    )
    assert (part.conditions.kernel, op.width, op.dtype) == ("depthwise-cuda", 5, FP16)
    assert not op.activation


@pytest.mark.parametrize(
    ("op", "params", "dtype", "reason"),
    [
        ("depthwise_conv1d_fwd", LONG | {"kernel": 5, "direction": "bwd"}, "fp16", "backward"),
        ("fftconv_gated_fwd", LONG | {"direction": "bwd"}, "fp16", "backward"),
        ("gdn_context_chunk_gated_delta_rule", DELTA, "fp8_block", "mixes formats"),
        ("quantize_bf16_to_fp8_static", {"elements": 8}, "fp8_block", "no count yet"),
        ("softmax", {"rows": 2, "cols": 8}, "amp_bf16", "mixes formats"),
    ],
)
def test_what_is_given_up(op: str, params: dict[str, Any], dtype: str, reason: str) -> None:
    with pytest.raises(Uncounted, match=reason):
        parts(row(op, params, "aic/vllm-1/x", dtype))


@pytest.mark.parametrize(
    ("cols", "dtype", "source", "kernel"),
    [
        (1000, "fp32", "neusight/vec", ""),
        (4096, "fp32", "neusight/vec", ""),
        (4098, "fp32", "neusight/vec", "unaligned"),
        (16384, "fp32", "neusight/vec", "unstaged"),
        (16384, "fp16", "neusight/vec", ""),
        (4096, "fp16", "llmcompass/ae", "unstaged"),
    ],
)
def test_softmax_kernels(cols: int, dtype: str, source: str, kernel: str) -> None:
    part, op = only("softmax", {"rows": 5, "cols": cols}, source, dtype)
    assert isinstance(op, Softmax) and part.conditions.kernel == kernel
    assert part.conditions.host == f"{source.split('/')[0]}/softmax"


def test_maps_of_serving_kernels_keep_their_rows() -> None:
    shape = {"rows": 6, "cols": 32, "elements": 192}
    part, op = only("silu_and_mul", shape, "vidur/mlp", "fp16")
    assert isinstance(op, RowMap) and (op.rows, op.num_inputs) == (6, 2)
    assert (part.conditions.kernel, part.conditions.host) == ("vllm-silu", "")
    part, op = only(
        "quantize_bf16_to_fp8_static", shape, "aic/vllm-0.24.0/static_scaled_fp8_quant",
        "bf16->fp8",
    )  # fmt: skip
    assert (part.conditions.kernel, op.dtype, op.out_dtype) == ("vllm-quant", BF16, FP8)
    _, op = only("gelu", shape, "vidur/mlp", "fp16")
    assert isinstance(op, Elementwise) and (op.formula, op.num_elements) == ("gelu", 192)
    tokens = {"tokens": 6, "heads_q": 4, "heads_kv": 2, "head_dim": 64}
    _, op = only("rope", tokens, "vidur/mlp", "fp16")
    assert isinstance(op, RowMap) and (op.rows, op.cols) == (6, 6 * 64)


def test_the_residual_of_phi_2_is_added_twice() -> None:
    shape = {"rows": 6, "cols": 2560, "elements": 6 * 2560}
    assert len(parts(row("add", shape, "vidur/mlp", "fp16"))) == 2
    assert len(parts(row("add", shape, "neusight/vec", "fp32"))) == 1
