from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.ops.embedding import Embedding, EmbeddingBackward

dtypes = st.sampled_from([BF16, FP8, FP32])
sizes = {
    "num_tokens": st.integers(1, 60),
    "vocab_size": st.integers(1, 50),
    "dim": st.integers(1, 90),
    "dtype": dtypes,
}
forward = st.builds(Embedding, **sizes)
backward = st.builds(EmbeddingBackward, **sizes, grad_dtype=dtypes)
AnyOp = Embedding | EmbeddingBackward


@proves("embedding")
@given(op=forward, fast_bytes=st.integers(16, 800), seed=st.integers(0, 99))
def test_lookup_counts_what_the_closed_form_says(op: Embedding, fast_bytes: int, seed: int) -> None:
    assert_proved(op, fast_bytes, seed=seed)


@proves("embedding_backward")
@given(op=backward, fast_bytes=st.integers(16, 800), seed=st.integers(0, 99))
def test_gradient_counts_what_the_closed_form_says(
    op: EmbeddingBackward, fast_bytes: int, seed: int
) -> None:
    assert_proved(op, fast_bytes, seed=seed)


def test_tokens_of_one_row_add_up() -> None:
    op = EmbeddingBackward(num_tokens=5, vocab_size=2, dim=3)
    inputs = {"grad": np.zeros((2, 3)), "dy": np.ones((5, 3)), "ids": np.ones(5)}
    got = op.program(Machine(100), inputs)["grad"]
    assert got.tolist() == [[0.0] * 3, [5.0] * 3]
    assert inputs["grad"].tolist() == [[0.0] * 3, [0.0] * 3]  # the caller's array is left alone


def test_a_small_vocabulary_lowers_the_bound_but_not_the_traffic() -> None:
    small = Embedding(num_tokens=1000, vocab_size=10, dim=64)
    large = small.over(vocab_size=1000)
    assert small.work(2**16).bytes == large.work(2**16).bytes == large.compulsory_bytes()
    assert large.compulsory_bytes() - small.compulsory_bytes() == 990 * 64 * 2
    back = EmbeddingBackward(num_tokens=1000, vocab_size=1000, dim=64)
    assert back.work(2**16).bytes == back.compulsory_bytes()
    assert back.over(vocab_size=10).compulsory_bytes() < back.compulsory_bytes()


@pytest.mark.parametrize("kind", [Embedding, EmbeddingBackward])
def test_arrays_agree_with_scalars(kind: type[AnyOp]) -> None:
    rng = np.random.default_rng(1)
    tokens, vocab, dim = (rng.integers(1, 5000, 40) for _ in range(3))
    many = kind(num_tokens=tokens, vocab_size=vocab, dim=dim)
    for i in range(40):
        one = kind(num_tokens=int(tokens[i]), vocab_size=int(vocab[i]), dim=int(dim[i]))
        for field in ("vector_flops", "read_bytes", "write_bytes"):
            got = np.broadcast_to(getattr(many.work(2**12), field), (40,))[i]
            assert got == getattr(one.work(2**12), field)
        assert np.asarray(many.compulsory_bytes())[i] == one.compulsory_bytes()
        for key, tile in one.tiling(2**12).items():
            assert np.asarray(many.tiling(2**12)[key])[i] == tile


@settings(max_examples=200, deadline=None)
@given(
    op=st.one_of(forward, backward),
    grow=st.sampled_from(["num_tokens", "dim"]),
    more=st.integers(1, 50),
)
def test_more_tokens_or_wider_rows_are_more_work(op: AnyOp, grow: str, more: int) -> None:
    grown = op.over(**{grow: getattr(op, grow) + more})
    assert grown.work(2**12).bytes > op.work(2**12).bytes
    assert grown.compulsory_bytes() > op.compulsory_bytes()


@pytest.mark.parametrize("bad", [0, -4, 2.5, float("nan"), float("inf"), 2**60, "many"])
@pytest.mark.parametrize("kind", [Embedding, EmbeddingBackward])
def test_bad_sizes_are_refused(kind: type[AnyOp], bad: object) -> None:
    with pytest.raises(InputError, match=f"{kind.name}: dim = "):
        kind(num_tokens=8, vocab_size=8, dim=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Embedding, EmbeddingBackward])
def test_too_small_a_fast_memory_is_refused(kind: type[AnyOp]) -> None:
    with pytest.raises(InputError, match="cannot hold"):
        kind(num_tokens=8, vocab_size=8, dim=8).work(4)
