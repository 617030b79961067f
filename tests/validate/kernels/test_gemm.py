"""The matrix product: every check, every tile set, both ways of loading, the baseline."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import dtypes
from tests.validate.kernels.checking import CPU, check
from validate.kernels.gemm import kernel, suite
from validate.kernels.gemm.reference import product
from validate.kernels.judge import relative_error
from validate.kernels.spec import Inputs, Launch
from validate.record import Case

(SPEC,) = suite.SPECS


def _inputs(case: Case, seed: int = 0) -> Inputs:
    return SPEC.inputs(case, torch.Generator().manual_seed(seed), CPU)


def _error(name: str, case: Case, launch: Launch | None) -> float:
    inputs = _inputs(case)
    (out,) = SPEC.implementation(name).prepare(case, inputs, launch)()
    return relative_error(out, SPEC.reference(case, inputs)[0])


@pytest.mark.parametrize("case", SPEC.checks, ids=lambda c: c.key)
def test_checks(case: Case) -> None:
    if case.dtype == "fp8":
        launch = SPEC.implementation("triton").launches(case, 90)[0]
        assert _error("triton", case, launch) <= SPEC.tolerances["fp8"]
    else:
        check(SPEC, case)


@pytest.mark.parametrize("case", SPEC.checks, ids=lambda c: c.key)
def test_baseline(case: Case) -> None:
    if suite.torch_refusal(case, 90) is None:
        assert _error("torch", case, None) <= SPEC.tolerances[case.dtype]


@pytest.mark.parametrize("launch", kernel.launches_of("fp16"), ids=lambda x: x.label)
def test_every_pointer_launch(launch: Launch) -> None:
    """Several tiles each way, ragged at every edge, more k than one share has slices."""
    m, n = launch.meta["BLOCK_M"] + 3, launch.meta["BLOCK_N"] + 5
    assert _error("triton", suite.case(m, n, 150, "fp16"), launch) <= SPEC.tolerances["fp16"]


@pytest.mark.parametrize("launch", kernel.tma_launches_of("fp16"), ids=lambda x: x.label)
def test_every_descriptor_launch(launch: Launch) -> None:
    m, n = launch.meta["BLOCK_M"] + 3, launch.meta["BLOCK_N"] + 8
    case = suite.case(m, n, 152, "fp16")
    assert suite.tma_refusal(case, 90) is None
    assert _error("triton-tma", case, launch) <= SPEC.tolerances["fp16"]


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "tf32"])
def test_descriptors_in_other_formats(dtype: str) -> None:
    case = suite.case(70, 48, 96, dtype)
    launch = suite.tma_launches(case, 90)[0]
    assert _error("triton-tma", case, launch) <= SPEC.tolerances[dtype]


@settings(max_examples=4, deadline=None)
@given(m=st.integers(1, 70), n=st.integers(1, 90), k=st.integers(1, 200), pick=st.integers(3, 6))
def test_ragged_shapes(m: int, n: int, k: int, pick: int) -> None:
    launch = kernel.launches_of("fp16")[pick]
    assert _error("triton", suite.case(m, n, k, "fp16"), launch) <= SPEC.tolerances["fp16"]


def test_by_hand() -> None:
    a, w = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    assert product(a, w).tolist() == [[1.0, -1.0], [3.0, -1.0]]
    (out,) = kernel.prepare(a, w, "fp32", torch.float32, kernel.EXACT)()
    assert out.tolist() == [[1.0, -1.0], [3.0, -1.0]]


def test_an_unwritten_tile_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a grid that forgets the last tile, poison remains and no error is small enough."""
    case = suite.case(70, 70, 40, "fp16")
    launch = kernel.launches_of("fp16")[3]
    assert _error("triton", case, launch) <= SPEC.tolerances["fp16"]
    monkeypatch.setattr(kernel, "_tiles", lambda launch, m, n: 1)
    assert _error("triton", case, launch) == math.inf


def test_refusals() -> None:
    assert suite.tma_refusal(suite.case(8, 8, 8), 80) is not None
    assert suite.tma_refusal(suite.case(8, 8, 9), 90) == "rows are no multiple of 16 bytes"
    assert suite.tma_refusal(suite.case(8, 9, 8), 90) == "rows are no multiple of 16 bytes"
    assert suite.tma_refusal(suite.case(7, 8, 8), 90) is None
    fp8 = suite.case(16, 16, 16, "fp8")
    assert "8.9" in (SPEC.implementation("triton").refusal(fp8, 80) or "")
    assert SPEC.implementation("triton").refusal(fp8, 90) is None
    assert suite.torch_refusal(suite.case(16, 8, 16, "fp8"), 90) is not None


def test_the_default_launch_fits_the_shape() -> None:
    """Large tiles for a large product, split sums for one row of tokens."""
    large = suite.launches(suite.case(8192, 8192, 8192), 90)[0].meta
    assert (large["BLOCK_M"], large["BLOCK_N"]) == (128, 256)
    token = suite.launches(suite.case(1, 4096, 4096), 90)[0].meta
    assert token["BLOCK_M"] == 16 and token["SPLIT_K"] > 1


def test_counts_and_rows() -> None:
    op = suite.op(suite.case(32, 64, 128, "fp8"))
    assert op.min_flops() == {dtypes.FP8: 2 * 32 * 64 * 128}
    assert op.compulsory_bytes() == 32 * 128 + 64 * 128 + 2 * 32 * 64
    assert suite.row(suite.case(1, 2, 3)) == ("gemm", "gemm", {"m": 1, "n": 2, "k": 3})
    assert suite.row(suite.case(1, 2, 3, "fp8")) is None


def test_binaries_have_names_of_their_own() -> None:
    found = SPEC.compilations()
    assert len({c.name for c in found}) == len(found)
    for c in found:
        assert set(c.signature) == set(c.function.arg_names), c.name
        assert set(c.constants) == {n for n, kind in c.signature.items() if kind == "constexpr"}
