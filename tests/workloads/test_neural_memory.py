"""Titans' memory: proofs token by token, its gradients, the delta rule as a special case."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError, UnknownNameError
from tests.workloads.proof import assert_proved, proves
from workloads import registry
from workloads.machine import Machine, Values
from workloads.op import ProvedOp
from workloads.ops.linear_recurrence import LinearRecurrence
from workloads.ops.neural_memory import (
    BLENDS,
    MAPS,
    MemoryMap,
    MomentumScan,
    NeuralMemory,
    RowBlend,
)

dtypes = st.sampled_from([BF16, FP32])


def prove(op: ProvedOp, fast_bytes: int, seed: int = 0) -> None:
    try:
        op.work(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes, seed=seed)


@proves("memory_map")
@given(
    size=st.integers(1, 200), formula=st.sampled_from(sorted(MAPS)),
    fast_bytes=st.integers(12, 900), dtype=dtypes,
)  # fmt: skip
def test_maps_count_what_the_closed_form_says(
    size: int, formula: str, fast_bytes: int, dtype: Any
) -> None:
    prove(MemoryMap(num_elements=size, formula=formula, dtype=dtype), fast_bytes)


@proves("row_blend")
@given(
    rows=st.integers(1, 9), cols=st.integers(1, 40), form=st.sampled_from(sorted(BLENDS)),
    fast_bytes=st.integers(40, 900), dtype=dtypes,
)  # fmt: skip
def test_blends_count_what_the_closed_form_says(
    rows: int, cols: int, form: str, fast_bytes: int, dtype: Any
) -> None:
    prove(RowBlend(rows=rows, cols=cols, form=form, dtype=dtype), fast_bytes)


@proves("momentum_scan")
@given(
    batch=st.integers(1, 4), chunk=st.integers(1, 14), seed=st.integers(0, 99),
    fast_bytes=st.integers(60, 900), dtype=dtypes,
)  # fmt: skip
def test_the_scan_of_gates_counts_what_the_closed_form_says(
    batch: int, chunk: int, seed: int, fast_bytes: int, dtype: Any
) -> None:
    prove(MomentumScan(batch=batch, chunk=chunk, dtype=dtype), fast_bytes, seed)


@proves("neural_memory")
@given(data=st.data(), seed=st.integers(0, 99), fast_bytes=st.integers(500, 9000))
def test_chunks_give_what_tokens_one_by_one_give(
    data: st.DataObject, seed: int, fast_bytes: int
) -> None:
    op = NeuralMemory(
        batch=data.draw(st.integers(1, 2)), num_heads=data.draw(st.integers(1, 2)),
        len_seq=data.draw(st.integers(1, 11)), dim=data.draw(st.integers(1, 4)),
        depth=data.draw(st.integers(1, 3)), width=data.draw(st.none() | st.integers(1, 5)),
        chunk=data.draw(st.integers(1, 5)), dtype=data.draw(dtypes),
    )  # fmt: skip
    prove(op, fast_bytes, seed)


# ---- against truths written without the reference ------------------------------------------


def loss(weights: list[Any], k: Values, v: Values) -> Any:
    x = k
    for layer in weights[:-1]:
        out = x @ layer
        x = out / (1 + np.exp(-out))
    return ((x @ weights[-1] - v) ** 2).sum()


def test_a_token_moves_the_weights_down_the_slope() -> None:
    op = NeuralMemory(len_seq=1, dim=3, width=4, depth=3)
    inputs = dict(op.inputs(np.random.default_rng(1)))
    inputs |= {"alpha": np.zeros((1, 1)), "theta": np.ones((1, 1))}
    found = op.program(Machine(2**20), inputs)
    weights = [inputs[f"w{at}"][0] for at in range(3)]
    for at in range(3):
        momentum = inputs["eta"][0, 0] * inputs[f"s{at}"][0] - found[f"s{at}"][0]
        for place in np.ndindex(weights[at].shape):
            moved = [w.astype(complex) for w in weights]
            moved[at][place] += 1e-30j
            slope = loss(moved, inputs["k"][0, 0], inputs["v"][0, 0]).imag / 1e-30
            assert momentum[place] == pytest.approx(slope, rel=1e-9, abs=1e-12)
        change = found[f"w{at}"] - inputs[f"w{at}"]
        np.testing.assert_allclose(change, found[f"s{at}"], atol=1e-12)


def test_one_linear_layer_without_momentum_is_the_delta_rule() -> None:
    rule = LinearRecurrence(num_heads=2, len_seq=9, key_dim=4, rule="delta", dtype=FP32)
    given = rule.inputs(np.random.default_rng(2))
    flat = {name: given[name].reshape(2, 9, -1) for name in "qkv"}
    memory = NeuralMemory(num_heads=2, len_seq=9, dim=4, depth=1, chunk=1, dtype=FP32)
    zero, nothing = np.zeros((2, 4, 4)), np.zeros((2, 9))
    gates = {"eta": nothing, "alpha": nothing, "theta": given["b"].reshape(2, 9) / 2}
    found = memory.program(Machine(2**20), flat | gates | {"w0": zero, "s0": zero})
    np.testing.assert_allclose(found["y"], rule.reference(given)["o"].reshape(2, 9, 4), atol=1e-12)


def test_two_halves_are_the_whole() -> None:
    op = NeuralMemory(batch=2, len_seq=8, dim=3, depth=2, chunk=4)
    inputs = op.inputs(np.random.default_rng(3))
    whole, half = op.reference(inputs), op.over(len_seq=4)
    tokens = ("q", "k", "v", "eta", "alpha", "theta")
    held = {name: values for name, values in inputs.items() if name not in tokens}
    for rows in (slice(0, 4), slice(4, 8)):
        found = half.program(
            Machine(2**20), {name: inputs[name][:, rows] for name in tokens} | held
        )
        np.testing.assert_allclose(found["y"], whole["y"][:, rows], rtol=1e-9, atol=1e-12)
        held = {name: values for name, values in found.items() if name != "y"}


# ---- by hand -------------------------------------------------------------------------------


def test_flops_of_a_deep_memory_by_hand() -> None:
    op = NeuralMemory(len_seq=128, dim=16, width=32, depth=3, chunk=64)
    layers = 10 * 16 * 32 + 12 * 32 * 32 + 12 * 32 * 16
    recent = 2 * 64 * (16 + 32 + 32 + 32 + 32 + 16)
    assert op.work(2**20).tensor_flops[BF16] == 128 * (layers + recent)
    assert op.state_bytes() == 2 * 2 * (2 * 16 * 32 + 32 * 32)


def test_cost_is_linear_in_the_length_and_the_state_constant() -> None:
    ops = [NeuralMemory(len_seq=n, dim=384, width=768) for n in (2**14, 2**21)]
    work = [op.work(2**22) for op in ops]
    for counter in ("flops", "bytes"):
        ratio = getattr(work[1], counter) / getattr(work[0], counter)
        assert ratio == pytest.approx(128, rel=1e-3), counter
    assert ops[0].state_bytes() == ops[1].state_bytes()


def test_a_longer_chunk_reads_the_weights_less_often() -> None:
    short, long = (NeuralMemory(len_seq=4096, dim=512, chunk=c).work(2**18) for c in (16, 128))
    assert long.bytes < short.bytes and long.launches < short.launches


def test_arrays_count_as_scalars_do() -> None:
    op = NeuralMemory(len_seq=64, dim=16)
    lengths = [1, 64, 100, 640]
    many = op.over(len_seq=np.array(lengths, dtype=np.float64)).work(2**18)
    for counter in ("flops", "bytes", "special_ops", "launches"):
        ones = [getattr(op.over(len_seq=n).work(2**18), counter) for n in lengths]
        assert np.broadcast_to(getattr(many, counter), 4).tolist() == ones, counter


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"depth": 0}, "depth = 0 must be a whole number"),
        ({"chunk": 2.5}, "chunk = 2.5 must be a whole number"),
    ],
)
def test_impossible_memories_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        registry.build("titans", {"len_seq": 64, "dim": 16} | fields)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="formula"):
        MemoryMap(num_elements=4, formula="relu")
    with pytest.raises(UnknownNameError, match="form"):
        RowBlend(rows=1, cols=4, form="all")
