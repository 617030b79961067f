"""Published training runs: read as plans, held against the bound, fitted without leaking."""

from __future__ import annotations

import datetime
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.errors import InputError
from hwmodels.step_ratios import STEPS_FILE, StepRatios, read_step_ratios
from simulator.step import training_step
from tests.validate.data import write_csv
from validate import steps
from validate.adapters import Uncounted
from validate.measurement import STEPS, Measurement, read
from validate.report import steps_markdown
from validate.runs import digest, read_runs, run
from validate.steps import compare_steps, main, sample, step_ratios, write_atomically
from workloads.plan import Recompute

DAY = datetime.date(2026, 11, 21)
GPT = {
    "name": "gpt", "layers": 4, "hidden": 1024, "heads": 16, "kv_heads": 16, "ffn": 4096,
    "gated": 0, "vocab": 50368, "seq": 2048,
}  # fmt: skip
LLAMA = GPT | {"name": "llama", "kv_heads": 4, "gated": 1}
LAYOUT = {
    "dp": 8, "tp": 1, "pp": 1, "cp": 1, "microbatch": 2, "gradaccum": 3, "globalbatch": 48,
    "zero": 3, "recompute": "full", "cpu_offload": 0,
}  # fmt: skip


def training_row(
    value: float = 10.0,
    metric: str = "step_time_s",
    *,
    model: dict[str, Any] | None = None,
    layout: dict[str, Any] | None = None,
    num_gpus: int = 8,
    precision: str = "bf16",
    source: str = "made/up",
    gpu: str = "H100-SXM-80GB",
) -> Measurement:
    """A row as the reader gives it; None removes a key of the model or the layout."""
    params = {
        name: {k: v for k, v in (base | (change or {})).items() if v is not None}
        for name, base, change in (("model", GPT, model), ("parallelism", LAYOUT, layout))
    }
    return Measurement(
        family="steps_training",
        source=source,
        gpu=gpu,
        device_id=catalog.device(gpu).id,
        op=metric,
        dtype=precision,
        params={"num_gpus": num_gpus, "value": value, **params},
        seconds=value if metric == "step_time_s" else None,
    )


def at_ratios(*ratios: float, **changes: Any) -> list[Measurement]:
    """Runs of different models that took those multiples of their bound."""
    rows = []
    for i, ratio in enumerate(ratios):
        model = {"layers": 4 + i}
        bound_s = sample(run(training_row(model=model, **changes))).bound_s
        rows.append(training_row(bound_s * ratio, model=model, **changes))
    return rows


def fitted(rows: list[Measurement], folder: Path) -> StepRatios:
    path = folder / "ratios.json"
    write_atomically(path, step_ratios(rows, on=DAY))
    return read_step_ratios(path)


# ---- rows as runs --------------------------------------------------------------------------


def test_a_row_becomes_the_plan_it_states() -> None:
    found = run(training_row(layout={"interleave": 2, "pp": 2, "tp": 2, "dp": 2, "globalbatch": 8}))
    plan = found.plan
    assert (plan.dp, plan.tp, plan.pp, plan.cp, plan.micro_batch) == (2, 2, 2, 1, 2)
    assert (plan.interleave, plan.recompute, plan.zero_stage) == (2, Recompute.FULL, 3)
    assert (found.step.global_batch, found.step.len_seq, found.seconds) == (8, 2048, 10.0)
    assert (found.cluster.id, found.cluster.num_nodes, found.recipe.name) == (
        "hgx-h100",
        1,
        "bf16-grad16",
    )


def test_both_families_of_layers() -> None:
    gpt, llama = run(training_row()).config, run(training_row(model=LLAMA)).config
    assert (gpt.norm, gpt.tied_embeddings, gpt.num_positions) == ("layernorm", True, 2048)
    assert (gpt.mlp.bias, gpt.mlp.gated, gpt.attention.rope_dim) == (True, False, 0)
    assert (llama.norm, llama.tied_embeddings, llama.num_positions) == ("rmsnorm", False, 0)
    assert (llama.mlp.bias, llama.mlp.gated, llama.attention.rope_dim) == (False, True, 64)


