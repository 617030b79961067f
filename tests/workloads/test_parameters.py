from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hwmodels.errors import InputError
from workloads.models.config import Attention, TransformerConfig, load_model
from workloads.models.parameters import (
    count_parameters,
    heads_per_rank,
    layer_parameters,
    matmul_parameters,
    parameters_per_rank,
)
from workloads.plan import Plan

EXACT = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mistral-7b-v0.1": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "gpt2": 124_439_808,
    "gpt3-175b": 174_604_259_328,
    "megatron-1t": 12 * 128 * 25600**2 + 13 * 128 * 25600 + (51200 + 2048 + 2) * 25600,
    "opt-6.7b": 6_658_473_984,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-7b": 8_537_680_896,
    "gemma-2-9b": 9_241_705_984,
    "deepseek-v3": 671_026_419_200,
    "bamba-9b": 9_780_235_392,
    "jamba-v0.1": 51_570_323_328,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "lfm2-1.2b": 1_170_340_608,
    "linear-llama3-1b": 2 * 128_256 * 2048 + 16 * (4 * 2048**2 + 3 * 2048 * 5504) + 33 * 2048,
}
"""Parameters of the published checkpoints; DeepSeek-V3 and Qwen3-Next without MTP modules, LASP-2's
model by its sizes, GPT-1T by Narayanan et al.'s equation 2 (1008.0 billion), and the last norm's
bias."""

ACTIVE = {"mixtral-8x7b": 12_879_925_248, "qwen3-30b-a3b": 3_353_032_704}


def example(name: str) -> TransformerConfig:
    return load_model(f"examples/{name}.json")


@pytest.mark.parametrize("name", sorted(p.stem for p in Path("examples").glob("*.json")))
def test_totals_are_those_of_the_published_checkpoints(name: str) -> None:
    count = count_parameters(example(name))
    assert count.total == EXACT[name]
    assert count.layers + count.embedding_and_head == count.total


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name: str) -> None:
    assert count_parameters(example(name)).active == ACTIVE[name]


def test_deepseek_activates_37_billion() -> None:
    count = count_parameters(example("deepseek-v3"))
    assert 36.5e9 < count.active - count.embedding < 37.5e9
    assert count.active == 37_552_297_472


def test_gpt3_is_twelve_l_h_squared() -> None:
    count = count_parameters(example("gpt3-175b"))
    assert count.dense_layer is not None
    weights = 12 * 12288**2
    assert count.dense_layer.total == weights + (3 + 1 + 4 + 1 + 4) * 12288
    assert count.moe_layer is None


@pytest.mark.parametrize("name", EXACT)
def test_matmul_weights_are_the_active_ones_less_norms_biases_and_lookups(name: str) -> None:
    cfg = example(name)
    count = count_parameters(cfg)
    left = count.active - matmul_parameters(cfg)
    lookups = count.positions + (0 if cfg.tied_embeddings else count.embedding)
    taps = cfg.num_mixer_layers * cfg.mixer.small() if cfg.mixer else 0
    biases_and_norms = left - lookups - taps
    assert 0 < biases_and_norms <= 40 * cfg.num_layers * cfg.hidden_dim


@pytest.mark.parametrize("name", EXACT)
def test_one_rank_holds_everything(name: str) -> None:
    cfg = example(name)
    count = count_parameters(cfg)
    first, last = parameters_per_rank(cfg, Plan())
    assert first == last
    assert first.total == count.total
    assert first.experts == count.experts


@pytest.mark.parametrize("name", EXACT)
def test_ranks_add_up_to_the_model_and_what_is_replicated(name: str) -> None:
    """tp * ep shards exceed the model by copies of norms, routers and whole biases only."""
    cfg = example(name)
    tp = 4
    whole = {kind: layer_parameters(cfg, kind) for kind in cfg.kinds}
    for kind, layer in whole.items():
        ep = 8 if kind == "moe" else 1
        part = layer_parameters(cfg, kind, tp, ep)
        assert part.experts * tp * ep == layer.experts
        assert part.shared_experts * tp == layer.shared_experts
        assert part.norms == layer.norms and part.router == layer.router
        copied = tp * part.attention - layer.attention
        assert 0 <= copied <= (tp - 1) * (cfg.hidden_dim * 2400 + 4000)
        assert 0 <= tp * part.mlp - layer.mlp <= (tp - 1) * cfg.hidden_dim


def test_pipeline_stages_add_up() -> None:
    cfg = example("llama3-8b")
    first, last = parameters_per_rank(cfg, Plan(pp=2))
    assert first.total + last.total == EXACT["llama3-8b"]


def test_a_tied_embedding_is_copied_to_the_last_stage() -> None:
    cfg = example("gpt2")
    first, last = parameters_per_rank(cfg, Plan(pp=2))
    assert first.total + last.total == EXACT["gpt2"] + 50257 * 768


def test_dense_layers_of_a_mixture_lie_on_the_first_stage() -> None:
    cfg = example("deepseek-v3")
    moe = layer_parameters(cfg, "moe", 1, 8)
    first, last = parameters_per_rank(cfg, Plan(pp=16, ep=8))
    assert first.experts == 1 * moe.experts
    assert last.experts == 4 * moe.experts


@pytest.mark.parametrize("name", ["llama3-70b", "deepseek-v3", "gpt2", "qwen3-30b-a3b"])
def test_array_plans_agree_with_scalar_plans(name: str) -> None:
    cfg = example(name)
    tp, pp, ep = (np.array(v, dtype=float) for v in ([1, 2, 3, 16], [1, 4, 7, 2], [1, 8, 4, 2]))
    many = parameters_per_rank(cfg, Plan(tp=tp, pp=pp, ep=ep))
    for i in range(4):
        one = parameters_per_rank(cfg, Plan(tp=int(tp[i]), pp=int(pp[i]), ep=int(ep[i])))
        for stage, stages in zip(one, many, strict=True):
            assert stage.dense == np.broadcast_to(stages.dense, 4)[i]
            assert stage.experts == np.broadcast_to(stages.experts, 4)[i]


def test_kv_heads_are_copied_beyond_their_number() -> None:
    assert heads_per_rank(64, 8, 16) == (4, 1)
    assert heads_per_rank(28, 4, 8) == (4, 1)
    q, kv = heads_per_rank(64, 8, np.array([1.0, 8.0, 64.0]))
    assert np.array_equal(q, [64, 8, 1]) and np.array_equal(kv, [8, 1, 1])


def test_a_narrow_embedding_is_projected_both_ways() -> None:
    cfg = replace(example("opt-6.7b"), embedding_dim=512)
    count = count_parameters(cfg)
    assert count.embedding == 50272 * 512 + 512 * 4096
    assert count.head == 512 * 4096


def test_inner_norms_and_biases_are_counted() -> None:
    cfg = example("llama3-8b")
    plain = layer_parameters(cfg, "dense").attention
    assert isinstance(cfg.attention, Attention)
    spec = replace(cfg.attention, qkv_bias=True, out_bias=True, qk_norm=True)
    rich = layer_parameters(replace(cfg, attention=spec), "dense").attention
    assert rich - plain == (32 + 16) * 128 + 4096 + 2 * 128


def test_a_kind_the_model_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="has no 'moe' layers; it has dense"):
        layer_parameters(example("gpt2"), "moe")
    with pytest.raises(InputError, match="has no 'dense' layers; it has moe"):
        layer_parameters(example("mixtral-8x7b"), "dense")
