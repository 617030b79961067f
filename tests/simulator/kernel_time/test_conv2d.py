"""Convolutions: counts, algorithms, order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import FP16, FP32
from hwmodels.errors import UnknownNameError
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.predict import predict
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


def test_winograd_saves_three_products_in_four_where_it_applies() -> None:
    op = Conv2d(algorithm="winograd", **SIZES)
    assert op.min_flops()[FP32] == op.direct_flops() / 4
    for other in ({"stride": 2}, {"kernel_h": 5}, {"algorithm": "direct"}):
        assert op.over(**other).min_flops()[FP32] == op.over(**other).direct_flops()


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
        for a in ALGORITHMS
    )
    assert (best == np.minimum(direct, winograd)).all()
    assert winograd[-1] < direct[-1]
    wide = Conv2d(**SIZES | {"kernel_h": 5, "kernel_w": 5}, algorithm="best")
    alone = predict(wide.over(algorithm="direct"), on=V100).seconds
    assert predict(wide, on=V100).seconds == alone


def test_unknown_names_are_refused() -> None:
    for wrong in ({"direction": "back"}, {"algorithm": "fft"}):
        with pytest.raises(UnknownNameError):
            Conv2d(**SIZES, **wrong)  # type: ignore[arg-type]
