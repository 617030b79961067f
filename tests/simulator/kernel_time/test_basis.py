"""Whose constants a device gets, and how wide that makes its interval."""

from __future__ import annotations

import dataclasses
import datetime
import math

import pytest

from hwmodels import catalog
from hwmodels.calibration import LEVELS, Calibration, FittedConstant, ModelCalibration, Residuals
from simulator.kernel_time.basis import ARCHITECTURE, MEAN, NOMINAL, OWN, basis, kin, remembered
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.general import MODEL as GENERAL
from workloads.ops.matmul import Matmul

MODEL = dataclasses.replace(
    GENERAL,
    name="gemm",
    ops=(Matmul,),
    constants=(
        Constant(name="launch_s", meaning="a floor", unit="s", start=3e-6, low=1e-7, high=1e-4,
                 by=("kernel",)),
        Constant(name="mma_frac", meaning="a share", unit="1", start=0.7, low=0.1, high=1.0,
                 by=("dtype",)),
    ),
)  # fmt: skip
"""A model with a constant a kernel and one a format; what it times does not matter here."""
TODAY = datetime.date(2026, 11, 21)


def residuals(half: float) -> Residuals:
    quantiles = tuple(half * (2 * level - 1) / 0.8 for level in LEVELS)
    return Residuals(num_rows=100, q80=half, q90=1.5 * half, quantiles=quantiles)


def fitted(value: float, **factors: float) -> FittedConstant:
    return FittedConstant(value=value, status="fitted", factors=factors)


def calibration(device_id: str, half: float = 0.1, **constants: FittedConstant) -> Calibration:
    entry = ModelCalibration(
        device_id=device_id, date=TODAY, num_rows=100, usual_kernel="", sources=("s",),
        constants=constants,
        residuals={"all": residuals(half), "hbm": residuals(half / 2)},
        transfer=residuals(3 * half),
    )  # fmt: skip
    return Calibration(
        device_id=device_id, date=TODAY, rows_digest="d", rows=frozenset({"r"}),
        models={"gemm": entry},
    )  # fmt: skip


H100 = calibration("h100-sxm", mma_frac=fitted(0.9, bf16=1.1), launch_s=fitted(2e-6, vllm=0.5))
A100 = calibration("a100-sxm4-80gb", 0.2, mma_frac=fitted(0.4, fp16=0.5), launch_s=fitted(8e-6))
LABELS = {"kernel": "vllm", "dtype": "bf16", "host": ""}


def values(device: str, *given: Calibration, **labels: str) -> dict[str, float]:
    return basis(catalog.device(device), MODEL, given).constants(LABELS | labels)


@pytest.mark.parametrize(
    ("device", "scope", "donors"),
    [
        ("h100-sxm", OWN, ["h100-sxm"]),
        ("h200-sxm", ARCHITECTURE, ["h100-sxm"]),
        ("a100-pcie-40gb", ARCHITECTURE, ["a100-sxm4-80gb"]),
        ("b200-sxm", MEAN, ["h100-sxm", "a100-sxm4-80gb"]),
        ("rtx-pro-6000-blackwell-server", MEAN, ["h100-sxm", "a100-sxm4-80gb"]),
    ],
)
def test_donors_in_order(device: str, scope: str, donors: list[str]) -> None:
    found = basis(catalog.device(device), MODEL, (H100, A100))
    assert found.scope == scope
    assert [d.device_id for d in found.donors] == donors
    assert all(d in found.describe() for d in donors)


def test_a_board_that_differs_in_its_memory_alone_goes_before_its_architecture() -> None:
    slower = calibration("a100-pcie-80gb", mma_frac=fitted(0.2), launch_s=fitted(8e-6))
    found = basis(catalog.device("a100-sxm4-40gb"), MODEL, (slower, A100))
    assert (found.scope, [d.device_id for d in found.donors]) == (ARCHITECTURE, ["a100-sxm4-80gb"])
    others = basis(catalog.device("a100-pcie-40gb"), MODEL, (A100, H100))
    assert [d.device_id for d in others.donors] == ["a100-sxm4-80gb"]


def test_without_any_calibration_the_start_values_answer() -> None:
    found = basis(catalog.device("h100-sxm"), MODEL, ())
    assert found.scope == NOMINAL and not found.calibrated
    assert found.constants(LABELS) == MODEL.nominal()
    assert found.residuals("hbm") is None


def test_a_factor_applies_under_its_label_and_the_base_elsewhere() -> None:
    assert values("h100-sxm", H100)["mma_frac"] == pytest.approx(0.9 * 1.1)
    assert values("h100-sxm", H100, dtype="fp8")["mma_frac"] == 0.9
    assert values("h100-sxm", H100, kernel="")["launch_s"] == 2e-6


def test_several_donors_give_their_geometric_mean_of_what_knows_the_label() -> None:
    assert values("b200-sxm", H100, A100, dtype="fp8")["mma_frac"] == pytest.approx(0.6)
    assert values("b200-sxm", H100, A100)["mma_frac"] == pytest.approx(0.99)  # bf16: H100 alone
    assert values("b200-sxm", H100, A100, kernel="x")["launch_s"] == pytest.approx(4e-6)


def test_several_donors_are_narrowed_to_those_that_know_most_labels() -> None:
    found = basis(catalog.device("b200-sxm"), MODEL, (H100, A100))
    assert [d.device_id for d in found.narrowed(LABELS).donors] == ["h100-sxm"]
    assert len(found.narrowed(LABELS | {"kernel": "", "dtype": "fp8"}).donors) == 2
    assert found.narrowed(LABELS).knows(LABELS)
    assert not found.knows(LABELS | {"kernel": "unheard of"})
    assert found.knows(LABELS | {"kernel": ""})  # the usual kernel claims nothing


def test_the_cost_of_an_eager_launch_is_looked_up_everywhere() -> None:
    eager = calibration("a100-sxm4-80gb", host_s=fitted(1e-5, neusight=4.0))
    assert values("h100-sxm", H100, eager, host="neusight")["host_s"] == pytest.approx(4e-5)


def test_borrowed_intervals_are_wider() -> None:
    def half(device: str, regime: str = "hbm", *, known: bool = True) -> float:
        found = basis(catalog.device(device), MODEL, (H100, A100)).residuals(regime, known=known)
        assert found is not None
        return found.q80

    assert half("h100-sxm") == pytest.approx(0.05)
    assert half("h100-sxm", "compute") == pytest.approx(0.1)  # no rows of its own: all of them
    assert half("h200-sxm") == pytest.approx(0.05)
    assert half("b200-sxm") == pytest.approx((0.3 + 0.6) / 2)
    assert half("h100-sxm", known=False) == pytest.approx(0.3)


def test_architectures_are_told_apart_by_name_and_capability() -> None:
    def same(a: str, b: str) -> bool:
        return kin(catalog.device(a)) == kin(catalog.device(b))

    assert same("b200-sxm", "gb300") and same("p4", "p100-pcie-16gb") and same("a10", "a30")
    assert not same("rtx-5090", "b200-sxm") and not same("l4", "a10") and not same("mi300x", "l4")


def test_memory_by_identity_survives_a_new_device_at_the_same_place() -> None:
    calls: list[str] = []

    def make(device: object) -> int:
        calls.append(str(device))
        return len(calls)

    find = remembered(make)  # type: ignore[arg-type]
    h100, t4 = catalog.device("h100-sxm"), catalog.device("t4")
    assert [find(h100), find(t4), find(h100)] == [1, 2, 1]
    assert math.isclose(len(calls), 2)
