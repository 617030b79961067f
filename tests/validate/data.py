"""Rows made up for tests: as measurements, and as small files of them."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hwmodels import catalog
from hwmodels.calibration import LEVELS, Calibration, FittedConstant, ModelCalibration, Residuals
from hwmodels.step_ratios import digest_of
from simulator.estimate import estimate
from simulator.kernel_time import registry
from simulator.kernel_time.predict import predict
from validate.adapters import parts
from validate.calibrate import as_document, short_digest
from validate.measurement import KERNELS, Measurement

GPU = "H100-SXM-80GB"

ATTENTION = {"batch": 2, "heads_q": 8, "heads_kv": 2, "head_dim": 128, "causal": 1}
ROWS = {"rows": 4096, "cols": 1024, "elements": 4096 * 1024}
MOE = {"tokens": 512, "hidden": 2048, "inter": 1024, "topk": 4, "experts": 16, "tp": 2, "ep": 2}
EXAMPLES = {
    "gemm": {"m": 4096, "n": 2048, "k": 1024},
    "bmm": {"batch": 8, "m": 512, "n": 512, "k": 128},
    "attn_prefill": {**ATTENTION, "seq_q": 2048, "seq_kv": 2048},
    "attn_prefill_noncausal": {**ATTENTION, "seq_q": 512, "seq_kv": 512, "causal": 0},
    "attn_fwd": {**ATTENTION, "seq_q": 1024, "seq_kv": 1024},
    "attn_fwd_bwd": {**ATTENTION, "seq_q": 1024, "seq_kv": 1024},
    "attn_decode": {**ATTENTION, "seq_q": 1, "seq_kv": 8192},
    "rope": {"tokens": 4096, "heads_q": 32, "heads_kv": 8, "head_dim": 128},
    "moe_ffn_gated": MOE,
    "moe_ffn_nongated": MOE,
    "embedding": {"tokens": 4096, "hidden": 4096, "vocab_shard": 32000},
}


def example(op: str, seconds: float | None = 1.0, **changes: object) -> Measurement:
    """A row of that op; `changes` replace fields of the row, `params` are merged."""
    params = EXAMPLES.get(op, ROWS) | changes.pop("params", {})  # type: ignore[operator]
    row = Measurement(
        family="f",
        source="s",
        gpu=GPU,
        device_id="h100-sxm",
        op=op,
        dtype="bf16",
        params=params,
        seconds=seconds,
    )
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def example_of(op: str) -> Measurement:
    return example(op, dtype="bf16->fp8" if op.startswith("quantize") else "bf16")


def timed_at_the_bound(row: Measurement, factor: float = 1.0) -> Measurement:
    """The same row, measured `factor` times as slow as the bound of its parts one by one."""
    device = catalog.device(row.device_id)
    scalar = [p.op(**dict(p.fixed), **p.sizes) for p in parts(row)]
    bound = sum(float(estimate(op, on=device).lower_s) for op in scalar)
    return dataclasses.replace(row, seconds=bound * factor)


def timed_as_predicted(
    row: Measurement, factor: float = 1.0, calibrations: Sequence[Calibration] | None = None
) -> Measurement:
    """The same row, measured `factor` times as slow as its parts are predicted one by one."""
    device = catalog.device(row.device_id)
    seconds = sum(
        float(
            predict(
                p.op(**dict(p.fixed), **p.sizes),
                on=device,
                conditions=p.conditions,
                calibrations=calibrations,
            ).seconds
        )
        for p in parts(row)
    )
    return dataclasses.replace(row, seconds=seconds * factor)


def made_calibration(
    device_id: str,
    *,
    model: str = "gemm",
    rows: Iterable[Measurement] = (),
    half: float = 0.1,
    scale: float = 1.0,
) -> Calibration:
    """Constants at their starts times `scale`, an 80 % interval of exp(half), a 90 % one of twice
    that."""
    quantiles = tuple(half * (2 * level - 1) / 0.8 for level in LEVELS)
    residuals = Residuals(num_rows=100, q80=half, q90=2 * half, quantiles=quantiles)
    today = datetime.date(2026, 11, 21)
    entry = ModelCalibration(
        device_id=device_id,
        date=today,
        num_rows=100,
        usual_kernel="",
        sources=("made",),
        constants={
            c.name: FittedConstant(value=c.start * scale, status="fitted", factors={})
            for c in registry.model(model).constants
        },
        residuals={"all": residuals},
        transfer=residuals,
    )
    digests = sorted({short_digest(r) for r in rows} or {"0" * 16})
    return Calibration(
        device_id=device_id,
        date=today,
        rows_digest=digest_of(digests),
        rows=frozenset(digests),
        models={model: entry},
    )


def write_calibration(path: Path, calibration: Calibration, **changes: object) -> Path:
    """The calibration as its file; `changes` replace keys of the document."""
    path.write_text(json.dumps(as_document(calibration) | changes), encoding="utf-8")
    return path


def kernel_row(
    params: Mapping[str, Any] | str,
    latency_us: object,
    *,
    op: str = "gemm",
    dtype: str = "bf16",
    gpu: str = "H100-SXM-80GB",
) -> list[str]:
    text = params if isinstance(params, str) else json.dumps(params)
    shown = repr(latency_us) if isinstance(latency_us, float) else str(latency_us)
    return ["made/up", gpu, op, dtype, text, shown]


def write_csv(
    path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = KERNELS
) -> Path:  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path
