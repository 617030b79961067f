from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from workloads.models.config import LatentAttention, TransformerConfig, load_model
from workloads.models.transformer import (
    decode_step,
    ends,
    layer,
    model_flops,
    model_flops_forward,
    optimizer,
    prefill_step,
    train_step,
)
from workloads.ops.matmul import Matmul
from workloads.plan import Plan
from workloads.workload import BACKWARD, FORWARD, OPTIMIZER, Workload

NAMES = [
    "llama3-8b", "mistral-7b-v0.1", "mixtral-8x7b", "gpt2", "opt-6.7b", "qwen2.5-7b", "qwen3-8b",
    "qwen3-30b-a3b", "gemma-2-9b", "deepseek-v3",
]  # fmt: skip
LEN = 8192


def example(name: str) -> TransformerConfig:
    return load_model(f"examples/{name}.json")


CASES = [(name, kind) for name in NAMES for kind in example(name).kinds]


def tensor_flops(workload: Workload, phase: str | None = None) -> float:
    total = 0.0
    for node in workload.select(phase=phase):
        total = total + node.count * sum(node.op.min_flops().values(), start=0.0)
    return total


# ---- what a model needs --------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "llama3-70b", "gemma-7b", "gpt3-175b"])
@pytest.mark.parametrize("len_seq", [512, LEN])
def test_layers_and_ends_do_the_models_flops(name: str, len_seq: int) -> None:
    """Exactly, but for the diagonal: L (L + 1) / 2 pairs where the convention has L^2 / 2."""
    cfg = example(name)
    step = train_step(cfg, len_seq=len_seq, global_batch=1)
    done = sum(
        count * tensor_flops(step.layer(kind, Plan()), FORWARD) for kind, count in cfg.kinds.items()
    ) + tensor_flops(step.ends(Plan()), FORWARD)
    per_pair = 2 * cfg.attention.num_heads * (cfg.attention.head_dim + cfg.attention.v_head_dim)
    frac = cfg.windowed_frac
    diagonal = (1 - frac) * len_seq + frac * min(len_seq, cfg.window or len_seq)
    diagonal *= cfg.num_layers * per_pair / 2
    assert done - diagonal == pytest.approx(model_flops_forward(cfg, len_seq, len_seq), rel=1e-13)


def test_model_flops_of_a_long_context_by_hand() -> None:
    cfg = example("llama3-8b")
    tokens = 4 * 131072
    products = 6 * 7_504_658_432 * tokens
    attention = 6 * 32 * (32 * 128) * 131072 * tokens
    assert model_flops(cfg, 131072, tokens) == products + attention
    assert train_step(cfg, len_seq=131072, global_batch=4).model_flops == products + attention


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_backward_is_twice_the_forward_and_the_scores_again(name: str, kind: str) -> None:
    step = train_step(example(name), len_seq=1024, global_batch=1)
    one = step.layer(kind, Plan())
    again = sum(
        n.count * 2 * n.op.head_dim * n.op.batch * n.op.num_heads * n.op.num_pairs()
        for n in one
        if n.op.name == "flash_attention_2_backward"
    )
    assert tensor_flops(one, BACKWARD) == 2 * tensor_flops(one, FORWARD) + again


# ---- the split over ranks ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("plan", [Plan(tp=4), Plan(cp=8), Plan(tp=2, cp=4)])
def test_ranks_together_do_the_work_of_one(name: str, kind: str, plan: Plan) -> None:
    cfg = example(name)
    whole = layer(cfg, kind=kind, batch=2, len_q=LEN, training=True)
    part = layer(cfg, kind=kind, batch=2, len_q=LEN, plan=plan, training=True)
    assert plan.tp * plan.cp * tensor_flops(part) == pytest.approx(tensor_flops(whole), rel=1e-14)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"])
def test_expert_parallelism_holds_fewer_experts_with_more_rows(name: str) -> None:
    cfg = example(name)
    assert cfg.moe is not None
    whole = layer(cfg, kind="moe", batch=1, len_q=LEN, training=True)
    part = layer(cfg, kind="moe", batch=1, len_q=LEN, plan=Plan(ep=8), training=True)
    assert tensor_flops(part) == tensor_flops(whole)
    experts = part["experts.up"].op
    assert experts.batch == cfg.moe.num_experts // 8
    assert experts.m == 8 * LEN * cfg.moe.num_active // cfg.moe.num_experts


