"""Claims on encoders: settings of our own, relations that must hold, incomplete settings."""

from __future__ import annotations

from typing import Any

import pytest

from validate.claims.claim import Claim, NotModelledError
from validate.claims.encoder import (
    evaluate_bytetransformer,
    evaluate_music_transformer,
    evaluate_ntk_attention,
)

IMPLS = (
    "PyTorch", "FasterTransformer", "FasterTransformer remove-padding", "DeepSpeed",
    "ByteTransformer",
)  # fmt: skip
SETTING: dict[str, Any] = {
    "gpu": "A100", "n_gpus": 1, "dtype": "fp16", "batch": 8, "heads": 12, "head_dim": 64,
    "layers": 12, "max_seq": 352, "avg_seq": "0.6*max", "impl": "ByteTransformer",
}  # fmt: skip


def claim(quantity: str = "encoder forward", kind: str = "latency", **setting: Any) -> Claim:
    return Claim(
        id="x", family="attention", quantity=quantity, unit="", kind=kind, published=None,
        setting=setting,
    )  # fmt: skip


def ms(**changes: Any) -> float:
    found = evaluate_bytetransformer(claim(**(SETTING | changes)))
    assert isinstance(found, float)
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch", [1, 8])
def test_longer_sequences_take_longer(impl: str, batch: int) -> None:
    times = [ms(impl=impl, batch=batch, max_seq=n) for n in (96, 224, 448, 832, 1024)]
    assert times == sorted(times)
    assert 0.3 < times[0] < times[-1] < 60


def test_packing_beats_padding_and_fusing_beats_both_passes() -> None:
    at = {impl: ms(impl=impl, batch=16, max_seq=320) for impl in IMPLS}
    assert at["ByteTransformer"] < at["FasterTransformer"] < at["DeepSpeed"] < at["PyTorch"]
    assert at["FasterTransformer remove-padding"] < at["FasterTransformer"]


def test_fused_attention_ends_at_its_longest_sequence() -> None:
    """One token more costs FasterTransformer its fused kernel: far more than one token's share."""
    fused, unfused = (ms(impl="FasterTransformer", batch=16, max_seq=n) for n in (384, 385))
    assert unfused > 1.2 * fused


def test_an_eager_framework_has_a_floor() -> None:
    assert ms(impl="PyTorch", batch=1, max_seq=32) == ms(impl="PyTorch", batch=1, max_seq=96)
    assert ms(impl="PyTorch", batch=1, max_seq=32, layers=24) == pytest.approx(24 * 0.241)


def test_layers_add_up_and_full_sequences_leave_nothing_to_remove() -> None:
    assert ms(layers=24) == pytest.approx(2 * ms(layers=12))
    full = {"batch": 16, "max_seq": 320, "avg_seq": 320}
    plain, removed = (ms(impl=impl, **full) for impl in IMPLS[1:3])
    assert plain < removed < 1.1 * plain


def test_two_sequences_are_not_packed() -> None:
    short, long = (ms(batch=2, avg_seq=f"{share}*max") for share in (0.3, 0.9))
    assert short == long
    assert ms(batch=3, avg_seq="0.3*max") < ms(batch=3, avg_seq="0.9*max")


@pytest.mark.parametrize("missing", ["gpu", "batch", "max_seq", "avg_seq", "impl", "layers"])
def test_incomplete_settings_are_given_up(missing: str) -> None:
    setting = {key: value for key, value in SETTING.items() if key != missing}
    with pytest.raises(NotModelledError, match=f"setting incomplete: no {missing}"):
        evaluate_bytetransformer(claim(**setting))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"impl": "TurboTransformer"}, "no kernels are known"),
        ({"avg_seq": "long"}, "setting unclear: avg_seq = 'long'"),
        ({"avg_seq": 400}, "no length up to max_seq"),
        ({"n_gpus": 2}, "several devices"),
    ],
)
def test_unclear_settings_are_given_up(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(NotModelledError, match=says):
        evaluate_bytetransformer(claim(**(SETTING | changes)))


def test_speedups_without_shapes_are_given_up() -> None:
    with pytest.raises(NotModelledError, match="no batch, max_seq"):
        evaluate_bytetransformer(claim("fused MHA speedup", "speedup", gpu="A100"))


def test_parameters_of_a_state_are_confirmed_or_corrected() -> None:
    right, wrong = "d^2+d vs 2 m d", "d^2 vs m d"
    assert evaluate_ntk_attention(claim("parameters", "complexity", formula=right)) == right
    assert "at {'d': 64" in str(
        evaluate_ntk_attention(claim("parameters", "complexity", formula=wrong))
    )


def test_memory_of_relative_positions() -> None:
    found = evaluate_music_transformer(claim("memory", "memory", L=2048, D=512))
    assert found == pytest.approx((4.194, 8589.9), rel=1e-3)
    orders = {"before": "O(L^2 D)", "after": "O(L D)"}
    assert evaluate_music_transformer(claim("x", "complexity", **orders)) == "see setting"
    orders["after"] = "O(L^2)"
    wrong = evaluate_music_transformer(claim("x", "complexity", **orders))
    assert str(wrong).startswith("after: grows by 32, not 64")
