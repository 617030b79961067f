"""Factors of training steps: recovered from made-up runs, read strictly, shown as errors."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
from pathlib import Path

import numpy as np
import pytest

from hwmodels import catalog, step_factors
from hwmodels.device import Device
from hwmodels.errors import SpecError
from hwmodels.step_factors import FACTORS_FILE, read_step_factors
from simulator.stack import factor_names, prior_of, stack
from tests.validate.test_steps import training_row
from validate.measurement import Measurement
from validate.report import step_model_markdown
from validate.runs import Run, read_runs
from validate.step_accuracy import step_accuracy
from validate.step_fit import (
    document,
    fit,
    fitted_runs,
    group_of,
    left_out,
    main,
    median_mfu,
    mfu_of,
    predicted_s,
    robust,
)
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


def test_a_run_far_from_all_others_counts_little() -> None:
    """z = 20: R sqrt(ln(1 + 100)) with R = 2 is 4.3; small residuals stay as they are."""
    assert robust(np.array([0.1, -0.1])) == pytest.approx([0.1, -0.1], rel=2e-3)
    assert robust(np.array([20.0, -20.0])) == pytest.approx([4.297, -4.297], rel=1e-3)
    runs = timed(made_up_rows(), {})
    odd = [dataclasses.replace(runs[0], seconds=2 * runs[0].seconds), *runs[1:]]
    assert np.abs(fit(odd).errors[1:]).max() < 0.05


def test_a_search_from_elsewhere_ends_at_the_same_factors() -> None:
    runs = timed(made_up_rows(), {"product/h100-sxm": 1.3})
    first, again = fit(runs).values, fit(runs, {"product/h100-sxm": 1.5, "attention": 0.8}).values
    assert again == pytest.approx(first, rel=0.02)


def test_only_dense_models_in_16_bits_are_fitted_on() -> None:
    rows = [*made_up_rows(), training_row(1.0, source=FOUNDRY, precision="amp_fp8"),
            training_row(1.0, source="made/up")]  # fmt: skip
    assert [r.row for r in fitted_runs(rows)] == rows[:6]


def test_one_share_of_the_peak_is_the_median_of_a_device() -> None:
    """6 N per token and half of 12 L h s: 989.4 Tflop/s on each of 8 GPUs."""
    (run,), _ = read_runs([training_row(10.0, source=FOUNDRY)])
    assert mfu_of(run) == pytest.approx(float(run.step.model_flops) / (10 * 8 * 989.4e12))
    slow = dataclasses.replace(run, seconds=40.0)
    medians = median_mfu([run, slow, dataclasses.replace(run, seconds=20.0)])
    assert medians == {"h100-sxm": pytest.approx(mfu_of(run) / 2)}


def test_runs_that_no_fit_has_seen_are_added_up(tmp_path: Path) -> None:
    rows = made_up_rows()
    path = tmp_path / "factors.json"
    path.write_text(json.dumps(document(rows[:4], on=DAY)))
    found = read_step_factors(path)
    table, total = step_accuracy(rows, found)
    assert (table.n, table.fitted) == (6, 4)
    assert (total.source, total.n, total.fitted) == ("all dense, 16 bits", 2, 0)
    assert table.mfu_mape is not None and total.mfu_mape is not None
    mfu = [mfu_of(r) / found.mfu["h100-sxm"] - 1 for r in read_runs(rows)[0]]
    assert table.mfu_mape == pytest.approx(np.abs(mfu).mean())


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
        ("llm-foundry/x", {}, "llm-foundry-torch1"),
        ("calculon/y", {"seq_par": 1}, "megatron-2022"),
        ("calculon/y", {"seq_par": 0}, "megatron-2022-whole"),
        ("megatron-lm/sc21_table", {"pp": 1}, "megatron-2021-ddp"),
        ("megatron-lm/sc21_table", {"pp": 2}, "megatron-2021"),
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
    assert set(found.values) == set(factor_names(stack("llm-foundry-torch1"), _h100()))
    (table,) = step_accuracy(rows, found)
    assert table.n == table.fitted == len(rows) and table.assumed == 0
    assert table.mape == pytest.approx(
        np.mean([abs(predicted_s(r, found.values) / r.seconds - 1) for r in read_runs(rows)[0]])
    )
    assert "| llm-foundry | H100-SXM-80GB | 6 |" in step_model_markdown([table])


def _h100() -> Device:
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