def test_seconds_from_tokens_per_second() -> None:
    direct, rate = training_row(2.0), training_row(48 * 2048 / 2.0 / 8, "tokens_per_s_per_gpu")
    assert run(rate).seconds == pytest.approx(run(direct).seconds)


def test_a_global_batch_is_computed_where_its_parts_are_stated() -> None:
    assert run(training_row(layout={"globalbatch": None})).step.global_batch == 48
    parts = {"globalbatch": None, "gradaccum": None}
    assert run(training_row(layout=parts, source="torchtitan/x")).step.global_batch == 16


def test_the_96_gb_board_sits_in_the_system_of_the_80_gb_one() -> None:
    found = run(training_row(gpu="H100-96GB-HBM2e-500W", num_gpus=16, layout={"dp": 16,
                             "globalbatch": 96}))  # fmt: skip
    assert (found.cluster.id, found.cluster.device.id) == ("hgx-h100", "h100-sxm-96gb")
    assert found.cluster.num_nodes == 2


UNCOUNTED = {
    "not the time of a whole step": training_row(40.0, "mfu_pct"),
    "mixture of experts": training_row(model={"experts": 8}),
    "stated feed-forward block": training_row(model={"gated": None}),
    "states no vocab": training_row(model={"vocab": None}),
    "layers is not a whole number": training_row(model={"layers": 0.5}),
    "seq is not a whole number": training_row(model={"seq": 1e300}),
    "ffn is not a whole number": training_row(model={"ffn": True}),
    "heads do not divide": training_row(model={"heads": 24, "kv_heads": 24}),
    "another number of parameters": training_row(model={"params": 7}),
    "no precision recipe for fp8 yet": training_row(precision="fp8"),
    "only adapters": training_row(source="made/lora"),
    "states no micro-batch": training_row(layout={"microbatch": None}),
    "what is recomputed": training_row(layout={"recompute": ["full"]}),
    "states no ZeRO stage": training_row(layout={"zero": None}),
    "none of 0, 1, 2, 3": training_row(layout={"zero": 4}),
    "offloaded": training_row(layout={"cpu_offload": 1}),
    "model chunks": training_row(layout={"pp": 2, "dp": 4}),
    "do not multiply": training_row(layout={"tp": 2}),
    "neither a global batch": training_row(layout={"globalbatch": None, "gradaccum": None}),
    "no whole number of micro-batches": training_row(layout={"globalbatch": 50}),
    "no cluster of t4": training_row(gpu="T4", precision="fp16"),
}


@pytest.mark.parametrize("reason", UNCOUNTED)
def test_a_row_that_states_no_run_says_why(reason: str) -> None:
    with pytest.raises(Uncounted, match=reason):
        run(UNCOUNTED[reason])
    comparison = compare_steps([UNCOUNTED[reason]])
    assert (comparison.tables, comparison.overall, comparison.num_rows) == ((), None, 1)


def test_a_run_that_two_rows_time_counts_once() -> None:
    rows = [training_row(5e3, "tokens_per_s_per_gpu"), training_row(2.0),
            training_row(9.0, "step_time_s_derived")]  # fmt: skip
    runs, others = read_runs(rows)
    assert [r.seconds for r in runs] == [2.0]
    assert [reason for _, reason in others] == ["another row states the time of the same run"] * 2
    assert len(read_runs(rows[2:])[0]) == 1


# ---- ratios --------------------------------------------------------------------------------


def test_a_sample_is_the_bound_of_the_same_plan() -> None:
    one = run(training_row())
    e = training_step(one.step, plan=one.plan, on=one.cluster, recipe=one.recipe)
    assert sample(one).bound_s == pytest.approx(float(e.seconds))
    assert sample(one).ratio == pytest.approx(10.0 / float(e.seconds))


def test_ratios_are_the_quantiles_of_the_runs(tmp_path: Path) -> None:
    factors = np.linspace(1.5, 2.5, 11)
    ratios = fitted(at_ratios(*factors), tmp_path)
    for found in (ratios.devices["h100-sxm"], ratios.architectures["Hopper"]):
        assert (found.num_rows, found.source) == (11, "made/up")
        assert (found.p10, found.median, found.p90) == pytest.approx((1.6, 2.0, 2.4), abs=1e-4)
    assert ratios.date == DAY


