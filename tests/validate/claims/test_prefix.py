"""Claims on shared prefixes, on settings of our own."""

from __future__ import annotations

from typing import Any

import pytest

from hwmodels import catalog
from hwmodels.dtypes import FP16
from validate.claims import prefix
from validate.claims.claim import Claim, NotModelledError
from validate.claims.evaluate import NOT_MODELLED, evaluate
from validate.claims.formula import formula_value
from validate.claims.models import model_named
from validate.claims.prefix import FLASH, HYDRAGEN, VLLM, Decoding, throughput
from validate.claims.unfused import layer, no_attention_seconds
from workloads.ops.matmul import Matmul

A100 = catalog.device("a100-sxm4-40gb")
CELL: dict[str, Any] = {
    "gpu": "A100-40GB", "n_gpus": 8, "parallel": "TP8", "dtype": "fp16", "model": "CodeLlama-7B",
    "batch": 512, "shared_prefix": 3072, "new_tokens": 128, "impl": "Hydragen",
}  # fmt: skip


def claim(system: str, quantity: str, **setting: object) -> Claim:
    return Claim(
        id=system, family="attention", quantity=quantity, unit="k tokens/s", kind="latency",
        published=1.0, setting=setting,
    )  # fmt: skip


def rate(**change: object) -> float:
    found = prefix.evaluate_hydragen(claim("hydragen", "decoding throughput", **(CELL | change)))
    assert isinstance(found, float)
    return found


def cell(**change: Any) -> Decoding:
    fields: dict[str, Any] = {
        "model": model_named("CodeLlama-7B"), "batch": 64, "prefix": 1024, "new_tokens": 128,
        "tp": 8, "on": A100, "dtype": FP16,
    }  # fmt: skip
    return Decoding(**(fields | change))


def test_no_attention_is_the_upper_bound_and_more_prefix_costs() -> None:
    bound = prefix.evaluate_hydragen(
        claim("hydragen", "no-attention upper bound throughput", gpu="A100-40GB", n_gpus=8,
              model="CodeLlama-7B", batch=512)
    )  # fmt: skip
    assert isinstance(bound, float)
    assert bound > rate() > rate(shared_prefix=12288) > 0.7 * bound


def test_without_sharing_the_prefix_is_read_for_every_sequence() -> None:
    alone = {"batch": 64, "impl": "FlashAttention (no sharing)"}
    shared = rate(batch=64, shared_prefix=8192)
    assert rate(**alone, shared_prefix=8192) < 0.6 * shared
    assert rate(**alone, shared_prefix=64) > 0.9 * rate(batch=64, shared_prefix=64)


def test_what_does_not_fit_is_out_of_memory() -> None:
    full = cell(batch=512, prefix=4096)
    assert throughput(full, FLASH) == "OOM"
    assert not isinstance(throughput(full, HYDRAGEN), str)
    assert throughput(cell(batch=2**16), VLLM) == "OOM"
    copies = prefix.memory_bytes(full, FLASH) - prefix.memory_bytes(full, HYDRAGEN)
    assert copies == 512 * 4096 * full.row_bytes


def test_vllm_falls_to_the_host_whatever_the_model() -> None:
    for batch in (512, 2048):
        small, large = (
            rate(
                impl="vLLM 0.2.7 no-detok",
                batch=batch,
                shared_prefix=16256,
                model=f"CodeLlama-{n}B",
            )
            for n in (7, 34)
        )
        assert small == pytest.approx(large, rel=0.1)
        assert small == pytest.approx(1e-3 / (2 * 16256 * prefix.LIST_S), rel=0.1)


def test_graphs_end_at_a_batch_and_at_a_context() -> None:
    inside, over = (prefix.vllm_seconds(cell(batch=b)) / b for b in (256, 264))
    assert over > 1.5 * inside
    short, long = (prefix.vllm_seconds(cell(prefix=p)) for p in (8064, 8065))
    assert long > 1.5 * short


def test_a_layer_has_seven_products_and_splits_them() -> None:
    ops = list(layer(model_named("CodeLlama-34B"), batch=16, tp=8, dtype=FP16))
    products = [op for op in ops if isinstance(op, Matmul)]
    assert len(products) == 7 and len(ops) == 46
    assert sum(op.n * op.k for op in products) * 8 == 2 * 8192 * (8192 + 1024) + 3 * 8192 * 22016