def test_few_tokens_leave_experts_idle() -> None:
    cfg = example("qwen3-30b-a3b")
    experts = decode_step(cfg, batch=2, len_context=100).layer("moe", Plan())["experts.down"].op
    assert (experts.batch, experts.m) == (16, 1)


def test_norms_and_residuals_are_split_along_the_sequence() -> None:
    one = layer(example("llama3-8b"), batch=1, len_q=LEN, plan=Plan(tp=4, cp=2), training=True)
    assert one["attention_norm"].op.rows == LEN // 8
    assert one["mlp_residual"].op.num_elements == LEN // 8 * 4096
    assert one["qkv"].op.m == LEN // 2
    assert one["attention"].op.len_q == LEN and one["attention"].count == 0.5


def test_what_does_not_divide_is_rounded_up() -> None:
    one = layer(example("llama3-8b"), batch=1, len_q=100, plan=Plan(tp=3, cp=7), training=False)
    assert one["qkv"].op.m == 15 and one["attention_norm"].op.rows == 5
    assert one["attention"].op.num_heads == 12 and one["attention"].op.num_kv_heads == 3
    assert one["up"].op.n == 2 * 4779
    assert one["down"].op.k == 4779


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_array_plans_agree_with_scalar_plans(name: str, kind: str, training: bool) -> None:
    cfg = example(name)
    tp, cp, ep = np.array([1, 2, 16, 3]), np.array([1, 4, 2, 1]), np.array([1, 8, 2, 1])
    len_q, fast = np.array([100.0, 5000, 9000, 4096]), 2**25
    plan = Plan(tp=tp.astype(float), cp=cp.astype(float), ep=ep.astype(float))
    many = layer(cfg, kind=kind, batch=3, len_q=len_q, plan=plan, training=training).work(fast)
    for i in range(4):
        alone = Plan(tp=int(tp[i]), cp=int(cp[i]), ep=int(ep[i]))
        size = int(len_q[i])
        one = layer(cfg, kind=kind, batch=3, len_q=size, plan=alone, training=training).work(fast)
        for field in ("vector_flops", "special_ops", "read_bytes", "write_bytes"):
            got = np.broadcast_to(getattr(many, field), 4)[i]
            assert got == pytest.approx(getattr(one, field), rel=1e-12), field
        got = np.broadcast_to(many.tensor_flops[BF16], 4)[i]
        assert got == pytest.approx(one.tensor_flops[BF16], rel=1e-12)


def test_arrays_in_the_ends_and_the_optimizer() -> None:
    cfg, fast, tp = example("gpt2"), 2**22, np.array([1.0, 4.0])
    many = ends(cfg, batch=2, len_q=64, plan=Plan(tp=tp), training=True).work(fast)
    for i, t in enumerate((1, 4)):
        one = ends(cfg, batch=2, len_q=64, plan=Plan(tp=t), training=True).work(fast)
        assert one.bytes == pytest.approx(np.asarray(many.bytes)[i], rel=1e-12)
    assert np.array_equal(optimizer(1000 / tp).work(fast).bytes, [30_000, 7_500])


