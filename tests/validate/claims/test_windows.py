"""Claims on windows and sinks, on settings of our own."""

from __future__ import annotations

from typing import Any

import pytest

from hwmodels import catalog
from hwmodels.dtypes import FP16
from validate.claims import windows
from validate.claims.claim import Claim, NotModelledError, Value
from validate.claims.evaluate import NOT_MODELLED, evaluate
from validate.claims.models import model_named
from workloads.ops.matmul import Matmul

A100 = catalog.device("a100-sxm4-80gb")
STREAM: dict[str, Any] = {"gpu": "A6000", "dtype": "fp16", "model": "Llama-2-7B", "cache": 768}
MEMORY: dict[str, Any] = {
    "gpu": "A100-80GB", "model": "Vicuna-7B", "batch": 2, "seq": 6144, "density": 0.25,
}  # fmt: skip


def claim(
    system: str, quantity: str, unit: str, kind: str, setting: dict[str, Any], **change: object
) -> Claim:
    return Claim(
        id=system, family="sparse_attention", quantity=quantity, unit=unit, kind=kind,
        published=1.0, setting={k: v for k, v in (setting | change).items() if v is not None},
    )  # fmt: skip


def number(value: Value) -> float:
    assert isinstance(value, (int, float))
    return float(value)


# ---- StreamingLLM --------------------------------------------------------------------------


def latency(impl: str, **change: object) -> float:
    one = claim("streaming_llm", "per-token latency", "ms", "latency", STREAM, impl=impl, **change)
    return number(windows.evaluate_streaming_llm(one))


def test_a_window_grows_linearly_and_recomputing_it_quadratically() -> None:
    streaming = [latency("StreamingLLM", cache=n) for n in (4096, 8192, 16384)]
    recomputed = [latency("sliding window re-computation", cache=n) for n in (4096, 8192, 16384)]
    assert streaming[2] - streaming[1] == pytest.approx(2 * (streaming[1] - streaming[0]), rel=0.05)
    assert recomputed[2] / recomputed[1] > 3
    assert recomputed[0] > 15 * streaming[0]


def test_the_host_is_the_floor_of_a_small_model_on_a_fast_device() -> None:
    floor = 32 * windows.EAGER.host_s_per_layer * 1e3
    assert latency("StreamingLLM", gpu="H100-SXM", cache=64) == pytest.approx(floor)
    assert latency("StreamingLLM", gpu="A6000", cache=4096) > floor


def test_the_speedup_is_the_ratio_of_the_latencies() -> None:
    one = claim("streaming_llm", "speedup", "x", "speedup", STREAM)
    ratio = latency("sliding window re-computation") / latency("StreamingLLM")
    assert windows.evaluate_streaming_llm(one) == pytest.approx(ratio)


def test_ten_passes_over_the_cache() -> None:
    """What a longer cache adds: keys and values cut, appended, rotated (keys alone), multiplied."""
    model = model_named("Llama-2-7B")
    per_key = 32 * 128 * 2 * 2  # bytes of a key and a value

    def cache_bytes(length: int) -> float:
        ops = windows.eager_token(model, length, FP16, moves=True)
        return sum(float(op.compulsory_bytes()) for op in ops)

    passes = (cache_bytes(3000) - cache_bytes(2000)) / 1000 / per_key
    scores = 32 * (2 + 2 * 4 + 6 + 8 + 6 + 2) / per_key  # a head's score through its six kernels
    assert passes == pytest.approx(10 + scores, rel=0.01)


def test_grouped_heads_are_repeated_before_the_product() -> None:
    grouped, plain = (
        list(windows.eager_token(model_named(name), 512, FP16, moves=True))
        for name in ("Llama-3-8B", "Llama-2-7B")
    )
    assert len(grouped) == len(plain) + 2
    assert sum(type(op) is Matmul for op in grouped) == 7


def test_memory_is_weights_and_the_window() -> None:
    one = claim("streaming_llm", "memory", "GB", "memory", STREAM, cache=2048)
    found = number(windows.evaluate_streaming_llm(one))
    assert found == pytest.approx(12.55 + 1.0, rel=0.002)


# ---- MoA -----------------------------------------------------------------------------------


def memory(impl: str, **change: object) -> Value:
    one = claim("moa", f"GPU memory {impl}", "GB", "memory", MEMORY, **change)
    return windows.evaluate_moa(one)


def test_memory_by_hand() -> None:
    """12.55 GiB of weights, 6 GiB of keys and values."""
    assert memory("FlashAttn2") == pytest.approx(12.55 + 6, rel=0.002)
    scores = 2 * 32 * 6144**2 * 4 / 2**30
    assert memory("H2O") == pytest.approx(12.55 + 1.5 + scores, rel=0.002)
    prompt = 2 * 6144 * 2 * (3 * 11008 + 4096) / 2**30
    assert memory("MoA") == pytest.approx(12.55 + 1.5 + prompt, rel=0.002)


