"""Based linear attention, fused, with an encoder region, quadratic and token by token."""

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
from workloads.ops.based import Based
from workloads.ops.based_parallel import ParallelBased
from workloads.ops.causal_product import CausalProduct
from workloads.ops.prefix_linear_attention import PrefixLinearAttention


def prove(op: ProvedOp, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError as why:
        assume("cannot hold" not in str(why))
        raise
    assert_proved(op, fast_bytes)


heads = {"batch": st.integers(1, 2), "num_heads": st.integers(1, 2)}
widths = {"feature_dim": st.integers(1, 5), "value_dim": st.integers(1, 9)}
dtypes = st.sampled_from([BF16, FP32])


@st.composite
def fused(draw: st.DrawFn) -> dict[str, Any]:
    return {name: draw(value) for name, value in (heads | widths).items()} | {
        "len_seq": draw(st.integers(1, 20)),
        "chunk": draw(st.integers(1, 12)),
        "symmetric": draw(st.booleans()),
        "normalised": draw(st.booleans()),
        "dtype": draw(dtypes),
    }


@proves("based")
@given(shape=fused(), fast_bytes=st.integers(300, 6000))
def test_based_counts_what_the_closed_form_says(shape: dict[str, Any], fast_bytes: int) -> None:
    prove(Based(**shape), fast_bytes)


@proves("prefix_linear_attention")
@given(shape=fused(), len_encoder=st.none() | st.integers(1, 24),
       fast_bytes=st.integers(300, 6000))  # fmt: skip
def test_prefixes_count_what_the_closed_form_says(
    shape: dict[str, Any], len_encoder: int | None, fast_bytes: int
) -> None:
    prove(PrefixLinearAttention(**shape, len_encoder=len_encoder), fast_bytes)


@proves("based_parallel")
@given(len_seq=st.integers(1, 80), dtype=dtypes, fast_bytes=st.integers(400, 9000),
       **heads, **widths)  # fmt: skip
def test_pairs_count_what_the_closed_form_says(fast_bytes: int, **shape: Any) -> None:
    prove(ParallelBased(**shape), fast_bytes)


@proves("causal_product")
@given(
    len_seq=st.integers(1, 12), key_dim=st.integers(1, 20), value_dim=st.integers(1, 9),
    fast_bytes=st.integers(40, 900), **heads,
)  # fmt: skip
def test_stepping_counts_what_the_closed_form_says(fast_bytes: int, **shape: Any) -> None:
    prove(CausalProduct(**shape), fast_bytes)


# ---- exactness ------------------------------------------------------------------------------


def weights(q: Any, k: Any) -> Any:
    s = q @ k.T / q.shape[1] ** 0.5
    return 1 + s + s * s / 2


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_outputs_are_averages_by_the_taylor_series(symmetric: bool) -> None:
    op = PrefixLinearAttention(
        num_heads=1, len_seq=19, len_encoder=7, feature_dim=4, value_dim=5, chunk=8,
        symmetric=symmetric,
    )  # fmt: skip
    inputs = op.inputs(np.random.default_rng(0))
    q, k, v, k_enc, v_enc = (inputs[name][0, 0] for name in ("q", "k", "v", "k_enc", "v_enc"))
    causal, encoder = np.tril(weights(q, k)), weights(q, k_enc)
    expected = (causal @ v + encoder @ v_enc) / (causal.sum(1) + encoder.sum(1))[:, None]
    np.testing.assert_allclose(op.program(Machine(2**14), inputs)["o"][0, 0], expected, rtol=1e-9)


def test_all_implementations_agree() -> None:
    rng = np.random.default_rng(1)
    fused = Based(num_heads=2, len_seq=40, feature_dim=3, value_dim=4, chunk=16, normalised=False)
    inputs = fused.inputs(rng)
    pairs = ParallelBased(num_heads=2, len_seq=40, feature_dim=3, value_dim=4)
    o = fused.program(Machine(2**14), inputs)["o"]
    np.testing.assert_allclose(pairs.program(Machine(2**12), inputs)["o"], o, rtol=1e-9)
    phi = {}
    for name in ("q", "k"):
        flat = inputs[name].reshape(-1, 3)
        phi[name] = fused.features().over(rows=80).reference({"x": flat})["y"].reshape(1, 2, 40, 13)
    stepped = CausalProduct(num_heads=2, len_seq=40, key_dim=13, value_dim=4)
    got = stepped.program(Machine(2**9), phi | {"v": inputs["v"]})["o"]
    np.testing.assert_allclose(got, o, rtol=1e-9)


def test_decoding_goes_on_where_the_prompt_ended() -> None:
    """phi's d^(-1/4) and 2^(-1/2) fall on queries and keys alike, the states differ by them."""
    op = Based(num_heads=2, len_seq=9, feature_dim=3, value_dim=4)
    inputs = op.inputs(np.random.default_rng(2))
    expected = op.program(Machine(2**14), inputs)["o"]
    step = op.step()
    held = {"state": np.zeros((1, 2, 13, 4)), "total": np.zeros((1, 2, 13))}
    for t in range(9):
        token = {
            n: op.features().reference({"x": inputs[n][0, :, t]})["y"][None] for n in ("q", "k")
        }
        found = step.program(Machine(2**12), token | held | {"v": inputs["v"][:, :, t]})
        held = {name: found[name] for name in held}
        np.testing.assert_allclose(found["o"], expected[:, :, t], rtol=1e-9)
    assert step.state_bytes() == op.state_bytes() == 2 * 4 * 13 * 5


def test_a_late_token_changes_nothing_before_it_but_an_encoded_one_does() -> None:
    op = PrefixLinearAttention(num_heads=1, len_seq=12, feature_dim=2, value_dim=2, chunk=4)
    inputs = op.inputs(np.random.default_rng(3))
    before = op.program(Machine(2**13), inputs)["o"]
    inputs["v"][:, :, 7] += 1
    after = op.program(Machine(2**13), inputs)["o"]
    np.testing.assert_array_equal(after[:, :, :7], before[:, :, :7])
    assert not np.allclose(after[:, :, 7:], before[:, :, 7:])
    inputs["v_enc"][:, :, 5] += 1
    assert not np.allclose(op.program(Machine(2**13), inputs)["o"][:, :, 0], before[:, :, 0])


# ---- by hand --------------------------------------------------------------------------------


def test_a_prompt_by_hand() -> None:
    """2 sequences of 4 heads, 160 tokens in chunks of 64, 64 and 32, 80 of an encoder."""
    op = PrefixLinearAttention(batch=2, num_heads=4, len_seq=160, normalised=False)
    squares = 2 * 64**2 + 32**2
    work = op.work(2**20)
    decoder = 2 * squares * (16 + 64) + 4 * 160 * (16 + 256) * 64
    assert work.tensor_flops[BF16] == 8 * (decoder + 2 * 80 * (16 + 256) * 64)
    vector = 160 * (16 + 16 + 256 + 256) + 80 * 256 + 6 * squares
    vector += 64 * (160 + 160 + 3 + 80 + 2)
    assert work.vector_flops == 8 * vector
    assert work.bytes == op.compulsory_bytes() == 8 * 2 * (160 * 160 + 80 * 80)
    assert (op.chunks(), op.encoder_chunks(), work.launches) == (3, 2, 1)
    assert op.state_bytes() == 8 * 4 * 273 * 64


def test_products_kept_once_shrink_the_state() -> None:
    full = Based(num_heads=1, len_seq=64)
    once = full.over(symmetric=True)
    assert (full.num_features, once.num_features) == (1 + 16 + 256, 1 + 16 + 136)
    assert once.state_bytes() < 0.57 * full.state_bytes()


def test_a_prompt_read_twice_costs_twice_but_a_prefix_a_quarter_more() -> None:
    once = Based(num_heads=1, len_seq=4096)
    twice, prefix = once.over(len_seq=8192), PrefixLinearAttention(num_heads=1, len_seq=4096)
    flops = [float(sum(op.min_flops().values())) for op in (once, twice, prefix)]
    assert flops[1:] == [2 * flops[0], 1.25 * flops[0]]


# ---- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Based(num_heads=1, len_seq=512, chunk=512).work(2**16), "take a smaller chunk"),
        (lambda: PrefixLinearAttention(num_heads=1, len_seq=4, len_encoder=0), "len_encoder"),
        (lambda: ParallelBased(num_heads=1, len_seq=64).work(64), "a query and a block of keys"),
        (lambda: CausalProduct(num_heads=1, len_seq=4, key_dim=8).work(64), "a row of the state"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()