def test_maps_have_the_sizes_of_what_they_map() -> None:
    plan = Plan(tp=4, cp=2)
    one = layer(example("llama3-8b"), batch=1, len_q=LEN, plan=plan, training=True)
    rope = one["rope"].op
    assert (rope.num_tokens, rope.num_heads, rope.head_dim) == (LEN // 2, 8 + 2, 128)
    assert one["activation"].op.num_elements == LEN // 2 * 14336 // 4
    assert one["activation.backward"].op.num_outputs == 2
    qwen = layer(example("qwen3-8b"), batch=1, len_q=LEN, plan=plan, training=True)
    assert (qwen["qk_norm"].op.rows, qwen["qk_norm"].op.cols) == (LEN // 2 * 10, 128)
    v3 = layer(example("deepseek-v3"), kind="moe", batch=1, len_q=LEN, plan=plan, training=True)
    assert v3["rope"].op.num_heads == 32 + 1 and v3["rope"].op.head_dim == 64
    assert v3["kv_a_norm"].op.rows == v3["q_a"].op.m == v3["router"].op.m == LEN // 8
    assert v3["experts.activation"].op.num_elements == LEN // 2 * 8 * 2048 // 4
    assert v3["dispatch"].op.compulsory_bytes() == LEN // 8 * 7168 * (1 + 8) * 2
    assert v3["combine"].op.compulsory_bytes() == LEN // 8 * 7168 * (8 + 1 + 1) * 2


# ---- the graph -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_graph_is_acyclic_and_connected(name: str, kind: str) -> None:
    for workload in (
        layer(example(name), kind=kind, batch=1, len_q=LEN, training=True),
        ends(example(name), batch=1, len_q=64, training=True),
    ):
        graph = workload.graph
        assert nx.is_directed_acyclic_graph(graph)
        assert nx.is_weakly_connected(graph)
        backward = {n.name for n in workload.select(phase=BACKWARD)}
        forward = {n.name for n in workload.select(phase=FORWARD)}
        assert not any(a in backward and b in forward for a, b in graph.edges)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_nothing_waits_for_a_weight_gradient(name: str, kind: str) -> None:
    one = layer(example(name), kind=kind, batch=1, len_q=64, training=True)
    waited_for = {a for node in one for a in node.after}
    products = [n for n in one.select(phase=FORWARD) if isinstance(n.op, Matmul)]
    for node in products:
        assert f"{node.name}.wgrad" not in waited_for
        dgrad, wgrad = one[f"{node.name}.dgrad"], one[f"{node.name}.wgrad"]
        assert dgrad.after == wgrad.after
        assert wgrad.op.written_dtype == FP32
    assert len([n for n in one if n.name.endswith(".wgrad")]) == len(products)


def test_every_forward_map_has_its_backward() -> None:
    one = layer(example("deepseek-v3"), kind="moe", batch=1, len_q=64, training=True)
    for node in one.select(phase=FORWARD):
        suffix = "dgrad" if isinstance(node.op, Matmul) else "backward"
        assert (node.part == "residual") != (f"{node.name}.{suffix}" in one.graph)
    assert one["kv_a"].after == ("attention_norm",)
    assert set(one["attention_norm.backward"].after) == {"q_a.dgrad", "kv_a.dgrad"}
    assert set(one["combine"].after) == {"experts.down", "router", "shared.down"}


def test_parts_and_phases() -> None:
    one = layer(example("llama3-8b"), batch=1, len_q=64, training=True)
    assert {n.part for n in one} == {"attention", "mlp", "norm", "residual"}
    assert {n.part for n in ends(example("gpt2"), batch=1, len_q=64, training=True)} == {
        "embedding", "head",
    }  # fmt: skip
    assert {n.phase for n in optimizer(10)} == {OPTIMIZER}
    assert not layer(example("gpt2"), batch=1, len_q=64, training=False).select(phase=BACKWARD)


def test_four_norms_where_the_family_has_them() -> None:
    one = layer(example("gemma-2-9b"), batch=1, len_q=64, training=True)
    norms = [n.name for n in one.select(phase=FORWARD, part="norm")]
    assert norms == ["attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"]
    joined = [n.name for n in one if n.name.endswith(".accumulate")]
    assert joined == ["mlp_norm.accumulate", "attention_norm.accumulate"]


# ---- windows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("len_q", "len_kv"), [(50, 50), (64, 64), (65, 65), (300, 300), (7, 100), (40, 90), (1, 400)]
)
@pytest.mark.parametrize("windowed", [2, 8])
def test_a_window_leaves_exactly_its_pairs(len_q: int, len_kv: int, windowed: int) -> None:
    cfg = replace(example("llama3-8b"), window=64, num_windowed_layers=4 * windowed)
    one = layer(cfg, batch=1, len_q=len_q, len_kv=len_kv, training=False)
    nodes = [n for n in one if n.op.name == "flash_attention_2"]
    past = len_kv - len_q
    full = sum(past + i + 1 for i in range(len_q))
    seen = sum(min(64, past + i + 1) for i in range(len_q))
    frac = cfg.windowed_frac
    pairs = sum(n.count * n.op.num_pairs() for n in nodes)
    assert pairs == pytest.approx(frac * seen + (1 - frac) * full, rel=1e-14)


def test_a_window_wider_than_the_sequence_changes_nothing() -> None:
    cfg = example("mistral-7b-v0.1")
    one = layer(cfg, batch=1, len_q=4096, training=True)
    assert one.nodes == layer(replace(cfg, window=None), batch=1, len_q=4096, training=True).nodes


# ---- inference -----------------------------------------------------------------------------


def test_decoding_latent_attention_is_absorbed() -> None:
    cfg = example("deepseek-v3")
    one = decode_step(cfg, batch=4, len_context=1000).layer("moe", Plan(tp=8))
    op = one["attention"].op
    assert (op.num_heads, op.num_kv_heads, op.head_dim, op.head_dim_v) == (16, 1, 576, 512)
    assert (op.len_q, op.len_kv) == (1, 1000)
    assert "kv_b" not in one.graph
    prefill = prefill_step(cfg, batch=4, len_context=1000).layer("moe", Plan(tp=8))
    op = prefill["attention"].op
    assert (op.num_heads, op.num_kv_heads, op.head_dim, op.head_dim_v) == (16, 16, 192, 128)


def test_absorbing_is_the_same_product_in_another_order() -> None:
    """Per head: q^T (W_k c) = (W_k^T q)^T c, so both absorbed products have kv_b's weights."""
    cfg = example("deepseek-v3")
    spec = cfg.attention
    assert isinstance(spec, LatentAttention)
    one = decode_step(cfg, batch=1, len_context=10).layer("dense", Plan())
    weights = sum(one[n].op.batch * one[n].op.k * one[n].op.n for n in ("q_absorb", "v_absorb"))
    assert weights == spec.kv_lora_rank * 128 * (128 + 128)


def test_decoding_reads_the_weights_and_the_cache() -> None:
    cfg = example("llama3-8b")
    work = decode_step(cfg, batch=1, len_context=4096).layer("dense", Plan()).work(50 * 2**20)
    weights, cache = 218_103_808 * 2, 4096 * 2 * 8 * 128 * 2
    assert weights + cache < work.read_bytes < 1.001 * (weights + cache)


def test_prefill_needs_one_row_of_logits_per_sequence() -> None:
    step = prefill_step(example("llama3-8b"), batch=4, len_context=1000)
    head = step.ends(Plan(tp=2))["head"].op
    assert (head.m, head.n, head.out_dtype) == (4, 64128, FP32)
    assert step.num_tokens == 4000
    assert "loss" not in step.ends(Plan()).graph


def test_impossible_steps_are_refused() -> None:
    cfg = example("gpt2")
    with pytest.raises(InputError, match="cannot be split over cp"):
        decode_step(cfg, batch=1, len_context=10).layer("dense", Plan(cp=2))
    with pytest.raises(InputError, match="len_seq = 0"):
        train_step(cfg, len_seq=0, global_batch=1)
    with pytest.raises(InputError, match=r"decode: batch = 1\.5"):
        decode_step(cfg, batch=1.5, len_context=10)
    with pytest.raises(InputError, match="has no 'moe' layers"):
        layer(cfg, kind="moe", batch=1, len_q=8, training=False)


# ---- the ends ------------------------------------------------------------------------------


def test_positions_and_projections_of_the_ends() -> None:
    gpt = ends(example("gpt2"), batch=1, len_q=64, training=True)
    assert {"positions", "add_positions", "embedding.backward", "loss.backward"} <= set(gpt.graph)
    assert set(gpt["add_positions"].after) == {"embedding", "positions"}
    narrow = replace(example("opt-6.7b"), embedding_dim=512)
    opt = ends(narrow, batch=1, len_q=64, training=True)
    assert opt["project_in"].op.k == 512 and opt["head"].op.k == 512
    assert opt["project_out"].op.n == 512
    assert opt["embedding"].op.dim == 512


def test_the_head_is_split_by_vocabulary() -> None:
    cfg = example("llama3-8b")
    whole = ends(cfg, batch=1, len_q=LEN, training=True)
    part = ends(cfg, batch=1, len_q=LEN, plan=Plan(tp=4, cp=2), training=True)
    assert 8 * tensor_flops(part) == tensor_flops(whole) == 6 * LEN * 4096 * 128256
    assert whole["loss"].op.dtype == FP32 and whole["loss.backward"].op.written_dtype == BF16
