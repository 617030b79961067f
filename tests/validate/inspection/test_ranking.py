"""Expected orders of configurations, and their judgement on made-up records."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import catalog
from tests.validate.inspection.made import binary, entry, loop, source
from validate.inspection.ledger import Entry
from validate.inspection.ranking import LEAST, orders, ranked, spearman
from validate.record import Case, Environment, Record
from workloads.ops.matmul import Matmul

H200 = catalog.device("h200-sxm")
OP = Matmul(m=4096, n=4096, k=4096)
TILES = ((128, 256, 8), (128, 128, 8), (64, 64, 4), (32, 32, 4))


def case(dtype: str = "bf16", **sizes: int) -> Case:
    return Case(op="gemm", dtype=dtype, params={"m": 4096, "n": 4096, "k": 4096} | sizes)


def label(m: int, n: int, warps: int) -> str:
    return f"BLOCK_M{m}-BLOCK_N{n}-BLOCK_K64-w{warps}-s3"


def product(m: int, n: int, warps: int, dtype: str = "bf16") -> Entry:
    """A product whose instructions are exactly its flops' worth."""
    flops = 2 * m * n * 64
    found = binary(
        loop(HMMA_16816=flops // 4096 // warps, LDSM_4=(m + n) // 8, LDGSTS_128=(m + n) // 16),
        sources=(source(dot_flops=flops, load_bytes=(m + n) * 128, math="bf16"),),
        num_warps=warps, plain_warps=warps, smem_bytes=3 * (m + n) * 128,
        registers=min(64 + m * n // (warps * 32), 255),
    )  # fmt: skip
    return entry("gemm", f"gemm[{dtype}]:{label(m, n, warps)}", 90, found)


ENTRIES = tuple(product(*tile) for tile in TILES)
LABELS = [label(*tile) for tile in TILES]


def test_large_products_want_large_tiles() -> None:
    found = ranked("gemm", OP, case(), LABELS, H200, entries=ENTRIES)
    assert [x.launch for x in found] == LABELS
    assert all(a.seconds <= b.seconds for a, b in pairwise(found))


def test_few_tiles_want_small_ones() -> None:
    small = Matmul(m=256, n=256, k=4096)
    found = ranked("gemm", small, case(m=256, n=256), LABELS, H200, entries=ENTRIES)
    assert found[0].launch != LABELS[0] and found[-1].launch == LABELS[0]


def test_binaries_of_another_format_or_architecture_are_not_used() -> None:
    assert ranked("gemm", OP, case("fp8"), LABELS, H200, entries=ENTRIES) == ()
    b200 = catalog.device("b200-sxm")
    assert ranked("gemm", OP, case(), LABELS, b200, entries=ENTRIES) == ()
    assert ranked("other", OP, case(), LABELS, H200, entries=ENTRIES) == ()


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # a tie
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


@given(st.lists(st.integers(1, 10**6), min_size=3, max_size=12, unique=True))
def test_spearman_sees_order_alone(values: list[int]) -> None:
    assert spearman(values, [math.log(v) for v in values]) == pytest.approx(1)
    assert spearman(values, [-v for v in values]) == pytest.approx(-1)


class Spec:
    """As much of a kernel's spec as the judgement asks for."""

    @staticmethod
    def op(case: Case) -> Matmul:
        return OP


def record(tried: dict[str, float], implementation: str = "triton") -> Record:
    return Record(
        case=case(), environment=Environment(
            gpu="H200", sm_clock_hz=None, memory_clock_hz=None, driver="", versions={},
            l2_state="cold",
        ),
        seconds=min(tried.values(), default=1.0), repetitions=9, spread_frac=0.01,
        measured_at="2026-11-21", kernel="gemm", implementation=implementation, tried=tried,
    )  # fmt: skip


def judged(*records: Record, specs: dict[str, Any] | None = None) -> Any:
    return orders(records, H200, {"gemm": Spec} if specs is None else specs, entries=ENTRIES)


def test_records_in_the_expected_order_correlate() -> None:
    times = dict(zip(LABELS, (1.0, 2.0, 3.0, 4.0), strict=True))
    reverse = dict(zip(LABELS, (4.0, 3.0, 2.0, 1.0), strict=True))
    (found,) = judged(record(times), record(reverse))
    assert found.rho == (1.0, -1.0) and found.near_frac == 0.5 and found.left_out == {}
    assert found.as_dict()["median_rho"] == 0


def test_a_close_second_is_near() -> None:
    times = dict(zip(LABELS, (1.04, 1.0, 3.0, 4.0), strict=True))
    (found,) = judged(record(times))
    assert found.near_frac == 1 and found.rho == (pytest.approx(0.8),)


def test_what_cannot_be_ranked_is_counted_by_reason() -> None:
    few = dict.fromkeys(LABELS[: LEAST - 1], 1.0)
    unknown = {"BLOCK_M1-w4-s1": 1.0, "BLOCK_M2-w4-s1": 2.0, "BLOCK_M3-w4-s1": 3.0}
    (found,) = judged(record(few), record(unknown), record(dict.fromkeys(LABELS, 1.0)))
    assert found.rho == () and sorted(found.left_out.values()) == [1, 1, 1]
    assert found.as_dict()["median_rho"] is None
    (nowhere,) = judged(record(dict.fromkeys(LABELS, 1.0)), specs={})
    assert nowhere.left_out == {"no such kernel": 1}
    assert judged(record({})) == ()
