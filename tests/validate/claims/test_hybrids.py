"""Claims on the hybrid, Hydra and Titans, on settings of our own."""

from __future__ import annotations

from typing import Any

import pytest

from validate.claims.claim import Claim
from validate.claims.evaluate import NOT_MODELLED, evaluate

DECODING: dict[str, Any] = {"gpu": "H100", "batch": 32, "seq": "32K"}


def claim(system: str, kind: str, unit: str = "x", quantity: str = "", **setting: object) -> Claim:
    return Claim(
        id=system, family="scan_ssm", quantity=quantity, unit=unit, kind=kind, published=1.0,
        setting=setting,
    )  # fmt: skip


def number(*args: str, quantity: str = "", **setting: Any) -> float:
    found = evaluate(claim(*args, **{"quantity": quantity} | setting)).predicted
    assert isinstance(found, float)
    return found


def test_the_speedup_grows_with_the_context_to_the_ratio_of_layers() -> None:
    found = [
        number("mamba_empirical", "speedup", **DECODING | {"seq": seq})
        for seq in (1024, "16K", "up to 128K", "64K+")
    ]
    assert found == sorted(found)
    assert found[0] < 1.3 and 5 < found[2] < 7
    assert found[3] == pytest.approx(32 / 4, rel=1e-2)


def test_a_cache_of_every_head_makes_the_transformer_slower() -> None:
    narrow, wide = (
        number("mamba_empirical", "speedup", **DECODING | {"kv_heads": n}) for n in (8, 32)
    )
    assert 3 < wide / narrow < 4


def test_a_speedup_is_a_ratio_of_steps() -> None:
    steps = {
        model: number("mamba_empirical", "latency", "ms", **DECODING | {"model": model})
        for model in ("8B hybrid", "8B Transformer")
    }
    ratio = steps["8B Transformer"] / steps["8B hybrid"]
    assert number("mamba_empirical", "speedup", **DECODING) == pytest.approx(ratio)
    rate = number("mamba_empirical", "throughput", "tokens/s", **DECODING)
    assert rate == pytest.approx(32 / steps["8B hybrid"] * 1e3)


def test_bytes_kept_by_hand() -> None:
    kept = number("mamba_empirical", "memory", "B", batch=2, seq=4096)
    caches = 2 * 4 * 8 * 128 * 4096 * 2
    states = 24 * (128 * 128 * 64 + 10240 * 3) * 2
    assert kept == 2 * (caches + states)
    plain = number("mamba_empirical", "memory", "B", batch=2, seq=4096, model="Transformer")
    assert plain == 2 * 8 * caches


def test_hydra_costs_two_scans_and_shares_the_rest() -> None:
    assert number("hydra_bissm", "complexity", quantity="scan FLOPs") == 2
    assert 1 < number("hydra_bissm", "complexity", quantity="parameters") < 1.05
    wide = number("hydra_bissm", "complexity", quantity="mixer cost", heads=8, state=256)
    thin = number("hydra_bissm", "complexity", quantity="mixer cost", heads=64, state=32)
    assert 1 < thin < wide < 2
    layer: dict[str, Any] = {"gpu": "A100", "seq": 4096, "batch": 8}
    assert 0.5 < number("hydra_bissm", "speedup", **layer) < 1
    once, twice = (number("hydra_bissm", "latency", "ms", **layer | {"batch": n}) for n in (8, 16))
    assert 1.8 < twice / once < 2.2


def test_titans_counts_are_linear() -> None:
    short, long = (
        number("titans", "complexity", "GFLOPs", quantity="FLOPs", seq=n, dim=256)
        for n in (2**16, 2**20)
    )
    assert long / short == pytest.approx(16, rel=1e-3)
    held = number("titans", "memory", "B", seq=2**20, dim=256, depth=1)
    assert held == 2 * 2 * 256**2


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (claim("mamba_empirical", "speedup", gpu="H100", seq=4096), "no batch"),
        (claim("mamba_empirical", "speedup", **DECODING | {"seq": "long"}), "seq = 'long'"),
        (claim("mamba_empirical", "speedup", batch=1, seq=4096), "no gpu"),
        (claim("mamba_empirical", "accuracy", **DECODING), "quality claim"),
        (claim("mamba_empirical", "latency", "ms", **DECODING | {"model": "a vs b"}), "which"),
        (claim("mamba_empirical", "latency", "h", **DECODING), "unit 'h'"),
        (claim("hydra_bissm", "accuracy"), "quality claim"),
        (claim("hydra_bissm", "speedup"), "no gpu"),
        (claim("titans", "complexity", "tokens", quantity="context scaling"), "quality claim"),
        (claim("titans", "complexity", "FLOPs", quantity="FLOPs", seq=64), "no dim"),
        (claim("titans", "complexity", "x", quantity="FLOPs", seq=64, dim=8), "unit 'x'"),
    ],
)
def test_what_cannot_be_told_says_why(asked: Claim, reason: str) -> None:
    verdict = evaluate(asked)
    assert verdict.status == NOT_MODELLED and reason in verdict.reason
