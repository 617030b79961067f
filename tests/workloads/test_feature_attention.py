"""Linear attention by features, additive decays, codes and windows: proofs, counts, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError, UnknownNameError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.op import ProvedOp
from workloads.ops.feature_attention import FeatureAttention
from workloads.ops.feature_map import FEATURES, HEDGEHOG, RELU, TAYLOR, KernelFeatures
from workloads.ops.lightnet import AdditiveDecay, LightNet
from workloads.ops.linear_recurrence import LinearRecurrence
from workloads.ops.long_vq import LongVq, OneHot
from workloads.ops.recurrent_step import RecurrentStep
from workloads.ops.scattered_attention import ScatteredAttention, WindowReadout, WindowStates

memories = st.floats(12, 15).map(lambda exponent: int(2**exponent))
dtypes = st.sampled_from([BF16, FP32])
features = st.sampled_from(sorted(FEATURES))


def prove(op: ProvedOp, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError as why:
        assume("cannot hold" not in str(why))
        raise
    assert_proved(op, fast_bytes)


@st.composite
def heads(draw: st.DrawFn) -> dict[str, Any]:
    update = draw(st.booleans())
    return {
        "batch": draw(st.integers(1, 2)),
        "num_heads": draw(st.integers(1, 2)),
        "head_dim": draw(st.integers(1, 8)),
        "len_seq": 1 if update else draw(st.integers(1, 20)),
        "update": update,
        "chunk": draw(st.integers(1, 24)),
        "dtype": draw(dtypes),
    }


@proves("kernel_features")
@given(rows=st.integers(1, 9), dim=st.integers(1, 9), feature=features, dtype=dtypes,
       fast_bytes=st.integers(20, 900))  # fmt: skip
def test_features_count_what_the_closed_form_says(
    rows: int, dim: int, feature: str, dtype: Any, fast_bytes: int
) -> None:
    prove(KernelFeatures(rows=rows, dim=dim, feature=feature, dtype=dtype), fast_bytes)


@proves("recurrent_step")
@given(
    batch=st.integers(1, 2), num_heads=st.integers(1, 3), dk=st.integers(1, 9),
    dv=st.none() | st.integers(1, 9), decay=st.booleans(), normalised=st.booleans(), dtype=dtypes,
    fast_bytes=st.integers(40, 900),
)  # fmt: skip
def test_a_step_counts_what_the_closed_form_says(
    dk: int, dv: int | None, fast_bytes: int, **shape: Any
) -> None:
    prove(RecurrentStep(key_dim=dk, value_dim=dv, **shape), fast_bytes)


@proves("feature_attention")
@given(shape=heads(), feature=features, fast_bytes=memories)
def test_featured_attention_counts_what_the_closed_form_says(
    shape: dict[str, Any], feature: str, fast_bytes: int
) -> None:
    prove(FeatureAttention(**shape, feature=feature), fast_bytes)


@proves("additive_decay")
@given(
    streams=st.integers(1, 3), len_seq=st.integers(1, 12), dim=st.integers(1, 9),
    held=st.booleans(), dtype=dtypes, fast_bytes=st.integers(12, 400),
)  # fmt: skip
def test_additive_decays_count_what_the_closed_form_says(fast_bytes: int, **shape: Any) -> None:
    prove(AdditiveDecay(**shape), fast_bytes)


@proves("lightnet")
@given(
    shape=heads(), causal=st.booleans(), value_dim=st.none() | st.integers(1, 8),
    fast_bytes=memories,
)  # fmt: skip
def test_lightnet_counts_what_the_closed_form_says(
    shape: dict[str, Any], causal: bool, value_dim: int | None, fast_bytes: int
) -> None:
    prove(
        LightNet(**shape, causal=causal or shape["update"], value_dim=value_dim), fast_bytes
    )  # fmt: skip


@proves("one_hot")
@given(rows=st.integers(1, 9), cols=st.integers(1, 40), dtype=dtypes,
       fast_bytes=st.integers(8, 300))  # fmt: skip
def test_one_hot_rows_count_what_the_closed_form_says(
    rows: int, cols: int, dtype: Any, fast_bytes: int
) -> None:
    prove(OneHot(rows=rows, cols=cols, dtype=dtype), fast_bytes)


@proves("longvq")
@given(shape=heads(), num_codes=st.integers(1, 12), fast_bytes=memories)
def test_attention_to_codes_counts_what_the_closed_form_says(
    shape: dict[str, Any], num_codes: int, fast_bytes: int
) -> None:
    prove(LongVq(**shape, num_codes=num_codes), fast_bytes)


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    voxels = draw(st.integers(1, 40))
    return {
        "num_voxels": voxels,
        "num_windows": draw(st.integers(1, voxels)),
        "num_heads": draw(st.integers(1, 2)),
        "head_dim": draw(st.integers(1, 6)),
        "group": draw(st.integers(1, 9)),
        "dtype": draw(dtypes),
    }


@proves("window_states", "window_readout", "scattered_attention")
@given(shape=windows(), fast_bytes=st.integers(300, 1500))
def test_windows_count_what_the_closed_form_says(shape: dict[str, Any], fast_bytes: int) -> None:
    for kind in (WindowStates, WindowReadout, ScatteredAttention):
        assert_proved(kind(**shape), fast_bytes)


# ---- step by step ----------------------------------------------------------------------------


STEPPED = [
    *(FeatureAttention(num_heads=2, len_seq=17, head_dim=5, chunk=4, feature=f) for f in FEATURES),
    LightNet(num_heads=2, len_seq=17, head_dim=5, chunk=4, causal=True),
    LongVq(num_heads=2, len_seq=17, head_dim=5, chunk=4, num_codes=6),
]
EMPTY = {"state": 0.0, "total": 0.0, "average": 0.0, "z": -700.0}


@pytest.mark.parametrize("op", STEPPED, ids=lambda op: f"{op.name}-{getattr(op, 'feature', '')}")
def test_token_after_token_gives_what_the_chunks_give(op: Any) -> None:
    inputs = op.inputs(np.random.default_rng(1))
    whole = op.program(Machine(2**16), inputs)["o"]
    one = op.over(len_seq=1, update=True)
    given_one = one.inputs(np.random.default_rng(2))
    held = {name: np.full_like(given_one[name], EMPTY[name]) for name in EMPTY if name in given_one}
    assert held
    for t in range(17):
        sequences = {n: x for n, x in inputs.items() if x.ndim == 4 and x.shape[2] == 17}
        token = {name: values[:, :, t : t + 1] for name, values in sequences.items()}
        found = one.program(Machine(2**16), inputs | token | held)
        held = {name: found[name] for name in held}
        np.testing.assert_allclose(found["o"][:, :, 0], whole[:, :, t], rtol=1e-8, atol=1e-10)
    elements = sum(values.size for values in held.values())
    assert op.state_bytes() == one.state_bytes() == 4 * elements


def test_a_late_token_changes_nothing_before_it() -> None:
    for op in STEPPED:
        inputs = op.inputs(np.random.default_rng(3))  # type: ignore[attr-defined]
        before = op.program(Machine(2**16), inputs)["o"]  # type: ignore[attr-defined]
        inputs["v"][:, :, 9] += 1
        after = op.program(Machine(2**16), inputs)["o"]  # type: ignore[attr-defined]
        np.testing.assert_array_equal(before[:, :, :9], after[:, :, :9])
        assert not np.allclose(before[:, :, 9:], after[:, :, 9:])


# ---- by hand -----------------------------------------------------------------------------------


def test_taylor_features_are_the_exponential_to_second_order() -> None:
    op = KernelFeatures(rows=2, dim=16, feature=TAYLOR)
    x = np.random.default_rng(0).standard_normal((2, 16))
    q, k = op.program(Machine(2**14), {"x": x})["y"]
    s = x[0] @ x[1] / 4
    assert q @ k == pytest.approx(1 + s + s * s / 2, rel=1e-12)
    assert op.width == 1 + 16 + 256


def test_hedgehog_features_stay_finite_for_large_inputs() -> None:
    op = KernelFeatures(rows=1, dim=2, feature=HEDGEHOG)
    y = op.program(Machine(2**10), {"x": np.array([[2000.0, -1.0]])})["y"]
    np.testing.assert_allclose(y, [[1, 0, 0, 0]], atol=1e-12)


def test_hedgehog_by_hand() -> None:
    """2 sequences of 3 heads, 100 tokens of 16: N = 600 rows, 32 features."""
    op = FeatureAttention(batch=2, num_heads=3, len_seq=100, head_dim=16, feature=HEDGEHOG)
    recurrence = op.recurrence()
    assert isinstance(recurrence, LinearRecurrence) and recurrence.normalised
    assert recurrence.min_flops()[BF16] == 4 * 600 * 16 * 32
    work = op.work(2**20)
    mapped = 2 * 2 * 600 * 16**2
    squares = 64**2 + 36**2  # chunks of 64 and 36 tokens
    chunks = 6 * (2 * squares * (32 + 16) + 2 * 100 * 32) + 4 * 600 * 16 * 32
    assert work.tensor_flops[BF16] == mapped + chunks
    assert work.launches == 5
    assert op.state_bytes() == 2 * 3 * 4 * 32 * 17


def test_a_map_without_weights_has_no_product_before_it() -> None:
    names = [s.name for s in FeatureAttention(num_heads=1, len_seq=9, head_dim=4).stages()]
    assert names == ["features", "recur"]
    relu = FeatureAttention(num_heads=1, len_seq=9, head_dim=4, feature=RELU)
    assert next((s.name, s.times) for s in relu.stages()) == ("project", 2)


def test_lightnet_takes_one_pass_whatever_the_axes() -> None:
    for axes, others in ((1, 2), (2, 4), (3, 6)):
        for causal in (True, False):
            op = LightNet(num_heads=4, len_seq=64, head_dim=16, num_axes=axes, causal=causal)
            assert (op.num_scans(), op.directional_scans()) == (1, others)
    op = LightNet(batch=2, num_heads=4, len_seq=100, head_dim=16, value_dim=8)
    assert op.work(2**20).tensor_flops[BF16] == 4 * 8 * 100 * 16 * 8


def test_unordered_lightnet_does_not_see_the_order() -> None:
    op = LightNet(num_heads=1, len_seq=12, head_dim=4)
    inputs = op.inputs(np.random.default_rng(0))
    order = np.random.default_rng(1).permutation(12)
    o = op.program(Machine(2**14), inputs)["o"]
    turned = op.program(Machine(2**14), {name: x[:, :, order] for name, x in inputs.items()})["o"]
    np.testing.assert_allclose(turned, o[:, :, order], rtol=1e-12)


def test_attention_to_codes_is_exact_where_keys_are_codes() -> None:
    """No averaging (decay 0), every key a code: plain causal attention over the keys."""
    op = LongVq(num_heads=1, len_seq=9, head_dim=4, num_codes=5, chunk=4)
    inputs = op.inputs(np.random.default_rng(0))
    inputs["decay"][:] = 0
    inputs["x"] = inputs["codes"][:, [0, 3, 3, 1, 4, 2, 0, 1, 1]][None]
    x = inputs["x"][0, 0]
    weight = np.tril(np.exp(x @ x.T / 2))
    expected = weight @ inputs["v"][0, 0] / weight.sum(1, keepdims=True)
    np.testing.assert_allclose(op.program(Machine(2**14), inputs)["o"][0, 0], expected, rtol=1e-10)


def test_windows_cost_what_their_voxels_cost_however_they_are_spread() -> None:
    op = ScatteredAttention(num_voxels=60, num_windows=3, num_heads=2, head_dim=4, group=8)
    inputs = op.inputs(np.random.default_rng(0))
    found = []
    for lengths in ([20, 20, 20], [1, 1, 58], [17, 40, 3]):
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        inputs["places"] = np.stack([first, lengths], axis=1).astype(float)
        machine = Machine(2**12)
        o = op.program(machine, inputs)["o"]
        np.testing.assert_allclose(o, op.reference(inputs)["o"], rtol=1e-9)
        found.append(machine.counted())
    assert found[0] == found[1] == found[2]
    assert found[0].tensor_flops[BF16] == 4 * 60 * 2 * 16


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ScatteredAttention(num_voxels=9, num_windows=10, num_heads=1, head_dim=4),
         "scattered_attention: num_windows = 10 is more than the num_voxels = 9"),
        (lambda: LightNet(num_heads=1, len_seq=1, head_dim=4, update=True), "set causal"),
        (lambda: LightNet(num_heads=1, len_seq=2, head_dim=4, update=True), "one step"),
        (lambda: LongVq(num_heads=1, len_seq=2, head_dim=4, num_codes=3, update=True), "one step"),
        (lambda: FeatureAttention(num_heads=1, len_seq=2, head_dim=4, update=True), "one step"),
        (lambda: WindowStates(
            num_voxels=9, num_windows=1, num_heads=1, head_dim=4).work(64), "smaller head_dim"),
        (lambda: LongVq(num_heads=1, len_seq=64, head_dim=64, num_codes=4096).work(2**17),
         "smaller chunk"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()


def test_an_unknown_map_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="feature"):
        FeatureAttention(num_heads=1, len_seq=2, head_dim=4, feature="porcupine")
