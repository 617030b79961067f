"""A bar is held against the rows it is about, and says what was missed."""

from __future__ import annotations

import math

import pytest

from tests.validate.data import example, made_calibration, timed_as_predicted
from validate.bars import (
    BARS,
    BIAS,
    COVER_80,
    COVER_90,
    FITTED,
    LARGEST,
    MAPE,
    NEVER,
    NEW,
    SAME,
    Verdict,
    noise_floor,
    verdicts,
)
from validate.compare import compare
from validate.measurement import Measurement

H100 = made_calibration("h100-sxm", half=0.1)
A100 = made_calibration("a100-sxm4-80gb", half=0.1)
DEVICES = {
    "H100-SXM-80GB": "h100-sxm",
    "H200-SXM-141GB": "h200-sxm",
    "B200-SXM": "b200-sxm",
    "A100-SXM4-80GB": "a100-sxm4-80gb",
}


def product(m: int, gpu: str = "H100-SXM-80GB", **changes: object) -> Measurement:
    sizes = {"m": m}
    return example("gemm", family="gemm", gpu=gpu, device_id=DEVICES[gpu], params=sizes, **changes)


def timed(factors: list[float], gpu: str = "H100-SXM-80GB", **changes: object) -> list[Measurement]:
    """Products of growing size, measured by those factors slower than predicted."""
    return [
        timed_as_predicted(product(256 * (i + 1), gpu, **changes), f, [H100, A100])
        for i, f in enumerate(factors)
    ]


def verdict(rows: list[Measurement]) -> Verdict:
    (found,) = verdicts(compare(rows, calibrations=[H100, A100]).points)
    return found


def spread_over(level: float, count: int = 50) -> list[float]:
    """Alternating errors of which the shares 0.8 and 0.9 lie in the intervals of `H100`."""
    logs = [0.02 if i < 0.8 * count else 0.15 if i < 0.9 * count else 0.25 for i in range(count)]
    return [math.exp(level + (x if i % 2 else -x)) for i, x in enumerate(logs)]


def test_a_cell_that_keeps_everything_missed_nothing() -> None:
    found = verdict(timed(spread_over(0.0)))
    assert (found.bar, found.kind, found.limit) == ("GEMM bf16", FITTED, 0.065)
    assert found.errors.mape is not None and found.errors.mape < 0.065
    assert found.missed == ()


def test_what_is_missed_is_named() -> None:
    found = verdict(timed([1.5] * 50))
    assert found.missed == (MAPE, BIAS, LARGEST, COVER_80, COVER_90)
    found = verdict(timed([1.0] * 50))
    assert found.missed == (COVER_80, COVER_90)  # intervals much wider than the errors
    found = verdict(timed([*[1.0] * 45, *[1.06] * 5]))
    assert LARGEST in found.missed and BIAS not in found.missed
    assert found.largest_bias == pytest.approx(1 / 1.06 - 1)


def test_few_rows_are_not_judged_by_what_they_cannot_show() -> None:
    found = verdict(timed([1.0] * 10))
    assert found.missed == () and found.largest_bias is None


@pytest.mark.parametrize(
    ("gpu", "kind", "limit"),
    [("H100-SXM-80GB", FITTED, 0.065), ("A100-SXM4-80GB", FITTED, 0.085),
     ("H200-SXM-141GB", SAME, 0.07), ("B200-SXM", NEW, 0.14)],
)  # fmt: skip
def test_the_limit_depends_on_how_well_the_gpu_is_known(gpu: str, kind: str, limit: float) -> None:
    found = verdict([product(512, gpu)])
    assert (found.kind, found.limit) == (kind, limit)


def test_what_nobody_fitted_is_held_against_a_new_architecture() -> None:
    (found,) = verdicts(compare([product(512)], calibrations=()).points)
    assert (found.kind, found.limit) == (NEVER, 0.14)


def test_every_family_has_a_bar_and_formats_without_one_have_no_verdict() -> None:
    assert len({b.name for b in BARS}) == len(BARS)
    assert verdicts(compare([product(512, dtype="fp32")], calibrations=[H100]).points) == ()


def test_a_publishers_rows_have_a_bar_of_their_own() -> None:
    rows = [product(512, source="llmcompass/x"), product(512, source="vidur/x")]
    found = {v.bar: v.errors.n for v in verdicts(compare(rows, calibrations=[H100]).points)}
    assert found == {"GEMM bf16": 2, "GEMM, published by LLMCompass": 1}


def test_the_noise_floor_is_stated_where_it_is_known_only() -> None:
    def floor(*rows: Measurement) -> float | None:
        return noise_floor(compare(rows, calibrations=[H100]).points)

    assert floor(product(512)) == 0.037
    assert floor(product(512, dtype="fp16")) is None
    assert floor(product(512), product(512, dtype="fp16")) is None
