"""Published labels of mixture-of-experts rows as ops, on made-up rows."""

from __future__ import annotations

import pytest

from hwmodels.dtypes import BF16, FP8, INT4, MXFP4, MXFP8, NVFP4
from simulator.kernel_time.model import REPLAYED
from tests.validate.data import GPU
from validate.adapters import Part, Uncounted, parts
from validate.batches import batches
from validate.measurement import Measurement
from workloads.ops.moe_ffn import COMPUTED, GROUPED, PASSED, SKIPPED, MoeFfn

PARAMS = {
    "tokens": 64, "hidden": 1024, "inter": 512, "topk": 4, "experts": 32, "tp": 2, "ep": 4,
    "dist": "balanced",
}  # fmt: skip


def row(
    source: str, dtype: str = "bf16", device: str = "h100-sxm", **params: object
) -> Measurement:
    return Measurement(
        family="kernels_moe", source=f"aic/{source}", gpu=GPU, device_id=device,
        op="moe_ffn_gated", dtype=dtype, params=PARAMS | params, seconds=1e-4,
    )  # fmt: skip


def only(measurement: Measurement) -> Part:
    (part,) = parts(measurement)
    return part


@pytest.mark.parametrize(
    ("source", "dtype", "device", "kernel", "remote"),
    [
        ("sglang-0.5.10/sglang_fused_moe_triton", "bf16", "a100-sxm4-80gb", "triton", COMPUTED),
        ("sglang-0.5.14/sglang_fused_moe_triton", "bf16", "h100-sxm", "triton", PASSED),
        ("sglang-1/sglang_fused_moe_triton", "w4a16_mxfp4", "h100-sxm", "triton", PASSED),
        ("sglang-0.5.10/sglang_marlin_moe", "int4_wo", "a100-sxm4-80gb", "marlin", COMPUTED),
        ("vllm-1/vllm_x_triton_tritonexperts", "bf16", "h100-sxm", "triton", PASSED),
        ("vllm-1/vllm_fused_moe", "bf16", "a100-sxm4-80gb", "triton", SKIPPED),
        ("vllm-1/vllm_x_marlin_marlinexperts", "int4_wo", "h100-sxm", "marlin", PASSED),
        ("vllm-1/x_triton_oaitritonmxfp4experts", "w4a16_mxfp4", "h100-sxm", "triton_kernels",
         SKIPPED),
        ("trtllm-1/moe_torch_flow_cutlass", "fp8", "h100-sxm", "cutlass", SKIPPED),
        ("trtllm-1/moe_torch_flow", "bf16", "a100-sxm4-80gb", "cutlass", SKIPPED),
        ("trtllm-1/moe_torch_flow", "w4a16_mxfp4", "h100-sxm", "triton_kernels", PASSED),
        ("trtllm-1/moe_torch_flow", "w4a16_mxfp4", "b200-sxm", "trtllm_gen", SKIPPED),
        ("trtllm-1/deepgemm", "fp8_block", "b200-sxm", "deepgemm", SKIPPED),
        ("vllm-1/x_flashinfer_cutlass_y", "fp8", "b200-sxm", "flashinfer_cutlass", SKIPPED),
        ("sglang-1/sglang_flashinfer_trtllm_moe", "bf16", "b200-sxm", "trtllm_gen", SKIPPED),
        ("other-1/unheard_of", "bf16", "b200-sxm", "", SKIPPED),
    ],
)  # fmt: skip
def test_kernels_and_remote_choices(
    source: str, dtype: str, device: str, kernel: str, remote: str
) -> None:
    part = only(row(source, dtype, device))
    assert (part.conditions.kernel, dict(part.fixed)["remote"]) == (kernel, remote)
    assert (part.conditions.host, part.conditions.l2) == ("", REPLAYED)


@pytest.mark.parametrize(
    ("label", "dtype", "weights", "scaling"),
    [
        ("bf16", BF16, BF16, "tensor"),
        ("fp8", FP8, FP8, "tensor"),
        ("fp8_block", FP8, FP8, "block"),
        ("nvfp4", NVFP4, NVFP4, "block"),
        ("int4_wo", BF16, INT4, "block"),
        ("w4a16_mxfp4", BF16, MXFP4, "block"),
        ("w4a8_mxfp4_mxfp8", MXFP8, MXFP4, "block"),
    ],
)
def test_formats(label: str, dtype: object, weights: object, scaling: str) -> None:
    fixed = dict(only(row("sglang-1/sglang_flashinfer_trtllm_moe", label)).fixed)
    assert (fixed["dtype"], fixed["weight_dtype"], fixed["scaling"]) == (dtype, weights, scaling)


def test_sizes_keep_their_meaning_before_the_ranks_share_them() -> None:
    part = only(row("trtllm-1/moe_torch_flow_cutlass"))
    op = part.op(**dict(part.fixed), **part.sizes)
    assert isinstance(op, MoeFfn)
    assert op.work(0).tensor_flops[BF16] == 6 * 64 * 4 * 1024 * 512 / (2 * 4)


def test_a_format_without_a_count_is_given_up() -> None:
    with pytest.raises(Uncounted, match="experts in fp32 have no count yet"):
        parts(row("trtllm-1/moe_torch_flow_cutlass", "fp32"))


def test_an_unknown_distribution_is_counted_as_refused() -> None:
    _, reasons = batches([row("trtllm-1/moe_torch_flow_cutlass", dist="zipf")])
    assert reasons[0] is not None and "routing 'zipf' is neither" in reasons[0]


def test_impossible_sizes_are_counted_as_refused() -> None:
    found, reasons = batches(
        [row("trtllm-1/moe_torch_flow_cutlass", topk=64), row("trtllm-1/moe_torch_flow_cutlass")]
    )
    assert reasons[0] is not None and "topk exceeds num_experts" in reasons[0]
    assert reasons[1] is None and len(found) == 1


def test_early_power_laws_are_packed_and_deepseeks_router_is_grouped() -> None:
    early = dict(only(row("vllm-1/vllm_fused_moe", dist="power_law_1.2")).fixed)
    later = dict(only(row("trtllm-1/moe_torch_flow_cutlass", dist="power_law_1.2")).fixed)
    assert (early["packed"], later["packed"]) == (True, False)
    deepseek = {"hidden": 7168, "inter": 2048, "topk": 8, "experts": 256}
    grouped = only(row("vllm-1/x_flashinfer_trtllm_y", "fp8_block", "b200-sxm", **deepseek))
    plain = only(row("vllm-1/x_flashinfer_trtllm_y", "bf16", "b200-sxm", **deepseek))
    assert (dict(grouped.fixed)["routing"], dict(plain.fixed)["routing"]) == (GROUPED, "balanced")
