"""Claims on linear attentions, on settings of our own."""

from __future__ import annotations

import pytest

from validate.claims.claim import Claim, Value
from validate.claims.evaluate import NOT_MODELLED, evaluate

SHAPE = {"gpu": "A100-80GB", "batch": 4, "seq": 16384, "heads": 16, "head_dim": 64}
SCENE = {"gpu": "RTX 3090", "voxels": 40000, "windows": 2000, "heads": 4, "head_dim": 32}


def claim(system: str, quantity: str, unit: str, kind: str = "latency", **setting: object) -> Claim:
    return Claim(
        id=system, family="linear_attention", quantity=quantity, unit=unit, kind=kind,
        published=1.0, setting=setting,
    )  # fmt: skip


def found(*args: str, **setting: object) -> Value:
    verdict = evaluate(claim(*args, **setting))
    assert verdict.status != NOT_MODELLED, verdict.reason
    return verdict.predicted


def number(*args: str, **setting: object) -> float:
    value = found(*args, **setting)
    assert isinstance(value, float)
    return value


def test_hedgehog_gains_on_flash_attention_with_the_length() -> None:
    speedups = [
        number("hedgehog", "speed", "x", "speedup", **(SHAPE | {"seq": seq}))
        for seq in (1024, 16384, 65536)
    ]
    assert speedups[0] < 1 < speedups[1] < speedups[2]
    assert speedups[2] / speedups[1] == pytest.approx(4, rel=0.15)


def test_hedgehogs_flops_and_state_by_hand() -> None:
    tokens, state = 4 * 16 * 16384, 4 * 16 * 128 * 65 * 4
    flops = number("hedgehog", "attention", "GFLOPs", "ratio", **SHAPE)
    assert flops * 1e9 == pytest.approx(tokens * (4 * 64 * 128 + 4 * 64**2), rel=0.02)
    assert number("hedgehog", "state", "MiB", "memory", **SHAPE) == state / 2**20


@pytest.mark.parametrize(("axes", "scans"), [(None, 4.0), (1, 2.0), (3, 6.0)])
def test_passes_are_two_an_axis_but_one_for_lightnet(axes: int | None, scans: float) -> None:
    setting = {} if axes is None else {"axes": axes}
    assert found("lightnet", "number of scans", "scans", **setting) == (1.0, scans)


@pytest.mark.parametrize(
    ("system", "formula", "answer"),
    [
        ("longvq", "O(N S d)", "O(N S d)"),
        ("longvq", "O(L C D)", "O(L C D)"),
        ("longvq", "O(N d)", "O(N^1.00 d^1.00 S^1.00)"),
        ("longvq", "O(N^2 d)", "O(N^1.00 d^1.00 S^1.00)"),
        ("lightnet", "4Nd^2", "4Nd^2"),
        ("lightnet", "2Nd^2", "2 times 2Nd^2"),
        ("hedgehog", "4Nd(2d)", "4Nd(2d)"),
        ("hedgehog", "O(N^2 d)", "O(N^1.00 d^2.00)"),
    ],
)
def test_formulas_are_confirmed_by_counts_or_answered(
    system: str, formula: str, answer: str
) -> None:
    assert found(system, "complexity", "formula", "complexity", formula=formula) == answer


def test_scattered_attention_is_linear_in_voxels() -> None:
    times = [
        number("scatterformer", "module", "ms", **(SCENE | {"voxels": n, "windows": n // 20}))
        for n in (10**6, 2 * 10**6)
    ]
    assert times[1] / times[0] == pytest.approx(2, rel=0.1)
    slower = number("scatterformer", "module", "us", **(SCENE | {"gpu": "T4"}))
    assert slower > 1e3 * number("scatterformer", "module", "ms", **SCENE)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (claim("hedgehog", "speed", "x", "speedup", gpu="A6000", seq=32768), "no batch, heads"),
        (claim("hedgehog", "accuracy", "%", "ratio", **SHAPE), "no count of this op"),
        (claim("longvq", "step", "ms", **SHAPE), "no codes"),
        (claim("longvq", "complexity", "formula", formula="O(N k d)"), "has a size 'k'"),
        (claim("longvq", "complexity", "formula", formula="O(N L d)"), "names a size twice"),
        (claim("scatterformer", "module latency", "ms", gpu="RTX 3090"), "no voxels, windows"),
        (claim("scatterformer", "detector FPS", "FPS", **SCENE), "whole detector"),
        (claim("scatterformer", "m", "ms", **(SCENE | {"windows": 10**6})), "setting impossible"),
        (claim("lightnet", "step", "ms", **(SHAPE | {"gpu": "TPUv9"})), "no device is called"),
    ],
)
def test_what_cannot_be_told_says_why(given: Claim, reason: str) -> None:
    verdict = evaluate(given)
    assert verdict.status == NOT_MODELLED and reason in verdict.reason
