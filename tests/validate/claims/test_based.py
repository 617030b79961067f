"""Claims on JRT, on settings of our own."""

from __future__ import annotations

import pytest

from validate.claims.claim import Claim, Value
from validate.claims.evaluate import NOT_MODELLED, Verdict, evaluate

SHAPE = {"gpu": "H100", "batch": 24, "seq": 6144}
CUSTOM, PREFIX, TWICE = "Based custom CUDA", "JRT-RNN custom CUDA", "JRT-Prompt custom CUDA"
PYTORCH, STEPPED = "JRT-RNN PyTorch", "Fast Transformer CUDA / Based (causal dot product)"
TRITON, FLASH = "Based Triton (FLA)", "FlashAttention-2"


def verdict(quantity: str, unit: str, kind: str, **setting: object) -> Verdict:
    return evaluate(
        Claim(
            id="jrt",
            family="linear_attention",
            quantity=quantity,
            unit=unit,
            kind=kind,
            published=1.0,
            setting=setting,
        )
    )


def found(impl: str, **change: object) -> Value:
    got = verdict("prefill latency", "ms", "latency", **(SHAPE | {"impl": impl} | change))
    assert got.status != NOT_MODELLED, got.reason
    return got.predicted


def ms(impl: str, **change: object) -> float:
    value = found(impl, **change)
    assert isinstance(value, float)
    return value


def test_kernels_grow_with_the_prompt_as_they_work() -> None:
    for impl in (CUSTOM, PREFIX, TWICE, STEPPED):
        assert ms(impl, seq=12288) == pytest.approx(2 * ms(impl), rel=0.05)
    for impl in (FLASH, PYTORCH, TRITON):
        growth = ms(impl, seq=12288, batch=4) / ms(impl, batch=4)  # more would not fit PyTorch
        assert 3 < growth < 4.05


def test_a_prompt_read_twice_is_a_prompt_of_twice_the_length() -> None:
    assert ms(TWICE) == ms("JRT-Prompt custom CUDA (2x prompt)") == ms(CUSTOM, seq=2 * 6144)


def test_an_encoder_costs_more_than_none_and_less_than_reading_twice() -> None:
    assert ms(CUSTOM) < ms(PREFIX) < ms(TWICE)
    assert ms("Based PyTorch", seq=3072) < ms(PYTORCH, seq=3072)


def test_a_prompt_alone_on_the_device_takes_as_long_as_eight() -> None:
    """Up to 132 heads have an SM each: only the pass over the outputs grows."""
    for few, many in ((1, 2), (2, 8)):
        assert ms(PREFIX, batch=few) < ms(PREFIX, batch=many) < 1.3 * ms(PREFIX, batch=few)
    assert ms(PREFIX, batch=64) > 3 * ms(PREFIX, batch=8)


def test_outputs_are_added_to_by_hand() -> None:
    """One fill and one sum over fp16 outputs, beside 96 chunks of 3 heads an SM."""
    outputs = 24 * 16 * 6144 * 64 * 2
    chunks = 96 * 3 * 5310 / 1.83e9
    assert ms(CUSTOM) == pytest.approx(1e3 * (chunks + 4 * outputs / 3.0e12), rel=0.06)


def test_what_does_not_fit_is_out_of_memory() -> None:
    assert found(PYTORCH, seq=16384) == "OOM"
    assert found("Based PyTorch", seq=65536, batch=1) == "OOM"
    assert isinstance(found(PYTORCH, seq=16384, batch=1), float)
    assert found(STEPPED, seq=24576, batch=32) == "OOM"
    assert found(STEPPED, heads="64 (assumed)", seq=24576) == "OOM"
    assert isinstance(found(CUSTOM, seq=16384, batch=64), float)


def test_speedups_are_ratios_of_the_times() -> None:
    both = verdict("JRT-Prompt / JRT-RNN prefill throughput vs FA2", "x", "speedup", **SHAPE)
    assert both.predicted == pytest.approx((ms(FLASH) / ms(TWICE), ms(FLASH) / ms(PREFIX)))
    one = verdict("JRT-RNN speedup over FA2", "x", "speedup", **SHAPE)
    assert one.predicted == pytest.approx(ms(FLASH) / ms(PREFIX))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch": None}, "no batch"),
        ({"gpu": None}, "no gpu"),
        ({"impl": "Mamba CUDA"}, "no implementation 'Mamba CUDA'"),
        ({"heads": "several"}, "heads = 'several'"),
    ],
)
def test_unclear_settings_are_given_up(change: dict[str, object], reason: str) -> None:
    got = verdict("prefill latency", "ms", "latency", **(SHAPE | {"impl": CUSTOM} | change))
    assert got.status == NOT_MODELLED and reason in got.reason
