"""Predictions as samples: intervals, sums, maxima and comparisons."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hwmodels import catalog
from simulator.kernel_time.predict import Prediction, predict
from simulator.uncertainty import Samples, samples
from workloads.ops.matmul import Matmul

H100 = catalog.device("h100-sxm")
OP = Matmul(m=4096, n=4096, k=4096)


def prediction(**changes: object) -> Prediction:
    return predict(OP.over(**changes) if changes else OP, on=H100)


def test_samples_scatter_as_the_interval_says() -> None:
    found = prediction()
    low, high = samples(found, key="a").interval(80)
    # the interval is symmetric by construction, the residuals need not be
    assert math.log(high / low) == pytest.approx(2 * found.half_80, rel=0.25)
    assert low < found.seconds < high


def test_one_kernel_has_one_error_and_two_kernels_two() -> None:
    found = prediction()
    one = samples(found, key="layer")
    assert np.array_equal(one.seconds, samples(found, key="layer").seconds)
    other = samples(found, key="another")
    assert abs(np.corrcoef(one.seconds, other.seconds)[0, 1]) < 0.1
    assert not np.array_equal(one.seconds, samples(found, key="layer", seed=1).seconds)


def test_repetitions_keep_their_relative_width_and_different_kernels_average() -> None:
    one, other = (samples(prediction(), key=k) for k in "ab")

    def width(s: Samples) -> float:
        low, high = s.interval(80)
        return float(np.log(high / low))

    assert width(one.times(32)) == pytest.approx(width(one), rel=1e-9)
    assert width(one + other) < 0.85 * width(one)


def test_the_longer_of_two_is_at_least_either() -> None:
    one, other = (samples(prediction(), key=k) for k in "ab")
    assert (one.longest(other).seconds >= np.maximum(one.seconds, other.seconds)).all()


def test_probabilities_of_being_faster() -> None:
    fast, slow = samples(prediction(), key="a"), samples(prediction(m=4100), key="b")
    assert fast.faster_frac(slow) + slow.faster_frac(fast) == pytest.approx(1)
    assert 0.3 < fast.faster_frac(slow) < 0.7  # the same size: a toss
    assert fast.faster_frac(samples(prediction(m=32768), key="b")) > 0.999
    assert fast.faster_frac(fast) == 0.5  # itself: all ties


def test_arrays_keep_their_shape() -> None:
    found = samples(prediction(m=np.array([1.0, 512.0, 8192.0])), key="a", num_samples=500)
    assert found.seconds.shape == (3, 500)
    low, high = found.interval(90)
    assert isinstance(low, np.ndarray) and low.shape == (3,) and (low < high).all()
    doubled = found.times(np.array([1.0, 2.0, 3.0])).seconds / found.seconds
    assert np.allclose(doubled, [[1], [2], [3]])


def test_without_a_calibration_the_spread_is_a_factor_of_two() -> None:
    found = samples(predict(OP, on=H100, calibrations=()), key="a")
    low, high = found.interval(80)
    assert 1.6 < math.sqrt(high / low) < 2.6
