"""Quasi-LSTM and LSTM layers, WKV, spiking neurons and products: proofs and other truths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.op import ProvedOp
from workloads.ops.cell_map import MAPS, CellMap
from workloads.ops.quasi_rnn import Lstm, QuasiLstm, lstm_steps
from workloads.ops.wkv import SpikingNeurons, SpikingProduct, SpikingTokenMix, Wkv

memories = st.floats(9, 13).map(lambda exponent: int(2**exponent))
dtypes = st.sampled_from([BF16, FP32])
small = st.integers(1, 5)


def prove(op: ProvedOp, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


@proves("cell_map")
@given(formula=st.sampled_from(sorted(MAPS)), n=st.integers(1, 70), dtype=dtypes, fast=memories)
def test_gates_count_and_compute_what_they_say(
    formula: str, n: int, dtype: object, fast: int
) -> None:
    prove(CellMap(num_elements=n, formula=formula, dtype=dtype), fast)  # type: ignore[arg-type]


@proves("quasi_lstm")
@given(
    batch=st.integers(1, 2), blocks=st.integers(1, 4), block=small, dim=small, heads=small,
    width=small, dtype=dtypes, fast=memories,
)  # fmt: skip
def test_the_quasi_lstm_is_its_recurrence(
    batch: int, blocks: int, block: int, dim: int, heads: int, width: int, dtype: object, fast: int
) -> None:
    op = QuasiLstm(batch=batch, len_seq=blocks * block, block_length=block, dim=dim,
                   num_heads=heads, head_dim=width, dtype=dtype)  # type: ignore[arg-type]  # fmt: skip
    prove(op, fast)


@proves("lstm_layer")
@given(batch=st.integers(1, 2), length=small, dim=small, heads=st.integers(1, 3), width=small,
       dtype=dtypes, fast=memories)  # fmt: skip
def test_the_lstm_counts_every_step(
    batch: int, length: int, dim: int, heads: int, width: int, dtype: object, fast: int
) -> None:
    op = Lstm(batch=batch, len_seq=length, dim=dim, num_heads=heads, head_dim=width,
              dtype=dtype)  # type: ignore[arg-type]  # fmt: skip
    prove(op, fast)


@proves("wkv", "spiking_neurons")
@given(batch=st.integers(1, 2), length=st.integers(1, 30), channels=st.integers(1, 9),
       dtype=dtypes, fast=st.floats(5.3, 12).map(lambda e: int(2**e)))  # fmt: skip
def test_recurrences_of_channels_are_their_sums(
    batch: int, length: int, channels: int, dtype: object, fast: int
) -> None:
    shape = {"batch": batch, "len_seq": length, "channels": channels, "dtype": dtype}
    prove(Wkv(**shape), fast)  # type: ignore[arg-type]
    prove(SpikingNeurons(**shape), fast)  # type: ignore[arg-type]


@proves("spiking_product")
@given(m=st.integers(1, 20), n=st.integers(1, 20), k=st.integers(1, 30), data=st.data(),
       dtype=dtypes, fast=memories)  # fmt: skip
def test_masked_additions_are_the_dense_product(
    m: int, n: int, k: int, data: st.DataObject, dtype: object, fast: int
) -> None:
    spikes = data.draw(st.integers(1, k))
    prove(SpikingProduct(m=m, n=n, k=k, spikes=spikes, dtype=dtype), fast)  # type: ignore[arg-type]


@proves("spiking_token_mix")
@given(batch=st.integers(1, 2), length=st.integers(1, 8), dim=st.integers(1, 9),
       frac=st.floats(0, 1), events=st.booleans(), fast=memories)  # fmt: skip
def test_token_mixing_with_spikes(
    batch: int, length: int, dim: int, frac: float, events: bool, fast: int
) -> None:
    op = SpikingTokenMix(batch=batch, len_seq=length, dim=dim, spike_frac=frac,
                         event_driven=events)  # fmt: skip
    prove(op, fast)


def test_wkv_starts_from_the_first_value_and_forgets() -> None:
    """One step gives v; a huge decay leaves only the bonus' token and the one before it."""
    op = Wkv(len_seq=3, channels=1)
    k, v = np.zeros((1, 3, 1)), np.array([1.0, 5.0, 9.0]).reshape(1, 3, 1)
    given_ = {"k": k, "v": v, "w": np.array([1e6]), "u": np.array([0.0])}
    y = op.program(Machine(2**12), given_)["y"][0, :, 0]
    assert y == pytest.approx([1.0, 3.0, 7.0])


def test_a_neuron_that_is_fed_fires_every_few_steps() -> None:
    """x = 1.5: h = 0.75, 1.125 (fires, reset), 0.75, ..."""
    op = SpikingNeurons(len_seq=6, channels=1)
    y = op.program(Machine(2**12), {"x": np.full((1, 6, 1), 1.5)})["y"][0, :, 0]
    assert y.tolist() == [0, 1, 0, 1, 0, 1]


def test_spikes_save_what_they_leave_out() -> None:
    dense = SpikingTokenMix(len_seq=64, dim=200)
    events = dense.over(event_driven=True, spike_frac=0.1)
    saved = dense.work(2**18).tensor_flops[BF16] - events.work(2**18).tensor_flops[BF16]
    assert saved == 2 * 64 * 200 * 600
    assert events.synaptic_ops() == 64 * 20 * 600
    assert dense.state_bytes() == dense.over(len_seq=8192).state_bytes() == 4 * 4 * 200


def test_a_quasi_lstm_without_recurrent_weights_is_an_lstm() -> None:
    op = QuasiLstm(batch=2, len_seq=12, block_length=4, dim=3, num_heads=2, head_dim=2)
    found = op.inputs(np.random.default_rng(1))
    plain = lstm_steps(op)
    same = plain.reference({**found, "u": np.zeros((2, 8))})["y"]
    assert np.allclose(op.program(Machine(2**14), found)["y"], same)
    assert plain.work(2**14).launches == 2 + 2 * 12
    assert op.work(2**14).launches == 5


def test_impossible_layers_are_refused() -> None:
    with pytest.raises(InputError, match="block_length = 16 must divide len_seq = 100; pad"):
        QuasiLstm(len_seq=100, dim=8, head_dim=8)
    with pytest.raises(InputError, match="spike_frac"):
        SpikingTokenMix(len_seq=8, dim=8, spike_frac=1.5)
    with pytest.raises(InputError, match="num_inputs = 2; leave it"):
        CellMap(num_elements=8, num_inputs=5)
