"""Claims on attention over selected keys, with settings of our own."""

from __future__ import annotations

import numpy as np
import pytest

from validate.claims.claim import Claim
from validate.claims.evaluate import NOT_MODELLED, evaluate
from validate.claims.selection import SIZES, evaluate_hip_attention, grows_as

SEVEN = {"model": "Llama-2-7B", "gpu": "A100"}
QWEN = {"model": "Qwen2-7B", "gpu": "A100", "seq": 2**18}
SQUEEZED = {"model": "LLaMA-2-7B-32K", "gpu": "H100", "seq": "256K"}


def claim(system: str, quantity: str, **setting: object) -> Claim:
    return Claim(
        id=system, family="", quantity=quantity, unit="x", kind="speedup", published=1.0,
        setting=setting,
    )  # fmt: skip


def value(system: str, quantity: str, **setting: object) -> float:
    found = evaluate(claim(system, quantity, **setting)).predicted
    assert isinstance(found, float)
    return found


def test_speedups_of_labels_approach_the_ratio_of_bytes() -> None:
    def at(batch: int, seq: int) -> float:
        return value("double_sparsity", "attention speedup", batch=batch, seq=seq, **SEVEN)

    assert 1 < at(1, 3000) < at(4, 12000) < at(24, 24000) < 128 / 9
    assert at(24, 24000) > 10
    less = value("double_sparsity", "attention speedup", batch=24, seq=24000, sparsity="1/8",
                 **SEVEN)  # fmt: skip
    assert less < 0.7 * at(24, 24000)


@pytest.mark.parametrize(
    ("quantity", "setting", "ratio"),
    [
        ("bytes of the KV cache", {}, 128 / 9),
        ("bytes of the KV cache, fp16 labels", {}, 32 / 3),
        ("bytes of the KV cache", {"label_dtype": "fp16", "seq": 8192}, 32 / 3),
        ("bytes of the KV cache", {"sparsity": 1 / 8, "label_bits": 16}, 16 / 3),
    ],
)
def test_byte_ratios_by_hand(quantity: str, setting: dict[str, object], ratio: float) -> None:
    assert value("double_sparsity", quantity, **setting) == pytest.approx(ratio)


def test_a_step_gains_less_than_its_attention() -> None:
    setting = {"batch": 8, "seq": 6000, **SEVEN}
    step = value("double_sparsity", "e2e speedup", **setting)
    assert 1 < step < value("double_sparsity", "attention speedup", **setting)


def test_offloading_gains_the_ratio_of_bytes_where_the_link_binds() -> None:
    assert value("double_sparsity", "offloading speedup", seq="512K") == pytest.approx(16, rel=0.01)
    short = value("double_sparsity", "offloading speedup", seq=4096, batch=1, **SEVEN)
    assert 1 < short < 15
    eighth = value("double_sparsity", "offloading speedup", seq="1M", sparsity="1/8")
    assert eighth == pytest.approx(8, rel=0.01)


def test_a_selection_cache_and_chunks_make_selection_cheap() -> None:
    def at(**setting: object) -> float:
        return value("tokenselect", "attention speedup", **(QWEN | setting))

    never, often = at(phase="decode"), at(phase="decode", hit_frac=0.9)
    assert 1 < never < often
    assert at(phase="prefill", chunk=2048) > often
    assert at(phase="decode", k=4096) < never


def test_budgets_of_centroids() -> None:
    budget = "KV budget reduction"
    assert value("squeezed_attention", budget) == pytest.approx(8, rel=1e-3)
    half = value("squeezed_attention", budget, sparsity=0.5)
    assert half == pytest.approx(1 / 0.525, rel=1e-3)
    coarse = value("squeezed_attention", "hierarchical KV budget reduction")
    assert coarse == pytest.approx(1 / (0.005 + 0.3 * 0.025 + 0.1), rel=1e-2)


def test_kernels_over_clusters() -> None:
    most, less = (
        value("squeezed_attention", "generation kernel speedup", sparsity=s, **SQUEEZED)
        for s in (0.9, 0.8)
    )
    assert 1 < less < most < 8
    prompt = value("squeezed_attention", "prefill kernel speedup", len_q=2048, **SQUEEZED)
    assert 3 < prompt < 8


