"""Recurrent layers: chains, weight gradients, counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import FP16, FP32
from hwmodels.errors import UnknownNameError
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.model import USUAL
from simulator.kernel_time.predict import predict
from simulator.kernel_time.rates import rates_of
from simulator.kernel_time.rnn import MODEL
from validate.batches import Batch
from validate.fitting import Problem, fit
from workloads.ops.rnn import DIRECTIONS, GATES, Rnn

V100 = catalog.device("v100-sxm2-16gb")
SIZES = {"hidden": 1024, "batch": 32, "num_steps": 50}


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_counts_are_those_of_the_products(cell: str, direction: str) -> None:
    op = Rnn(cell=cell, direction=direction, **SIZES)
    products = 2 if direction == "bwd_all" else 1
    flops = products * 50 * 2 * (GATES[cell] * 1024) * 1024 * 32
    assert op.work(2**20).tensor_flops == {FP32: flops}
    assert op.work(2**20).bytes == op.compulsory_bytes() > products * op.weight_bytes()


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("field", SIZES)
def test_larger_layers_take_longer_and_none_beats_its_bound(
    cell: str, direction: str, field: str
) -> None:
    op = Rnn(cell=cell, direction=direction, dtype=FP16, **SIZES)
    grown = op.over(**{field: SIZES[field] * 2.0 ** np.arange(0, 4)})
    times = np.asarray(predict(grown, on=V100).seconds)
    assert (np.diff(times) >= 0).all()
    assert (times >= estimate(grown, on=V100, rung=BOUND).lower_s).all()


def test_a_chain_is_slower_than_the_same_flops_at_once() -> None:
    chain, weight = (
        predict(Rnn(cell="lstm", direction=d, **SIZES), on=V100).seconds
        for d in ("bwd_data", "bwd_weight")
    )
    both = predict(Rnn(cell="lstm", direction="bwd_all", **SIZES), on=V100).seconds
    assert weight < chain < both <= (chain + weight) * 1.3


def test_later_steps_cost_less_than_early_ones() -> None:
    op = Rnn(cell="gru", **SIZES | {"num_steps": np.array([200.0, 400.0, 800.0])})
    few, more, most = np.asarray(nominal(op, MODEL.nominal()))
    assert few < more < 2 * few and (most - more) / 400 < (more - few) / 200


def test_the_gradient_is_added_in_single_precision() -> None:
    short = Rnn(cell="lstm", hidden=4096, batch=1, num_steps=1, direction="bwd_weight", dtype=FP16)
    twice = 2 * 4 * short.weight_bytes() / 2  # read and written, four bytes an entry
    assert nominal(short, MODEL.nominal()) > twice / V100.hbm.bytes_per_s  # type: ignore[operator]


def test_constants_are_recovered_from_times_they_made() -> None:
    rng = np.random.default_rng(3)
    hidden, batch, steps = (2.0 ** rng.integers(a, b, 300) for a, b in ((8, 13), (3, 8), (4, 11)))
    op = Rnn(cell="lstm", hidden=hidden, batch=batch, num_steps=steps)
    truth = {**MODEL.nominal(), "step_s": 3e-5, "hbm_frac": 0.6, "settle_s": 4e-5}
    noise = np.exp(rng.normal(0, 0.02, 300))
    measured = np.asarray(nominal(op, truth)) * noise
    one = Batch(V100.id, op, USUAL, np.arange(300))
    found = fit(Problem(V100, (one,), (MODEL,), measured)).constants(MODEL)
    for name in ("step_s", "hbm_frac", "settle_s"):
        assert found[name].value == pytest.approx(truth[name], rel=0.15), name


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_complex_step_is_the_slope(direction: str) -> None:
    op = Rnn(cell="lstm", direction=direction, **SIZES)
    rates = rates_of(V100)

    def seconds(name: str, factor: complex) -> complex:
        moved = replace(rates, **{name: np.array([getattr(rates, name) * factor])})
        time = MODEL.time(op, moved, MODEL.nominal(), USUAL).seconds
        return complex(np.asarray(time).reshape(-1)[0])

    for name in ("hbm_bytes_per_s", "vector_scale", "matmul_scale", "clock_hz", "l2_bytes"):
        step = seconds(name, 1 + 1e-20j).imag / 1e-20
        slope = (seconds(name, 1 + 1e-6).real - seconds(name, 1 - 1e-6).real) / 2e-6
        assert step == pytest.approx(slope, rel=1e-4, abs=1e-12)
        assert step <= 0


def nominal(op: Rnn, constants: Mapping[str, float]) -> Any:
    return MODEL.time(op, rates_of(V100), constants, USUAL).seconds


def test_unknown_cells_and_directions_are_refused() -> None:
    for wrong in ({"cell": "lstn"}, {"cell": "lstm", "direction": "back"}):
        with pytest.raises(UnknownNameError):
            Rnn(**SIZES, **wrong)  # type: ignore[arg-type]
