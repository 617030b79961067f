"""Published serving figures: how rows are read, refused, compared and fitted on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.main import main as ridgeplan
from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8, MXFP4, MXFP8, NVFP4
from hwmodels.errors import InputError
from simulator.serving import PROMPT_TOKENS, Host, Load
from simulator.serving_kernels import Layout
from tests.validate.data import write_csv
from validate.adapters import Uncounted
from validate.measurement import STEPS, Measurement
from validate.serving import compare_serving, fit, left_out, main, predicted_s, ranges
from validate.serving_report import kept, serving_markdown
from validate.serving_rows import (
    DENSE,
    DRAFTING,
    FLEET,
    LIMIT,
    MOE,
    QUEUED,
    SAME_RUN,
    TOO_FAST,
    TPOT,
    TTFT,
    Serving,
    read_servings,
    serving,
)

LLAMA = {"name": "meta-llama/Llama-3.1-8B", "layers": 32, "hidden": 4096, "heads": 32,
         "kv_heads": 8, "ffn": 14336, "vocab": 128256, "isl": 1024, "osl": 512}  # fmt: skip
GPT_OSS = {"name": "openai/gpt-oss-120b", "layers": 36, "hidden": 2880, "heads": 64, "kv_heads": 8,
           "head_dim": 64, "ffn": 2880, "experts": 128, "topk": 4, "vocab": 201088, "isl": 1024,
           "osl": 1024}  # fmt: skip
DEEPSEEK = {"name": "deepseek-ai/DeepSeek-V3", "layers": 61, "hidden": 7168, "heads": 128,
            "kv_heads": 128, "ffn": 18432, "moe_ffn": 2048, "experts": 256, "topk": 8, "mla": 1,
            "vocab": 129280, "isl": 1024, "osl": 1024}  # fmt: skip
AGG = {"mode": "agg", "batch": 8, "concurrency": 8, "tp": 1, "pp": 1, "moe_tp": 1, "moe_ep": 1,
       "backend": "vllm-0.12.0"}  # fmt: skip
ON_EIGHT = AGG | {"tp": 8, "moe_tp": 8, "attn_dp": 1, "backend": "trtllm-1.2"}


def made(
    model: Mapping[str, Any] = LLAMA,
    split: Mapping[str, Any] = AGG,
    value: float = 20.0,
    *,
    metric: str = TPOT,
    gpu: str = "H100-SXM-80GB",
    precision: str = "fp8",
) -> Measurement:
    """A row as the reader gives it."""
    params = {"model": dict(model), "parallelism": dict(split), "num_gpus": 1, "value": value}
    return Measurement(family="steps_inference", source="made/up", gpu=gpu, op=metric,
                       device_id=catalog.device(gpu).id, dtype=precision, params=params,
                       seconds=None)  # fmt: skip


def reason(row: Measurement) -> str:
    with pytest.raises(Uncounted) as found:
        serving(row)
    return str(found.value)


def test_formats_by_label_model_and_gpu() -> None:
    eight = serving(made()).served.formats
    assert (eight.mlp.dtype, eight.mlp.scheme, eight.cache) == (FP8, "tensor", FP8)
    plain = serving(made(precision="unknown")).served.formats
    assert (plain.mlp.dtype, plain.cache) == (BF16, BF16)
    four = serving(made(DEEPSEEK, ON_EIGHT, gpu="B200-SXM", precision="fp4")).served.formats
    assert (four.experts.dtype, four.attention.dtype) == (NVFP4, BF16)
    block = serving(made(DEEPSEEK, ON_EIGHT, gpu="H200-SXM-141GB")).served.formats
    assert (block.experts.scheme, block.cache) == ("block", BF16)
    hopper = serving(made(GPT_OSS, AGG | {"tp": 2, "moe_tp": 2})).served
    assert hopper.expert_kernel == "marlin"
    assert (hopper.formats.experts.dtype, hopper.formats.experts.stored) == (BF16, MXFP4)
    blackwell = serving(made(GPT_OSS, AGG, gpu="B200-SXM", precision="fp4")).served
    assert (blackwell.formats.experts.dtype, blackwell.expert_kernel) == (MXFP8, "")
    assert "no checkpoint format for int3" in reason(made(precision="int3"))


def test_families_and_what_names_say() -> None:
    assert serving(made()).family == DENSE
    one = serving(made(DEEPSEEK, ON_EIGHT, gpu="B200-SXM"))
    assert (one.family, one.served.config.num_moe_layers) == (MOE, 58)
    assert serving(made(DEEPSEEK | {"name": "deepseek-ai/DeepSeek-R1"}, ON_EIGHT,
                        gpu="B200-SXM")).family == DRAFTING  # fmt: skip
    oss = serving(made(GPT_OSS, AGG, gpu="B200-SXM")).served.config
    assert (oss.window, oss.num_windowed_layers) == (128, 18)
    assert "is not known beyond its sizes" in reason(made(LLAMA | {"name": "acme/9"}))


def test_squares_are_the_group_they_name() -> None:
    square = ON_EIGHT | {"tp": 64, "moe_tp": 8, "moe_ep": 8}
    one = serving(made(DEEPSEEK, square, gpu="B200-SXM"))
    assert one.served.layout == Layout(tp=8, attn_dp=1, moe_tp=1, moe_ep=8)
    apart = square | {"tp": 1, "attn_dp": 64, "batch": 4, "concurrency": 256}
    replicas = serving(made(DEEPSEEK, apart, 40.0, gpu="B200-SXM"))
    assert replicas.served.layout == Layout(tp=1, attn_dp=8, moe_tp=1, moe_ep=8)
    assert replicas.load.concurrency == 32
    kept_as_is = {k: v for k, v in square.items() if k != "attn_dp"}
    refused = reason(made(DEEPSEEK, kept_as_is | {"moe_ep": 4}, gpu="B200-SXM"))
    assert "experts' tp times ep" in refused


def test_rows_that_do_not_say_an_engines_load_are_refused() -> None:
    assert reason(made(split=AGG | {"concurrency": 256})) == FLEET
    assert reason(made(split={k: v for k, v in AGG.items() if k != "concurrency"})) == LIMIT


def test_runs_are_read_as_their_benchmark_documents() -> None:
    big = LLAMA | {"name": "meta-llama/Llama-3.1-70B", "isl": 1024, "osl": 1024}
    raced = serving(made(big, AGG | {"backend": "trtllm-1"}, 100.0)).load
    assert (raced.isl, raced.osl, raced.together) == (922, 922, False)
    assert (raced.sent_frac, raced.wait_steps) == (0.1, 20)
    assert serving(made(big | {"osl": 8192}, AGG | {"backend": "trtllm-1"}, 100.0)).load == Load(
        concurrency=8, isl=922, osl=7373, sent_frac=0.1
    )
    vllm = serving(made(big, value=100.0)).load
    assert (vllm.sent_frac, vllm.wait_steps) == (0.0, 0.0)
    own = serving(made(big | {"isl": 1000}, value=100.0)).load
    assert own == Load(concurrency=8, isl=1000, osl=1024, together=True)
    assert serving(made(LLAMA | {"osl": 1024})).load.together  # 8B is no model of that benchmark


def test_disaggregated_rows_are_the_ranks_that_decode() -> None:
    split = {"mode": "disagg", "d_tp": 1, "d_dp": 8, "d_moe_ep": 8, "d_batch": 32, "p_tp": 4,
             "concurrency": 256, "backend": "sglang-0.5.8"}  # fmt: skip
    one = serving(made(DEEPSEEK, split, 40.0, gpu="B200-SXM"))
    assert one.served.layout == Layout(tp=1, attn_dp=8, moe_tp=1, moe_ep=8)
    assert (one.mode, one.load.concurrency, one.terms.prompts) == ("disagg", 32, 0)
    unloaded = {k: v for k, v in split.items() if k != "concurrency"}
    assert reason(made(DEEPSEEK, unloaded, gpu="B200-SXM")) == LIMIT
    del split["d_batch"]
    assert "no batch of the ranks that decode" in reason(made(DEEPSEEK, split, gpu="B200-SXM"))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (made(split=AGG | {"tp": 3}), "do not divide 32 heads"),
        (made(split=AGG | {"pp": 2}), "pipeline parallel serving"),
        (made(split=AGG | {"mode": "both"}), "mode is neither"),
        (made(split=AGG | {"backend": "orca-1"}), "no serving engine orca"),
        (made(LLAMA | {"layers": 1.5}), "layers is not a whole number"),
        (made(LLAMA | {"hidden": None}), "hidden is not a whole number"),
        (made({"name": "llama-3"}), "no"),
        (made(split={"mode": "agg"}), LIMIT),
        (made(split=AGG | {"batch": 0.5}), "batch is not a whole number"),
        (made(split=AGG | {"moe_ep": "two"}), "moe_ep is not a whole number"),
        (made(LLAMA | {"mla": 1}), "ranks of latent attention"),
        (made(value=0.5), TOO_FAST),
        (made(metric=TTFT, split=AGG | {"batch": 9, "concurrency": 9}), QUEUED),
    ],
)
def test_rows_that_are_refused_say_why(row: Measurement, why: str) -> None:
    assert why in reason(row)


def test_a_run_under_two_names_counts_once_under_the_one_known_better() -> None:
    renamed = made(DEEPSEEK | {"name": "deepseek-ai/DeepSeek-R1"}, ON_EIGHT, gpu="B200-SXM")
    first = made(DEEPSEEK, ON_EIGHT, gpu="B200-SXM")
    other = made(DEEPSEEK | {"name": "deepseek-ai/DeepSeek-R1"}, ON_EIGHT, 9.0, gpu="B200-SXM")
    found, others = read_servings([renamed, first, other])
    assert [one.family for one in found] == [MOE, DRAFTING]
    assert [why for _, why in others] == [SAME_RUN]


def rows() -> list[Measurement]:
    """Figures of three engines that follow the model exactly, with constants of their own."""
    found = []
    for engine in ("trtllm", "vllm", "sglang"):
        for batch in (1, 4, 16, 64):
            for isl, osl in ((1024, 1024), (4096, 128), (512, 64)):
                split = AGG | {"backend": f"{engine}-1", "batch": batch, "concurrency": batch}
                for metric in (TPOT, TTFT):
                    row = made(LLAMA | {"isl": isl, "osl": osl}, split, 1e3, metric=metric)
                    if metric == TTFT and batch * isl > PROMPT_TOKENS:
                        continue
                    value = 1e3 * predicted_s(serving(row), TRUTH)
                    found.append(replace(row, params=dict(row.params) | {"value": value}))
    return found


TRUTH = Host(step_s={"trtllm": 4e-4, "vllm": 2e-3, "sglang": 8e-4}, sequence_s=2e-5, prompt_s=6e-3,
             launch_s={"trtllm": 5e-5, "vllm": 1e-4, "sglang": 2e-4})  # fmt: skip


def both(given: list[Measurement]) -> list[Serving]:
    return [one for metric in (TPOT, TTFT) for one in read_servings(given, metric=metric)[0]]


def test_the_fit_finds_the_constants_that_made_the_figures() -> None:
    found = both(rows())
    assert len(found) == 36 + 18
    host = fit(found)
    assert host.step_s == pytest.approx(TRUTH.step_s, rel=1e-2)
    assert host.sequence_s == pytest.approx(TRUTH.sequence_s, rel=1e-2)
    assert host.prompt_s == pytest.approx(TRUTH.prompt_s, rel=1e-2)
    assert host.launch_s == pytest.approx(TRUTH.launch_s, rel=1e-2)
    with pytest.raises(InputError, match="no serving figure to fit on"):
        fit([])


def test_ranges_are_of_models_left_out() -> None:
    other = LLAMA | {"name": "meta-llama/Llama-3.1-405B", "layers": 16}
    slow = [made(other | {"osl": osl}, value=60.0) for osl in (256, 512, 1024)]
    low, high = ranges(both(rows() + slow))[TPOT]
    assert 0 < low < high < 0.5  # nine tenths are the model that slow ones tell nothing of


def test_what_is_left_out_is_not_fitted_on() -> None:
    found, _ = read_servings(rows())
    tables = dict(left_out(found, lambda s: s.served.engine.name))
    assert set(tables) == {"sglang", "trtllm", "vllm"}
    assert tables["vllm"].n == 12
    assert tables["vllm"].mape > 0.05  # its host was never seen: the others' mean is not 2 ms


def test_a_comparison_counts_every_row_and_its_errors_by_hand() -> None:
    good = made(value=1.0)
    exact = 1e3 * predicted_s(serving(made()))
    given = [made(value=exact), made(split=AGG | {"concurrency": 8.0}, value=2 * exact),
             good, made(metric=TTFT, value=100.0)]  # fmt: skip
    found = compare_serving(given)
    assert found.num_rows == 4
    (tpot, ttft) = found.tables
    assert (tpot.n, ttft.n, ttft.metric) == (2, 1, TTFT)
    assert tpot.mape == pytest.approx(0.25) and tpot.median == pytest.approx(0.25)
    assert tpot.bias == pytest.approx(0.5**0.5 - 1)
    assert found.reasons == ((TPOT, TOO_FAST, 1),)
    assert json.loads(json.dumps(found.as_dict()))["unsupported"][0]["n"] == 1
    whole = found.totals[0]
    assert kept(whole) is False and kept(tpot) is None
    assert "dense: MAPE 25.0 % over 2 figures, bar 12.0 %: missed." in serving_markdown(found)


def test_rows_of_other_families_are_left_alone() -> None:
    assert compare_serving([replace(made(), family="steps_training")]).num_rows == 0


def as_csv(given: list[Measurement], path: Path) -> Path:
    lines = [
        [r.source, r.gpu, "1", json.dumps(r.params["model"]), json.dumps(r.params["parallelism"]),
         r.dtype, r.op, repr(r.params["value"])]
        for r in given
    ]  # fmt: skip
    return write_csv(path / "steps_inference.csv", lines, STEPS)


def test_the_command_fits_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_csv(rows(), tmp_path)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "prompt_s" in out and "without GPU" not in out.splitlines()[0]
    assert main([str(tmp_path / "none")]) == 2
    assert "validate.serving: error:" in capsys.readouterr().err


def test_validate_has_a_section_on_serving(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_csv([made(), made(value=0.5), made(metric=TTFT, value=90.0)], tmp_path)
    assert ridgeplan(["validate", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["serving_steps"]
    assert [(t["metric"], t["n"]) for t in document["tables"]] == [(TPOT, 1), (TTFT, 1)]
    assert [u["n"] for u in document["unsupported"]] == [1]
    target = tmp_path / "accuracy.md"
    assert ridgeplan(["validate", str(tmp_path), "--markdown", str(target)]) == 0
    out = capsys.readouterr().out
    assert "serving: errors in %" in out
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "\n## Serving\n" in target.read_text(encoding="utf-8")
