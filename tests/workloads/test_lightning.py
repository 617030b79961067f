"""Lightning Attention-1 and TransNormerLLM's token mixer: proofs, counts by hand, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.op import ProvedOp
from workloads.ops.lightning_attention_1 import LightningAttention1
from workloads.ops.linear_recurrence import SCALAR, LinearRecurrence
from workloads.ops.transnormer import SwishFeatures, TransnormerAttention

dtypes = st.sampled_from([BF16, FP32])


def prove(op: ProvedOp, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError as why:
        assume("cannot hold" not in str(why))
        raise
    assert_proved(op, fast_bytes)


@proves("lightning_attention_1")
@given(
    batch=st.integers(1, 2), num_heads=st.integers(1, 3), len_seq=st.integers(1, 90),
    head_dim=st.integers(1, 6), dtype=dtypes, fast_bytes=st.integers(200, 40_000),
)  # fmt: skip
def test_the_left_product_counts_what_the_closed_form_says(fast_bytes: int, **shape: Any) -> None:
    prove(LightningAttention1(**shape), fast_bytes)


@proves("swish_features")
@given(
    streams=st.integers(1, 3), len_seq=st.integers(1, 20), dim=st.integers(1, 9),
    lrpe=st.booleans(), dtype=dtypes, fast_bytes=st.integers(12, 400),
)  # fmt: skip
def test_swish_counts_what_the_closed_form_says(fast_bytes: int, **shape: Any) -> None:
    prove(SwishFeatures(**shape), fast_bytes)


@st.composite
def mixers(draw: st.DrawFn) -> TransnormerAttention:
    form = draw(st.sampled_from(["", "lrpe", "left", "update"]))
    return TransnormerAttention(
        batch=draw(st.integers(1, 2)), num_heads=draw(st.integers(1, 2)),
        len_seq=1 if form == "update" else draw(st.integers(1, 20)),
        head_dim=draw(st.integers(1, 8)), chunk=draw(st.integers(1, 24)), dtype=draw(dtypes),
        **({form: True} if form else {}),
    )  # fmt: skip


@proves("transnormer_attention")
@given(op=mixers(), fast_bytes=st.integers(3_000, 30_000))
def test_the_mixer_counts_what_the_closed_form_says(
    op: TransnormerAttention, fast_bytes: int
) -> None:
    prove(op, fast_bytes)


@pytest.mark.parametrize("lrpe", [False, True])
def test_left_and_right_products_agree(lrpe: bool) -> None:
    """Lightning Attention-1 and -2 are one function, in blocks of any length."""
    op = TransnormerAttention(num_heads=3, len_seq=37, head_dim=6, chunk=8, lrpe=lrpe)
    inputs = op.inputs(np.random.default_rng(0))
    truth = op.reference(inputs)["o"]
    others = [op.over(chunk=16), *([] if lrpe else [op.over(left=True)])]
    for form in (op, *others):
        found = form.program(Machine(2**20), inputs)["o"]
        np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-12)


def test_steps_from_a_held_state_make_the_whole() -> None:
    whole = TransnormerAttention(num_heads=2, len_seq=9, head_dim=4, chunk=4)
    inputs = whole.inputs(np.random.default_rng(1))
    truth = whole.reference(inputs)["o"]
    one = whole.over(len_seq=1, update=True)
    state = np.zeros((1, 2, 4, 4))
    for t in range(9):
        tokens = {name: inputs[name][:, :, t : t + 1] for name in ("q", "k", "v", "u")}
        found = one.program(Machine(2**16), {**tokens, "g": inputs["g"], "state": state})
        state = found["state"]
        np.testing.assert_allclose(found["o"], truth[:, :, t : t + 1], rtol=1e-9, atol=1e-12)


def test_turned_features_give_cosines_of_the_distance() -> None:
    op = SwishFeatures(len_seq=5, dim=2, lrpe=True)
    phi = op.reference({"x": np.ones((1, 5, 2))})["y"][0]
    swish = 1 / (1 + np.exp(-1))
    expected = swish**2 * (np.cos(3.0) + np.cos(3e-4))
    assert phi[4] @ phi[1] == pytest.approx(expected, rel=1e-12)


def test_the_left_product_by_hand() -> None:
    op = LightningAttention1(batch=2, num_heads=3, len_seq=128, head_dim=64)
    work = op.work(2**18)  # one block of all queries: two blocks of 64 keys, both masked in part
    assert op.tiling(2**18) == {"br": 128, "bc": 64}
    assert work.tensor_flops == {BF16: 2 * 3 * 4 * 128 * 128 * 64}
    assert work.special_ops == 2 * 3 * 128 * 128
    assert work.vector_flops == 2 * 3 * 128 * 128 * (3 + 2)
    assert work.bytes == op.compulsory_bytes() == 2 * 3 * 4 * 128 * 64 * 2


def test_doubling_the_length_doubles_one_and_quadruples_the_other() -> None:
    flops = {
        left: [
            sum(TransnormerAttention(num_heads=1, len_seq=n, head_dim=64, left=left)
                .min_flops().values())
            for n in (2**15, 2**16)
        ]
        for left in (False, True)
    }  # fmt: skip
    assert flops[False][1] / flops[False][0] == 2
    assert flops[True][1] / flops[True][0] == pytest.approx(4, rel=1e-4)


def test_the_recurrence_is_lightning_attention_2() -> None:
    op = TransnormerAttention(num_heads=2, len_seq=64, head_dim=16)
    recurrence = op.recurrence()
    assert isinstance(recurrence, LinearRecurrence) and recurrence.decay == SCALAR
    turned = op.over(lrpe=True).recurrence()
    assert isinstance(turned, LinearRecurrence) and turned.key_dim == 32


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"update": True, "len_seq": 2}, "one step"),
        ({"update": True, "len_seq": 1, "lrpe": True}, "leave lrpe and left out"),
        ({"left": True, "lrpe": True}, "leave lrpe or left out"),
    ],
)
def test_impossible_mixers_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        TransnormerAttention(**({"num_heads": 1, "len_seq": 8, "head_dim": 4} | fields))


def test_too_little_fast_memory_is_refused() -> None:
    with pytest.raises(InputError, match="cannot hold one query row"):
        LightningAttention1(num_heads=1, len_seq=8, head_dim=64).work(64)
