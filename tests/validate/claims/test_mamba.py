"""Claims on scans of vector states and their kin, on settings of our own."""

from __future__ import annotations

import numpy as np
import pytest

from validate.claims.claim import Claim, NotModelledError
from validate.claims.evaluate import NOT_MODELLED, evaluate
from validate.claims.mamba import (
    MODELS,
    OTHER_BYTES,
    PARAMETER_BYTES,
    evaluate_languini_lstm,
    evaluate_mamba_scan,
    evaluate_spikegpt,
    evaluate_state_tracking_lrnn,
    evaluate_vir,
    mamba_bytes,
    mamba_parameters,
    transformer_bytes,
)
from workloads import registry
from workloads.machine import Machine
from workloads.op import ProvedOp

A100 = {"gpu": "A100-80GB-PCIe", "dtype": "bf16"}


def claim(
    quantity: str, kind: str = "speedup", id_: str = "mamba_scan", **setting: object
) -> Claim:
    return Claim(
        id=id_, family="scan_ssm", quantity=quantity, unit="x", kind=kind, published=1.0,
        setting=setting,
    )  # fmt: skip


def number(quantity: str, **setting: object) -> float:
    found = evaluate_mamba_scan(claim(quantity, **(A100 | setting)))
    assert isinstance(found, float)
    return found


def test_memory_is_parameters_and_what_a_token_keeps() -> None:
    model = MODELS["125m"]
    none = mamba_bytes(model, 0)
    assert none == PARAMETER_BYTES * mamba_parameters(model) + OTHER_BYTES
    # by hand, d 768: a layer 4 d + 2 d + 12 d * 2, x_proj 2 (48 + 32), B and C 64, states 96
    layer = 30 * 768 - 12 * 768 + 160 + 64 + 8 * 16 * 1536 / 2048
    assert mamba_bytes(model, 10) - none == 10 * (24 * layer + 6 * 768 + 4 * 50280)
    assert transformer_bytes(model, 4096) < mamba_bytes(model, 4096)


def test_memory_of_one_implementation_can_be_asked() -> None:
    setting = {"gpu": "A100-80GB", "params": "350M", "seq": 1024, "batch": 4}
    both = evaluate_mamba_scan(claim("training memory", "memory", **setting))
    assert isinstance(both, tuple)
    one = evaluate_mamba_scan(claim("training memory", "memory", impl="Mamba", **setting))
    assert one == both[1] > both[0]


def test_the_scan_wins_where_attention_is_long() -> None:
    short, long = (number("scan vs FlashAttention-2", seq=n) for n in (1024, 65536))
    assert short < 1 < long
    assert number("scan vs FlashAttention-2", seq=131072) == pytest.approx(2 * long, rel=0.05)
    assert 2048 < number("crossover with FA2") < 8192
    wider = number("crossover with FA2", N_state=64)
    assert wider > number("crossover with FA2", N_state=16)


def test_fusing_beats_a_tree_of_kernels_in_memory() -> None:
    assert 10 < number("scan vs standard scan in PyTorch", seq=32768) < 40


def test_causal_attention_saves_less_than_half() -> None:
    assert 1 < number("FA2 causal vs non-causal speedup", seq=1024) < 1.7
    assert 1.9 < number("FA2 causal vs non-causal speedup", seq=65536) < 2


def test_inference_gains_from_the_batches_that_a_state_allows() -> None:
    run = {"prompt": 1024, "new": 256, "models": "Mamba 1.4B vs 1.3B"}
    assert number("inference throughput", batch="1..128", **run) > 1.5
    with pytest.raises(NotModelledError, match="no batch fits"):
        number("inference throughput", batch=4096, **run)


def test_the_quasi_lstm_gains_what_steps_cost() -> None:
    shape = {"gpu": "RTX-3090", "batch": 16, "seq": 512, "hidden": 768, "heads": 12}
    ratios = [
        evaluate_languini_lstm(claim("throughput vs LSTM", **(shape | {"seq": n})))
        for n in (128, 512)
    ]
    assert all(isinstance(r, float) and r > 2 for r in ratios)


def test_additions_follow_the_spikes() -> None:
    half, tenth = (
        evaluate_spikegpt(claim("operation reduction", spike_rate=r)) for r in (0.5, 0.1)
    )
    assert half == pytest.approx(2) and tenth == pytest.approx(10, rel=0.02)


def test_orders_are_confirmed_or_contradicted_by_counts() -> None:
    good = {"parallel": "O(N^2 d)", "recurrent": "O(N d^2)", "chunkwise": "O(N d (C + d))"}
    assert evaluate_vir(claim("complexity", "complexity", **good)) == "see setting"
    wrong = evaluate_vir(claim("complexity", "complexity", recurrent="O(N^2 d)"))
    assert isinstance(wrong, str) and wrong.startswith("recurrent: O(N^2 d) times")


def test_gates_below_zero_cost_nothing_and_stay_exact() -> None:
    setting: dict[str, object] = {"model": "1.3B"}
    for on in ({}, {"gpu": "H100"}):
        found = evaluate_state_tracking_lrnn(claim("runtime overhead", "ratio", **setting, **on))
        assert found == 0
    shape: dict[str, object] = {"num_heads": 2, "len_seq": 40, "key_dim": 5, "chunk": 16}
    op = registry.build("state_tracking_lrnn", shape)
    assert isinstance(op, ProvedOp)
    given = dict(op.inputs(np.random.default_rng(0)))
    given["b"] = 2 * given["b"]  # eigenvalues 1 - b from -1 to 1
    assert np.allclose(op.program(Machine(2**16), given)["o"], op.reference(given)["o"])


@pytest.mark.parametrize(
    ("id_", "quantity", "setting", "reason"),
    [
        ("mamba_scan", "training memory", {"params": "125M", "seq": 8}, "no batch"),
        ("mamba_scan", "training memory", {"params": "9T", "seq": 8, "batch": 1}, "no sizes"),
        ("mamba_scan", "inference throughput", A100 | {"prompt": 8, "new": 8, "batch": 1},
         "no models"),
        ("mamba_scan", "perplexity", {}, "no rule"),
        ("languini_lstm", "throughput vs LSTM", {}, "no gpu"),
        ("spikegpt", "operation reduction", {"params": "216M"}, "no spike_rate"),
        ("vir", "complexity", {}, "no order"),
        ("state_tracking_lrnn", "runtime overhead", {}, "no model"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_says_why(
    id_: str, quantity: str, setting: dict[str, object], reason: str
) -> None:
    verdict = evaluate(claim(quantity, "complexity", id_, **setting))
    assert verdict.status == NOT_MODELLED and reason in verdict.reason
