"""Published labels of attention and latent attention over prompts as ops, on made-up rows."""

from __future__ import annotations

import pytest

from hwmodels.dtypes import BF16, FP8, FP16
from simulator.kernel_time.model import REPLAYED
from tests.validate.data import GPU
from validate.adapters import Part, Uncounted, parts
from validate.measurement import Measurement
from workloads.ops.attention import StandardAttention
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.prefill_attention import MlaPrefill, PrefillAttention

SHAPE = {
    "batch": 2, "heads_q": 8, "heads_kv": 2, "head_dim": 128, "seq_q": 300, "seq_kv": 300,
    "causal": 1,
}  # fmt: skip
LATENT = {
    "batch": 2, "heads_q": 8, "seq_q": 300, "seq_kv": 300, "kv_lora": 512, "rope_dim": 64,
    "nope_dim": 128, "v_dim": 128, "causal": 1,
}  # fmt: skip
A100, H100, B200, RTX = "a100-sxm4-80gb", "h100-sxm", "b200-sxm", "rtx-pro-6000-blackwell-server"


def row(
    source: str, op: str = "attn_prefill", dtype: str = "bf16", device: str = H100,
    **params: object,
) -> Measurement:  # fmt: skip
    shape = LATENT if op == "mla_prefill" else SHAPE
    return Measurement(
        family="kernels_attention_prefill", source=f"aic/{source}", gpu=GPU, device_id=device,
        op=op, dtype=dtype, params=shape | params, seconds=1e-4,
    )  # fmt: skip


def only(measurement: Measurement) -> Part:
    (part,) = parts(measurement)
    return part


@pytest.mark.parametrize(
    ("source", "device", "params", "kernel"),
    [
        ("vllm-0.24.0/vllm_flash_attn_fa3", H100, {}, "vllm+cache:fa3"),
        ("sglang-0.5.14/fa3", H100, {"head_dim": 192}, "sglang+cache:fa3-256"),
        ("sglang-0.5.10/flash_attention", A100, {}, "sglang+cache:fa3/mma"),
        ("vllm-0.14.0/vllm_flash_attn", A100, {}, "vllm+cache:fa2"),
        ("vllm-0.14.0/vllm_flash_attn", A100, {"seq_q": 1}, "vllm+cache+regrouped:fa2-one"),
        ("vllm-0.14.0/vllm_flash_attn", A100, {"seq_q": 1, "batch": 1}, "vllm+cache:fa2-one"),
        ("trtllm-1.3/torch_flow", H100, {}, "trtllm+cache:trtllm"),
        ("trtllm-1.3/torch_flow", B200, {}, "trtllm+cache:trtllm-gen"),
        ("trtllm-1.3/torch_flow", B200, {"head_dim": 72}, "trtllm+cache:fmha-v2"),
        ("trtllm-1.3/torch_flow", RTX, {}, "trtllm+cache:trtllm/mma"),
        ("sglang-0.5.14/trtllm_mha", B200, {"head_dim": 512}, "sglang+cache:trtllm-gen-wide"),
        ("sglang-0.5.14/never_heard_of", H100, {}, ""),
    ],
)
def test_the_kernel_of_a_label(
    source: str, device: str, params: dict[str, object], kernel: str
) -> None:
    part = only(row(source, device=device, **params))
    assert part.op is PrefillAttention
    assert part.conditions.kernel == kernel
    assert part.conditions.l2 == REPLAYED


@pytest.mark.parametrize(
    ("source", "width", "kernel"),
    [
        ("vllm-0.24/vllm_vit_flash_attn_fa3", 64, "vllm-vision:fa3-encoder"),
        ("vllm-0.24/vllm_vit_flash_attn_fa3", 72, "vllm-vision+padded:fa3-encoder"),
        ("trtllm-1.3/torch_flow", 80, "trtllm-vision+packing:trtllm"),
    ],
)
def test_vision_towers_have_callers_of_their_own(source: str, width: int, kernel: str) -> None:
    measured = row(source, "attn_prefill_noncausal", head_dim=width, causal=0)
    part = only(measured)
    assert part.conditions.kernel == kernel
    assert dict(part.fixed)["causal"] is False


def test_sizes_formats_and_windows() -> None:
    part = only(row("sglang-0.5.14/fa3", dtype="fp8", window=128))
    assert part.sizes["window"] == 128 and part.sizes["num_kv_heads"] == 2
    fixed = dict(part.fixed)
    assert fixed["dtype"] == FP8 and fixed["out_dtype"] == BF16 and fixed["causal"] is True
    assert "window" not in only(row("sglang-0.5.14/fa3", window=300)).sizes


def test_figures_are_a_forward_and_a_backward_pass() -> None:
    source = "flash-attention/fig/fa2"
    both = parts(row(source, "attn_fwd_bwd", "fp16", heads_kv=8))
    assert [p.op for p in both] == [PrefillAttention, FlashAttention2Backward]
    assert {p.conditions.kernel for p in both} == {"figure:fa2"}
    assert dict(both[1].fixed)["dtype"] == FP16
    assert only(row(source, "attn_fwd", "fp16")).op is PrefillAttention
    unfused = only(row("flash-attention/fig/standard", "attn_fwd", "fp16"))
    assert unfused.op is StandardAttention


@pytest.mark.parametrize(
    ("source", "dtype", "device", "kernel"),
    [
        ("trtllm-1.3/default", "bf16_kvbf16", H100, "trtllm-mla+cache:trtllm"),
        ("trtllm-1.3/default", "bf16_kvfp8", B200, "trtllm-mla+fp8cache:trtllm-gen"),
        ("trtllm-1.0/default", "bf16_kvbf16", A100, "trtllm-mla+cache:trtllm/mma"),
        ("sglang-0.5/trtllm_mla", "bf16_kvbf16", B200, "sglang-mla+cache:trtllm-gen"),
        ("vllm-0.14.0/vllm_flashmla", "bf16_kvfp8", H100, "vllm-mla+fp8cache:fa3-latent/eager"),
        ("vllm-0.14.0/vllm_triton_mla", "bf16_kvbf16", A100, "vllm-mla+cache:fa2-latent/eager"),
    ],
)
def test_latent_attention(source: str, dtype: str, device: str, kernel: str) -> None:
    part = only(row(source, "mla_prefill", dtype, device))
    assert part.op is MlaPrefill and part.conditions.kernel == kernel
    assert part.sizes["head_dim"] == 192 and part.sizes["value_dim"] == 128
    assert dict(part.fixed)["dtype"] == BF16


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (row("sglang-0.5.14/fa3", heads_kv=3), "no multiple of the KV heads"),
        (row("sglang-0.5.14/fa3", dtype="bf16_kvfp8"), "mixes formats"),
        (row("flash-attention/fig/pytorch", "attn_fwd_bwd"), "unfused attention has no count"),
        (row("trtllm-1.3/default", "mla_prefill", "int8_wo"), "has no count yet"),
    ],
)
def test_what_is_not_counted_says_why(measured: Measurement, reason: str) -> None:
    with pytest.raises(Uncounted, match=reason):
        parts(measured)
