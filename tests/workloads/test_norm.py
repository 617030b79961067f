from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.ops.norm import LayerNorm, Norm, RmsNorm
from workloads.ops.norm_backward import LayerNormBackward, RmsNormBackward

FORWARD = (RmsNorm, LayerNorm)
BACKWARD = (RmsNormBackward, LayerNormBackward)
ALL = FORWARD + BACKWARD


def fields(most_cols: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "rows": st.integers(1, 50),
            "cols": st.integers(1, most_cols),
            "dtype": st.sampled_from([BF16, FP8, FP32]),
            "residual": st.booleans(),
        }
    )


def norms(kinds: tuple[type[Norm], ...], most_cols: int) -> st.SearchStrategy[Norm]:
    return st.builds(lambda kind, made: kind(**made), st.sampled_from(kinds), fields(most_cols))


@pytest.mark.parametrize("kind", FORWARD)
@proves("rmsnorm", "layernorm")
@given(made=fields(200), fast_bytes=st.integers(400, 3000), seed=st.integers(0, 99))
def test_forward_counts_what_the_closed_form_says(
    kind: type[Norm], made: dict[str, Any], fast_bytes: int, seed: int
) -> None:
    assert_proved(kind(**made), fast_bytes, seed=seed)


@pytest.mark.parametrize("kind", BACKWARD)
@proves("rmsnorm_backward", "layernorm_backward")
@given(made=fields(48), fast_bytes=st.integers(500, 2000), seed=st.integers(0, 99))
def test_backward_counts_what_the_closed_form_says(
    kind: type[Norm], made: dict[str, Any], fast_bytes: int, seed: int
) -> None:
    op = kind(**made)
    # Rows of one or two columns cancel to almost nothing, hence the wider tolerance.
    assert_proved(op, fast_bytes, seed=seed, rtol=1e-6 if op.cols <= 2 else 1e-9)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("cols", "passes"), [(20, 1), (200, 2)])
def test_both_tilings_are_reached_and_proved(
    kind: type[Norm], residual: bool, cols: int, passes: int
) -> None:
    op, fast_bytes = kind(rows=37, cols=cols, residual=residual), 700
    assert op.tiling(fast_bytes)["passes"] == passes
    assert_proved(op, fast_bytes)


@pytest.mark.parametrize("kind", FORWARD)
@pytest.mark.parametrize("residual", [False, True])
def test_a_row_that_fits_moves_once_and_one_that_does_not_is_read_twice(
    kind: type[Norm], residual: bool
) -> None:
    op = kind(rows=64, cols=1024, residual=residual)
    once, twice = op.work(2**20), op.work(2**11)
    assert once.bytes == op.compulsory_bytes()
    strips, weights = 64 / 16, len(op.weights) * 1024 * 2
    assert twice.read_bytes - once.read_bytes == 64 * 1024 * 2 + (strips - 1) * weights
    assert twice.write_bytes == once.write_bytes


@pytest.mark.parametrize("kind", BACKWARD)
def test_a_backward_row_that_does_not_fit_takes_two_kernels(kind: type[Norm]) -> None:
    op = kind(rows=64, cols=1024)
    assert op.work(2**20).bytes == op.compulsory_bytes()
    assert (op.work(2**20).launches, op.work(2**11).launches) == (1, 2)
    assert op.work(2**11).bytes > 1.6 * op.compulsory_bytes()


def test_layer_norm_survives_a_large_common_offset() -> None:
    op = LayerNorm(rows=8, cols=300)
    inputs = dict(op.inputs(np.random.default_rng(0)))
    inputs["x"] = inputs["x"] + 1e6
    got = op.program(Machine(700), inputs)["y"]
    assert op.tiling(700)["passes"] == 2
    np.testing.assert_allclose(got, op.reference(inputs)["y"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", BACKWARD)
def test_gradients_are_those_of_finite_differences(kind: type[Norm]) -> None:
    op = kind(rows=3, cols=7)
    forward = FORWARD[BACKWARD.index(kind)](rows=3, cols=7)
    inputs = dict(op.inputs(np.random.default_rng(3)))
    expected, step = op.reference(inputs), 1e-6
    bias = {"bias": np.zeros(7)} if kind is LayerNormBackward else {}

    def loss(changed: str, index: tuple[int, ...], by: float) -> float:
        arrays = {"x": inputs["x"].copy(), "weight": inputs["weight"].copy(), **bias}
        arrays[changed][index] += by
        return float((forward.reference(arrays)["y"] * inputs["dy"]).sum())

    for key, gradient in (("x", "dx"), ("weight", "dweight")):
        for index in np.ndindex(inputs[key].shape):
            slope = (loss(key, index, step) - loss(key, index, -step)) / (2 * step)
            assert slope == pytest.approx(expected[gradient][index], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", ALL)
def test_arrays_agree_with_scalars(kind: type[Norm]) -> None:
    rng = np.random.default_rng(1)
    rows, cols = rng.integers(1, 9000, 60), (2 ** rng.uniform(0, 15, 60)).astype(int)
    for fast in (2**14, 2**17):
        op = kind(rows=rows, cols=cols, residual=True)
        many, tiles = op.work(fast), op.tiling(fast)
        assert {1.0, 2.0} == set(np.asarray(tiles["passes"]))
        for i in range(60):
            one_op = kind(rows=int(rows[i]), cols=int(cols[i]), residual=True)
            one = one_op.work(fast)
            for field in ("vector_flops", "special_ops", "read_bytes", "write_bytes", "launches"):
                got = np.broadcast_to(getattr(many, field), (60,))[i]
                assert got == getattr(one, field), field


@settings(max_examples=200, deadline=None)
@given(
    op=norms(ALL, 200),
    fast_bytes=st.integers(500, 3000),
    grow=st.sampled_from(["rows", "cols"]),
    more=st.integers(1, 300),
)
def test_a_larger_norm_is_more_work(op: Norm, fast_bytes: int, grow: str, more: int) -> None:
    less = op.work(fast_bytes)
    grown = op.over(**{grow: getattr(op, grow) + more}).work(fast_bytes)
    assert grown.bytes > less.bytes
    assert grown.vector_flops > less.vector_flops


@settings(max_examples=200, deadline=None)
@given(op=norms(ALL, 200), fast_bytes=st.integers(500, 3000))
def test_a_larger_fast_memory_never_moves_more(op: Norm, fast_bytes: int) -> None:
    assert op.work(2 * fast_bytes).bytes <= op.work(fast_bytes).bytes


@pytest.mark.parametrize("bad", [0, -4, 2.5, float("nan"), float("inf"), 2**60, "many"])
@pytest.mark.parametrize("kind", ALL)
def test_bad_sizes_are_refused(kind: type[Norm], bad: object) -> None:
    with pytest.raises(InputError, match=f"{kind.name}: cols = "):
        kind(rows=8, cols=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ALL)
def test_too_small_a_fast_memory_is_refused(kind: type[Norm]) -> None:
    with pytest.raises(InputError, match="cannot hold 16 rows of one column"):
        kind(rows=64, cols=64).work(60)
