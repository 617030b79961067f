"""MKOR: proof of its update and step, its orders, and what the update keeps inverse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.op import ProvedOp
from workloads.ops.mkor import GAMMA, MkorStep, RankOneUpdate

memories = st.floats(5.5, 12).map(lambda exponent: int(2**exponent))
dtypes = st.sampled_from([BF16, FP32])


def prove(op: ProvedOp, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


@proves("rank_one_update")
@given(dim=st.integers(1, 40), dtype=dtypes, fast=memories)
def test_the_update_is_its_formula(dim: int, dtype: DType, fast: int) -> None:
    prove(RankOneUpdate(dim=dim, dtype=dtype), fast)


@proves("mkor_step")
@given(dim_out=st.integers(1, 12), dim_in=st.integers(1, 12), dtype=dtypes,
       fast=st.floats(8, 13).map(lambda e: int(2**e)))  # fmt: skip
def test_the_step_is_its_stages(dim_out: int, dim_in: int, dtype: DType, fast: int) -> None:
    prove(MkorStep(dim_out=dim_out, dim_in=dim_in, dtype=dtype), fast)


def test_the_update_by_hand() -> None:
    j, v = np.diag([2.0, 1.0]), np.array([1.0, 0.0])
    op = RankOneUpdate(dim=2)
    found = op.reference({"j": j, "u": j @ v, "s": np.array([2.0])})["j"]
    c = 0.1 / (GAMMA**2 * (1 + 0.9 * 0.1 * 2))
    assert found == pytest.approx(np.array([[1.8 + 4 * c, 0.0], [0.0, 0.9]]), rel=1e-9)


def test_factors_cost_the_square_of_the_width_and_the_gradient_its_cube() -> None:
    small, large = (MkorStep(dim_out=d, dim_in=d) for d in (512, 1024))
    assert large.factor_flops() == 4 * small.factor_flops() == 2 * 5 * 1024**2
    assert large.communicated_bytes() == 2 * small.communicated_bytes()
    assert large.left().min_flops()[BF16] == 8 * small.left().min_flops()[BF16]
    counted = large.work(2**20)
    inside = sum(v for d, v in counted.tensor_flops.items()) - 4 * 1024**3 + counted.vector_flops
    assert inside == pytest.approx(large.factor_flops(), rel=1e-3)


def test_arrays_of_widths() -> None:
    many = MkorStep(dim_out=np.array([64.0, 128.0]), dim_in=32).work(2**18)
    one = MkorStep(dim_out=128, dim_in=32).work(2**18)
    assert np.asarray(many.bytes)[1] == one.bytes
