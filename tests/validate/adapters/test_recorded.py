"""Records without a public row: counted by the suite's own ops, or refused with the reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simulator.kernel_time.model import COLD, REPLAYED
from tests.validate.made_records import ENVIRONMENT
from validate.adapters import Uncounted, parts, recorded
from validate.batches import batches
from validate.kernels.ragged import Together
from validate.kernels.registry import spec
from validate.measurement import Measurement
from validate.predictions import predict
from validate.record import Case, Record
from validate.recorded import measurements
from workloads.ops.flash_attention import FlashAttention2


def record(
    kernel: str, case: Case, implementation: str = "triton", vendor: str = "", l2: str = "rotated"
) -> Record:
    return Record(
        case=case, environment=replace(ENVIRONMENT, l2_state=l2), seconds=1e-3, repetitions=9,
        spread_frac=0.0, measured_at="now", kernel=kernel, implementation=implementation,
        vendor=vendor, method="graph",
    )  # fmt: skip


def row(kernel: str, case: Case, **more: str) -> Measurement:
    (found,) = measurements([record(kernel, case, **more)])
    return found


def triad(elements: int) -> Case:
    return Case(op="triad", dtype="fp32", params={"elements": elements})


def test_the_kernel_s_op_counts_the_case() -> None:
    case = triad(2**20)
    (part,) = parts(row("triad", case))
    op = part.op(**dict(part.fixed), **part.sizes)
    assert op == spec("triad").op(case) and set(part.sizes) >= {"num_elements"}
    assert (part.conditions.kernel, part.conditions.l2) == ("ridgeplan:triton", COLD)
    (warm,) = parts(row("triad", case, implementation="torch", vendor="torch", l2="warm"))
    assert (warm.conditions.kernel, warm.conditions.l2) == ("torch", REPLAYED)


def test_cases_that_differ_in_size_are_one_batch() -> None:
    rows = [row("triad", triad(2**n)) for n in range(20, 26)]
    (batch,), reasons = batches(rows)
    assert not any(reasons)
    assert np.asarray(batch.op.compulsory_bytes()).tolist() == [12.0 * 2**n for n in range(20, 26)]


def test_ops_that_the_suite_defines_need_not_take_arrays() -> None:
    cases = spec("sparse_gemm").grid[:3]
    rows = [row("sparse_gemm", c, implementation="torch-2to4", vendor="cusparselt") for c in cases]
    found = predict(rows)
    assert not any(found.reasons) and np.all(found.seconds > 0)


def test_a_library_s_other_algorithm_is_not_what_the_op_counts() -> None:
    case = spec("sparse_gemm").grid[0]
    with pytest.raises(Uncounted, match="another way"):
        parts(row("sparse_gemm", case, implementation="torch", vendor="cublas"))


@pytest.mark.parametrize(
    ("kernel", "case", "said"),
    [
        ("nothing", triad(8), "no kernel nothing"),
        ("triad", Case(op="triad", dtype="fp32", params={}), "takes no such case"),
        ("triad", Case(op="triad", dtype="fp99", params={"elements": 8}), "takes no such case"),
    ],
)
def test_what_cannot_be_counted_is_said(kernel: str, case: Case, said: str) -> None:
    with pytest.raises(Uncounted, match=said):
        parts(row(kernel, case))


def test_problems_of_different_sizes_in_one_launch_have_no_model() -> None:
    one = FlashAttention2(num_heads=2, len_q=64, head_dim=64)
    with pytest.raises(Uncounted, match="different sizes"):
        list(recorded._kernels(Together(problems=((one, 2),))))


def test_without_torch_the_reason_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [("streaming", "ModuleNotFoundError: No module named 'torch'")]
    monkeypatch.setattr("validate.agenda.suites", lambda: ((), broken))
    recorded._suite.cache_clear()
    try:
        with pytest.raises(Uncounted, match="pip install 'ridgeplan\\[gpu\\]'"):
            parts(row("triad", triad(8)))
    finally:
        recorded._suite.cache_clear()