def test_few_runs_on_a_device_are_left_to_the_architecture(tmp_path: Path) -> None:
    rows = at_ratios(*[2.0] * 8) + at_ratios(*[3.0] * 4, gpu="H100-96GB-HBM2e-500W")
    ratios = fitted(rows, tmp_path)
    assert not ratios.devices
    assert ratios.architectures["Hopper"].num_rows == 12
    with_one_more = fitted(at_ratios(*[2.0] * 9), tmp_path)
    assert list(with_one_more.devices) == ["h100-sxm"]


def test_errors_are_their_formulas_and_only_of_unseen_runs(tmp_path: Path) -> None:
    calib = at_ratios(*np.linspace(1.5, 2.5, 11))
    ratios = fitted(calib, tmp_path)
    unseen = at_ratios(1.0, 1.6001, 2.0, 4.0, source="other/x")
    comparison = compare_steps([*calib, *unseen], ratios=ratios)
    seen, held = comparison.tables
    assert (seen.n, seen.n_unseen, seen.mape, seen.scope) == (11, 0, None, None)
    assert (held.n, held.n_unseen, held.scope) == (4, 4, "device")
    measured = np.array([1.0, 1.6001, 2.0, 4.0])
    assert held.mape == pytest.approx(np.mean(np.abs(2.0 - measured) / measured), abs=1e-3)
    assert held.bound_mape == pytest.approx(np.mean((measured - 1) / measured))
    assert held.coverage_80 == pytest.approx(0.5)
    assert (held.least, held.median) == pytest.approx((1.0, 1.80005))
    overall = comparison.overall
    assert overall is not None
    assert (overall.n, overall.n_unseen) == (15, 4)


def test_a_row_of_a_fitted_run_is_no_evidence_in_other_words(tmp_path: Path) -> None:
    calib = at_ratios(*[2.0] * 9)
    step = run(calib[0]).step
    tokens_per_s = float(step.num_tokens) / (float(calib[0].params["value"]) * 8)
    twin = training_row(tokens_per_s, "tokens_per_s_per_gpu", model={"layers": 4})
    ratios = fitted([*calib, twin], tmp_path)
    assert digest(twin) in ratios.rows
    (table,) = compare_steps([twin], ratios=ratios).tables
    assert (table.n, table.n_unseen) == (1, 0)


def test_a_run_faster_than_its_kernels_is_counted() -> None:
    one = sample(run(training_row()))
    rows = [training_row(one.lower_s * f, source=f"s{f}") for f in (0.99, 1.01)]
    assert [t.faster_than_bound for t in compare_steps(rows).tables] == [1, 0]


def test_a_digest_is_of_what_a_row_says() -> None:
    assert digest(training_row()) == digest(training_row())
    assert digest(training_row()) != digest(training_row(11.0))


def test_the_section_states_ratios_errors_and_reasons(tmp_path: Path) -> None:
    ratios = fitted(at_ratios(*np.linspace(1.5, 2.5, 11)), tmp_path)
    rows = [*at_ratios(1.6001, source="other/x"), training_row(1.0, "mfu_pct")]
    text = steps_markdown(compare_steps(rows, ratios=ratios), ratios)
    assert text.startswith("## Training steps\n")
    assert "2 rows state 1 runs" in text
    assert "| other | H100-SXM-80GB | 1 | 1.60 | 1.60 | 1.60 | 1.60 | 0 |" in text
    assert "| other | H100-SXM-80GB | 1 | device | 37.5 | 25.0 | 100.0 |" in text
    assert ratios.rows_digest[:16] in text
    assert "| the metric is not the time of a whole step | 1 |" in text


# ---- the command ---------------------------------------------------------------------------


def as_csv(row: Measurement) -> list[str]:
    model, layout = (json.dumps(row.params[k]) for k in ("model", "parallelism"))
    said = [row.source, row.gpu, str(row.params["num_gpus"]), model, layout, row.dtype, row.op]
    return [*said, repr(row.params["value"])]


def test_the_command_writes_what_the_catalogue_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = at_ratios(*[2.0] * 9)
    write_csv(tmp_path / "steps_training.csv", [as_csv(r) for r in rows], STEPS)
    output = tmp_path / "deep" / "ratios.json"
    assert main([str(tmp_path), "--output", str(output)]) == 0
    ratios = read_step_ratios(output)
    assert ratios.rows == {digest(r) for r in rows}
    assert "h100-sxm" in capsys.readouterr().out
    assert [p.name for p in output.parent.iterdir()] == ["ratios.json"]


