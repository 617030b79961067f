"""Time of a kernel from its instructions: by hand, and its bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.errors import InputError, UnsupportedError
from simulator.instruction_issue import (
    FMA,
    HBM,
    ISSUE,
    L2,
    LSU,
    SPECIAL,
    TENSOR,
    Body,
    issue_time,
    rates,
    tensor_flops_per_clk,
)
from simulator.occupancy import Resources

H100, A100 = catalog.device("h100-sxm"), catalog.device("a100-sxm4-80gb")
BLOCK = Resources(registers=64, num_warps=4, smem_bytes=0)


def body(passes: float = 1.0, **counts: int) -> Body:
    named = {kind.replace("_", "."): n for kind, n in counts.items()}
    return Body(counts=named, always=named, passes=passes)


def test_lanes_of_both_generations() -> None:
    assert rates(H100)[FMA] == pytest.approx(4.0, rel=0.02)  # 128 lanes of an SM
    assert rates(A100)[FMA] == pytest.approx(2.0, rel=0.02)  # 64
    assert rates(H100)[SPECIAL] == 0.5


def test_one_pipe_by_hand() -> None:
    # 4 warps x 1000 passes x 8 instructions at half an instruction a clock: 64,000 clocks
    found = issue_time([body(1000, MUFU_EX2=8)], BLOCK, H100.num_sms, H100)
    assert found.resources[SPECIAL] == pytest.approx(64_000 / H100.clock_hz)
    assert found.resources[ISSUE] == pytest.approx(8_000 / H100.clock_hz)
    assert found.bound == SPECIAL
    assert found.lower_s == pytest.approx(found.resources[SPECIAL])


def test_products_by_hand() -> None:
    # a warp's quarter of 64 x 256 x 16: 131,072 flops at 4096 a clock, 4 warps
    found = issue_time([body(HGMMA_64x256x16=1)], BLOCK, H100.num_sms, H100)
    assert found.resources[TENSOR] == pytest.approx(4 * 131_072 / 4096 / H100.clock_hz)
    slow = issue_time([body(HMMA_16816=32)], BLOCK, H100.num_sms, H100)
    assert slow.resources[TENSOR] == pytest.approx(
        found.resources[TENSOR] / 0.63
    )  # warp-wide products do not reach Hopper's peak
    whole = Body(counts={}, always={}, passes=2, tensor_flops=8192 * 10)
    on = catalog.device("b200-sxm")
    made = issue_time([whole], BLOCK, 1, on)
    assert made.resources[TENSOR] == pytest.approx(20 / on.clock_hz)


def test_wide_accesses_take_the_pipe_longer() -> None:
    narrow = issue_time([body(LDS_32=8)], BLOCK, 1, H100).resources[LSU]
    assert issue_time([body(LDS_128=8)], BLOCK, 1, H100).resources[LSU] == 4 * narrow
    assert issue_time([body(LDS_8=8)], BLOCK, 1, H100).resources[LSU] == narrow
    assert issue_time([body(LDSM_4=8)], BLOCK, 1, H100).resources[LSU] == 4 * narrow


def test_the_busiest_sm_decides() -> None:
    times = [
        issue_time([body(1e6, FMA=100)], BLOCK, n, H100) for n in (132, 133, 264, 265)
    ]  # fmt: skip
    compute = [t.resources[FMA] for t in times]
    assert compute[1] == compute[2] == 2 * compute[0] and compute[3] == 3 * compute[0]
    assert issue_time([body(FMA=1)], BLOCK, 132 * 8 * 2, H100).tail_frac == 0


def test_memory_lies_between_the_arguments_and_the_loads() -> None:
    code = Body(counts={"LDG.128": 4}, always={"LDG.128": 4}, passes=64, load_bytes=8192)
    asked = 1056 * 64 * 8192
    hidden = issue_time([code], BLOCK, 1056, H100)
    known = issue_time([code], BLOCK, 1056, H100, unique_bytes=asked / 8)
    assert hidden.resources[HBM] == pytest.approx(asked / H100.hbm.bytes_per_s)
    assert known.resources[HBM] == pytest.approx(asked / 8 / H100.hbm.bytes_per_s)
    assert known.resources[L2] == hidden.resources[L2] > 0
    assert known.seconds < hidden.seconds and known.upper_s == hidden.upper_s
    # arguments larger than what is read bound nothing
    assert (
        issue_time([code], BLOCK, 1056, H100, unique_bytes=1e15).resources[HBM]
        == (hidden.resources[HBM])
    )


def test_what_a_pass_may_go_around_widens_the_range() -> None:
    sure = body(1000, FMA=100)
    maybe = replace(sure, always={"FMA": 40})
    a, b = (issue_time([x], BLOCK, 132, H100) for x in (sure, maybe))
    assert b.lower_s == pytest.approx(0.4 * a.lower_s) and b.upper_s == a.upper_s
    half = issue_time([replace(maybe, maybe_share=0.5)], BLOCK, 132, H100)
    assert half.resources[FMA] == pytest.approx(0.7 * a.resources[FMA])


def test_refusals() -> None:
    with pytest.raises(InputError, match="at least 1"):
        issue_time([body(FMA=1)], BLOCK, 0, H100)
    with pytest.raises(UnsupportedError, match="no matrix rate for fp8"):
        tensor_flops_per_clk(A100, "fp8")


KINDS = st.sampled_from(["FMA", "ALU", "MUFU.EX2", "LDG.128", "HMMA.16816", "LDS.64", "CONTROL"])


@given(
    st.dictionaries(KINDS, st.integers(1, 500), min_size=1), st.integers(1, 10**4),
    st.integers(1, 10**5), st.floats(0, 1e5),
)  # fmt: skip
def test_seconds_lie_between_the_bounds_and_grow(
    counts: dict[str, int], passes: int, blocks: int, moved: float
) -> None:
    code = Body(counts=counts, always=counts, passes=passes, load_bytes=moved)
    found = issue_time([code], BLOCK, blocks, A100)
    assert 0 < found.lower_s <= found.seconds * (1 + 1e-9)
    assert found.seconds <= found.upper_s * (1 + 1e-9)
    assert 0 <= found.tail_frac < 1
    longer = issue_time([replace(code, passes=2 * passes)], BLOCK, blocks, A100)
    assert longer.seconds >= found.seconds and longer.lower_s >= found.lower_s
