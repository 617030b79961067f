from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import FP8, FP16, FP32, FP64, DType
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.ops.fft_convolution import FFTConvolution
from workloads.ops.flash_fft_conv import FlashFFTConv

H100_BLOCK_BYTES = 227 * 1024


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[FlashFFTConv, int]:
    """An op of each order, and a fast memory that makes it stream 0, 1, ... outer stages."""
    length = draw(st.integers(1, 150))
    circular = draw(st.booleans())
    if circular:
        length = 2 ** (length % 8)
    order = draw(st.sampled_from([None, 2, 3, 4]))
    op = FlashFFTConv(
        batch=draw(st.integers(1, 3)),
        channels=draw(st.integers(1, 3)),
        len_seq=length,
        len_filter=draw(st.none() | st.integers(1, length)),
        order=order,
        circular=circular,
        gated=draw(st.booleans()),
        dtype=draw(st.sampled_from([FP16, FP8, FP32])),
    )
    num_outer = draw(st.integers(0, (order or 2) - 1))
    return op, int(op.needed_bytes(order or 2, num_outer)) + draw(st.integers(0, 600))


@proves("flashfftconv", shapes=300)
@given(case=convolutions())
def test_program_counts_what_the_closed_form_says(case: tuple[FlashFFTConv, int]) -> None:
    assert_proved(*case)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("dtype", [FP16, FP8, FP32])
@pytest.mark.parametrize("gated", [False, True])
def test_every_split_is_reached_and_proved_at_its_least_memory(
    order: int, dtype: DType, gated: bool
) -> None:
    op = FlashFFTConv(
        batch=2, channels=1, len_seq=300, len_filter=201, order=order, dtype=dtype, gated=gated
    )
    for num_outer in range(order):
        fast_bytes = float(op.needed_bytes(order, num_outer))
        assert op.tiling(fast_bytes)["num_outer"] == num_outer
        assert_proved(op, fast_bytes)


def test_a_large_outer_matrix_can_be_what_needs_the_memory() -> None:
    op = FlashFFTConv(batch=2, channels=1, len_seq=1500, order=2, gated=True)
    assert op.factors(2) == (64, 32)
    least = op.needed_bytes(2, 1)
    assert least == 4 * 64**2 + 64 * (4 + 4 + 8)  # one matrix; a column, its twiddles and result
    assert_proved(op, least)


@settings(max_examples=200, deadline=None)
@given(case=convolutions(), more=st.integers(1, 4_000))
def test_more_fast_memory_never_moves_more(case: tuple[FlashFFTConv, int], more: int) -> None:
    op, fast_bytes = case
    assert op.work(fast_bytes + more).bytes <= op.work(fast_bytes).bytes


@pytest.mark.parametrize(
    ("order", "small_bytes"), [(None, 2**16), (2, 9 * 2**20), (3, 2**18), (4, 2**16)]
)
def test_arrays_agree_with_scalars(order: int | None, small_bytes: int) -> None:
    rng = np.random.default_rng(7)
    length = np.concatenate(
        [rng.integers(1, 2**19, 60), 2 ** np.arange(20), 2 ** np.arange(20) + 1]
    )
    many = FlashFFTConv(batch=3, channels=8, len_seq=length, order=order, gated=True)
    for fast_bytes in (small_bytes, 2**20 + small_bytes, 50 * 2**20):
        counted, tiles = many.work(fast_bytes), many.tiling(fast_bytes)
        for i in range(length.size):
            op = many.over(len_seq=int(length[i]))
            one = op.work(fast_bytes)
            assert one.tensor_flops[FP16] == counted.tensor_flops[FP16][i]
            for counter in ("vector_flops", "read_bytes", "write_bytes", "launches"):
                every = np.broadcast_to(getattr(counted, counter), length.shape)
                assert getattr(one, counter) == every[i], counter
            for key, value in op.tiling(fast_bytes).items():
                assert value == np.broadcast_to(tiles[key], length.shape)[i], key


def test_flops_are_those_of_the_papers_cost_model() -> None:
    """Eq. 2: B H sum of 16 N N_i, here with N = 1024 complex points = 32 * 32."""
    op = FlashFFTConv(batch=2, channels=3, len_seq=1024, order=2)
    work = op.work(2**20)
    assert op.factors(2) == (32, 32)
    assert work.tensor_flops == {FP16: 6 * 16 * 1024 * (32 + 32)}
    assert work.vector_flops == 6 * (12 * 1024 + 6 * 1024)
    assert op.factors(3) == (16, 8, 8)
    assert op.factors(4) == (8, 8, 4, 4)


