from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from workloads.models.activations import ends_bytes, kv_cache_bytes, layer_bytes, saved_tensors
from workloads.models.config import TransformerConfig, load_model
from workloads.plan import Plan, Recompute

GPT3 = load_model("examples/gpt3-175b.json")
S, B, H, A = 2048, 3, 12288, 96


def paper_bytes(t: int, recompute: Recompute = Recompute.NONE, *, sequence: bool = False) -> float:
    """A GPT layer as Korthikanti et al. count it: dropout, materialised scores."""
    bytes_ = layer_bytes(
        GPT3,
        batch=B,
        len_seq=S,
        plan=Plan(tp=t, recompute=recompute),
        materialised=True,
        dropout=True,
        sequence_parallel=sequence,
    )
    return float(bytes_)


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-12, abs=0)


def test_one_rank_is_equation_1() -> None:
    assert paper_bytes(1) == near(S * B * H * (34 + 5 * A * S / H))


@pytest.mark.parametrize("t", [2, 4, 8])
def test_tensor_parallel_is_equation_2(t: int) -> None:
    assert paper_bytes(t) == near(S * B * H * (10 + 24 / t + 5 * A * S / (H * t)))


@pytest.mark.parametrize("t", [2, 4, 8])
def test_sequence_parallel_is_equation_4(t: int) -> None:
    assert paper_bytes(t, sequence=True) == near(S * B * H / t * (34 + 5 * A * S / H))


@pytest.mark.parametrize("t", [1, 8])
def test_recomputation_is_table_2(t: int) -> None:
    assert paper_bytes(t, Recompute.SELECTIVE, sequence=True) == near(34 * S * B * H / t)
    assert paper_bytes(t, Recompute.SELECTIVE) == near(S * B * H * (10 + 24 / t))
    assert paper_bytes(t, Recompute.FULL) == near(2 * S * B * H)


def test_the_ends_are_section_4_3() -> None:
    for t in (1, 8):
        cfg = replace(GPT3, vocab_size=51200)
        kept = ends_bytes(cfg, batch=B, len_seq=S, plan=Plan(tp=t), dropout=True)
        assert kept.head == near(4 * S * B * H / t * (1 + 51200 / H))
        assert kept.embedding == near(S * B * H / t)


def test_a_fused_attention_keeps_no_scores() -> None:
    whole = layer_bytes(GPT3, batch=B, len_seq=S, materialised=True)
    fused = layer_bytes(GPT3, batch=B, len_seq=S)
    assert whole - fused == 2 * A * S * S * B - 4 * A * S * B
    selective = layer_bytes(GPT3, batch=B, len_seq=S, plan=Plan(recompute=Recompute.SELECTIVE))
    assert selective == fused


def per_token(cfg: TransformerConfig, kind: str = "dense", **plan: int) -> float:
    return float(layer_bytes(cfg, kind=kind, batch=1, len_seq=4096, plan=Plan(**plan))) / 4096


def test_llama_by_hand() -> None:
    """Two norms in and out, q k v, attention out and its logsumexp, gate, up and their product."""
    llama = load_model("examples/llama3-8b.json")
    assert per_token(llama) == 4 * 8192 + 2 * 6144 + 8192 + 4 * 32 + 3 * 2 * 14336


def test_mixture_by_hand() -> None:
    mixtral = load_model("examples/mixtral-8x7b.json")
    attention = 4 * 8192 + 2 * 6144 + 8192 + 4 * 32
    experts = 4 * 8 + 2 * (2 * 8192 + 3 * 2 * 14336)
    assert per_token(mixtral, "moe") == attention + experts
    # The rows that experts receive are whole; all else is split four ways.
    assert per_token(mixtral, "moe", tp=4) == (attention + experts + 3 * 2 * 8192) / 4


def test_latent_attention_by_hand() -> None:
    v3 = load_model("examples/deepseek-v3.json")
    heads = 2 * 128 * (192 + 192 + 128 + 128) + 4 * 128
    latents = 2 * 2 * (1536 + 512)
    assert per_token(v3, "dense") == 4 * 2 * 7168 + latents + heads + 3 * 2 * 18432


def test_small_print_of_the_families() -> None:
    gemma = load_model("examples/gemma-2-9b.json")
    assert per_token(gemma) - per_token(replace(gemma, norms_per_layer=2)) == 2 * 2 * 3584
    qwen = load_model("examples/qwen3-8b.json")
    names = {t.name for t in saved_tensors(qwen, len_seq=1)}
    assert "qk_norm.input" in names
    opt = load_model("examples/opt-6.7b.json")
    gelu = replace(opt, mlp=replace(opt.mlp, activation="gelu"))
    assert per_token(gelu) - per_token(opt) == 2 * 16384  # a ReLU keeps its output only


def test_context_parallelism_divides_everything() -> None:
    for name, kind in (("llama3-8b", "dense"), ("deepseek-v3", "moe")):
        cfg = load_model(f"examples/{name}.json")
        assert per_token(cfg, kind, cp=8) == per_token(cfg, kind) / 8


@pytest.mark.parametrize("materialised", [False, True])
def test_array_plans_agree_with_scalar_plans(materialised: bool) -> None:
    cfg = load_model("examples/deepseek-v3.json")
    tp, cp, mode = np.array([1.0, 4, 3, 8]), np.array([2.0, 1, 5, 8]), np.array([0.0, 1, 2, 1])
    for kind in cfg.kinds:
        shape = {"kind": kind, "batch": 2, "len_seq": 999, "materialised": materialised}
        many = layer_bytes(cfg, plan=Plan(tp=tp, cp=cp, recompute=mode), **shape)
        for i in range(4):
            plan = Plan(tp=int(tp[i]), cp=int(cp[i]), recompute=int(mode[i]))
            one = layer_bytes(cfg, plan=plan, **shape)
            assert one == np.asarray(many)[i]


def test_tensor_names_are_unique() -> None:
    for name, kind in (("gpt2", "dense"), ("gemma-2-9b", "dense"), ("deepseek-v3", "moe")):
        cfg = load_model(f"examples/{name}.json")
        tensors = saved_tensors(cfg, kind=kind, len_seq=8, dropout=True, materialised=True)
        assert len({t.name for t in tensors}) == len(tensors)


def test_caches() -> None:
    llama = load_model("examples/llama3-8b.json")
    assert kv_cache_bytes(llama, batch=4, len_context=1000) == 4 * 1000 * 32 * 2 * 8 * 128 * 2
    assert kv_cache_bytes(llama, batch=1, len_context=1, plan=Plan(tp=16, pp=4)) == 8 * 2 * 128 * 2
    v3 = load_model("examples/deepseek-v3.json")
    assert kv_cache_bytes(v3, batch=1, len_context=1, plan=Plan(tp=8)) == 61 * 576 * 2
    gemma = load_model("examples/gemma-2-9b.json")
    per_layer = 2 * 8 * 256 * 2
    assert kv_cache_bytes(gemma, batch=1, len_context=8192) == 21 * (8192 + 4096) * per_layer
