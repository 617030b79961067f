"""Hydra's mixer and layer: proofs against the dense matrix, ranks, both directions alike."""

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
from workloads.op import ProvedOp
from workloads.ops.mamba2_layer import Mamba2Layer
from workloads.ops.quasi_separable import HydraLayer, MergeDirections, QuasiSeparable


def prove(op: ProvedOp, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


@st.composite
def mixers(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 2))
    return {
        "batch": draw(st.integers(1, 2)),
        "num_groups": groups,
        "num_heads": groups * draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(1, 4)),
        "state_dim": draw(st.integers(1, 4)),
        "len_seq": draw(st.integers(1, 12)),
        "chunk": draw(st.integers(1, 6)),
        "dtype": draw(st.sampled_from([BF16, FP32])),
    }


@proves("merge_directions")
@given(
    batch=st.integers(1, 2), length=st.integers(1, 9), heads=st.integers(1, 3),
    width=st.integers(1, 9), fast_bytes=st.integers(12, 200), dtype=st.sampled_from([BF16, FP32]),
)  # fmt: skip
def test_merging_counts_what_the_closed_form_says(
    batch: int, length: int, heads: int, width: int, fast_bytes: int, dtype: Any
) -> None:
    op = MergeDirections(
        batch=batch, len_seq=length, num_heads=heads, head_dim=width, dtype=dtype
    )  # fmt: skip
    prove(op, fast_bytes)


@proves("quasi_separable", shapes=300)
@given(shape=mixers(), fast_bytes=st.integers(500, 5000))
def test_the_mixer_is_the_dense_matrix(shape: dict[str, Any], fast_bytes: int) -> None:
    prove(QuasiSeparable(**shape), fast_bytes)


@proves("hydra_layer")
@given(data=st.data(), shape=mixers(), fast_bytes=st.integers(1500, 20000))
def test_a_layer_counts_what_the_closed_form_says(
    data: st.DataObject, shape: dict[str, Any], fast_bytes: int
) -> None:
    op = HydraLayer(
        **shape, width=data.draw(st.integers(1, 5)), dim=data.draw(st.none() | st.integers(1, 6))
    )
    prove(op, fast_bytes)


def matrix(op: QuasiSeparable, seed: int) -> Any:
    """The mixer's matrix, column by column, by its program's stages."""
    inputs = dict(op.inputs(np.random.default_rng(seed)))
    inputs["x"] = np.eye(int(op.len_seq))[None, :, None]
    return op.run(lambda kernel, given: kernel.reference(given), inputs, None)["y"][0, :, 0]


def test_blocks_off_the_diagonal_have_the_rank_of_the_state() -> None:
    op = QuasiSeparable(len_seq=12, num_heads=1, head_dim=12, state_dim=2)
    found = matrix(op, 1)
    for cut in (4, 6, 8):
        assert np.linalg.matrix_rank(found[cut:, :cut], tol=1e-9) <= 2
        assert np.linalg.matrix_rank(found[:cut, cut:], tol=1e-9) <= 2
    assert np.linalg.matrix_rank(found) > 4
    assert np.abs(found[0, 1:]).max() > 0 and np.abs(found[-1, :-1]).max() > 0


def test_a_turned_sequence_gives_turned_results() -> None:
    op = QuasiSeparable(batch=2, len_seq=7, num_heads=2, head_dim=3, state_dim=4)
    inputs = op.inputs(np.random.default_rng(2))
    turned = {name: inputs[name][:, ::-1] for name in ("x", "d")}
    for name in ("dt", "b", "c"):
        turned[name] = inputs[f"r{name}"][:, ::-1]
        turned[f"r{name}"] = inputs[name][:, ::-1]
    turned |= {name: inputs[name] for name in ("a", "bias")}
    both = [
        op.run(lambda kernel, given: kernel.reference(given), case, None)["y"]
        for case in (inputs, turned)
    ]
    np.testing.assert_allclose(both[1][:, ::-1], both[0], atol=1e-12)


def test_a_layer_looks_around_each_token() -> None:
    """With decays that forget at once only the convolution mixes: 3 tokens to either side."""
    op = HydraLayer(len_seq=16, num_heads=1, head_dim=4, state_dim=2)
    inputs = dict(op.inputs(np.random.default_rng(3)))
    inputs |= {"a": np.array([-1e9]), "bias": np.array([20.0])}
    base = op.reference(inputs)["y"]
    inputs["u"] = inputs["u"].copy()
    inputs["u"][0, 8] += 1
    moved = np.flatnonzero(np.abs(op.reference(inputs)["y"] - base).max(axis=2)[0] > 1e-9)
    assert (moved.min(), moved.max()) == (8 - 3 - 1, 8 + 3 + 1)


def test_two_scans_share_projections() -> None:
    shape: dict[str, Any] = {"len_seq": 2048, "num_heads": 24, "state_dim": 64, "width": 7}
    both, one = HydraLayer(**shape), Mamba2Layer(**shape)
    scans = [op.kernels()[name].min_flops()[BF16] for op, name in ((both, "mix"), (one, "scan"))]
    assert scans[0] == 2 * scans[1]
    assert 1 < both.weights() / one.weights() < 1.05
    assert 1 < both.work(2**40).flops / one.work(2**40).flops < 1.25


def test_a_mixer_is_linear_in_the_length() -> None:
    work = [QuasiSeparable(len_seq=n, num_heads=4).work(2**18) for n in (2**12, 2**16)]
    assert work[1].flops / work[0].flops == pytest.approx(16, rel=1e-3)
    assert work[1].bytes / work[0].bytes == pytest.approx(16, rel=1e-3)


def test_impossible_mixers_are_refused() -> None:
    for name in ("quasi_separable", "hydra_layer"):
        with pytest.raises(InputError, match="num_groups = 3 must divide num_heads = 4"):
            registry.build(name, {"num_heads": 4, "len_seq": 64, "num_groups": 3})
