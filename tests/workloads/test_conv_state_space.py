"""ConvS5: its convolution, its scan and the layer proved, counted by hand, and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32, TF32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.op import ProvedOp
from workloads.ops.associative_scan import ALGORITHMS
from workloads.ops.conv_state_space import ConvStateSpace
from workloads.ops.same_conv import SameConv
from workloads.ops.state_scan import StateScan

formats = st.sampled_from([BF16, FP32])
math = st.sampled_from([None, TF32])


def prove(op: ProvedOp, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


@proves("same_conv")
@given(data=st.data(), dtype=formats, fast_bytes=st.floats(7, 14).map(lambda e: int(2**e)))
def test_a_convolution_counts_what_the_closed_form_says(
    data: st.DataObject, dtype: Any, fast_bytes: int
) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    op = SameConv(
        batch=data.draw(st.integers(1, 3)), in_channels=data.draw(st.integers(1, 4)),
        out_channels=data.draw(st.integers(1, 6)), height=height, width=width,
        out_height=height, out_width=width, kernel_h=data.draw(st.integers(1, 6)),
        kernel_w=data.draw(st.integers(1, 4)), dtype=dtype,
    )  # fmt: skip
    prove(op, fast_bytes)


@proves("state_scan")
@given(data=st.data(), dtype=formats, fast_bytes=st.integers(64, 2000))
def test_a_scan_counts_what_the_closed_form_says(
    data: st.DataObject, dtype: Any, fast_bytes: int
) -> None:
    op = StateScan(
        rows=data.draw(st.integers(1, 3)), len_seq=data.draw(st.integers(1, 40)),
        state_dim=data.draw(st.integers(1, 4)), chunk=data.draw(st.integers(1, 50)),
        algorithm=data.draw(st.sampled_from(ALGORITHMS)), held=data.draw(st.booleans()),
        dtype=dtype,
    )  # fmt: skip
    prove(op, fast_bytes)


@proves("conv_state_space")
@given(data=st.data(), dtype=formats, fast_bytes=st.floats(10, 14).map(lambda e: int(2**e)))
def test_a_layer_counts_what_the_closed_form_says(
    data: st.DataObject, dtype: Any, fast_bytes: int
) -> None:
    recurrent = data.draw(st.booleans())
    sides: dict[str, Any] = {f"kernel_{n}": data.draw(st.integers(1, 3)) for n in "bc"}
    op = ConvStateSpace(
        batch=data.draw(st.integers(1, 2)), len_seq=data.draw(st.integers(1, 6)),
        height=data.draw(st.integers(1, 4)), width=data.draw(st.integers(1, 4)),
        channels=data.draw(st.integers(1, 3)), state_dim=data.draw(st.integers(1, 3)),
        kernel_a=data.draw(st.integers(1, 3)) if recurrent else 1, recurrent=recurrent,
        chunk=data.draw(st.integers(1, 8)), dtype=dtype, math_dtype=data.draw(math), **sides,
    )  # fmt: skip
    prove(op, fast_bytes)


# ---- other truths --------------------------------------------------------------------------


SHAPE: dict[str, Any] = {"batch": 2, "height": 3, "width": 4, "channels": 2, "state_dim": 3}


def test_frames_at_once_are_frames_one_after_another() -> None:
    whole = ConvStateSpace(**SHAPE, len_seq=7, chunk=4)
    inputs = dict(whole.inputs(np.random.default_rng(1)))
    step = ConvStateSpace(**SHAPE, len_seq=1, recurrent=True)
    inputs["x0"], seen = np.zeros((2, 3, 4, 6)), []
    for t in range(7):
        found = step.program(Machine(2**16), inputs | {"u": inputs["u"][:, t : t + 1]})
        inputs["x0"] = found["state"]
        seen.append(found["y"])
    got = whole.program(Machine(2**16), inputs)["y"]
    np.testing.assert_allclose(got, np.concatenate(seen, axis=1), rtol=1e-10, atol=1e-12)


def test_a_state_is_a_decayed_sum_of_convolved_frames() -> None:
    op = ConvStateSpace(**SHAPE, len_seq=5, kernel_b=1, kernel_c=1)
    inputs = op.inputs(np.random.default_rng(2))
    decay = inputs["a"][:3] + 1j * inputs["a"][3:]
    entered = inputs["u"] @ inputs["b"][0, 0]
    complex_frames = entered[..., :3] + 1j * entered[..., 3:]
    powers = np.array([decay**n for n in range(5)])
    for t in range(5):
        state = sum(powers[t - i] * complex_frames[:, i] for i in range(t + 1))
        parts = np.concatenate([np.real(state), np.imag(state)], axis=-1)
        np.testing.assert_allclose(op.reference(inputs)["y"][:, t], parts @ inputs["c"][0, 0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("held", [False, True])
def test_decays_close_to_nothing_and_to_one(algorithm: str, held: bool) -> None:
    op = StateScan(rows=2, len_seq=200, state_dim=6, chunk=64, algorithm=algorithm, held=held)
    inputs = dict(op.inputs(np.random.default_rng(3)))
    inputs["a"] = np.array([0, 1e-200, 1e-9, 1 - 1e-12, 1, np.cos(2), 0, 0, 0, 0, 0, np.sin(2)])
    expected = op.reference(inputs)["x"]
    got = op.program(Machine(2**16), inputs)["x"]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_composed_kernels_have_the_side_that_is_said() -> None:
    op = ConvStateSpace(**SHAPE, len_seq=4, kernel_a=3, recurrent=True)
    kernel = np.ones(3)
    for level in range(4):
        assert op.composed_side(level) == kernel.size
        kernel = np.convolve(kernel, kernel)


# ---- by hand -------------------------------------------------------------------------------


def test_a_layer_by_hand() -> None:
    op = ConvStateSpace(len_seq=8, height=4, width=4, channels=2, state_dim=3, kernel_c=1)
    work = op.work(2**20)
    frames = 8 * 16
    assert work.tensor_flops[FP32] == 2 * frames * 2 * 6 * 9 + 2 * frames * 6 * 2
    scan = (4 + 2 + 1 + 3 + 1) * 16  # Brent and Kung over eight frames, pixel by pixel
    assert work.vector_flops == 3 * (scan * 8 + 2 * 6)  # A^2 and A^4 once
    taps = 2 * 6 * 9 + 6 * 2
    assert work.bytes == 4 * (frames * (2 + 6 + 6 + 6 + 6 + 2) + taps + 6)
    assert (op.depth(), op.over(len_seq=1024).depth()) == (5, 19)
    assert op.state_bytes() == op.over(len_seq=9999).state_bytes() == 16 * 6 * 4


def test_a_frame_of_a_recurrence_costs_what_the_paper_says() -> None:
    """O(h w P (U k_B^2 + Y k_C^2))."""
    op = ConvStateSpace(**SHAPE, len_seq=1, kernel_b=3, kernel_c=5, recurrent=True)
    pixels, states, channels = 2 * 12, 3, 2
    flops = op.min_flops()[FP32]
    assert flops == 4 * pixels * states * (channels * 9 + channels * 25)
    assert op.over(len_seq=10).min_flops()[FP32] == 10 * flops
    assert op.over(len_seq=10).work(2**16).launches == 30
    assert op.over(kernel_a=3).min_flops()[FP32] == flops + 2 * pixels * 6 * 6 * 9


def test_bands_read_the_rows_around_them() -> None:
    op = SameConv(in_channels=1, height=10, width=1, out_channels=1, out_height=10, out_width=1,
                  kernel_h=4, kernel_w=1)  # fmt: skip
    assert op.rows_read(10) == 10
    assert op.rows_read(4) == (4 + 2) + (1 + 4 + 2) + (1 + 2)
    assert op.rows_read(1) == 3 + 4 * 7 + 3 + 2 + 0


# ---- refused -------------------------------------------------------------------------------


def test_wide_state_kernels_do_not_scan() -> None:
    with pytest.raises(InputError, match=r"grow to \(kernel_a - 1\) 2\^i \+ 1"):
        ConvStateSpace(**SHAPE, len_seq=4, kernel_a=3)


def test_a_chunk_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="make chunk smaller"):
        StateScan(rows=1, len_seq=2**14, state_dim=64, chunk=2**14).work(2**16)


@pytest.mark.parametrize(
    ("change", "why"),
    [({"stride": 2}, "use conv2d"), ({"direction": "bwd_data"}, "use conv2d"),
     ({"out_height": 3}, "as large as the input")],
)  # fmt: skip
def test_other_convolutions_are_refused(change: dict[str, Any], why: str) -> None:
    op = SameConv(in_channels=2, height=4, width=4, out_channels=2, out_height=4, out_width=4)
    with pytest.raises(InputError, match=why):
        op.over(**change)
