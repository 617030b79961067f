"""Recurrent layers: chains, weight gradients, counts."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import FP16, FP32
from hwmodels.errors import UnknownNameError
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.predict import predict
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


def test_unknown_cells_and_directions_are_refused() -> None:
    for wrong in ({"cell": "lstn"}, {"cell": "lstm", "direction": "back"}):
        with pytest.raises(UnknownNameError):
            Rnn(**SIZES, **wrong)  # type: ignore[arg-type]
