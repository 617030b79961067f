"""Factors of training steps: recovered from made-up runs, read strictly, shown as errors."""

from __future__ import annotations

import copy
import datetime
import json
from pathlib import Path

import numpy as np
import pytest

from hwmodels import step_factors
from hwmodels.errors import SpecError
from hwmodels.step_factors import FACTORS_FILE, read_step_factors
from simulator.stack import factor_names, prior_of, stack
from tests.validate.test_steps import training_row
from validate.measurement import Measurement
from validate.report import step_model_markdown
from validate.runs import Run, read_runs
from validate.step_accuracy import step_accuracy
from validate.step_fit import document, fit, group_of, left_out, main, predicted_s
from validate.trainers import trainer_of

DAY = datetime.date(2026, 11, 21)
FOUNDRY = "llm-foundry/made up"
MEGATRON = "megatron-lm/model_table_r0.8"


def made_up_rows() -> list[Measurement]:
    """Six runs of eager code: short and long sequences, small and large models, one exchange."""
    found = []
    for hidden, seq, micro in ((1024, 512, 16), (1024, 8192, 1), (4096, 512, 8), (4096, 2048, 4),
                               (2048, 16384, 1), (4096, 4096, 1)):  # fmt: skip
        model = {"hidden": hidden, "heads": hidden // 64, "kv_heads": hidden // 64,
                 "ffn": 4 * hidden, "seq": seq}  # fmt: skip
        layout = {"microbatch": micro, "gradaccum": 2, "globalbatch": 16 * micro,
                  "recompute": "none"}  # fmt: skip
        found.append(training_row(1.0, model=model, layout=layout, source=FOUNDRY))
    return found


def timed(rows: list[Measurement], values: dict[str, float]) -> list[Run]:
    """The runs of the rows, as long as the model says with those factors."""
    import dataclasses

    return [dataclasses.replace(r, seconds=predicted_s(r, values)) for r in read_runs(rows)[0]]


def test_the_fit_moves_towards_the_factors_that_made_the_runs() -> None:
    """Six runs and seven factors: the priors share out what the runs leave open."""
    truth = {"product/h100-sxm": 1.4, "pointwise/eager": 3.5}
    runs = timed(made_up_rows(), truth)
    before = [abs(predicted_s(r, {}) / r.seconds - 1) for r in runs]
    found = fit(runs)
    assert np.abs(found.errors).mean() < 0.15 * np.mean(before)
    for name, value in truth.items():
        assert prior_of(name)[0] < found.values[name] < 1.1 * value


def test_runs_at_the_priors_stay_there() -> None:
    found = fit(timed(made_up_rows(), {}))
    for name, value in found.values.items():
        assert value == pytest.approx(prior_of(name)[0], rel=1e-3)


def test_a_table_left_out_is_predicted_by_the_others() -> None:
    rows = made_up_rows()
    megatron = training_row(
        1.0, source=MEGATRON, layout={"recompute": "none", "zero": 1, "microbatch": 2}
    )
    runs = timed([*rows, megatron], {})
    off = left_out(runs)
    assert set(off) == {group_of(r) for r in runs} and len(off) == 2
    assert all(np.abs(ratios - 1).max() < 0.01 for ratios in off.values())


def test_a_run_with_an_open_micro_batch_takes_the_fastest_that_fits() -> None:
    layout = {"microbatch": None, "gradaccum": None, "globalbatch": 64, "recompute": None,
              "zero": 1, "pp": 2, "dp": 4}  # fmt: skip
    row = training_row(1.0, source=MEGATRON, layout=layout)
    (run,), _ = read_runs([row], assume=True)
    assert run.assumed == ("recompute", "microbatch", "interleave")
    micro = np.asarray(run.plan.micro_batch)
    assert set(micro.tolist()) == {1, 2, 4, 8, 16}
    alone = []
    for m, v in zip(micro, np.asarray(run.plan.interleave), strict=True):
        stated = layout | {"microbatch": int(m), "interleave": int(v), "recompute": "none"}
        (one,), _ = read_runs([training_row(1.0, source=MEGATRON, layout=stated)])
        alone.append(predicted_s(one, {}))
    assert predicted_s(run, {}) == pytest.approx(min(alone))
    runs, others = read_runs([row])
    assert not runs and "micro-batch" in others[0][1]


@pytest.mark.parametrize(
    ("source", "layout", "name"),
    [
        ("llm-foundry/x", {}, "llm-foundry"),
        ("calculon/y", {}, "megatron-2022"),
        ("megatron-lm/sc21_table", {}, "megatron-2022"),
        ("torchtitan/2024-12", {"compile": 0}, "torchtitan"),
        ("torchtitan/2025-06", {"compile": 1, "async_tp": 1}, "torchtitan-async-tp"),
        ("made/up", {}, None),
    ],
)
def test_trainers_by_source(source: str, layout: dict[str, int], name: str | None) -> None:
    found = trainer_of(source, layout)
    assert (found.stack if found else None) == name


def test_the_document_is_what_the_reader_reads(tmp_path: Path) -> None:
    rows = made_up_rows()
    written = document(rows, on=DAY)
    path = tmp_path / "factors.json"
    path.write_text(json.dumps(written))
    found = read_step_factors(path)
    assert found.num_runs == len(rows) and found.date == DAY
    assert set(found.values) == set(factor_names(stack("llm-foundry"), _h100()))
    (table,) = step_accuracy(rows, found)
    assert table.n == table.fitted == len(rows) and table.assumed == 0
    assert table.mape == pytest.approx(
        np.mean([abs(predicted_s(r, found.values) / r.seconds - 1) for r in read_runs(rows)[0]])
    )
    assert "| llm-foundry | H100-SXM-80GB | 6 |" in step_model_markdown([table])


def _h100() -> object:
    from hwmodels import catalog

    return catalog.device("h100-sxm")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("schema", 2, "is not 1"),
        ("kind", "other", "is not 'step-factors'"),
        ("half_80", -1.0, "half_80"),
        ("rows", ["0" * 64], "is not the digest"),
    ],
)
def test_a_file_that_is_wrong_is_refused(
    tmp_path: Path, key: str, value: object, said: str
) -> None:
    whole = copy.deepcopy(json.loads(FACTORS_FILE.read_text(encoding="utf-8")))
    path = tmp_path / "factors.json"
    path.write_text(json.dumps(whole | {key: value}))
    with pytest.raises(SpecError, match=said):
        read_step_factors(path)


def test_the_shipped_file_was_fitted_on_calibration_rows_alone() -> None:
    found = step_factors.shipped_factors()
    assert found is not None and found.num_runs >= 80
    assert len(found.values) <= 20
    assert not [s for s in found.sources if "A100 40GB" in s]


def test_a_folder_without_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "steps_training.csv").write_text(
        "source,gpu,n_gpus,model,parallelism,precision,metric,value\n"
    )
    assert main([str(tmp_path), "--output", str(tmp_path / "out.json")]) == 2
    assert "a header and no rows" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
