from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.ops.selective_scan import SelectiveScan, SelectiveScanUnfused

Scan = SelectiveScan | SelectiveScanUnfused

SIZES = {
    "batch": st.integers(1, 3),
    "len_seq": st.integers(1, 12),
    "channels": st.integers(1, 20),
    "state_dim": st.integers(1, 9),
    "gated": st.booleans(),
    "delta_softplus": st.booleans(),
    "dtype": st.sampled_from([BF16, FP8, FP32]),
}
fused = st.builds(SelectiveScan, **SIZES)
unfused = st.builds(SelectiveScanUnfused, state_dtype=st.sampled_from([FP32, FP16]), **SIZES)
PROVED_KINDS = [SelectiveScan, SelectiveScanUnfused]


def least_bytes(op: Scan) -> int:
    """The least fast memory the op accepts, found without knowing its formula."""
    low, high = 0, 2**14
    while high - low > 1:
        middle = (low + high) // 2
        try:
            op.tiling(middle)
            high = middle
        except InputError:
            low = middle
    return high


@proves("mamba_scan")
@given(op=fused, slack_bytes=st.integers(0, 6_000))
def test_fused_program_counts_what_the_closed_form_says(
    op: SelectiveScan, slack_bytes: int
) -> None:
    assert_proved(op, least_bytes(op) + slack_bytes)


@proves("mamba_scan_unfused")
@given(op=unfused, slack_bytes=st.integers(0, 4_000))
def test_unfused_program_counts_what_the_closed_form_says(
    op: SelectiveScanUnfused, slack_bytes: int
) -> None:
    assert_proved(op, least_bytes(op) + slack_bytes)


@settings(max_examples=200, deadline=None)
@given(op=st.one_of(fused, unfused), slack_bytes=st.integers(0, 6_000), more=st.integers(1, 6_000))
def test_more_fast_memory_never_moves_more(op: Scan, slack_bytes: int, more: int) -> None:
    fast_bytes = least_bytes(op) + slack_bytes
    assert op.work(fast_bytes + more).bytes <= op.work(fast_bytes).bytes


@pytest.mark.parametrize("kind", PROVED_KINDS)
def test_arrays_agree_with_scalars(kind: type[Scan]) -> None:
    rng = np.random.default_rng(3)
    length, channels, state = (rng.integers(1, high, 200) for high in (9_000, 9_000, 70))
    for fast_bytes in (2**14, 2**20):
        many = kind(batch=2, len_seq=length, channels=channels, state_dim=state).work(fast_bytes)
        for i in range(0, 200, 7):
            one = kind(
                batch=2,
                len_seq=int(length[i]),
                channels=int(channels[i]),
                state_dim=int(state[i]),
            ).work(fast_bytes)
            for counter in ("vector_flops", "special_ops", "read_bytes", "write_bytes"):
                assert getattr(one, counter) == np.asarray(getattr(many, counter))[i], counter


@pytest.mark.parametrize("kind", PROVED_KINDS)
def test_shape_and_fast_memory_sweep_together(kind: type[Scan]) -> None:
    op = kind(batch=1, len_seq=np.array([[64], [128]]), channels=4096)
    swept = op.work(np.array([2.0**14, 2.0**17, 2.0**20]))
    assert np.shape(swept.read_bytes) == (2, 3)
    assert np.asarray(swept.read_bytes)[1, 2] == op.over(len_seq=128).work(2**20).read_bytes


def test_a_fused_scan_that_fits_moves_only_what_it_must() -> None:
    op = SelectiveScan(batch=2, len_seq=100, channels=64)
    assert op.work(2**20).bytes == op.compulsory_bytes()
    assert op.work(2**20).launches == 1


def test_shared_vectors_are_read_once_per_channel_tile() -> None:
    op = SelectiveScan(batch=3, len_seq=50, channels=1000, state_dim=16)
    tiles = op.tiling(50_000)["num_channel_tiles"]
    assert tiles > 1
    extra_bytes = op.work(50_000).bytes - op.compulsory_bytes()
    assert extra_bytes == (tiles - 1) * 3 * 50 * 2 * 16 * 2


@settings(max_examples=200, deadline=None)
@given(op=fused, slack_bytes=st.integers(0, 3_000))
def test_the_time_chunk_takes_all_the_room_that_is_left(
    op: SelectiveScan, slack_bytes: int
) -> None:
    fast_bytes = least_bytes(op) + slack_bytes
    tiles = op.tiling(fast_bytes)
    machine = Machine(fast_bytes)
    op.program(machine, op.inputs(np.random.default_rng(0)))
    e = op.dtype.bytes_per_element
    one_more_step = e * (2 * op.state_dim + tiles["tile_channels"] * (2 + op.gated))
    assert tiles["tile_steps"] == op.len_seq or fast_bytes - machine.peak_bytes < one_more_step


def test_fusing_saves_a_factor_of_the_order_of_the_state_size() -> None:
    """Section 3.3.2 of the paper: O(B L D N) of traffic becomes O(B L D + D N)."""
    shape = {"batch": 8, "len_seq": 2048, "channels": 5120}
    fast_bytes = 64 * 2**20
    saved = [
        SelectiveScanUnfused(state_dim=n, **shape).work(fast_bytes).bytes
        / SelectiveScan(state_dim=n, **shape).work(fast_bytes).bytes
        for n in (16, 32, 64)
    ]
    # 6 N fp32 values against four bf16 ones, plus the unfused kernels' second look at x: 3 N.
    assert saved == pytest.approx([3 * n for n in (16, 32, 64)], rel=0.05)


def test_fused_and_unfused_do_the_same_arithmetic() -> None:
    shape = {"batch": 2, "len_seq": 77, "channels": 130, "state_dim": 12}
    one, other = (kind(**shape).work(2**20) for kind in PROVED_KINDS)
    assert one.vector_flops == other.vector_flops == 2 * 77 * 130 * (6 * 12 + 7)
    assert one.special_ops == other.special_ops == 2 * 77 * 130 * (12 + 4)


@pytest.mark.parametrize("kind", PROVED_KINDS)
def test_options_cost_what_they_do(kind: type[Scan]) -> None:
    plain = kind(batch=1, len_seq=10, channels=10, gated=False, delta_softplus=False)
    soft, gated = plain.over(delta_softplus=True), plain.over(gated=True)
    steps = 100
    before, with_soft, with_gate = (op.work(2**20) for op in (plain, soft, gated))
    assert with_soft.vector_flops - before.vector_flops == steps
    assert with_soft.special_ops - before.special_ops == 2 * steps
    assert with_soft.bytes == before.bytes
    assert with_gate.vector_flops - before.vector_flops == 3 * steps
    assert with_gate.special_ops - before.special_ops == 2 * steps
    assert with_gate.read_bytes - before.read_bytes == 2 * steps


@pytest.mark.parametrize("kind", PROVED_KINDS)
def test_too_small_a_fast_memory_is_refused(kind: type[Scan]) -> None:
    with pytest.raises(InputError, match="cannot hold one step of one channel"):
        kind(batch=1, len_seq=8, channels=8).work(64)


@pytest.mark.parametrize("kind", PROVED_KINDS)
@pytest.mark.parametrize("bad", [0, 1.5, "many"])
def test_bad_sizes_are_refused(kind: type[Scan], bad: object) -> None:
    with pytest.raises(InputError, match="state_dim"):
        kind(batch=1, len_seq=8, channels=8, state_dim=bad)
