"""Calibration files: the shipped ones are whole, and a broken one is refused by its key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hwmodels import catalog
from hwmodels.calibration import FOLDER, LEVELS, POOLED, Calibration, read_calibration, shipped
from hwmodels.errors import SpecError
from hwmodels.step_ratios import digest_of

ROWS = ["0123456789abcdef", "fedcba9876543210"]


def document() -> dict[str, Any]:
    residuals = {"num_rows": 9, "q80": 0.1, "q90": 0.2, "quantiles": [0.01 * i for i in range(39)]}
    return {
        "schema": 2,
        "kind": "kernel-time",
        "device": "h100-sxm",
        "date": "2026-11-21",
        "rows_digest": digest_of(ROWS),
        "rows": ROWS,
        "models": {
            "gemm": {
                "num_rows": 9,
                "usual_kernel": "vllm",
                "sources": ["a", "b"],
                "constants": {
                    "mma_frac": {"value": 0.9, "status": "fitted", "factors": {"bf16": 1.1}}
                },
                "residuals": {"all": residuals},
                "transfer": None,
            }
        },
    }


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_a_file_reads_back(tmp_path: Path) -> None:
    found = read_calibration(write(tmp_path / "h100-sxm.json", document()))
    gemm = found.models["gemm"]
    assert found.device_id == gemm.device_id == "h100-sxm" and found.rows == frozenset(ROWS)
    assert gemm.constants["mma_frac"].factors == {"bf16": 1.1}
    assert gemm.residuals[POOLED].q90 == 0.2 and gemm.transfer is None


def changed(path: str, value: Any) -> dict[str, Any]:
    whole = document()
    at: Any = whole
    *parents, last = path.split(".")
    for key in parents:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", 1), ("schema", 3), ("schema", True), ("kind", "step-ratio"), ("device", None),
        ("date", "yesterday"), ("rows", ["0123456789abcdef"]), ("rows_digest", "0" * 64),
        ("models.gemm.constants.mma_frac.value", -1),
        ("models.gemm.constants.mma_frac.status", "guessed"),
        ("models.gemm.constants.mma_frac.factors.bf16", 0),
        ("models.gemm.residuals.all", None), ("models.gemm.residuals.all.q80", 0.3),
        ("models.gemm.residuals.all.quantiles", [0.0] * 38),
        ("models.gemm.residuals.all.quantiles", [1.0, *[0.0] * 38]),
        ("models.gemm.num_rows", 0), ("models.gemm.more", 1),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_its_key(tmp_path: Path, path: str, value: Any) -> None:
    file = write(tmp_path / "h100-sxm.json", changed(path, value))
    with pytest.raises(SpecError) as refused:
        read_calibration(file)
    assert str(file) in str(refused.value)
    known = path.split(".")
    assert any(key in str(refused.value) for key in known)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_what_is_no_document_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "h100-sxm.json"
    file.write_text(text)
    with pytest.raises(SpecError):
        read_calibration(file)


@pytest.mark.parametrize("calibration", shipped(), ids=lambda c: c.device_id)
def test_every_shipped_file_names_a_device_and_is_physical(calibration: Calibration) -> None:
    assert calibration.device_id in catalog.device_ids()
    assert (FOLDER / f"{calibration.device_id}.json").exists()
    for name, model in calibration.models.items():
        assert model.num_rows >= 20
        assert len(model.residuals[POOLED].quantiles) == len(LEVELS)
        for key, constant in model.constants.items():
            if key.endswith("_frac"):
                assert 0 < constant.value <= 1, (name, key)
        for residuals in model.residuals.values():
            assert 0 < residuals.q80 <= residuals.q90 < math.log(10)


def test_the_shipped_set_covers_the_measured_devices() -> None:
    assert {c.device_id for c in shipped()} >= {
        "a100-sxm4-80gb", "a100-pcie-40gb", "h100-sxm", "b200-sxm", "v100-pcie-32gb",
        "v100-sxm2-16gb", "t4", "p4",
    }  # fmt: skip