def test_what_does_not_fit_is_out_of_memory() -> None:
    assert memory("H2O", batch=16, seq=16384) == "OOM"
    assert memory("MoA", batch=16, seq=16384) != "OOM"
    assert memory("MoA", batch=16, seq=16384, gpu="A100-40GB") == "OOM"


def test_half_the_keys_decode_faster_than_a_cache_that_is_copied() -> None:
    setting = {"gpu": "A100-80GB x1", "models": "7B,13B", "density": 0.5}
    found = [
        number(windows.evaluate_moa(claim("moa", q, "x", "speedup", setting)))
        for q in ("decode throughput vs FlashAttention2", "vs vLLM")
    ]
    assert found[0] > found[1] > 1
    less = claim("moa", "vs FA2", "x", "speedup", setting, density=0.25)
    assert number(windows.evaluate_moa(less)) > found[0]


def test_throughput_is_per_device() -> None:
    setting = {"gpu": "A100-80GB", "seq": 65536, "batch": 1, "model": "Vicuna-7B"}
    one = number(windows.evaluate_moa(claim("moa", "vs FA2 (per GPU)", "x", "speedup", setting)))
    two = claim("moa", "vs FA2", "x", "speedup", setting, note="baseline needs 2 GPUs")
    assert number(windows.evaluate_moa(two)) == pytest.approx(2 * one)


def test_batches_fill_the_device() -> None:
    model = model_named("Vicuna-13B")
    count = windows.batch_that_fits(model, 2.0**30, A100, FP16)
    assert 40 < count < 56
    with pytest.raises(NotModelledError, match="exceeds"):
        windows.batch_that_fits(model, 2.0**37, A100, FP16)


# ---- the others ----------------------------------------------------------------------------


def test_lm_infinite_gains_with_the_length() -> None:
    setting = {"gpu": "A100-80GB", "model": "Llama-2 7B/13B", "seq": 16384}
    for quantity in ("decoding speedup", "encoding speedup"):
        short, long = (
            number(
                windows.evaluate_lm_infinite(
                    claim("lm_infinite", quantity, "x", "speedup", setting, seq=n)
                )
            )
            for n in (16384, 65536)
        )
        assert 1 < short < long


def test_shares_of_dense_attention() -> None:
    one = claim("sinklora", "attention FLOP fraction", "fraction", "complexity", {"groups": 8})
    assert number(windows.evaluate_sinklora(one)) == pytest.approx(1 / 8, rel=0.02)
    setting = {"model": "GPT-NEO 1.3B", "seq": 4096, "full_layers": "6 (of 24)", "block": 512}
    saved = claim("masformer", "computational cost reduction", "%", "ratio", setting)
    kept = 1 / 4 + 3 / 4 * 513 / 4097
    assert number(windows.evaluate_masformer(saved)) == pytest.approx(100 * (1 - kept))
    few = claim("masformer", "cost reduction", "fraction", "ratio", setting, full_layers=6)
    assert number(windows.evaluate_masformer(few)) == pytest.approx(1 - kept)


@pytest.mark.parametrize(
    ("system", "quantity", "kind", "setting", "reason"),
    [
        ("streaming_llm", "latency", "latency", STREAM | {"cache": None}, "no cache"),
        ("streaming_llm", "latency", "latency", STREAM, "no impl"),
        ("streaming_llm", "latency", "latency", STREAM | {"impl": "abacus"}, "called 'abacus'"),
        ("streaming_llm", "latency", "latency", STREAM | {"impl": "re-computation", "gpu": None},
         "no gpu"),
        ("lm_infinite", "decoding speedup", "speedup", {"seq": 32768}, "no gpu"),
        ("lm_infinite", "decoding speedup", "speedup", {"seq": 2048, "gpu": "A100"}, "a window of"),
        ("lm_infinite", "perplexity", "quality", {"seq": 32768, "gpu": "A100"}, "no rule"),
        ("lm_infinite", "decoding speedup", "speedup", {"seq": 32768, "gpu": "A100"}, "no model"),
        ("moa", "vs vLLM", "speedup", {}, "no gpu"),
        ("moa", "vs TensorRT", "speedup", {"gpu": "A100"}, "no rule"),
        ("moa", "GPU memory MoA", "memory", MEMORY | {"batch": None}, "no batch"),
        ("moa", "GPU memory SnapKV", "memory", MEMORY, "no rule"),
        ("sinklora", "attention FLOP fraction", "complexity", {}, "no groups"),
        ("sinklora", "perplexity", "quality", {"groups": 4}, "no rule"),
        ("masformer", "ROUGE", "quality", {}, "no rule"),
        ("masformer", "cost reduction", "ratio", {"seq": 8192}, "no block"),
        ("masformer", "cost reduction", "ratio",
         {"seq": 8192, "block": 1000, "model": "GPT-NEO 1.3B", "full_layers": 4},
         "must divide len_q = 8192"),
    ],
)  # fmt: skip
def test_incomplete_settings_are_given_up(
    system: str, quantity: str, kind: str, setting: dict[str, Any], reason: str
) -> None:
    verdict = evaluate(claim(system, quantity, "ms", kind, setting))
    assert verdict.status == NOT_MODELLED
    assert reason in verdict.reason