@pytest.mark.parametrize("log2_length", range(4, 22))
def test_the_chosen_order_has_the_least_tensor_flops_of_those_that_fill_the_units(
    log2_length: int,
) -> None:
    op = FlashFFTConv(batch=1, channels=1, len_seq=2**log2_length)
    full = [p for p in (2, 3, 4) if min(op.factors(p)) >= 16] or [2]
    best = min(full, key=lambda p: sum(op.factors(p)))
    assert op.tiling(2**30)["order"] == best
    flops = op.work(2**30).tensor_flops[FP16]
    assert flops == op.over(order=best).work(2**30).tensor_flops[FP16]


def test_fusion_ends_where_the_papers_does() -> None:
    """A padded length of 32K is the last that one H100 thread block fuses."""
    op = FlashFFTConv(batch=1, channels=1, len_seq=2 ** np.arange(8, 20))
    outer = np.asarray(op.tiling(H100_BLOCK_BYTES)["num_outer"])
    fused = dict(zip(2 ** np.arange(9, 21), outer == 0, strict=True))
    assert fused[32 * 1024]
    assert not fused[64 * 1024]
    assert (np.diff(outer) >= 0).all()


def test_fused_traffic_is_compulsory_but_for_the_tables() -> None:
    op = FlashFFTConv(batch=4, channels=8, len_seq=1024, gated=True, order=2)
    tables = 2 * 2 * 32**2 + 1024
    assert op.work(H100_BLOCK_BYTES).bytes == op.compulsory_bytes() + 4 * tables
    assert op.compulsory_bytes() == 4 * 8 * 1024 * 2 * 4 + 8 * 1024 * 4


def test_an_outer_stage_moves_every_point_four_times_more() -> None:
    op = FlashFFTConv(batch=4, channels=8, len_seq=4096, order=3)
    fused, streamed = op.needed_bytes(3, 0), op.needed_bytes(3, 1)
    more = op.work(streamed), op.work(fused)
    assert more[0].launches == more[1].launches + 2 == 3
    assert more[0].write_bytes - more[1].write_bytes == 2 * 32 * 4096 * 4
    assert more[0].read_bytes - more[1].read_bytes == 2 * 32 * 4096 * 4 + 4096 * 4
    assert more[0].flops == more[1].flops


def test_it_moves_several_times_less_than_the_unfused_convolution() -> None:
    """B 64, H 768, gated, 1K: the paper's PyTorch baseline is 7.93 times slower on an H100."""
    shape = {"batch": 64, "channels": 768, "len_seq": 1024, "gated": True}
    fused = FlashFFTConv(**shape).work(H100_BLOCK_BYTES)
    unfused = FFTConvolution(**shape).work(H100_BLOCK_BYTES)
    assert 5 < unfused.bytes / fused.bytes < 10
    assert fused.launches == 1


def test_more_memory_asked_for_means_fewer_outer_stages() -> None:
    for length in 2 ** np.arange(4, 21):
        op = FlashFFTConv(batch=1, channels=1, len_seq=length)
        for order in (2, 3, 4):
            needed = [op.needed_bytes(order, s) for s in range(order)]
            assert needed == sorted(needed, reverse=True)


def test_refusals() -> None:
    for order in (0, 1, 5, 2.5, "two", np.array([2, 3])):
        with pytest.raises(InputError, match=r"order = .* must be 2, 3, 4 or None"):
            FlashFFTConv(batch=1, channels=1, len_seq=8, order=order)
    with pytest.raises(InputError, match="flashfftconv: len_filter must not exceed len_seq"):
        FlashFFTConv(batch=1, channels=1, len_seq=8, len_filter=9)
    with pytest.raises(InputError, match="wider than its fp32 transforms"):
        FlashFFTConv(batch=1, channels=1, len_seq=8, dtype=FP64)
    op = FlashFFTConv(batch=1, channels=1, len_seq=512)
    least = op.needed_bytes(2, 1)
    assert op.work(least).launches == 3
    with pytest.raises(InputError, match="cannot hold the innermost stage of one row"):
        op.work(least - 1)
