"""Claims on linear recurrences, on settings of our own."""

from __future__ import annotations

import pytest

from validate.claims.claim import Claim
from validate.claims.evaluate import NOT_MODELLED, evaluate
from validate.claims.recurrence import FLASH_FORWARD_S, FUNCTIONS, evaluate_gla

SHAPE = {"gpu": "GB200", "batch": 2, "seq": 8192, "heads": 32, "head_dim": 128}


def milliseconds(impl: str, pass_: str = "fwd", **change: object) -> float:
    setting = SHAPE | {"impl": impl} | change
    found = evaluate_gla(claim(f"{impl} {pass_}", **setting))
    assert isinstance(found, float)
    return found


def claim(quantity: str, kind: str = "latency", **setting: object) -> Claim:
    return Claim(
        id="gla", family="linear_attention", quantity=quantity, unit="ms", kind=kind,
        published=1.0, setting=setting,
    )  # fmt: skip


def test_recurrences_are_linear_in_length_and_attention_is_not() -> None:
    for impl in FUNCTIONS:
        short, long = (milliseconds(impl, seq=seq) for seq in (16384, 32768))
        assert 1.6 < long / short < 2.2
    short, long = (milliseconds("flash_attn(FA2)", seq=seq) for seq in (16384, 32768))
    assert 3.5 < long / short < 4.2


def test_a_decay_by_channel_costs_more_than_one_by_head() -> None:
    assert milliseconds("chunk_gla") > 1.3 * milliseconds("chunk_retention")
    assert milliseconds("chunk_gla", "fwd+bwd") > 2 * milliseconds("chunk_gla")


def test_small_calls_take_the_hosts_time() -> None:
    small = {"batch": 1, "seq": 64, "heads": 1}
    assert milliseconds("chunk_gdn", **small) == FUNCTIONS["chunk_gdn"].forward_s * 1e3
    assert milliseconds("flash_attn(FA2)", **small) == FLASH_FORWARD_S * 1e3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"impl": "chunk_rwkv"}, "no function 'chunk_rwkv'"),
        ({"impl": None}, "setting incomplete: no impl"),
        ({"impl": "chunk_gla", "seq": "long"}, "setting unclear: seq"),
    ],
)
def test_what_cannot_be_told_says_why(change: dict[str, object], reason: str) -> None:
    verdict = evaluate(claim("fwd", **(SHAPE | change)))
    assert verdict.status == NOT_MODELLED and reason in verdict.reason


def test_a_speedup_over_an_unnamed_kernel_is_given_up() -> None:
    one = Claim(id="deltanet", family="f", quantity="speedup", unit="x", kind="speedup",
                published=2.0, setting=SHAPE)  # fmt: skip
    assert "setting incomplete" in evaluate(one).reason
