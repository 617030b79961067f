"""Published steps of mixtures of experts: what a row and its trainer's scripts say, told apart."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.step_experts import HOST_S, KERNELS, ExpertFactors, shipped_experts
from hwmodels.step_factors import shipped_values
from simulator.expert_exchange import DEEPEP, FLAT, NODE_LIMITED
from validate.adapters import Uncounted
from validate.measurement import Measurement
from validate.moe_accuracy import moe_accuracy
from validate.moe_fit import document, fit
from validate.moe_models import model_of, moe_transformer
from validate.moe_runs import (
    DROPLESS,
    DROPPING,
    graphs_frac,
    moe_run,
    on_device,
    predicted_s,
    read_moe_runs,
)
from validate.moe_trainers import ATTENTION, ROUTER, STEP, release_of, setting_of
from validate.runs import read_runs
from workloads.models.architecture import LatentAttention
from workloads.plan import Recompute

QWEN: dict[str, Any] = {
    "name": "Qwen3_30B_a3B", "layers": 48, "hidden": 2048, "heads": 32, "kv_heads": 4,
    "head_dim": 128, "moe_ffn": 768, "experts": 128, "topk": 8, "vocab": 151936, "seq": 4096,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "name": "DeepSeekV3", "layers": 61, "hidden": 7168, "heads": 128, "ffn": 18432,
    "moe_ffn": 2048, "experts": 256, "topk": 8, "shared": 1, "dense_layers": 3, "mla": 1,
    "vocab": 129280, "seq": 4096,
}  # fmt: skip
LAYOUT: dict[str, Any] = {
    "dp": 8, "tp": 1, "pp": 1, "cp": 1, "ep": 8, "microbatch": 1, "globalbatch": 512, "fsdp": 0,
}  # fmt: skip


def row(
    value: float = 5000.0,
    *,
    model: dict[str, Any] | None = None,
    layout: dict[str, Any] | None = None,
    release: str = "25.11",
    gpu: str = "H100-SXM-80GB",
    num_gpus: int = 8,
    precision: str = "bf16",
    metric: str = "tokens_per_s_per_gpu",
) -> Measurement:
    return Measurement(
        family="steps_training",
        source=f"megatron-bridge/{release}/pre-training",
        gpu=gpu,
        device_id=catalog.device(gpu).id,
        op=metric,
        dtype=precision,
        params={
            "model": model or QWEN, "parallelism": LAYOUT | (layout or {}), "num_gpus": num_gpus,
            "value": value,
        },
        seconds=None,
    )  # fmt: skip


# ---- models ----------------------------------------------------------------------------------


def test_names_say_what_sizes_do_not() -> None:
    deepseek = moe_transformer(DEEPSEEK)
    assert isinstance(deepseek.attention, LatentAttention)
    assert deepseek.moe is not None
    assert (deepseek.num_mtp, deepseek.num_moe_layers, deepseek.moe.shared_ffn_dim) == (1, 58, 2048)
    assert moe_transformer(DEEPSEEK | {"name": "DeepSeekV3 (w/o MTP)"}).num_mtp == 0
    dropping = moe_transformer(QWEN | {"name": "Qwen3_30B_a3B (tokendrop)"}).moe
    assert dropping is not None and dropping.capacity_factor == 1.0
    oss = moe_transformer(
        QWEN | {"name": "GPT OSS 120B", "layers": 36, "head_dim": 64, "kv_heads": 8}
    )
    assert (oss.window, oss.num_windowed_layers) == (128, 18)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Some MoE"}, "is not known beyond its sizes"),
        ({"experts": 0}, "experts is not a whole number from 1"),
        ({"topk": 300}, "a token cannot choose more experts"),
        ({"dense_layers": -1}, "dense_layers is not a whole number from 0"),
    ],
)
def test_what_a_row_cannot_say(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Uncounted, match=message):
        moe_transformer(QWEN | change)


def test_models_are_found_by_any_spelling() -> None:
    assert model_of({"name": "Qwen3_235B_a22B (tokendrop)"}) == "qwen3-235b"


# ---- settings --------------------------------------------------------------------------------


def test_settings_follow_releases() -> None:
    def of(release: str, gpu: str, model: dict[str, Any]) -> Any:
        return setting_of(f"megatron-bridge/{release}/pre-training", gpu, model)

    assert of("25.11", "H100-SXM-80GB", QWEN).dispatcher == FLAT
    assert of("26.04.01", "H100-SXM-80GB", QWEN).dispatcher == NODE_LIMITED
    assert of("26.04", "B200-SXM", DEEPSEEK).dispatcher == NODE_LIMITED
    assert of("26.04.01", "B200-SXM", DEEPSEEK).dispatcher == DEEPEP
    assert of("26.08", "GB200", QWEN).fused and not of("26.04.01", "GB200", QWEN).fused
    assert of("26.04.01", "GB200", QWEN | {"name": "GPT OSS 120B"}).overlapped
    assert release_of("megatron-bridge/26.04.01/pre-training") > release_of(
        "megatron-bridge/26.04/x"
    )
    for source, gpu in (("other/25.11/x", "GB200"), ("megatron-bridge/25.11/x", "A100"),
                        ("megatron-bridge/latest/x", "GB200")):  # fmt: skip
        with pytest.raises(Uncounted):
            setting_of(source, gpu, QWEN)


def test_a_run_has_its_plan_and_framework() -> None:
    one = moe_run(row(layout={"dp": 16, "tp": 2, "pp": 8, "ep": 32, "interleave": 4},
                      model=DEEPSEEK, num_gpus=256, release="25.09"))  # fmt: skip
    plan = one.run.plan
    assert (plan.ep, plan.etp, plan.zero_stage, plan.recompute) == (32, 1, 1, Recompute.SELECTIVE)
    assert (one.release, one.algorithm) == ("25.09", DROPLESS)
    made = on_device(one, shipped_values(), ExpertFactors(kernels=1.5, host_s=0.01))
    assert made.stack.modules == ("mla_up_proj", "mlp")
    assert (made.experts.dispatcher, made.experts.overlapped) == (DEEPEP, True)
    assert (made.experts.kernels, made.experts.host_s) == (1.5, 0.01)
    dropping = moe_run(row(model=QWEN | {"name": "Qwen3_30B_a3B (tokendrop)"}, release="25.09"))
    assert dropping.algorithm == DROPPING


def test_fused_kernels_take_no_factor() -> None:
    one = moe_run(row(release="26.08", gpu="GB200"))
    assert on_device(one, shipped_values(), ExpertFactors(kernels=2.0)).experts.kernels == 1.0


def test_graphs_take_their_share_of_the_host() -> None:
    one = moe_run(row())
    shares = [
        graphs_frac(one.run.step, one.run.plan, graphs)
        for graphs in ((), (ROUTER,), (ATTENTION, ROUTER), (STEP,))
    ]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert 0.05 < shares[1] < 0.3 < shares[2] < 0.9


def test_a_job_of_several_racks_takes_64_of_each() -> None:
    several = moe_run(row(gpu="GB200", num_gpus=128, layout={"dp": 128, "ep": 64})).run.cluster
    one = moe_run(row(gpu="GB200", num_gpus=64, layout={"dp": 64, "ep": 64})).run.cluster
    assert (several.levels[0].size, one.levels[0].size) == (64, 72)


def test_every_row_is_a_run_or_has_a_reason() -> None:
    rows = [row(), row(metric="model_tflops_per_gpu"), row(model=QWEN | {"name": "Some MoE"}),
            row(layout={"ep": 16, "dp": 4}), row(model={"gated": 1})]  # fmt: skip
    runs, others = read_moe_runs(rows)
    assert len(runs) == 1
    assert len(others) == 3  # the dense row is none of theirs
    assert not read_runs(rows[:1], assume=True)[0]


# ---- fit and tables --------------------------------------------------------------------------


def made_rows(factors: ExpertFactors) -> list[Measurement]:
    """Rows whose steps take what the model says with those factors."""
    dense, rows = shipped_values(), []
    for layout, release in (
        ({}, "25.11"), ({"microbatch": 4}, "25.11"), ({"microbatch": 4}, "26.02"),
        ({"dp": 16, "ep": 16}, "26.04.01"), ({"microbatch": 2}, "26.06"),
    ):  # fmt: skip
        num = int(layout.get("dp", 8))
        empty = row(1.0, layout=layout, release=release, num_gpus=num, metric="step_time_s")
        seconds = predicted_s(moe_run(empty), dense, factors)
        rows.append(replace(empty, params={**empty.params, "value": seconds}))
    return rows


def test_the_fit_finds_the_factors_that_made_the_rows() -> None:
    truth = ExpertFactors(kernels=1.6, host_s=0.011)
    runs, _ = read_moe_runs(made_rows(truth))
    found = fit(runs, shipped_values())
    assert found.kernels == pytest.approx(truth.kernels, rel=0.05)
    assert found.host_s == pytest.approx(truth.host_s, rel=0.05)


def test_the_document_names_its_rows_and_what_was_left_out() -> None:
    rows = made_rows(ExpertFactors(kernels=1.6, host_s=0.011))
    written = document(rows, on=datetime.date(2026, 11, 21))
    assert written["num_runs"] == len(rows) == len(written["rows"])
    assert set(written["factors"]) == {KERNELS, HOST_S}
    assert {"release 25.11", "model qwen3-30b", "release 26.06"} > {"release 25.11"}
    assert "release 26.04.01" in written["left_out"]


def test_releases_and_token_drop_stand_apart() -> None:
    dropping = QWEN | {"name": "Qwen3_30B_a3B (tokendrop)"}
    rows = [row(release="25.09", model=dropping), row(release="25.11"), row(release="26.04.01")]
    tables = {(t.source, t.gpu): t for t in moe_accuracy(rows)}
    assert set(tables) == {
        ("megatron-bridge 25.09 MoE, token drop", "H100-SXM-80GB"),
        ("megatron-bridge 25.11 MoE", "H100-SXM-80GB"),
        ("megatron-bridge 26.04.01 MoE", "H100-SXM-80GB"),
        ("megatron-bridge MoE", "all"),
        ("megatron-bridge MoE, token drop", "all"),
    }
    total = tables["megatron-bridge MoE", "all"]
    parts = [t.mape for (source, gpu), t in tables.items() if gpu != "all" and "drop" not in source]
    assert total.n == 2 and total.mape == pytest.approx(float(np.mean(parts)))
    assert all(t.fitted == 0 for t in tables.values())


def test_the_shipped_factors_are_two_and_plausible() -> None:
    shipped = shipped_experts()
    assert shipped is not None
    assert set(shipped.values) == {KERNELS, HOST_S}
    factors = ExpertFactors.of(shipped.values)
    assert 1 < factors.kernels < 4
    assert 1e-3 < factors.host_s < 2e-2