def test_nothing_to_fit_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = as_csv(training_row(40.0, "mfu_pct"))
    write_csv(tmp_path / "steps_training.csv", [row], STEPS)
    output = tmp_path / "ratios.json"
    output.write_text("old")
    assert main([str(tmp_path), "--output", str(output)]) == 2
    assert main([str(tmp_path / "nowhere"), "--output", str(output)]) == 2
    assert output.read_text() == "old"
    assert capsys.readouterr().err.count("\n") == 2


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ratios.json"
    path.write_text("old")

    def fail(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps.json, "dumps", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, {})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_runs_no_ratios() -> None:
    with pytest.raises(InputError, match="no training run"):
        step_ratios([], on=DAY)


# ---- the published measurements ------------------------------------------------------------


@pytest.fixture(scope="module")
def calib(shared_data: Path) -> tuple[Measurement, ...]:
    return read(shared_data / "calib" / "steps_training.csv").rows


@pytest.fixture(scope="module")
def unseen(shared_data: Path) -> tuple[Measurement, ...]:
    return read(shared_data / "test" / "steps_training.csv").rows


def test_the_shipped_ratios_are_fitted_on_the_calibration_rows(
    calib: tuple[Measurement, ...], unseen: tuple[Measurement, ...]
) -> None:
    """What is shipped can be made again from the rows it names, and none of the others are in."""
    shipped = read_step_ratios(STEPS_FILE)
    again, document = step_ratios(calib, on=shipped.date), json.loads(STEPS_FILE.read_text())
    assert again.keys() == document.keys()
    assert again["rows"] == document["rows"], "fit again: python -m validate.steps"
    for group in ("devices", "architectures"):
        assert again[group].keys() == document[group].keys()
        for name, entry in document[group].items():
            for figure in ("num_rows", "median", "p10", "p90"):
                assert again[group][name][figure] == pytest.approx(entry[figure], rel=1e-3)
    assert not shipped.rows & {digest(row) for row in unseen}


def test_no_published_step_beats_the_bound(
    calib: tuple[Measurement, ...], unseen: tuple[Measurement, ...]
) -> None:
    started = time.perf_counter()
    comparison = compare_steps([*calib, *unseen])
    assert time.perf_counter() - started < 10
    assert comparison.num_rows == len(calib) + len(unseen)
    assert {t.source for t in comparison.tables} == {"calculon", "llm-foundry", "torchtitan"}
    assert sum(t.n for t in comparison.tables) > 150
    for table in comparison.tables:
        assert table.faster_than_bound == 0, table
        assert 1 < table.least <= table.median < 4, table


def test_ratios_hold_on_runs_they_have_not_seen(unseen: tuple[Measurement, ...]) -> None:
    """Four of five in the interval, give or take two standard errors of both samples."""
    overall = compare_steps(unseen).overall
    assert overall is not None
    assert overall.n_unseen == overall.n > 50
    fewest = min(r.num_rows for r in read_step_ratios(STEPS_FILE).devices.values())
    slack = 2 * math.sqrt(0.8 * 0.2 * (1 / overall.n_unseen + 1 / fewest))
    assert overall.coverage_80 == pytest.approx(0.8, abs=slack)
    assert overall.mape is not None
    assert overall.bound_mape is not None
    assert overall.mape < 0.15 < 0.4 < overall.bound_mape


def test_runs_that_say_both_seconds_and_tokens_agree_with_themselves(
    calib: tuple[Measurement, ...],
) -> None:
    rates = {
        steps.identity(row): run(row)
        for row in calib
        if row.op == "tokens_per_s_per_gpu" and row.source.startswith("llm-foundry/A100")
    }
    twins = [(r, rates.get(steps.identity(r.row))) for r in read_runs(calib)[0]]
    pairs = [(one.seconds, twin.seconds) for one, twin in twins if twin is not None]
    assert len(pairs) > 30
    for one_s, twin_s in pairs:
        assert twin_s == pytest.approx(one_s, rel=0.01)
