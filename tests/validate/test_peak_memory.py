"""Published peaks against the replay: which rows count, what is refused, how close it comes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from hwmodels.errors import InfeasibleError
from validate.adapters import Uncounted
from validate.measurement import Measurement
from validate.peak_memory import PeakComparison, compare_peaks, main, peak_run, predicted

MODEL = {"name": "llama3.1-8b", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8,
         "ffn": 14336, "gated": 1, "vocab": 128256, "seq": 8192}  # fmt: skip
LAYOUT = {"dp": 8, "tp": 1, "pp": 1, "cp": 1, "microbatch": 1, "zero": 3,
          "recompute": "selective", "compile": 1}  # fmt: skip


def row(source: str = "torchtitan/2024-12", gpu: str = "H100-96GB-HBM2e-500W",
        dtype: str = "bf16", metric: str = "peak_mem_gib", value: float = 50.0,
        model: dict[str, Any] | None = None, **layout: Any) -> Measurement:  # fmt: skip
    merged = {k: v for k, v in {**LAYOUT, **layout}.items() if v is not None}
    return Measurement(
        family="steps_training", source=source, gpu=gpu, device_id="h100-sxm-96gb", op=metric,
        dtype=dtype, params={"num_gpus": merged["dp"] * merged["tp"] * merged["cp"],
                             "model": {**MODEL, **(model or {})}, "parallelism": merged,
                             "value": value}, seconds=None,
    )  # fmt: skip


def test_a_row_becomes_a_run() -> None:
    run = peak_run(row(dtype="fp8_linear", tp=8, dp=2, async_tp=1, recompute="full"))
    assert (run.plan.tp, run.plan.dp, run.len_seq) == (8, 2, 8192)
    assert run.trainer.fp8 and run.trainer.async_tp and run.trainer.compiled
    assert run.measured_bytes == 50 * 2**30


@pytest.mark.parametrize(
    ("source", "compiled", "compiles_loss"),
    [
        ("torchtitan/2024-12", 1, False),
        ("torchtitan/2025-02", 1, False),
        ("torchtitan/2025-03-x", 1, True),
        ("torchtitan/2025-06-trainy", 0, False),
    ],
)
def test_the_release_says_whether_the_loss_is_compiled(
    source: str, compiled: int, compiles_loss: bool
) -> None:
    assert peak_run(row(source=source, compile=compiled)).trainer.compiled_loss is compiles_loss


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"source": "megatron-lm/x"}, "publisher's trainer"),
        ({"compile": None}, "compiled"),
        ({"recompute": None}, "recomputed"),
        ({"microbatch": None}, "micro-batch"),
        ({"model": {"experts": 8}}, "mixture of experts"),
    ],
)
def test_rows_that_say_too_little_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Uncounted, match=reason):
        peak_run(row(**changes))


def test_every_row_of_the_metric_is_predicted_or_counted() -> None:
    rows = [row(), row(zero=1), row(zero=1), row(source="x/y"), row(metric="tokens_per_s_per_gpu"),
            row(microbatch=64)]  # fmt: skip
    found = compare_peaks(rows)
    assert len(found.predictions) == 1 and found.num_rows == 5
    reasons = dict(found.reasons)
    assert sorted(reasons.values()) == [1, 1, 2]
    assert any("out of memory" in why for why in reasons)
    assert next(iter(reasons)).startswith("the replay is of ZeRO 3")
    document = found.as_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["n"] == 1 and len(document["rows"]) == 1


def test_an_empty_comparison_has_no_errors() -> None:
    assert PeakComparison().summary()["mape"] is None


def test_a_prediction_explains_itself_and_ignores_the_measured_figure() -> None:
    one, other = (predicted(peak_run(row(value=v))) for v in (40.0, 80.0))
    assert one.predicted_bytes == other.predicted_bytes and one.ratio == 2 * other.ratio
    assert sum(a.num_bytes for a in one.alive) == pytest.approx(one.live_bytes)
    assert one.predicted_bytes > one.live_bytes
    with pytest.raises(InfeasibleError, match="out of memory"):
        predicted(peak_run(row(microbatch=64)))


def test_the_command_prints_every_run_and_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = ["source", "gpu", "n_gpus", "model", "parallelism", "precision", "metric", "value"]
    lines = [[source, "H100-96GB-HBM2e-500W", 8, json.dumps(MODEL), json.dumps(LAYOUT), "bf16",
              "peak_mem_gib", 50.0] for source in ("torchtitan/2024-12", "x/y")]  # fmt: skip
    with (tmp_path / "steps_training.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "1 runs" in printed and "logits" in printed
    assert "1  no replay of this publisher's trainer is known" in printed
    assert main([str(tmp_path / "nothing")]) == 2
    assert "error" in capsys.readouterr().err
