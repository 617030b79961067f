"""Claims on sequence parallelism: settings decide, published figures do not."""

from __future__ import annotations

from typing import Any

import pytest

from validate.claims.claim import Claim, NotModelledError
from validate.claims.sequence_parallel import (
    counted_flops,
    evaluate_deepspeed_ulysses,
    evaluate_lasp2,
    evaluate_lightseq,
    evaluate_ring_attention_lwm,
    evaluate_ring_self_attention,
    evaluate_token_ring,
    gpt_of,
)

BOXES = "NVLink; 100Gbps IB across boxes"


def claim(id: str, quantity: str, kind: str = "latency", **setting: Any) -> Claim:
    return Claim(id=id, family="parallelism", quantity=quantity, unit="", kind=kind,
                 published=None, setting=setting)  # fmt: skip


def iteration(system: str, **changes: Any) -> float:
    setting: dict[str, Any] = {"gpu": "A100-80GB", "n_gpus": 8, "interconnect": BOXES}
    setting |= {"model": "LLaMA-7B", "seq_total": 65536, "batch": 1}
    found = evaluate_lightseq(claim("lightseq", f"iteration time {system}", **(setting | changes)))
    assert isinstance(found, float)
    return found


def test_iterations_follow_the_setting() -> None:
    ours, theirs = iteration("DistFlashAttn/LightSeq"), iteration("Megatron-LM (TP+FA)")
    assert 2 < ours < theirs < 20
    assert iteration("DistFlashAttn/LightSeq", seq_total=131072) > 2.5 * ours
    assert iteration("DistFlashAttn/LightSeq", model="LLaMA-GQA") < ours
    odd: dict[str, Any] = {"model": "LLaMA-33H", "seq_total": 131072}
    plain = iteration("Megatron-LM", seq_total=131072)
    assert 1.1 < iteration("Megatron-LM", **odd) / plain < 1.25  # 40 heads of work for 33
    assert iteration("Megatron-LM", **odd, heads=33) == iteration("Megatron-LM", **odd)
    slow = iteration("Megatron-LM", n_gpus=16, interconnect="25Gbps IB")
    assert slow > 1.5 * iteration("Megatron-LM", n_gpus=16)


def test_comparisons_name_both_systems() -> None:
    setting: dict[str, Any] = {"gpu": "A100-80GB", "n_gpus": 8, "seq": 65536, "model": "LLaMA-7B"}
    quantity = "DeepSpeed-Ulysses vs DistFlashAttn iteration"
    both = evaluate_lightseq(claim("lightseq", quantity, **setting))
    assert isinstance(both, tuple)
    assert both[0] == pytest.approx(iteration("LightSeq"), rel=1e-9)


def test_balance_is_counted_for_any_number_of_ranks() -> None:
    found = evaluate_lightseq(
        claim("lightseq", "load-balanced attention fwd speedup", "speedup", n_gpus=8, balanced=0,
              unbalanced=0)
    )  # fmt: skip
    assert found == pytest.approx((32 / 7.5, 32 / 4.5), rel=1e-3)
    (odd,) = [evaluate_lightseq(claim("lightseq", "attention fwd speedup", "speedup", n_gpus=9))]
    assert odd == pytest.approx(40.5 / 4.5, rel=1e-3)


@pytest.mark.parametrize(
    ("quantity", "setting"),
    [
        ("iteration time Megatron-LM", {"gpu": "A100-80GB", "n_gpus": 8}),
        ("iteration time FlashBang", {"gpu": "A100-80GB", "n_gpus": 8, "seq": 8192,
                                      "model": "LLaMA-7B"}),
        ("max seq per config on 16xA100-40GB", {"heads": 8}),
        ("loss", {}),
    ],
)  # fmt: skip
def test_what_the_setting_leaves_open_is_given_up(quantity: str, setting: dict[str, Any]) -> None:
    with pytest.raises(NotModelledError):
        evaluate_lightseq(claim("lightseq", quantity, **setting))


