from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import FP8, FP16, FP32, FP64
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.ops.fft_convolution import (
    FFTConvolution,
    ceil_log2,
    floor_log2,
    power_of_two,
)


@st.composite
def convolutions(draw: st.DrawFn) -> FFTConvolution:
    length = draw(st.integers(1, 70))
    circular = draw(st.booleans())
    if circular:
        length = 2 ** (length % 7)
    return FFTConvolution(
        circular=circular,
        batch=draw(st.integers(1, 3)),
        channels=draw(st.integers(1, 3)),
        len_seq=length,
        len_filter=draw(st.none() | st.integers(1, length)),
        gated=draw(st.booleans()),
        dtype=draw(st.sampled_from([FP16, FP8, FP32])),
    )


@proves("fft_convolution", shapes=250)
@given(op=convolutions(), fast_bytes=st.integers(32, 2_500))
def test_program_counts_what_the_closed_form_says(op: FFTConvolution, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@pytest.mark.parametrize(
    ("fast_bytes", "passes"), [(32, 7), (64, 4), (128, 3), (256, 2), (1024, 2), (2048, 1)]
)
def test_every_number_of_passes_is_reached_and_proved(fast_bytes: int, passes: int) -> None:
    op = FFTConvolution(batch=2, channels=1, len_seq=100, len_filter=57)
    assert op.num_points == 128
    assert op.tiling(fast_bytes)["num_passes"] == passes
    assert_proved(op, fast_bytes)


@settings(max_examples=200, deadline=None)
@given(op=convolutions(), fast_bytes=st.integers(32, 2_500), more=st.integers(1, 2_500))
def test_more_fast_memory_never_moves_more(op: FFTConvolution, fast_bytes: int, more: int) -> None:
    assert op.work(fast_bytes + more).bytes <= op.work(fast_bytes).bytes


def test_powers_of_two_are_exact_around_every_power() -> None:
    for q in range(1, 51):
        for size in (2**q - 1, 2**q, 2**q + 1):
            least = next(p for p in range(q + 2) if 2**p >= size)
            most = max(p for p in range(q + 2) if 2**p <= size)
            assert ceil_log2(size) == ceil_log2(np.array([float(size)]))[0] == least
            assert floor_log2(size) == floor_log2(np.array([float(size)]))[0] == most
        assert power_of_two(q) == power_of_two(np.array([float(q)]))[0] == 2**q


@pytest.mark.parametrize("fast_bytes", [64, 1000, 2**17, 50 * 2**20])
def test_arrays_agree_with_scalars(fast_bytes: int) -> None:
    rng = np.random.default_rng(5)
    length = np.concatenate([rng.integers(1, 2**20, 60), [1, 2, 3, 2**14, 2**14 + 1, 2**19]])
    taps = np.maximum(length // rng.integers(1, 9, length.size), 1)
    many = FFTConvolution(batch=3, channels=8, len_seq=length, len_filter=taps, gated=True)
    counted = many.work(fast_bytes)
    for i in range(length.size):
        one = many.over(len_seq=int(length[i]), len_filter=int(taps[i])).work(fast_bytes)
        for counter in ("vector_flops", "read_bytes", "write_bytes", "launches"):
            assert getattr(one, counter) == np.asarray(getattr(counted, counter))[i], counter


def test_the_filter_is_as_long_as_the_sequence_unless_said_otherwise() -> None:
    op = FFTConvolution(batch=1, channels=2, len_seq=np.array([5, 100]))
    same = FFTConvolution(batch=1, channels=2, len_seq=np.array([5, 100]), len_filter=[5, 100])
    assert np.array_equal(op.work(2**16).bytes, same.work(2**16).bytes)


def test_worked_number() -> None:
    """1K tokens and taps: 1024 complex points, one pass each way through 64 KiB."""
    op = FFTConvolution(batch=2, channels=3, len_seq=1024)
    work = op.work(64 * 1024)
    assert work.launches == 5
    assert work.vector_flops == 15 * (5 * 1024 * 10 + 6 * 1024) + 6 * 6 * 1024
    # u, two spectra of 8 KiB, the cropped fp32 row; the fp32 filter and its spectrum per channel
    assert work.read_bytes == 6 * (2048 + 2 * 8192 + 4096) + 3 * (4096 + 8192)
    assert work.write_bytes == 6 * (3 * 8192 + 2048) + 3 * 8192


def test_gates_are_two_more_kernels() -> None:
    op = FFTConvolution(batch=2, channels=3, len_seq=1000, len_filter=100)
    plain, gated = op.work(2**16), op.over(gated=True).work(2**16)
    sequence_bytes = 2 * 3 * 1000 * 2
    assert gated.launches == plain.launches + 2
    assert gated.read_bytes - plain.read_bytes == 4 * sequence_bytes
    assert gated.write_bytes - plain.write_bytes == 2 * sequence_bytes
    assert gated.vector_flops - plain.vector_flops == 2 * 2 * 3 * 1000


def test_transforms_need_no_matrix_product() -> None:
    op = FFTConvolution(batch=1, channels=1, len_seq=64)
    assert not op.work(2**16).tensor_flops
    assert not op.min_flops()


def test_refusals() -> None:
    with pytest.raises(InputError, match="len_filter must not exceed len_seq"):
        FFTConvolution(batch=1, channels=1, len_seq=8, len_filter=9)
    with pytest.raises(InputError, match="len_filter must not exceed len_seq"):
        FFTConvolution(batch=1, channels=1, len_seq=np.array([8, 80]), len_filter=9)
    with pytest.raises(InputError, match="fft_convolution: len_filter = 0 "):
        FFTConvolution(batch=1, channels=1, len_seq=8, len_filter=0)
    with pytest.raises(InputError, match="wider than its fp32 transforms"):
        FFTConvolution(batch=1, channels=1, len_seq=8, dtype=FP64)
    with pytest.raises(InputError, match="cannot hold one butterfly"):
        FFTConvolution(batch=1, channels=1, len_seq=8).work(31)
