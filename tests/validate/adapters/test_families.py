"""Rows of convolutions, recurrences, collectives and products as ops, and what is given up."""

from __future__ import annotations

import pytest

from hwmodels.dtypes import BF16, FP8, FP16, FP32, INT4, NVFP4
from simulator.kernel_time.model import COLD, REPLAYED, ROTATED
from validate.adapters import Uncounted, parts
from validate.measurement import Measurement
from workloads.ops.conv2d import Conv2d
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.prefill_attention import MlaPrefill
from workloads.ops.quantised_matmul import QuantisedMatmul
from workloads.ops.rnn import Rnn

CONV = {"n": 2, "c": 3, "h": 9, "w": 7, "k": 4, "r": 3, "s": 3, "pad_h": 1, "pad_w": 0,
        "stride_h": 2, "stride_w": 1}  # fmt: skip
LAYER = {"cell": "gru", "hidden": 64, "batch": 8, "timesteps": 5}
GROUP = {"nodes": 1, "gpus": 8, "bytes": 4096}
MLA = {"batch": 2, "heads_q": 16, "seq_q": 64, "seq_kv": 64, "q_lora": 1536, "kv_lora": 512,
       "rope_dim": 64, "nope_dim": 128, "v_dim": 128, "causal": 1}  # fmt: skip
MNK = {"m": 4, "n": 5, "k": 6}


def row(op: str, params: dict[str, object], source: str = "aic/vllm-1/x", dtype: str = "bf16",
        family: str = "f") -> Measurement:  # fmt: skip
    return Measurement(
        family=family, source=source, gpu="H100", device_id="h100-sxm", op=op, dtype=dtype,
        params=params, seconds=1e-3,
    )  # fmt: skip


def only(*args: object, **kwargs: object):  # type: ignore[no-untyped-def]
    (part,) = parts(row(*args, **kwargs))  # type: ignore[arg-type]
    return part, part.op(**dict(part.fixed), **part.sizes)


@pytest.mark.parametrize(
    ("source", "algorithm", "host"),
    [("neusight/conv", "direct", "neusight"), ("neusight/conv/winograd", "winograd", "neusight"),
     ("neusight/conv/fft", "fft", "neusight"), ("deepbench/train", "best", "deepbench")],
)  # fmt: skip
def test_convolutions(source: str, algorithm: str, host: str) -> None:
    part, op = only("conv2d_bwd_data", CONV, source, "fp16_fp32math")
    assert isinstance(op, Conv2d) and op.algorithm == algorithm and op.direction == "bwd_data"
    assert (op.out_height, op.out_width, op.stride) == (5, 5, 2)
    assert (op.dtype, op.math_dtype, part.conditions.host) == (FP16, FP32, host)


def test_recurrent_layers() -> None:
    _, op = only("rnn_bwd_weight", LAYER, "deepbench/train", "fp16_mixed")
    assert isinstance(op, Rnn) and op.direction == "bwd_weight" and op.gates == 3
    assert (op.num_steps, op.math_dtype) == (5, FP16)


@pytest.mark.parametrize(
    ("source", "op", "name", "kernel", "nodes"),
    [
        ("aic/nccl-2.27/half", "all_gather", "collective", "nccl", 1),
        ("aic/sglang-0.5/custom_ar_graph/bf16", "all_reduce", "custom_all_reduce", "sglang", 1),
        ("vidur/network/a100_dgx", "send_recv", "cluster_collective", "nccl-profiled-p2p", 2),
        ("aic/deepep-ll/T8_H2048_K8_E64", "moe_dispatch_fp8", "expert_exchange",
         "deepep-ll-dispatch", 1),
        ("stas00/torch/p6/fp32", "all_reduce", "cluster_collective", "nccl", 4),
    ],
)  # fmt: skip
def test_collectives(source: str, op: str, name: str, kernel: str, nodes: int) -> None:
    part, found = only(op, GROUP | {"nodes": nodes}, source, "")
    assert found.name == name and part.conditions.kernel == kernel
    assert found.num_ranks == 8
    assert getattr(found, "num_nodes", 1) == nodes
    if op != "moe_dispatch_fp8":
        assert found.kind == op and found.num_bytes == 4096


@pytest.mark.parametrize(
    ("label", "dtype", "weight", "scheme"),
    [("fp8", FP8, FP8, "tensor"), ("fp8_block", FP8, FP8, "block"),
     ("nvfp4", NVFP4, NVFP4, "block"), ("int4_wo", BF16, INT4, "weights")],
)  # fmt: skip
def test_quantised_products(label: str, dtype: object, weight: object, scheme: str) -> None:
    part, op = only("gemm", MNK, dtype=label)
    assert isinstance(op, QuantisedMatmul)
    assert (op.dtype, op.stored_dtype, op.scheme) == (dtype, weight, scheme)
    assert part.conditions.kernel == "vllm" and part.conditions.l2 == ROTATED


@pytest.mark.parametrize(
    ("source", "l2", "host"),
    [
        ("vidur/mlp", COLD, ""),
        ("neusight/linear", REPLAYED, "neusight"),
        ("aic/x-1/y", ROTATED, ""),
    ],
)
def test_plain_products_say_how_they_ran(source: str, l2: str, host: str) -> None:
    part, op = only("gemm", MNK, source, "fp16_fp32math")
    assert type(op) is Matmul and op.min_flops() == {FP32: 2 * 4 * 5 * 6}
    assert (part.conditions.l2, part.conditions.host) == (l2, host)
    _, batched = only("bmm", MNK | {"batch": 3}, source)
    assert isinstance(batched, BatchedMatmul) and batched.batch == 3


def test_latent_attention_over_prompts() -> None:
    _, op = only("mla_prefill", MLA, dtype="bf16_kvfp8")
    assert isinstance(op, MlaPrefill)
    assert (op.head_dim, op.value_width, op.kv_heads) == (192, 128, 16)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (row("conv2d_fwd", CONV | {"r": 40}, "neusight/conv", "fp32"), "larger than"),
        (row("conv2d_fwd", CONV, dtype="fp8_block"), "mixes formats"),
        (row("rnn_fwd", LAYER | {"cell": "qrnn"}, dtype="fp32"), "qrnn"),
        (row("all_reduce", GROUP | {"gpus": 1}, dtype=""), "one rank"),
        (row("all_reduce", GROUP, "deepbench/OSU Allreduce/fp32", ""), "host library"),
        (row("bmm", MNK | {"batch": 3}, dtype="fp8_block"), "fp8_block"),
    ],
)
def test_what_is_given_up_says_why(given: Measurement, reason: str) -> None:
    with pytest.raises(Uncounted, match=reason):
        parts(given)
