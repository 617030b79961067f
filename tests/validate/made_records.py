"""Records of the whole suite as a known device would give them: a model's times, and noise."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from hwmodels.calibration import Calibration, shipped
from validate.agenda import suites
from validate.predictions import predict
from validate.record import Environment, Record, RecordWriter, Trial
from validate.recorded import recorded

DEVICE, GPU, ARCH = "h200-sxm", "NVIDIA H200", 90
NOISE = 0.03
SCALED: Mapping[str, float] = {
    "hbm_frac": 0.93,
    "mma_frac": 0.9,
    "launch_s": 1.3,
    "l2_bytes_per_clk": 0.85,
}
"""How the made-up device differs from the H100, constant by constant."""
ENVIRONMENT = Environment(
    gpu=GPU,
    sm_clock_hz=1.9e9,
    memory_clock_hz=3.2e9,
    driver="580.1",
    versions={"torch": "2.11"},
    l2_state="rotated",
)


@lru_cache(maxsize=1)
def truth() -> Calibration:
    """The H100's calibration with some constants scaled, as if it were the device's own."""
    known = next(c for c in shipped() if c.device_id == "h100-sxm")
    models = {}
    for name, model in known.models.items():
        constants = {
            key: replace(c, value=c.value * SCALED.get(key, 1.0))
            for key, c in model.constants.items()
        }
        models[name] = replace(model, device_id=DEVICE, constants=constants)
    return replace(known, device_id=DEVICE, models=models, rows=frozenset(), rows_digest="")


def grid(kernels: Sequence[str]) -> list[Trial]:
    """Every trial of some kernels that a full profile would take."""
    return [
        Trial(kernel=spec.name, implementation=how.name, case=case)
        for spec in suites()[0]
        if spec.name in kernels
        for case in {case.key: case for case in spec.grid}.values()
        for how in spec.implementations
        if how.refusal(case, ARCH) is None
    ]


def records_of(trials: list[Trial], noise: float = NOISE) -> list[Record]:
    """Their records; the same trial gives the same time. What no model times is left out."""
    specs = {spec.name: spec for spec in suites()[0]}
    blank = []
    for trial in trials:
        spec = specs[trial.kernel]
        row = spec.row(trial.case) if spec.row is not None else None
        made = Record(
            case=trial.case,
            environment=ENVIRONMENT,
            seconds=1.0,
            repetitions=100,
            spread_frac=0.01,
            measured_at="2026-11-21T02:00:00Z",
            kernel=trial.kernel,
            implementation=trial.implementation,
            vendor=spec.implementation(trial.implementation).vendor,
            method="graph",
            error=1e-5,
            judge="reference",
            row=None if row is None else dict(zip(("family", "op", "params"), row, strict=True)),
        )
        blank.append(made)
    found = recorded(blank)
    seconds = predict(found.rows, (truth(),)).seconds
    return [
        replace(record, seconds=float(s) * _noise(record.trial, noise))
        for record, s in zip(found.records, seconds, strict=True)
        if np.isfinite(s)
    ]


def _noise(trial: Trial, noise: float) -> float:
    return float(np.exp(np.random.default_rng(zlib.crc32(trial.key.encode())).normal(0, noise)))


def written(folder: Path, records: list[Record]) -> Path:
    """A profile's folder of records."""
    folder.mkdir(parents=True, exist_ok=True)
    with RecordWriter(folder / "records.jsonl") as writer:
        for record in records:
            writer.append(record)
    return folder
