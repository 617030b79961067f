"""Legendre memory units and LMUFormer: proofs, hand counts, other truths, refusals."""

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
from workloads.ops.legendre_memory import LegendreMemory, LmuFormer, SpectrumProduct

formats = st.sampled_from([BF16, FP32])
few = st.integers(1, 3)
memories = st.floats(10, 14).map(lambda exponent: int(2**exponent))


def prove(op: ProvedOp, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


@proves("spectrum_product")
@given(batch=few, channels=few, points=st.integers(1, 30), fast_bytes=st.integers(20, 2000))
def test_products_of_spectra_count_what_the_closed_form_says(
    batch: int, channels: int, points: int, fast_bytes: int
) -> None:
    prove(SpectrumProduct(batch=batch, channels=channels, num_points=points), fast_bytes)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "batch": draw(few),
        "len_seq": draw(st.integers(1, 12)),
        "dim": draw(st.integers(1, 6)),
        "memory_dim": draw(st.none() | st.integers(1, 6)),
        "recurrent": draw(st.booleans()),
        "dtype": draw(formats),
    }


@proves("legendre_memory")
@given(shape=shapes(), fast_bytes=memories)
def test_a_memory_counts_what_the_closed_form_says(shape: dict[str, Any], fast_bytes: int) -> None:
    prove(LegendreMemory(**shape), fast_bytes)


@proves("lmuformer")
@given(shape=shapes(), convs=few, blocks=few, others=st.tuples(few, few), fast_bytes=memories)
def test_a_model_counts_what_the_closed_form_says(
    shape: dict[str, Any], convs: int, blocks: int, others: tuple[int, int], fast_bytes: int
) -> None:
    shape["len_seq"] = min(shape["len_seq"], 5)
    op = LmuFormer(
        **shape, num_convs=convs, num_blocks=blocks, in_channels=others[0], num_classes=others[1]
    )
    prove(op, fast_bytes)


def test_all_tokens_at_once_are_one_after_another() -> None:
    whole = LegendreMemory(batch=2, len_seq=13, dim=4, memory_dim=6)
    inputs = dict(whole.inputs(np.random.default_rng(1)))
    got = whole.program(Machine(2**16), inputs)["h"]
    inputs["m"] = np.zeros((2, 6))
    step = whole.over(recurrent=True)
    np.testing.assert_allclose(got, step.program(Machine(2**16), inputs)["h"], rtol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 1e-9, 1 - 1e-12, 1.0])
def test_memories_that_keep_all_or_nothing(decay: float) -> None:
    op = LegendreMemory(batch=1, len_seq=100, dim=2, memory_dim=3)
    inputs = dict(op.inputs(np.random.default_rng(2)))
    inputs["a"] = decay * np.eye(3)
    expected = op.reference(inputs)["h"]
    np.testing.assert_allclose(op.program(Machine(2**16), inputs)["h"], expected, rtol=1e-8)


def test_streaming_keeps_two_inputs_of_every_convolution() -> None:
    op = LmuFormer(len_seq=3, dim=2, in_channels=1, num_convs=1, recurrent=True)
    inputs = dict(op.inputs(np.random.default_rng(3)))
    inputs["history0"], inputs["history1"] = np.ones((1, 2, 1)), np.zeros((1, 2, 2))
    found = op.program(Machine(2**16), inputs)
    np.testing.assert_array_equal(found["history0"], inputs["x"][:, 1:])
    first = np.concatenate([inputs["history0"], inputs["x"]], axis=1)[0, :, 0]
    taps = inputs["conv0"][:, 0]
    embedded = np.stack([first[t : t + 3] @ taps for t in range(3)])
    np.testing.assert_allclose(found["history1"][0], embedded[1:])


def test_the_speech_model_by_hand() -> None:
    op = LmuFormer()
    embed = 3 * 256 * (128 + 4 * 256)
    block = 256 + 512 * 256 + 256 * 256 + 2 * 256 * 1024
    assert op.min_flops()[FP32] == 2 * 128 * (embed + block + 256 * 35)
    norms, biases = 2 * (4 * 256 + 256 + 1024 + 256), 1 + 256 + 256 + 1024 + 256 + 35
    assert op.num_parameters() == embed + block + 256 * 35 + norms + biases
    assert op.state_bytes() == op.over(len_seq=999).state_bytes()


def test_a_memory_by_hand() -> None:
    work = LegendreMemory(batch=2, len_seq=4, dim=3, memory_dim=5).work(2**20)
    transforms = (2 + 2 * 5) * (5 * 4 * 2 + 6 * 4)  # four points hold eight tokens
    assert work.vector_flops == transforms + 6 * 2 * 5 * 4
    assert work.launches == 5
    step = LegendreMemory(batch=2, len_seq=4, dim=3, memory_dim=5, recurrent=True)
    assert step.min_flops()[FP32] == 4 * 2 * 2 * (3 + 5 * 6 + 8 * 3)


def test_a_model_needs_layers() -> None:
    with pytest.raises(InputError, match="num_blocks = 0 must be a whole number from 1"):
        LmuFormer(num_blocks=0)
