"""FlexSP's and ByteScale's claims: the setting is read, the published figure is not."""

from __future__ import annotations

from typing import Any

import pytest

from validate.claims.claim import Claim, NotModelledError
from validate.claims.variable_length import evaluate_bytescale, evaluate_flexsp

SMALL: dict[str, Any] = {"models": "GPT-7B", "max_seq": 65536, "n_gpus": 16, "global_batch": 64}


def _claim(quantity: str, unit: str = "x", kind: str = "speedup", **setting: Any) -> Claim:
    return Claim(
        id="x", family="parallelism", quantity=quantity, unit=unit, kind=kind, published=1e9,
        setting=setting,
    )  # fmt: skip


def test_flexsp_is_faster_than_its_baselines_and_they_are_ordered() -> None:
    ada = evaluate_flexsp(_claim("vs FlexSP-BatchAda", **SMALL))
    static = evaluate_flexsp(_claim("max speedup vs DeepSpeed", **SMALL))
    assert isinstance(ada, float) and isinstance(static, float)
    assert 1 <= ada <= static < 3


def test_the_dearer_network_gains_more() -> None:
    slow, fast = (
        evaluate_flexsp(
            _claim("max speedup vs DeepSpeed", dataset="GitHub", interconnect=net, **SMALL)
        )
        for net in ("NVLink + 100Gbps IB", "NVLink + 1600Gbps IB")
    )
    assert isinstance(slow, float) and isinstance(fast, float) and slow > fast > 1


def test_pairs_come_for_named_baselines_and_corpora() -> None:
    pair = evaluate_flexsp(_claim("max speedup vs Megatron-LM / DeepSpeed", **SMALL))
    alone = evaluate_flexsp(_claim("max speedup vs Megatron-LM", **SMALL))
    assert isinstance(pair, tuple) and pair[0] <= pair[1] and alone in pair
    exchange = evaluate_flexsp(_claim("All-to-All reduction / e2e in case study", **SMALL))
    assert isinstance(exchange, tuple) and 1 < exchange[0] < exchange[1]


def test_buckets_by_program_add_less_than_even_ones() -> None:
    few, many = (
        evaluate_flexsp(_claim("bucketing token error", "%", "ratio", Q=q, dataset="wikipedia"))
        for q in (8, 32)
    )
    assert isinstance(few, tuple) and isinstance(many, tuple)
    assert few[0] > many[0] and few[0] < few[1]


@pytest.mark.parametrize(
    ("quantity", "unit", "setting"),
    [
        ("chosen groups case 1", "plan", {}),
        ("cost model error", "%", {}),
        ("solve time", "s", {}),
        ("profiled coefficients", "mixed", {}),
        ("perplexity", "ppl", {}),
        ("max speedup vs Alpa", "x", {}),
        ("max speedup vs DeepSpeed", "x", {"models": "GPT-99B"}),
        ("max speedup vs DeepSpeed", "x", {"interconnect": "fast"}),
    ],
)
def test_what_flexsp_cannot_be_asked_is_said(
    quantity: str, unit: str, setting: dict[str, Any]
) -> None:
    with pytest.raises(NotModelledError):
        evaluate_flexsp(_claim(quantity, unit, "ratio" if unit != "x" else "speedup", **setting))


RUN: dict[str, Any] = {
    "model": "LLaMA-7B",
    "n_gpus": 64,
    "context": 262144,
    "global_batch_tokens": 2e6,
}


def test_bytescale_gains_more_where_long_sequences_are_rare() -> None:
    rare, common = (
        evaluate_bytescale(
            _claim("max speedup", dataset=f"X ({share}% tokens >256K)", **RUN | {"context": 2**19})
        )
        for share in (2, 37)
    )
    assert isinstance(rare, float) and isinstance(common, float) and rare > common > 1


def test_step_times_are_named_least_first() -> None:
    found = evaluate_bytescale(_claim("case study step times", "s", "latency", **RUN))
    assert isinstance(found, tuple) and 0 < found[0] < found[1]


@pytest.mark.parametrize(
    ("quantity", "setting"),
    [
        ("activation offloading memory", {"normal": 59}),
        ("fused softmax cross-entropy", {}),
        ("speedups at 2M, GitHub", {"models": {"Mistral-8x7B": 1.0}}),
        ("max speedup", {"model": "Unknown-9T"}),
        ("perplexity", {}),
    ],
)
def test_what_bytescale_cannot_be_asked_is_said(quantity: str, setting: dict[str, Any]) -> None:
    with pytest.raises(NotModelledError):
        evaluate_bytescale(_claim(quantity, **setting))
