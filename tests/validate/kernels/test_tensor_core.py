"""The matrix ceiling: it multiplies as often as it says."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from hwmodels import dtypes
from tests.validate.kernels.checking import CPU, check
from validate.kernels.judge import relative_error
from validate.kernels.spec import Launch
from validate.kernels.tensor_core import kernel, suite
from validate.record import Case

(SPEC,) = suite.SPECS


@pytest.mark.parametrize("case", SPEC.checks, ids=lambda c: c.key)
def test_checks(case: Case) -> None:
    check(SPEC, case)


@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=lambda x: x.label)
def test_every_launch(launch: Launch) -> None:
    case = suite.case(1, 1, "fp16")
    inputs = SPEC.inputs(case, torch.Generator().manual_seed(1), CPU)
    (out,) = suite.prepare(case, inputs, launch)()
    assert relative_error(out, SPEC.reference(case, inputs)[0]) <= SPEC.tolerances["fp16"]


def test_fp8_sums() -> None:
    case = suite.case(1, 2, "fp8")
    inputs = SPEC.inputs(case, torch.Generator().manual_seed(1), CPU)
    (out,) = suite.prepare(case, inputs, kernel.LAUNCHES[0])()
    assert relative_error(out, SPEC.reference(case, inputs)[0]) <= SPEC.tolerances["fp8"]


def test_a_product_too_few_is_caught() -> None:
    case = suite.case(1, 3, "fp16")
    inputs = SPEC.inputs(case, torch.Generator().manual_seed(1), CPU)
    fewer = dataclasses.replace(case, params={**case.params, "iterations": 2})
    (out,) = suite.prepare(fewer, inputs, kernel.LAUNCHES[0])()
    error = relative_error(out, SPEC.reference(case, inputs)[0])
    assert math.isclose(error, 1 / 3, rel_tol=1e-3)
    assert error > SPEC.tolerances["fp16"]


def test_counts() -> None:
    work = suite.op(suite.case(132, 2048, "bf16")).work(1.0)
    assert work.tensor_flops == {dtypes.BF16: 2 * 132 * 2048 * 128**3}
    assert work.bytes == 132 * (2 * 128 * 128 * 2 + 128 * 128 * 4)


def test_the_grid_times_full_folds_alone() -> None:
    """All of a chip's rate: folds as long as shipped, on as many programs as multiprocessors."""
    assert all(c.params["iterations"] % kernel.FOLD == 0 for c in SPEC.grid)
    assert {108, 132, 148} <= {c.params["programs"] for c in SPEC.grid}


def test_binaries_have_names_of_their_own() -> None:
    found = SPEC.compilations()
    assert len({c.name for c in found}) == len(found)
    assert all(set(c.signature) == set(c.function.arg_names) for c in found)