def test_the_step_without_attention_grows_with_the_model() -> None:
    seconds = [
        no_attention_seconds(model_named(f"CodeLlama-{n}B"), batch=64, tp=8, on=A100, dtype=FP16)
        for n in (7, 13, 34)
    ]
    assert seconds == sorted(seconds)


def test_the_prefix_is_split_while_tiles_leave_sms_idle() -> None:
    few, many = (prefix.prefix_splits(cell(batch=b, prefix=16384)) for b in (32, 4096))
    assert few > many == 1
    assert prefix.prefix_splits(cell(prefix=1025)) == 1


def test_speedups_and_drops() -> None:
    setting = {"model": "CodeLlama-13B", "gpu": "A100-40GB", "n_gpus": 8, "batch": 1024}
    speedup = prefix.evaluate_hydragen(
        claim("hydragen", "max e2e speedup vs best baseline", **setting, prefix=8192)
    )
    assert isinstance(speedup, float) and 10 < speedup < 30
    drop = prefix.evaluate_hydragen(claim("hydragen", "throughput drop when 1K->16K", batch=256))
    assert isinstance(drop, float) and 0 < drop < 30


LINEAR, ATTENTION = "linear-layer FLOP ratio new/old", "attention FLOP ratio"


@pytest.mark.parametrize(
    ("quantity", "formula"),
    [
        (LINEAR, "(P + G R) / (G (P + R))"),
        (LINEAR, "(P + GR) / (GP + GR) -> 1/G for P >> R"),
        (ATTENTION, "[P^2 + 2 G R P + G R^2] / [G (P+R)^2]"),
    ],
)
def test_a_true_formula_is_confirmed(quantity: str, formula: str) -> None:
    found = prefix.evaluate_prefix_grouper(
        claim("prefix_grouper", quantity, formula=formula, P=[3000, 6000])
    )
    assert found == formula


@pytest.mark.parametrize("formula", ["(P + R) / (G (P + R))", "(P + G R) / (G (P + R)) -> 1/P"])
def test_a_wrong_formula_is_answered_with_the_count(formula: str) -> None:
    found = prefix.evaluate_prefix_grouper(claim("prefix_grouper", LINEAR, formula=formula))
    assert isinstance(found, str) and found != formula and " at " in found


def test_sizes_give_the_ratio_itself() -> None:
    found = prefix.evaluate_prefix_grouper(claim("prefix_grouper", LINEAR, P=600, R=100, G=6))
    assert found == (600 + 600) / (6 * 700)


def test_formulas_as_printed() -> None:
    assert formula_value("2G(P - R)^2/[P]", {"G": 3, "P": 4, "R": 2}) == 6
    for bad in ("P +", "Q", "__import__(P)"):
        with pytest.raises(NotModelledError, match="formula"):
            formula_value(bad, {"P": 1})


@pytest.mark.parametrize(
    ("quantity", "change", "reason"),
    [
        ("decoding throughput", {"batch": None}, "setting incomplete: no batch"),
        ("decoding throughput", {"impl": None}, "setting incomplete: no impl"),
        ("decoding throughput", {"impl": "vLLM 0.2.7"}, "detokenisation depends on the text"),
        ("decoding throughput", {"impl": "abacus"}, "no implementation is called 'abacus'"),
        ("decoding throughput", {"parallel": "PP8"}, "parallel 'pp8' on 8 devices"),
        ("decoding throughput", {"model": "GPT-9"}, "no sizes are known of the model"),
        ("decoding throughput", {"n_gpus": 3, "parallel": "TP3"}, "3 ranks do not divide"),
        ("hierarchical extra time reduction", {}, "setting incomplete: no lengths"),
        ("taste", {}, "no rule for 'taste'"),
    ],
)
def test_what_cannot_be_told_says_why(
    quantity: str, change: dict[str, object], reason: str
) -> None:
    verdict = evaluate(claim("hydragen", quantity, **(CELL | change)))
    assert verdict.status == NOT_MODELLED
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("quantity", "setting", "reason"),
    [
        (LINEAR, {"P": 100, "R": 10}, "setting incomplete: no G"),
        ("taste", {"formula": "P"}, "no rule for 'taste'"),
        (LINEAR, {"formula": "(P"}, "setting unclear: formula"),
    ],
)
def test_a_group_without_sizes_says_so(
    quantity: str, setting: dict[str, object], reason: str
) -> None:
    verdict = evaluate(claim("prefix_grouper", quantity, **setting))
    assert verdict.status == NOT_MODELLED
    assert reason in verdict.reason