def test_the_search_grows_as_its_paper_says() -> None:
    def found(**setting: object) -> object:
        return evaluate_hip_attention(claim("hip_attention", "complexity", **setting))

    assert found(time="O(T log T)", space="O(T)") == "see setting"
    assert found(space="O( t )") == "see setting"
    assert str(found(time="O(T)")).startswith("time is not O(T): times ")
    assert str(found(time="O(T^2)", space="O(T)")).startswith("time is not")
    assert str(found(time="O(T log T)", space="O(T log T)")).startswith("space is not")


@pytest.mark.parametrize("text", ["O(T)", "O(T log T)", "O(T^2)", "O(T^2 log T)", "O(log T)"])
def test_growth_of_one_class_is_no_other(text: str) -> None:
    counts = {
        "O(T)": [3.0 * t for t in SIZES],
        "O(T log T)": [3 * t * np.log2(t / 700) + 90 * t for t in SIZES],
        "O(T^2)": [3.0 * t * t + 800 * t for t in SIZES],
        "O(T^2 log T)": [3.0 * t * t * np.log2(t) for t in SIZES],
        "O(log T)": [3 * np.log2(t) for t in SIZES],
    }
    assert [name for name, counted in counts.items() if grows_as(text, counted)] == [text]


def test_speedups_of_the_search_and_of_blocks() -> None:
    setting = {"model": "Llama-3-8B", "gpu": "A100", "seq": 2**16, "batch": 4}
    hip = "attention speedup"
    near, far = (
        value("hip_attention", hip, **(setting | {"seq": n, "phase": "decode"}))
        for n in (2**15, 2**17)
    )
    assert 1 < near < far
    kept = value("hip_attention", hip, phase="prefill", **setting)
    assert kept > value("hip_attention", hip, phase="prefill", k=2048, **setting)
    dense, sparse = (
        value("flexprefill", hip, density=d, **setting) for d in (0.5, 0.2)
    )  # fmt: skip
    assert 1.5 < dense < 2 < sparse < 5
    same = value("flexprefill", hip, sparsity=0.8, **setting)
    assert same == pytest.approx(sparse, rel=1e-3)


@pytest.mark.parametrize(
    ("system", "quantity", "setting", "reason"),
    [
        ("double_sparsity", "attention speedup", SEVEN, "setting incomplete: no batch"),
        ("double_sparsity", "e2e speedup", {"batch": 1, "seq": 64}, "incomplete: no model"),
        ("double_sparsity", "attention speedup", {"sparsity": "much"}, "'much' is not a share"),
        ("double_sparsity", "attention speedup", {"sparsity": 3}, "3 is not a share"),
        ("double_sparsity", "offloading speedup", {"seq": 4096}, "no gpu or batch, on which"),
        ("double_sparsity", "taste", SEVEN, "no rule for 'taste'"),
        ("tokenselect", "attention speedup", {"seq": "up to 1M"}, "incomplete: no model"),
        ("tokenselect", "attention speedup", QWEN, "incomplete: no phase"),
        ("tokenselect", "attention speedup", QWEN | {"phase": "prefill"}, "no chunk"),
        ("tokenselect", "attention speedup", QWEN | {"seq": 600, "phase": "decode"}, "600 keys"),
        ("tokenselect", "e2e speedup", {}, "setting incomplete: no gpu, model, seq"),
        ("tokenselect", "e2e speedup", QWEN, "InfLLM"),
        ("squeezed_attention", "kernel speedup", SEVEN, "setting incomplete: no seq"),
        ("squeezed_attention", "prefill kernel speedup", SQUEEZED, "no len_q"),
        ("squeezed_attention", "taste", {}, "no rule for 'taste'"),
        ("hip_attention", "complexity", {}, "no class of time or space"),
        ("hip_attention", "complexity", {"time": "O(T!)"}, "no known class"),
        ("hip_attention", "speedup", QWEN, "setting incomplete: no batch"),
        ("hip_attention", "taste", {}, "no rule for 'taste'"),
        ("flexprefill", "speedup", {"gamma": 0.9, **QWEN}, "gamma does not fix"),
        ("flexprefill", "speedup", QWEN | {"seq": "long"}, "'long' is not a length"),
        ("flexprefill", "taste", {}, "no rule for 'taste'"),
    ],
)
def test_what_cannot_be_told_says_why(
    system: str, quantity: str, setting: dict[str, object], reason: str
) -> None:
    verdict = evaluate(claim(system, quantity, **setting))
    assert verdict.status == NOT_MODELLED
    assert reason in verdict.reason
