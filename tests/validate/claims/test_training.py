"""FlashAttention-2's claims on settings of our own."""

from __future__ import annotations

import pytest

from validate.claims.claim import Claim
from validate.claims.evaluate import NOT_MODELLED, evaluate
from validate.claims.training import evaluate_flash_attention_2 as run
from validate.claims.training import unfused
from workloads.ops.flash_attention import FlashAttention2

STEP = {"gpu": "A100-80GB", "n_gpus": 8, "model": "GPT3-2.7B", "seq": 4096}


def claim(quantity: str, **setting: object) -> Claim:
    return Claim(
        id="flash_attention_2", family="attention", quantity=quantity, unit="TFLOP/s",
        kind="tflops", published=1.0, setting=setting,
    )  # fmt: skip


def training(impl: str, **change: object) -> float:
    found = run(claim("end-to-end training TFLOPs/s/GPU", **STEP, impl=impl, **change))
    assert isinstance(found, float)
    return found


def test_better_kernels_train_faster_and_more_so_on_longer_sequences() -> None:
    plain, first, second = (training(i) for i in ("none", "FlashAttention", "FlashAttention-2"))
    assert 40 < plain < first < second < 312
    longer = [
        run(claim("end-to-end training", **(STEP | {"seq": 8192}), impl=i))
        for i in ("none", "FlashAttention-2")
    ]
    assert longer[1] / longer[0] > second / plain


def test_scores_that_do_not_fit_are_computed_again() -> None:
    shape = FlashAttention2(num_heads=4, len_q=64, head_dim=32)
    assert len(unfused(shape, recompute=True)) == len(unfused(shape, recompute=False)) + 4


def test_kernels_alone() -> None:
    peak = run(claim("peak fwd attention TFLOPs/s", gpu="A100-80GB-SXM4"))
    share = run(claim("bwd attention fraction of peak", gpu="A100-80GB-SXM4"))
    assert isinstance(peak, float) and isinstance(share, float)
    assert 100 < peak < 312 and 0.3 < share < peak / 312
    assert 1.2 < run(claim("speedup vs FA1", gpu="A100")) < 4  # type: ignore[operator]
    assert run(claim("speedup vs PyTorch attention", gpu="A100")) > 2  # type: ignore[operator]


@pytest.mark.parametrize(
    ("quantity", "setting", "reason"),
    [
        ("end-to-end training", {"gpu": "A100"}, "setting incomplete: no seq, n_gpus"),
        ("end-to-end training", STEP, "setting incomplete: no impl"),
        ("taste", {"gpu": "A100"}, "no rule for 'taste'"),
        ("speedup vs FA1", {}, "setting incomplete: no gpu"),
    ],
)
def test_what_cannot_be_told_says_why(
    quantity: str, setting: dict[str, object], reason: str
) -> None:
    verdict = evaluate(claim(quantity, **setting))
    assert (verdict.status, verdict.reason) == (NOT_MODELLED, reason)
