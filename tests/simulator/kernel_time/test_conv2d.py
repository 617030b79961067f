"""Convolutions: counts, algorithms, order."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import FP16, FP32
from hwmodels.errors import UnknownNameError
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.conv2d import MODEL
from simulator.kernel_time.model import USUAL
from simulator.kernel_time.predict import predict
from simulator.kernel_time.rates import rates_of
from workloads.ops.conv2d import ALGORITHMS, DIRECTIONS, Conv2d

V100 = catalog.device("v100-pcie-32gb")
SIZES = {
    "batch": 8, "in_channels": 64, "height": 28, "width": 28, "out_channels": 128,
    "out_height": 28, "out_width": 28,
}  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_direct_counts_are_those_of_the_loops(direction: str, stride: int) -> None:
    n, c, h, w, k, r, s = 2, 3, 6, 5, 4, 3, 2
    p, q = (h - r) // stride + 1, (w - s) // stride + 1
    loops = itertools.product(*(range(x) for x in (n, k, p, q, c, r, s)))
    op = Conv2d(
        batch=n, in_channels=c, height=h, width=w, out_channels=k, out_height=p, out_width=q,
        kernel_h=r, kernel_w=s, stride=stride, direction=direction,
    )  # fmt: skip
    assert op.min_flops() == {FP32: 2 * sum(1 for _ in loops)}
    elements = n * c * h * w + k * c * r * s + n * k * p * q
    assert op.work(2**20).bytes == op.compulsory_bytes() == 4 * elements
    m, cols, depth = op.as_product()
    assert 2 * m * cols * depth >= op.direct_flops()


def test_winograd_and_transforms_save_products_where_they_apply() -> None:
    def saved(**fields: object) -> float:
        op = Conv2d(**SIZES | fields)  # type: ignore[arg-type]
        return op.direct_flops() / op.min_flops()[FP32]

    five = {"kernel_h": 5, "kernel_w": 5}
    assert saved(algorithm="winograd") == 144 / 36
    assert saved(algorithm="winograd", **five) == 16 * 25 / 64
    fft = 28 * 28 * 25 / (4 * 32 * 17)  # new outputs of a tile, 4 real products a complex one
    assert saved(algorithm="fft", **five) == saved(algorithm="best", **five) == fft
    assert saved(algorithm="best") == 4
    for other in ({"stride": 2}, {"kernel_h": 5}, {"algorithm": "direct"}):
        assert saved(**{"algorithm": "winograd"} | other) == 1
    assert saved(algorithm="best", stride=2) == saved(algorithm="fft", stride=2) == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("field", ["batch", "in_channels", "out_channels"])
def test_larger_convolutions_take_longer_and_none_beats_its_bound(
    algorithm: str, direction: str, field: str
) -> None:
    op = Conv2d(algorithm=algorithm, direction=direction, dtype=FP16, math_dtype=FP32, **SIZES)
    grown = op.over(**{field: SIZES[field] * 2.0 ** np.arange(0, 5)})
    times = np.asarray(predict(grown, on=V100).seconds)
    assert (np.diff(times) >= 0).all()
    assert (times >= estimate(grown, on=V100, rung=BOUND).lower_s).all()


def test_the_best_algorithm_is_the_faster_one() -> None:
    batch = 2.0 ** np.arange(0, 8)
    direct, winograd, best = (
        np.asarray(predict(Conv2d(**SIZES | {"batch": batch}, algorithm=a), on=V100).seconds)
        for a in ("direct", "winograd", "best")
    )
    assert (best == np.minimum(direct, winograd)).all()
    assert winograd[-1] < direct[-1]
    wide = Conv2d(**SIZES | {"kernel_h": 5, "kernel_w": 3}, algorithm="best")
    alone = predict(wide.over(algorithm="direct"), on=V100).seconds
    assert predict(wide, on=V100).seconds == alone


def test_few_channels_leave_the_matrix_units() -> None:
    few, eight = (Conv2d(**SIZES | {"batch": 64, "in_channels": c}, dtype=FP16) for c in (3, 8))
    assert nominal(few) > 1.5 * nominal(eight)  # padded to eight channels, and on slower units
    alike = (Conv2d(**SIZES | {"batch": 64, "in_channels": c}, dtype=FP32) for c in (3, 8))
    assert nominal(next(alike)) < nominal(next(alike))


def test_data_gradients_of_a_stride_scatter_rather_than_multiply_zeros() -> None:
    op = Conv2d(
        batch=32, in_channels=1, height=161, width=700, out_channels=32, out_height=79,
        out_width=341, kernel_h=5, kernel_w=20, stride=2, direction="bwd_data",
    )  # fmt: skip
    m, n, k = op.as_product()
    assert m * n * k == pytest.approx(4 * op.direct_flops() / 2, rel=0.1)  # three zeros in four
    peak = V100.matmul_rate_flops_per_s(FP32)[0]
    assert op.direct_flops() / peak < nominal(op) < 2 * m * n * k / peak


def test_times_jump_only_where_tiles_or_rounds_do() -> None:
    for algorithm in ALGORITHMS:
        channels = 512.0 + np.arange(0, 200)
        times = np.asarray(
            nominal(Conv2d(**SIZES | {"out_channels": channels}, algorithm=algorithm))
        )
        grown = times[1:] / times[:-1]
        assert (grown >= 1).all()
        assert (grown[channels[:-1] % 8 != 0] <= 1.15).all() and (grown <= 1.5).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_complex_step_is_the_slope(algorithm: str, direction: str) -> None:
    op = Conv2d(**SIZES | {"batch": 33}, algorithm=algorithm, direction=direction)
    rates, constants = rates_of(V100), MODEL.nominal()

    def seconds(name: str, factor: complex) -> complex:
        moved = replace(rates, **{name: np.array([getattr(rates, name) * factor])})
        time = MODEL.time(op, moved, constants, USUAL).seconds
        return complex(np.asarray(time).reshape(-1)[0])

    for name in ("hbm_bytes_per_s", "vector_scale", "matmul_scale", "clock_hz"):
        step = seconds(name, 1 + 1e-20j).imag / 1e-20
        slope = (seconds(name, 1 + 1e-6).real - seconds(name, 1 - 1e-6).real) / 2e-6
        assert step == pytest.approx(slope, rel=1e-4, abs=1e-12)
        assert step <= 0


def nominal(op: Conv2d) -> Any:
    return MODEL.time(op, rates_of(V100), MODEL.nominal(), USUAL).seconds


def test_unknown_names_are_refused() -> None:
    for wrong in ({"direction": "back"}, {"algorithm": "im2col"}):
        with pytest.raises(UnknownNameError):
            Conv2d(**SIZES, **wrong)  # type: ignore[arg-type]
