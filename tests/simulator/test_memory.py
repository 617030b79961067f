"""Bytes of a rank: by hand, against schedules written out, and against every stage in turn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.memory import MemoryEstimate, inference_memory, training_memory
from simulator.recipe import RECIPES, recipe
from tests.simulator.pipelines import most_alive
from workloads.models.activations import ends_bytes, layer_bytes
from workloads.models.config import TransformerConfig, load_hf_config
from workloads.models.parameters import (
    count_parameters,
    heads_per_rank,
    layer_parameters,
    parameters_per_rank,
)
from workloads.models.transformer import decode_step, prefill_step, train_step
from workloads.plan import Plan, Recompute

BF16 = RECIPES["bf16"]
MODELS = ("llama3-8b", "deepseek-v3", "gemma-2-9b", "gpt2", "opt-6.7b", "mixtral-8x7b")


def model(name: str) -> TransformerConfig:
    return load_hf_config(f"examples/{name}.json")


LLAMA = model("llama3-8b")


def memory(cfg: TransformerConfig, *, len_seq: int = 4096, batch: int = 64, **plan: int):  # type: ignore[no-untyped-def]
    step = train_step(cfg, len_seq=len_seq, global_batch=batch)
    return training_memory(step, plan=Plan(**plan), recipe=BF16)


def parts(cfg: TransformerConfig, **given: int) -> dict[str, float]:
    return {k: float(v) for k, v in memory(cfg, **given).bytes_by_part.items()}


# ---- by hand -------------------------------------------------------------------------------


def test_llama_on_one_gpu() -> None:
    """8 030 261 248 parameters at 18 bytes; 92 416 bytes per token and layer without recompute."""
    found = parts(LLAMA, len_seq=8192, batch=1)
    assert found["weights"] == 2 * 8_030_261_248
    assert found["gradients"] == 4 * 8_030_261_248
    assert found["optimizer"] == 12 * 8_030_261_248
    per_token = 2 * (4 * 4096 + 10240 + 3 * 14336) + 4 * 32
    assert found["activations"] == 32 * 8192 * per_token
    assert found["ends"] == 8192 * (2 * 4096 + 2 * 4096 + 4 * 128256)
    assert found["working set"] == found["gathered weights"] == 0
    assert sum(found.values()) == memory(LLAMA, len_seq=8192, batch=1).total


def test_full_recompute_keeps_inputs_and_one_layer() -> None:
    found = parts(LLAMA, len_seq=8192, batch=1, recompute=Recompute.FULL)
    assert found["activations"] == 32 * 8192 * 4096 * 2
    assert found["working set"] == float(layer_bytes(LLAMA, batch=1, len_seq=8192))
    assert found["ends"] == parts(LLAMA, len_seq=8192, batch=1)["ends"]


@pytest.mark.parametrize("name", ["bf16", "bf16-grad16", "fp16", "fp32"])
def test_recipes_cost_what_they_say(name: str) -> None:
    step = train_step(LLAMA, len_seq=512, global_batch=1)
    found = training_memory(step, plan=Plan(), recipe=recipe(name)).bytes_by_part
    held = found["weights"] + found["gradients"] + found["optimizer"]
    expected = {"bf16": 18, "bf16-grad16": 16, "fp16": 16, "fp32": 16}[name]
    assert held == expected * 8_030_261_248
    assert recipe(name).bytes_per_parameter == expected


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="did you mean bf16"):
        recipe("bf17")
    with pytest.raises(ValueError, match="one of bf16, bf16-grad16, fp16, fp32"):
        recipe("zzzzzz")


# ---- ZeRO ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dp", [2, 8, 64])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_divides_exactly_its_parts(stage: int, dp: int) -> None:
    whole, found = parts(LLAMA, dp=dp), parts(LLAMA, dp=dp, zero_stage=stage)
    divided = ("optimizer", "gradients", "weights")[:stage]
    for part, size in whole.items():
        if part in ("gathered weights", "layer gradients"):
            continue
        assert found[part] == (size / dp if part in divided else size), part
    two_layers = 2 * 2 * 218_112_000 if stage == 3 else 0
    assert found["gathered weights"] == two_layers
    # One layer's gradients in bf16, as written, and in fp32, as reduced and scattered.
    assert found["layer gradients"] == ((2 + 4) * 218_112_000 if stage >= 2 else 0)


def test_zero_shards_over_context_parallel_ranks_too() -> None:
    assert parts(LLAMA, dp=4, cp=2, zero_stage=1)["optimizer"] == 12 * 8_030_261_248 / 8


def test_experts_are_sharded_by_ep_and_replicated_over_the_rest() -> None:
    cfg = model("mixtral-8x7b")
    one = layer_parameters(cfg, "moe")
    rest = count_parameters(cfg).total - 32 * one.experts
    for ep in (1, 2, 4, 8):
        found = parts(cfg, dp=8, ep=ep)
        assert found["weights"] == 2 * (rest + 32 * one.experts / ep)
        sharded = parts(cfg, dp=8, ep=ep, zero_stage=1)
        # Dense over 8 replicas; each expert has 8 / ep, so every rank updates an eighth of all.
        assert sharded["optimizer"] == 12 * (rest + 32 * one.experts) / 8
    gathered = parts(cfg, dp=8, ep=8, zero_stage=3)["gathered weights"]
    assert gathered == 2 * 2 * (one.dense + one.experts / 8)


# ---- the pipeline --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(p=st.integers(1, 12), m=st.integers(1, 30))
def test_1f1b_holds_what_the_schedule_holds(p: int, m: int) -> None:
    cfg = replace(LLAMA, num_layers=p)
    one = float(layer_bytes(cfg, batch=1, len_seq=128))
    found = parts(cfg, len_seq=128, batch=m, pp=p)
    alive = [most_alive(p, m, 1, stage) for stage in range(p)]
    assert found["activations"] / one in (alive[0], alive[-1])
    assert alive == [min(m, p - i) for i in range(p)]


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_interleaving_holds_what_the_schedule_holds(p: int, v: int, groups: int) -> None:
    """Chunks of 1 / v of a stage; a tiny vocabulary makes the first stage the fullest."""
    cfg = replace(LLAMA, num_layers=p * v, vocab_size=8)
    m = groups * p
    one_chunk = float(layer_bytes(cfg, batch=1, len_seq=4096))
    found = parts(cfg, batch=m, pp=p, interleave=v)
    assert found["activations"] == pytest.approx(most_alive(p, m, v, 0) * one_chunk, rel=1e-12)
    assert most_alive(p, m, v, 0) >= max(most_alive(p, m, v, i) for i in range(p))


def every_stage(
    cfg: TransformerConfig, plan: Plan, len_seq: int, batch: int
) -> list[dict[str, float]]:
    """All stages one by one, layer by layer; in-flight counts from the schedule's order."""
    p, v = int(plan.pp), int(plan.interleave)
    m = batch // int(plan.dp * plan.micro_batch)
    num = -(-cfg.num_layers // p)
    moe_layers = set(cfg.moe.layers) if cfg.moe else set()
    first, last = parameters_per_rank(cfg, plan)
    ends = ends_bytes(cfg, batch=plan.micro_batch, len_seq=len_seq, plan=plan)
    whole = replace(plan, recompute=Recompute.NONE)
    found = []
    for stage in range(p):
        start = min(stage * num, cfg.num_layers - num)
        kinds = ["moe" if i in moe_layers else "dense" for i in range(start, start + num)]
        held = [layer_parameters(cfg, k, plan.tp, plan.ep) for k in kinds]
        dense, experts = sum(x.dense for x in held), sum(x.experts for x in held)
        alive = most_alive(p, m, v, stage) / v
        outside = 0.0
        if stage == 0:
            dense, experts = first.dense, first.experts
            outside += float(ends.embedding) * alive
        if stage == p - 1:
            dense, experts = last.dense, last.experts
            outside += float(ends.head)

        def kept(kind: str, of: Plan) -> float:
            return float(
                layer_bytes(cfg, kind=kind, batch=plan.micro_batch, len_seq=len_seq, plan=of)
            )

        # Two chunks of K and V of the rank's heads, where a ring has ranks at all.
        _, kv_heads = heads_per_rank(cfg.attention.num_heads, cfg.attention.num_kv_heads, plan.tp)
        width = int(kv_heads) * (cfg.attention.head_dim + cfg.attention.v_head_dim)
        tokens = plan.micro_batch * len_seq / plan.cp
        passing = 2 * 2 * tokens * width if plan.cp > 1 else 0
        replicas = plan.dp * plan.cp
        z = int(plan.zero_stage)
        shard = -(-dense // replicas) + -(-experts // (replicas // plan.ep))
        full = dense + experts
        redo = max(kept(k, whole) for k in cfg.kinds)
        largest = max(layer_parameters(cfg, k, plan.tp, plan.ep).total for k in cfg.kinds)
        found.append(
            {
                "weights": 2 * (shard if z >= 3 else full),
                "gradients": 4 * (shard if z >= 2 else full),
                "optimizer": 12 * (shard if z >= 1 else full),
                "gathered weights": 2 * 2 * largest if z >= 3 else 0,
                "layer gradients": (2 + 4) * largest if z >= 2 else 0,
                "activations": alive * sum(kept(k, plan) for k in kinds),
                "working set": redo if plan.recompute == Recompute.FULL else 0,
                "ends": outside,
                "sequence exchange": passing,
            }
        )
    return found


plans = st.builds(
    Plan,
    dp=st.sampled_from([1, 2, 4]),
    tp=st.sampled_from([1, 2, 8]),
    pp=st.sampled_from([1, 2, 3, 4, 8, 16]),
    cp=st.sampled_from([1, 2]),
    ep=st.just(1),
    micro_batch=st.sampled_from([1, 2]),
    recompute=st.sampled_from([Recompute.NONE, Recompute.FULL]),
    zero_stage=st.integers(0, 3),
)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(MODELS),
    plan=plans,
    spread=st.booleans(),
    v=st.sampled_from([1, 2]),
    num_micro=st.integers(1, 24),
    len_seq=st.sampled_from([512, 4096]),
)
def test_no_stage_holds_more_than_is_reported(
    name: str, plan: Plan, spread: bool, v: int, num_micro: int, len_seq: int
) -> None:
    cfg = model(name)
    if not cfg.moe and spread:  # a narrower embedding, which is projected and keeps its input
        cfg = replace(cfg, embedding_dim=cfg.hidden_dim // 2)
    if cfg.moe and spread:
        plan = replace(plan, ep=plan.dp * plan.cp)
    if cfg.num_layers % (plan.pp * v) == 0 and num_micro % plan.pp == 0 and plan.pp > 1:
        plan = replace(plan, interleave=v)
    batch = int(plan.dp * plan.micro_batch) * num_micro
    step = train_step(cfg, len_seq=len_seq, global_batch=batch)
    reported = training_memory(step, plan=plan, recipe=BF16)
    stages = every_stage(cfg, plan, len_seq, batch)
    fullest = max(stages, key=lambda s: sum(s.values()))
    assert reported.total == pytest.approx(sum(fullest.values()), rel=1e-12)
    alike = [s for s in stages if sum(s.values()) >= reported.total * (1 - 1e-12)]
    assert any(reported.bytes_by_part == pytest.approx(s, rel=1e-12, abs=1e-3) for s in alike)


def test_deepseek_is_fullest_behind_its_dense_layers() -> None:
    """Of 16 stages the first has three dense layers and one with experts, the second has four."""
    cfg = model("deepseek-v3")
    plan = Plan(dp=64, tp=1, pp=16, ep=8)
    stages = every_stage(cfg, plan, 4096, 64 * 32)
    totals = [sum(s.values()) for s in stages]
    assert totals.index(max(totals)) == 1
    assert max(totals) > 1.4 * max(totals[0], totals[-1])
    found = memory(cfg, batch=64 * 32, dp=64, pp=16, ep=8).total
    assert found == pytest.approx(max(totals), rel=1e-12)


@pytest.mark.parametrize("pp", [16, 20, 30, 61])
@pytest.mark.parametrize("layers", [range(3, 61), range(1, 61, 2), range(20), range(30, 40)])
def test_wherever_the_experts_lie(layers: range, pp: int) -> None:
    """Behind the dense layers, every second layer, before them, and in the middle."""
    cfg = model("deepseek-v3")
    assert cfg.moe
    cfg = replace(cfg, moe=replace(cfg.moe, layers=tuple(layers)))
    plan = Plan(dp=8, pp=pp, ep=8)
    totals = [sum(s.values()) for s in every_stage(cfg, plan, 4096, 8 * 64)]
    found = memory(cfg, batch=8 * 64, dp=8, pp=pp, ep=8).total
    assert found == pytest.approx(max(totals), rel=1e-12)


def test_a_tied_embedding_is_held_at_both_ends() -> None:
    cfg = model("gemma-7b")
    assert cfg.tied_embeddings
    table = cfg.vocab_size * cfg.hidden_dim
    one, two = (
        parts(cfg, batch=1)["weights"],
        [2 * held.total for held in parameters_per_rank(cfg, Plan(pp=2))],
    )
    assert sum(two) == one + 2 * table
    assert parts(cfg, batch=1, pp=2)["weights"] in two


# ---- published -----------------------------------------------------------------------------


def test_korthikanti_parameters_and_optimizer() -> None:
    """Figure 1 of Korthikanti et al. 2022: 18 bytes per parameter over tp x pp ranks.

    GPT-3 175B on tp = 8, pp = 8: layers alone are 12 h^2 (1 + 13 / (12 h)) each.
    """
    cfg = model("gpt3-175b")
    found = parts(cfg, len_seq=2048, batch=64, tp=8, pp=8)
    held = found["weights"] + found["gradients"] + found["optimizer"]
    layers = 18 * 12 * 12 * 12288**2 / 8
    assert held == pytest.approx(layers, rel=0.04)  # the embedding is what is more
    assert held > layers


def test_korthikanti_full_recompute_is_2sbh_a_layer() -> None:
    """Table 2: 2 s b h, divided by tp where sequence parallelism shards it; p in flight."""
    cfg = model("gpt3-175b")
    found = parts(cfg, len_seq=2048, batch=64, tp=8, pp=8, recompute=Recompute.FULL)
    assert found["activations"] == 2 * 2048 * 12288 / 8 * 12 * 8


# ---- arrays --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_arrays_agree_with_scalars(name: str) -> None:
    cfg = model(name)
    rng = np.random.default_rng(11)
    pp = rng.choice([1.0, 2.0, 4.0, 8.0], 40)
    columns = {
        "dp": rng.choice([1.0, 2.0, 8.0], 40),
        "tp": rng.choice([1.0, 2.0, 4.0, 16.0], 40),
        "pp": pp,
        "cp": rng.choice([1.0, 2.0], 40),
        "micro_batch": rng.choice([1.0, 2.0], 40),
        "interleave": np.where(pp > 1, rng.choice([1.0, 2.0], 40), 1.0),
        "recompute": rng.choice([0.0, 2.0], 40),
        "zero_stage": rng.choice([0.0, 1.0, 2.0, 3.0], 40),
    }
    step = train_step(cfg, len_seq=2048, global_batch=128)
    many = training_memory(step, plan=Plan(**columns), recipe=BF16)
    for i in range(40):
        plan = Plan(**{k: int(v[i]) for k, v in columns.items()})
        one = training_memory(step, plan=plan, recipe=BF16)
        for part, size in one.bytes_by_part.items():
            assert np.broadcast_to(many.bytes_by_part[part], 40)[i] == pytest.approx(
                size, rel=1e-12
            ), (part, plan)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(MODELS), plan=plans, num_micro=st.integers(1, 8))
def test_more_of_anything_never_takes_less(name: str, plan: Plan, num_micro: int) -> None:
    cfg = model(name)
    batch = int(plan.dp * plan.micro_batch) * num_micro

    def total(over: Plan, len_seq: int = 1024, sequences: int = batch) -> float:
        step = train_step(cfg, len_seq=len_seq, global_batch=sequences)
        return float(training_memory(step, plan=over, recipe=BF16).total)

    assert total(plan) <= total(plan, len_seq=2048)
    assert total(plan) <= total(plan, sequences=2 * batch)
    if plan.zero_stage == 0:  # from 2 on a layer is held whole beside: few replicas gain nothing
        assert total(replace(plan, zero_stage=plan.zero_stage + 1)) <= total(plan)


# ---- serving -------------------------------------------------------------------------------


def test_decoding_holds_weights_and_cache() -> None:
    step = decode_step(LLAMA, batch=16, len_context=8192)
    found = inference_memory(step, plan=Plan(), recipe=BF16).bytes_by_part
    assert found["weights"] == 2 * 8_030_261_248
    assert found["kv cache"] == 16 * 8192 * 131072
    assert found["working set"] == float(layer_bytes(LLAMA, batch=16, len_seq=1))


def test_a_pipeline_keeps_the_cache_of_every_slot() -> None:
    step = decode_step(LLAMA, batch=4, len_context=8192)
    one, four = (
        inference_memory(step, plan=Plan(pp=pp), recipe=BF16).bytes_by_part for pp in (1, 4)
    )
    assert four["kv cache"] == one["kv cache"]  # a quarter of the layers, four slots
    assert four["weights"] < one["weights"] / 3


def test_tensor_parallelism_splits_the_cache_up_to_its_heads() -> None:
    step = prefill_step(LLAMA, batch=1, len_context=8192)
    sizes = [
        inference_memory(step, plan=Plan(tp=tp), recipe=BF16).bytes_by_part["kv cache"]
        for tp in (1, 8, 16)
    ]
    assert sizes[0] == 8 * sizes[1] == 8 * sizes[2]


def test_the_working_set_is_that_of_the_larger_kind() -> None:
    cfg = model("deepseek-v3")
    step = prefill_step(cfg, batch=1, len_context=4096)
    found = inference_memory(step, plan=Plan(), recipe=BF16)
    assert isinstance(found, MemoryEstimate)
    assert found.bytes_by_part["working set"] == max(
        float(layer_bytes(cfg, kind=kind, batch=1, len_seq=4096)) for kind in ("dense", "moe")
    )
