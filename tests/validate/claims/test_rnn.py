"""Claims on FlashRNN: settings of our own, bounds of the answers, settings that say too little."""

from __future__ import annotations

from typing import Any

import pytest

from hwmodels import catalog
from validate.claims.claim import Claim
from validate.claims.evaluate import NOT_MODELLED, evaluate
from validate.claims.rnn import (
    EAGER_KERNEL_S,
    KERNELS,
    alternating_seconds,
    evaluate_flashrnn,
    fused_seconds,
    vanilla_seconds,
)
from workloads.ops.fused_rnn import FusedRnn

H100 = catalog.device("h100-sxm")
LAYER = FusedRnn(batch=16, num_heads=12, head_dim=64, len_seq=1024)


def asked(quantity: str, kind: str = "speedup", **setting: Any) -> Claim:
    return Claim(
        id="flashrnn", family="rnn", quantity=quantity, unit="x", kind=kind, published=1.0,
        setting=setting,
    )  # fmt: skip


def number(claim: Claim) -> float:
    found = evaluate_flashrnn(claim)
    assert isinstance(found, float)
    return found


def test_the_eager_loop_waits_for_its_host() -> None:
    assert vanilla_seconds(LAYER, H100) == pytest.approx(1024 * KERNELS["lstm"] * EAGER_KERNEL_S)
    wide = LAYER.over(num_heads=1, head_dim=2048, batch=256)
    assert vanilla_seconds(wide, H100) > 1.5 * vanilla_seconds(LAYER, H100)


def test_the_order_of_the_implementations() -> None:
    for width in (64, 256, 768):
        layer = LAYER.over(num_heads=768 // width, head_dim=width)
        times = [f(layer, H100) for f in (fused_seconds, alternating_seconds, vanilla_seconds)]
        assert times == sorted(times)


def test_a_setting_moves_the_answer() -> None:
    full = {"gpu": "H100", "hidden": 768, "heads": 12, "head_dim": 64, "seq": 1024}
    quantity = "max speedup vs vanilla PyTorch"
    lstm = number(asked(quantity, **full))
    assert number(asked(quantity)) == lstm
    assert number(asked(quantity, **(full | {"function": "slstm"}))) > 1.5 * lstm
    assert number(asked(quantity, **(full | {"head_dim": 768, "heads": 1}))) < lstm
    short = number(asked(quantity, **(full | {"seq": 64})))
    assert short == pytest.approx(lstm, rel=0.1)


def test_a_width_and_its_heads() -> None:
    quantity = "fused vs alternating"
    by_heads = number(asked(quantity, hidden=512, heads=4))
    assert by_heads == number(asked(quantity, head_dim=128, heads=4))
    odd = evaluate(asked(quantity, hidden=700, head_dim=64))
    assert odd.status == NOT_MODELLED and "no heads of 64" in odd.reason


def test_constraints_of_other_limits() -> None:
    """Half the SMs, about 1 / sqrt 2 of the width; more gates, less."""
    setting = {"SMs": 108, "smem_per_block": 165000, "gates": 1, "batch": 8, "threads": 1024}
    quantity = "largest feasible hidden size under the rules"
    whole = number(asked(quantity, "memory", **setting))
    half = number(asked(quantity, "memory", **(setting | {"SMs": 54})))
    gates = number(asked(quantity, "memory", **(setting | {"gates": 4})))
    assert whole == 2912
    assert 0.6 * whole < half < 0.75 * whole and 0.4 * whole < gates < 0.55 * whole


def test_the_head_over_tritons() -> None:
    quantity = "larger hidden size than Triton version"
    ratio = number(asked(quantity, "ratio", triton_head_dim="<=64 (128 fwd)"))
    assert ratio == 2 * number(asked(quantity, "ratio", triton_head_dim=128)) == 42


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        (asked("larger hidden size than Triton version"), "triton_head_dim"),
        (asked("largest feasible hidden size", SMs=108), "smem_per_block"),
        (asked("max speedup vs vanilla PyTorch", function="rwkv"), "no recurrent cell"),
        (asked("max speedup vs vanilla PyTorch", gpu="Cerebras"), "no device"),
        (asked("cuDNN LSTM comparison", function="slstm"), "cuDNN has no slstm"),
        (asked("perplexity"), "no rule"),
    ],
)
def test_what_is_not_said_is_not_guessed(claim: Claim, reason: str) -> None:
    verdict = evaluate(claim)
    assert verdict.status == NOT_MODELLED and reason in verdict.reason
