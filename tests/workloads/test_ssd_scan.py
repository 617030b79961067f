"""Mamba-2's scan and step: proofs, the matrix form, the two forms against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads import registry
from workloads.ops.ssd_scan import Ssd, SsdScan, SsdStep


@st.composite
def heads(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 3))
    return {
        "batch": draw(st.integers(1, 2)),
        "num_groups": groups,
        "num_heads": groups * draw(st.integers(1, 4)),
        "head_dim": draw(st.integers(1, 5)),
        "state_dim": draw(st.integers(1, 6)),
        "skip": draw(st.booleans()),
        "dtype": draw(st.sampled_from([BF16, FP32])),
        "state_dtype": draw(st.sampled_from([BF16, FP32])),
    }


def prove(op: Ssd, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


@proves("ssd_scan", shapes=300)
@given(data=st.data(), shape=heads(), fast_bytes=st.integers(400, 4000))
def test_a_scan_counts_what_the_closed_form_says(
    data: st.DataObject, shape: dict[str, Any], fast_bytes: int
) -> None:
    op = SsdScan(
        **shape, len_seq=data.draw(st.integers(1, 20)), chunk=data.draw(st.integers(1, 9)),
        keep_state=data.draw(st.booleans()),
    )  # fmt: skip
    prove(op, fast_bytes)


@proves("ssd_step")
@given(shape=heads(), fast_bytes=st.integers(100, 2000))
def test_a_step_counts_what_the_closed_form_says(shape: dict[str, Any], fast_bytes: int) -> None:
    prove(SsdStep(**shape), fast_bytes)


SHAPE: dict[str, Any] = {
    "batch": 2, "num_heads": 4, "num_groups": 2, "head_dim": 3, "state_dim": 5,
}  # fmt: skip


def test_a_scan_is_masked_attention_with_decays() -> None:
    op = SsdScan(**SHAPE, len_seq=9)
    inputs = op.inputs(np.random.default_rng(1))
    dt = np.logaddexp(0, inputs["dt"] + inputs["bias"])
    total = np.cumsum(inputs["a"] * dt, axis=1)
    for h in range(4):
        c, b, x = inputs["c"][:, :, h // 2], inputs["b"][:, :, h // 2], inputs["x"][:, :, h]
        gap = total[:, :, None, h] - total[:, None, :, h]
        scores = np.tril(c @ b.swapaxes(1, 2) * np.exp(np.minimum(gap, 0)))
        expected = scores @ (dt[:, :, h, None] * x) + inputs["d"][h] * x
        np.testing.assert_allclose(op.reference(inputs)["y"][:, :, h], expected, atol=1e-12)


def test_a_prompt_and_a_step_are_a_longer_prompt() -> None:
    whole = SsdScan(**SHAPE, len_seq=8)
    inputs = whole.inputs(np.random.default_rng(2))
    numbers = {name: inputs[name] for name in ("a", "bias", "d")}
    tokens = {name: inputs[name] for name in ("x", "dt", "b", "c")}
    before = {name: values[:, :7] for name, values in tokens.items()}
    state = whole.over(len_seq=7).reference(before | numbers)["state"]
    last = {name: values[:, 7] for name, values in tokens.items()}
    step = SsdStep(**SHAPE).reference(last | numbers | {"state": state})
    expected = whole.reference(inputs)
    np.testing.assert_allclose(step["y"], expected["y"][:, 7])
    np.testing.assert_allclose(step["state"], expected["state"])


def test_groups_by_hand() -> None:
    op = SsdScan(num_heads=8, num_groups=2, head_dim=4, state_dim=16, len_seq=8, chunk=8)
    assert op.work(2**20).tensor_flops[BF16] == 2 * 2 * 64 * 16 + 8 * (2 * 64 * 4 + 4 * 8 * 64)
    tokens = 8 * (8 * 5 + 2 * 2 * 16) * 2
    assert op.work(2**20).read_bytes == tokens + 8 * 3 * 4
    assert op.work(2**20).write_bytes == 8 * 32 * 2 + 8 * 64 * 4
    # heads one at a time: B, C are read and their product is made 4 times
    beside = op.tiling(2**20)
    least = next(n for n in range(500, 5000) if _fits(op, n))
    assert (beside["held"], op.tiling(least)["held"]) == (4, 1)
    more = op.work(least).read_bytes - op.work(2**20).read_bytes
    assert more == 3 * 2 * 2 * 8 * 16 * 2


def _fits(op: SsdScan, fast_bytes: int) -> bool:
    try:
        op.tiling(fast_bytes)
    except InputError:
        return False
    return True


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_groups": 3}, "num_groups = 3 must divide num_heads = 4"),
        ({"chunk": 0}, "chunk = 0 must be a whole number"),
    ],
)
def test_impossible_scans_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        registry.build("ssd_scan", {"num_heads": 4, "len_seq": 64} | fields)


def test_a_chunk_too_long_for_fast_memory_is_refused() -> None:
    with pytest.raises(InputError, match="a shorter chunk takes less"):
        SsdScan(num_heads=4, len_seq=4096, chunk=1024).work(2**18)


def test_arrays_count_as_scalars_do() -> None:
    op = SsdScan(num_heads=8, num_groups=2, len_seq=64)
    many = op.over(len_seq=np.array([1.0, 64.0, 200.0])).work(2**18)
    for counter in ("flops", "bytes", "special_ops"):
        ones = [getattr(op.over(len_seq=n).work(2**18), counter) for n in (1, 64, 200)]
        assert np.broadcast_to(getattr(many, counter), 3).tolist() == ones, counter
