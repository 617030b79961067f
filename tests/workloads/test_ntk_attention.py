"""NTK-Attention: its kernels and the whole proved, parameters and counts by hand, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.op import Op
from workloads.ops.ntk_attention import AddState, FeatureMap, NtkAttention

SHAPE: dict[str, Any] = {"num_heads": 4, "len_q": 6, "head_dim": 8}
memories = st.floats(8, 15).map(lambda exponent: int(2**exponent))
dtypes = st.sampled_from([BF16, FP32])


def fits(op: Op, fast_bytes: int) -> bool:
    try:
        op.work(fast_bytes)
    except InputError:
        return False
    return True


@proves("feature_map")
@given(rows=st.integers(1, 40), dim=st.integers(1, 20), dtype=dtypes, fast_bytes=memories)
def test_features_count_what_the_closed_form_says(
    rows: int, dim: int, dtype: object, fast_bytes: int
) -> None:
    assert_proved(FeatureMap(rows=rows, dim=dim, dtype=dtype), fast_bytes)  # type: ignore[arg-type]


@proves("add_state")
@given(rows=st.integers(1, 40), dim=st.integers(1, 20), dtype=dtypes, fast_bytes=memories)
def test_adding_a_state_counts_what_the_closed_form_says(
    rows: int, dim: int, dtype: object, fast_bytes: int
) -> None:
    assert_proved(AddState(rows=rows, dim=dim, dtype=dtype), fast_bytes)  # type: ignore[arg-type]


@st.composite
def ntk(draw: st.DrawFn) -> NtkAttention:
    kv_heads, len_q = draw(st.integers(1, 2)), draw(st.integers(1, 12))
    return NtkAttention(
        batch=draw(st.integers(1, 3)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        len_q=len_q,
        len_kv=len_q + draw(st.integers(0, 12)),
        head_dim=draw(st.integers(1, 8)),
        causal=draw(st.booleans()),
        dtype=draw(dtypes),
    )


@proves("ntk_attention")
@given(op=ntk(), fast_bytes=memories)
def test_ntk_attention_counts_what_the_closed_form_says(op: NtkAttention, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


def test_without_a_state_it_is_plain_attention() -> None:
    op = NtkAttention(**SHAPE, causal=True)
    inputs = dict(op.inputs(np.random.default_rng(1)))
    inputs |= {name: 0 * inputs[name] for name in ("z", "s")}
    plain = op.attention().reference({n: inputs[n] for n in ("q", "k", "v")})["o"]
    assert op.program(Machine(2**16), inputs)["o"] == pytest.approx(plain)


def test_parameters_and_flops_by_hand() -> None:
    op = NtkAttention(**SHAPE, dtype=FP16)
    assert op.state_parameters() == 4 * (64 + 8)
    assert op.prefix_parameters(100) == 2 * 100 * 4 * 8
    state = 2 * 4 * 6 * 8 * 9
    assert op.min_flops()[FP16] == 4 * 4 * 36 * 8 + state
    assert op.attention(100).min_flops()[FP16] == 4 * 4 * 6 * 106 * 8


def test_impossible_shapes_are_refused_under_its_own_name() -> None:
    with pytest.raises(InputError, match=r"^ntk_attention: num_kv_heads = 3 must divide"):
        NtkAttention(**SHAPE, num_kv_heads=3)
    with pytest.raises(InputError, match=r"^ntk_attention: causal with len_q above len_kv"):
        NtkAttention(**SHAPE, len_kv=3, causal=True)
