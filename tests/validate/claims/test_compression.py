"""Claims on compressed caches, at settings of our own."""

from __future__ import annotations

from typing import Any

import pytest

from validate.claims import compression
from validate.claims.claim import Claim, NotModelledError
from validate.claims.evaluate import evaluator


def claimed(system: str, quantity: str, unit: str, **setting: Any) -> Any:
    claim = Claim(
        id=system, family="", quantity=quantity, unit=unit, kind="ratio", published=None,
        setting=setting,
    )  # fmt: skip
    run = evaluator(system)
    assert run is not None
    return run(claim)


def test_ratios_by_hand() -> None:
    assert claimed("kv_heads_svd", "head reduction", "fraction removed", heads_joined=4) == 0.75
    assert claimed("kv_heads_svd", "heads removed", "%", model="Llama-3-8B", kv_heads=2) == 75
    assert claimed("bfp_kv", "memory saving", "x", m=4, n=32) == pytest.approx(8.25 / 4.25)
    assert claimed("bfp_kv", "saving", "x", n=32, baseline="fp16") == pytest.approx(16 / 4.25)
    size = claimed("mikv", "average KV size", "fraction", p=0.5, b=4, seq=1000)
    assert size == pytest.approx(0.5 + 0.5 * 4.5 / 16)
    removed = claimed("matryoshkakv", "compression rate", "fraction removed", rank=32)
    assert removed == 0.75
    pruned = claimed("think", "memory reduction", "%", lambda_=0.5, seq=100_032)
    assert pruned == pytest.approx(25 * 100_000 / 100_032, rel=1e-5)


def test_merged_layers_follow_bits_and_retention() -> None:
    half = claimed("minicache", "compression ratio", "x", model="LLaMA-2-7B", bits=16)
    assert half == pytest.approx(4 / 3.1, rel=1e-3)
    none = claimed("minicache", "compression ratio", "x", bits=16, gamma=0.0)
    assert none == pytest.approx(4 / 3, rel=1e-3)


def test_peaks_and_batches_need_their_shape() -> None:
    peak = claimed("gear", "peak memory reduction", "x", model="LLaMA2-7B", batch=18, seq=1500)
    more = claimed("gear", "peak memory reduction", "x", model="LLaMA2-7B", batch=36, seq=1500)
    assert 1 < peak < more < claimed("gear", "memory ratio", "x", seq=1500)
    shape = {"model": "LLaMA2-7B", "gpu": "A100-80GB", "seq": 2048}
    whole = claimed("gear", "throughput improvement", "x", **shape)
    light = claimed("gear", "throughput improvement", "x", weight_bits=8, **shape)
    assert 2 < whole < 4 and light == pytest.approx(whole, rel=0.05)
    footprint = claimed("minicache", "memory footprint reduction", "%", model="LLaMA-2-7B",
                        batch=16, seq=2048)  # fmt: skip
    assert 0 < footprint < 80


def test_smaller_budgets_decode_faster() -> None:
    shape = {"model": "LLaVA-1.5-7B", "gpu": "A100-80GB", "batch": 16, "seq": 4096}
    fifth = claimed("prefixkv", "decode speedup at 20% budget", "x", **shape)
    half = claimed("prefixkv", "decode speedup at 50% budget", "x", **shape)
    assert 1 < half < fifth < 5


@pytest.mark.parametrize(
    ("system", "quantity", "setting", "says"),
    [
        ("gear", "throughput improvement", {"model": "LLaMA2-7B"}, "no gpu"),
        ("gear", "peak memory reduction", {}, "no model"),
        ("gear", "peak memory reduction", {"model": "LLaMA2-7B", "seq": 9}, "no batch"),
        ("minicache", "throughput", {"gpu": "A100"}, "no seq"),
        ("minicache", "memory footprint reduction", {"model": "LLaMA2-7B", "batch": 2}, "no seq"),
        ("prefixkv", "decode speedup", {"model": "LLaVA-1.5-7B"}, "no budget"),
        ("mikv", "average KV size", {"p": "half"}, "p = 'half' is no number"),
        ("gear", "throughput", {"model": "LLaMA-2-70B", "gpu": "A100", "seq": 99}, "not one"),
    ],
)
def test_incomplete_settings_say_what_is_missing(
    system: str, quantity: str, setting: dict[str, Any], says: str
) -> None:
    with pytest.raises(NotModelledError, match=says):
        claimed(system, quantity, "x", **setting)


def test_the_published_figure_is_never_read() -> None:
    for system in ("gear", "minicache", "think", "mikv", "bfp_kv", "kv_heads_svd"):
        run = getattr(compression, f"evaluate_{system}")
        claims = [
            Claim(id=system, family="", quantity="ratio", unit="x", kind="ratio", published=value)
            for value in (1.0, 99.0)
        ]
        assert run(claims[0]) == run(claims[1])