def test_longest_sequences_need_sizes() -> None:
    sizes: dict[str, Any] = {"heads": 8, "hidden": 1024, "layers": 32, "n_gpus": 16}
    found = evaluate_lightseq(
        claim("lightseq", "max seq per config", "memory", **sizes, dfa=0, megatron_tp_dp=0)
    )
    assert isinstance(found, tuple) and found[1] == pytest.approx(2 * found[0], rel=0.01)


def test_ulysses() -> None:
    sizes: dict[str, Any] = {"ulysses": "4Nh/P", "megatron_sp": "4Nh"}
    quantity = "communication per link per layer"
    evaluate = evaluate_deepspeed_ulysses
    assert evaluate(claim("u", quantity, "complexity", **sizes)) == "see setting"
    wrong = evaluate(claim("u", quantity, "complexity", ulysses="8Nh/P"))
    assert wrong != "see setting"
    assert evaluate(claim("u", "communication reduction", "ratio", n_gpus=32)) == 32
    held = "1.2B GPT strong scaling to 1M tokens"
    assert evaluate(claim("u", held, "memory", gpu="A100-40GB", n_gpus=64)) == 1e6
    few = evaluate(claim("u", held, "memory", gpu="A100-40GB", n_gpus=2))
    assert isinstance(few, float) and few < 1e6
    rate = evaluate(claim("u", "sustained throughput", "tflops", gpu="A100-40GB"))
    assert isinstance(rate, float) and 100 < rate < 312
    # 96 l h^2 s (1 + V / 16 l h) and 8 l h s^2
    cfg = gpt_of(7.0)
    assert counted_flops(cfg, 2) == pytest.approx(
        96 * 2 * 32 * 4096**2 + 8 * 32 * 4096 * 4 + 6 * 2 * 4096 * 50304
    )


def test_linear_sequences() -> None:
    assert evaluate_lasp2(claim("l", "communication steps", "complexity", n_gpus=32)) == (2, 62)
    found = evaluate_lasp2(claim("l", "speedup vs LASP-1", "speedup", n_gpus=64, seq=2**19))
    assert isinstance(found, float) and 1 < found < 30


def test_a_ring_step() -> None:
    setting: dict[str, Any] = {
        "gpu": "4x A10",
        "seq": 24000,
        "heads": 32,
        "head_dim": 128,
        "n_gpus": 4,
    }
    ours = evaluate_token_ring(claim("t", "TokenRing step time Q-only / Q+Out", **setting))
    ring = evaluate_token_ring(claim("t", "Ring Attention step time", **setting))
    assert isinstance(ours, tuple) and isinstance(ring, float)
    assert 1 < ours[0] < ours[1] < 10 and ours[0] < ring < 10


def test_orders_of_ring_self_attention() -> None:
    evaluate = evaluate_ring_self_attention
    text = "8(N-1)*B*Z*(L/N)*A total fwd+bwd, equal to Megatron TP"
    assert evaluate(claim("r", "communication per layer", "complexity", formula=text)) == text
    wrong = evaluate(claim("r", "communication", "complexity", formula="6(N-1)*B*Z*(L/N)*A"))
    assert str(wrong).startswith("3") or "elements" in str(wrong)
    limits: dict[str, Any] = {"mlp": "B*L > 32H", "attention": "B*L > 16*A*Z"}
    assert evaluate(claim("r", "memory crossover", "complexity", **limits)) == "see setting"
    assert evaluate(claim("r", "memory crossover", "complexity", mlp="B*L > 8H")) != "see setting"
    with pytest.raises(NotModelledError, match="number format"):
        evaluate(claim("r", "peak memory", "memory", gpu="P100-16GB"))


def test_rings_of_long_contexts() -> None:
    evaluate = evaluate_ring_attention_lwm
    stages: dict[str, Any] = {"tokens_B": [4.8, 1.8], "tokens_per_batch": "4M"}
    assert evaluate(claim("w", "training stages", "complexity", **stages)) == (450, 1200)
    block = evaluate(claim("w", "minimum block size for overlap", "complexity", A100_NVLink=0))
    assert isinstance(block, tuple) and block[0] == block[1] == pytest.approx(1040)
    with pytest.raises(NotModelledError, match="TPU"):
        evaluate(claim("w", "gradient step time", seq=2**20))
