"""Rows of decoding attention as ops: formats, sizes, kernels, and what is given up."""

from __future__ import annotations

from typing import Any

import pytest

from hwmodels.dtypes import BF16, FP8
from simulator.kernel_time.model import REPLAYED
from validate.adapters import Part, Uncounted, parts
from validate.measurement import Measurement
from workloads.ops.decode_attention import DecodeAttention, MlaDecode

GQA = {"batch": 4, "heads_q": 32, "heads_kv": 8, "head_dim": 128, "seq_q": 1, "seq_kv": 4096}
MLA = {"batch": 4, "heads_q": 16, "seq_q": 1, "seq_kv": 4096, "kv_lora": 512, "rope_dim": 64}
GPUS = {
    "8": ("A100-SXM4-80GB", "a100-sxm4-80gb"),
    "9": ("H100-SXM-80GB", "h100-sxm"),
    "10": ("B200-SXM", "b200-sxm"),
    "12": ("RTXPRO6000-SE", "rtx-pro-6000-blackwell-server"),
}


def one(
    source: str, dtype: str = "bf16", major: str = "9", op: str = "attn_decode", **params: Any
) -> Part:
    base = GQA if op == "attn_decode" else MLA
    gpu, device_id = GPUS[major]
    row = Measurement(
        family="f", source=source, gpu=gpu, device_id=device_id, op=op, dtype=dtype,
        params=base | params, seconds=1e-5,
    )  # fmt: skip
    (part,) = parts(row)
    return part


def mla(source: str, dtype: str = "bf16_kvbf16", major: str = "9", **params: Any) -> Part:
    return one(source, dtype, major, "mla_decode", **params)


def test_a_row_becomes_one_op_on_a_replayed_cache() -> None:
    part = one("aic/vllm-0.24.0/vllm_flash_attn_fa3", "bf16_fp8kv", window=1024)
    op = part.op(**dict(part.fixed), **part.sizes)
    assert op == DecodeAttention(
        batch=4, num_heads=32, num_kv_heads=8, len_kv=4096, head_dim=128, window=1024,
        dtype=BF16, kv_dtype=FP8, product_dtype=FP8,
    )  # fmt: skip
    assert part.conditions.l2 == REPLAYED and part.conditions.kernel == "vllm:fa3"
    assert ("head_dim", 128) in part.fixed  # widths are kernels of their own
    assert one("aic/x/fa3", window=10**6).sizes["window"] == 4096
    assert one("aic/x/fa3").sizes["window"] == 4096


def test_latents_become_one_op() -> None:
    part = mla("aic/trtllm-1.3/default", "bf16_kvfp8")
    op = part.op(**dict(part.fixed), **part.sizes)
    assert op == MlaDecode(
        batch=4, num_heads=16, len_kv=4096, kv_dtype=FP8, product_dtype=FP8, dtype=BF16
    )  # fmt: skip


def test_products_keep_the_format_of_q_where_the_gpu_multiplies_no_other() -> None:
    assert dict(mla("aic/trtllm-1.0/default", "bf16_kvfp8", "8").fixed)["product_dtype"] == BF16
    assert dict(mla("aic/trtllm-1.0/default", "bf16_kvfp8", "9").fixed)["product_dtype"] == FP8


@pytest.mark.parametrize(
    ("source", "dtype", "major", "params", "kernel"),
    [
        ("trtllm-1.3/torch_flow", "bf16", "9", {}, "trtllm:xqa"),
        ("trtllm-1.3/torch_flow", "bf16_fp8kv", "9", {}, "trtllm:xqa-wgmma"),
        ("trtllm-1.3/torch_flow", "bf16_fp8kv", "9", {"head_dim": 1024}, "trtllm:xqa"),
        ("trtllm-1.3/torch_flow", "bf16_fp8kv", "12", {}, "trtllm:xqa"),
        ("trtllm-1.3/torch_flow", "bf16", "9", {"heads_kv": 32}, "trtllm:mmha"),
        ("trtllm-1.3/torch_flow", "bf16", "10", {"heads_kv": 32}, "trtllm:trtllm-gen"),
        ("trtllm-1.3/torch_flow", "bf16", "10", {"heads_q": 64, "heads_kv": 1}, "trtllm:mmha"),
        ("vllm-0.24/vllm_flash_attn_fa2", "bf16", "12", {"heads_kv": 32}, "vllm:fa2-unsplit"),
        ("vllm-0.24/vllm_flash_attn_fa2", "bf16", "12", {}, "vllm+copies:fa2"),
        ("vllm-0.24/vllm_flash_attn_fa2", "bf16", "12", {"batch": 1}, "vllm:fa2"),
        ("vllm-0.24/vllm_flash_attn_fa2", "bf16", "12", {"heads_kv": 1}, "vllm:fa2"),
        ("sglang-0.5/fa3", "bf16", "9", {"head_dim": 192}, "sglang+d192:fa3-sgl"),
        ("sglang-0.5/fa3", "bf16", "9", {}, "sglang:fa3-sgl"),
        ("sglang-0.5/another", "bf16", "9", {}, ""),
    ],
)  # fmt: skip
def test_the_label_says_what_was_dispatched_to(
    source: str, dtype: str, major: str, params: dict[str, int], kernel: str
) -> None:
    assert one(f"aic/{source}", dtype, major, **params).conditions.kernel == kernel


@pytest.mark.parametrize(
    ("source", "major", "params", "kernel"),
    [
        ("trtllm-1.0.0/default", "8", {}, "trtllm:trtllm-mla-sm80"),
        ("trtllm-1.3/default", "10", {}, "trtllm:trtllm-gen-mla"),
        ("trtllm-1.3/default", "12", {}, "trtllm:xqa-mla"),
        ("vllm-0.14.0/vllm_triton_mla", "8", {}, "vllm:triton-mla/eager"),
        ("vllm-0.14.0/vllm_triton_mla", "8", {"heads_q": 1}, "vllm:triton-mla-single/eager"),
        ("vllm-0.24.0/vllm_flashmla", "9", {}, "vllm:flashmla"),
        ("sglang-0.5/triton", "12", {}, "sglang:triton"),
        ("sglang-0.5/another", "9", {}, ""),
    ],
)
def test_the_label_of_latent_kernels(
    source: str, major: str, params: dict[str, int], kernel: str
) -> None:
    assert mla(f"aic/{source}", major=major, **params).conditions.kernel == kernel


@pytest.mark.parametrize(
    ("op", "dtype", "params", "reason"),
    [
        ("attn_decode", "bf16", {"seq_q": 2}, "several tokens at once"),
        ("attn_decode", "bf16", {"heads_kv": 3}, "no multiple of the KV heads"),
        ("attn_decode", "w4a16_mxfp4", {}, "mixes formats and has no count yet"),
        ("mla_decode", "bf16_kvbf16", {"seq_q": 2}, "several tokens at once"),
        ("mla_decode", "fp8_block", {}, "mixes formats and has no count yet"),
    ],
)
def test_what_has_no_count_is_given_up(
    op: str, dtype: str, params: dict[str, int], reason: str
) -> None:
    with pytest.raises(Uncounted, match=reason):
        one("aic/vllm-0.24.0/x", dtype, op=op, **params)
