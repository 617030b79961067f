"""The best chunk: the least time of those tried, for each shape, and honest about the others."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.errors import InputError, UnknownNameError
from simulator.estimate import estimate
from simulator.tuning import tuned
from workloads.numeric import Num
from workloads.op import CHUNKED, Op
from workloads.ops.linear_recurrence import LinearRecurrence
from workloads.ops.matmul import Matmul

H100 = catalog.device("h100-sxm")


def predicted(op: Op) -> Num:
    return estimate(op, on=H100).seconds


def test_the_chosen_chunk_is_the_fastest_of_all_that_fit() -> None:
    op = LinearRecurrence(batch=8, num_heads=16, len_seq=4096, key_dim=64)
    found = tuned(op, "chunk", predicted)
    assert set(found.seconds) | set(found.refused) == set(CHUNKED["chunk"])
    assert found.seconds[int(found.best)] == min(found.seconds.values())
    assert predicted(found.op) == found.seconds[int(found.best)]


def test_every_shape_of_an_array_gets_its_own_chunk() -> None:
    op = LinearRecurrence(num_heads=8, len_seq=np.asarray([16.0, 4096.0]), key_dim=64)

    def products_and_waits(tried: Op) -> Num:
        assert isinstance(tried, LinearRecurrence)
        return tried.chunk_squares() + 5e3 * (tried.num_chunks - 1)

    found = tuned(op, "chunk", products_and_waits)
    each = [tuned(op.over(len_seq=n), "chunk", products_and_waits).best for n in (16.0, 4096.0)]
    assert list(np.asarray(found.best)) == each
    assert each[0] < each[1]
    assert np.all(np.isfinite(np.asarray(predicted(found.op))))


def test_chunks_that_do_not_fit_are_named_with_the_reason() -> None:
    found = tuned(LinearRecurrence(num_heads=8, len_seq=4096, key_dim=128), "chunk", predicted)
    assert 512 in found.refused
    assert "cannot hold a chunk of 512 tokens" in found.refused[512]


def test_an_op_without_the_choice_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="choice of matmul 'chunk'"):
        tuned(Matmul(m=8, n=8, k=8), "chunk", predicted)


def test_an_op_that_no_chunk_fits_is_refused() -> None:
    op = LinearRecurrence(num_heads=8, len_seq=4096, key_dim=2**20)
    with pytest.raises(InputError, match="take a smaller chunk"):
        tuned(op, "chunk", predicted)
