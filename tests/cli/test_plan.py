"""`ridgeplan plan`: the main job, its contract with programs, its pictures, and every bad input."""

from __future__ import annotations

import errno
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from hwmodels.step_ratios import step_ratio

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LLAMA = str(EXAMPLES / "llama3-8b.json")
MAIN_JOB = ("plan", LLAMA, "-c", "hgx-h100", "-n", "8", "--seq", "128k", "-b", "64")
SMALL = ("plan", LLAMA, "-c", "hgx-h100", "--seq", "8k", "-b", "8")
DECODE = ("plan", str(EXAMPLES / "llama3-70b.json"), "-c", "hgx-h200", "--seq", "8k", "-b", "32",
          "--phase", "decode")  # fmt: skip


def document(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    return found


# ---- the answer ------------------------------------------------------------------------------


def test_the_main_job_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(MAIN_JOB) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for part in (
        "Train llama3-8b, 64 x 128k tokens a step on 64 x h100-sxm (hgx-h100, 8 nodes)",
        "Best plan", "Bounds", "MFU", "on this rung", "Rung", "a real step",
        "published training steps", "extrapolated",
        "piece of the step", "attention", "memory per accelerator", "activations", "of budget",
        "why not", "gap 0 %", "of 80.0 GiB", "Korthikanti", "infiniband_ndr 50.0 GB/s",
    ):  # fmt: skip
        assert part in " ".join(out.split()), part


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("job", [MAIN_JOB, DECODE])
def test_nothing_is_wider_than_the_page(
    job: tuple[str, ...],
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(job) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= min(columns, 100)
    plans = [line for line in lines if re.match(r" dp\d+ tp", line)]
    if columns >= 80:  # a plan stays on one line where there is room
        assert len(plans) == 5
        assert all(re.search(r"mb\d+.* \d[\d.]* (s|ms) ", line) for line in plans)


@pytest.mark.parametrize("job", [MAIN_JOB, DECODE])
def test_pieces_and_parts_add_up(job: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, *job)
    assert next(iter(found)) == "version"
    assert set(found) == {
        "version", "model", "phase", "len_seq", "global_batch", "cluster", "device", "num_nodes",
        "num_accelerators", "recipe", "budget_bytes", "rung", "stack",
        "num_evaluated", "num_feasible", "status", "solve_s", "stages", "prices", "memory_curve",
        "gap_frac", "measured_over_bound", "plans",
    }  # fmt: skip
    assert (found["version"], found["rung"], found["gap_frac"]) == (1, "bound", 0.0)
    assert len(found["plans"]) == 5
    seconds = [plan["seconds"] for plan in found["plans"]]
    assert seconds == sorted(seconds)
    for plan in found["plans"]:
        assert set(plan) == {
            "plan", "seconds", "lower_s", "upper_s", "tokens_per_s", "mfu_frac", "bound",
            "seconds_by_piece", "compute_by_resource", "memory_bytes", "memory_bytes_by_part",
            "why_not_best", "order",
        }  # fmt: skip
        assert sum(plan["seconds_by_piece"].values()) == pytest.approx(plan["seconds"], rel=1e-12)
        parts = plan["memory_bytes_by_part"].values()
        assert sum(parts) == pytest.approx(plan["memory_bytes"], rel=1e-12)
        assert plan["memory_bytes"] <= found["budget_bytes"]
        assert 0 < plan["lower_s"] <= plan["seconds"] <= plan["upper_s"]
        assert 0 < plan["mfu_frac"] < 1
        degrees = plan["plan"]
        ranks = degrees["dp"] * degrees["tp"] * degrees["pp"] * degrees["cp"]
        assert ranks == found["num_accelerators"]
    assert [plan["why_not_best"] is None for plan in found["plans"]] == [True] + [False] * 4


def test_the_record_restates_the_question(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, *MAIN_JOB)
    asked = {key: found[key] for key in (
        "model", "phase", "len_seq", "global_batch", "cluster", "device", "num_nodes", "recipe",
    )}  # fmt: skip
    assert asked == {
        "model": "llama3-8b", "phase": "train", "len_seq": 131072, "global_batch": 64,
        "cluster": "hgx-h100", "device": "h100-sxm", "num_nodes": 8, "recipe": "bf16",
    }  # fmt: skip
    best = found["plans"][0]
    assert best["tokens_per_s"] * best["seconds"] == pytest.approx(64 * 131072, rel=1e-12)
    ratio = step_ratio("h100-sxm", "Hopper")
    assert ratio is not None
    assert found["measured_over_bound"]["p90"] == ratio.p90


def test_sizes_have_binary_suffixes(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "plan", LLAMA, "-c", "hgx-h100", "--seq", "4k", "-b", "1k")
    assert (found["len_seq"], found["global_batch"]) == (4096, 1024)


@pytest.mark.parametrize(
    ("phase", "words"),
    [("decode", "for one more token of every sequence"), ("Prefill", "for all prompts")],
)
def test_serving(phase: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = ("plan", LLAMA, "-c", "hgx-h100", "--seq", "8k", "-b", "16", "--phase", phase)
    assert main(job) == 0
    out = capsys.readouterr().out
    assert words in " ".join(out.split())
    assert "kv cache" in out
    assert "gradients" not in out and "published training" not in out
    found = document(capsys, *job)
    assert found["phase"] == phase.casefold()
    assert found["measured_over_bound"] is None
    best = found["plans"][0]
    new_tokens = 16 * (8192 if phase == "Prefill" else 1)
    assert best["tokens_per_s"] * best["seconds"] == pytest.approx(new_tokens, rel=1e-12)


@pytest.mark.parametrize(
    ("pins", "expected"),
    [
        (("tp=8",), {"tp": 8}),
        (("tp=2", "recompute=full"), {"tp": 2, "recompute": 2}),
        (("mb=1", "ZERO=1"), {"micro_batch": 1, "zero_stage": 1}),
        (("recompute=0",), {"recompute": 0}),
    ],
)
def test_pins_are_kept_by_every_plan(
    pins: tuple[str, ...], expected: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, *SMALL, *(part for pin in pins for part in ("--pin", pin)))
    assert found["plans"]
    for plan in found["plans"]:
        assert expected.items() <= plan["plan"].items()


def test_a_smaller_budget_fits_fewer_plans(capsys: pytest.CaptureFixture[str]) -> None:
    most, least = (document(capsys, *SMALL, "--hbm-fraction", f) for f in ("100%", "0.3"))
    assert most["budget_bytes"] * 0.3 == pytest.approx(least["budget_bytes"])
    assert least["num_feasible"] < most["num_feasible"]


def test_top_says_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(document(capsys, *SMALL, "--top", "1")["plans"]) == 1
    assert len(document(capsys, *SMALL, "--top", "7")["plans"]) == 7


def test_seconds_in_reasons_read_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(DECODE) == 0
    out = capsys.readouterr().out
    assert not re.search(r"e-\d", out)
    assert re.search(r"\+[\d.]+ (us|ms)", out)


# ---- pictures --------------------------------------------------------------------------------


def test_the_search_is_drawn_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a.html", "b.html")]
    assert main([*SMALL, "--html", str(files[0]), "--out", str(files[1])]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("wrote ")] == [
        f"wrote {file}" for file in files
    ]
    page = files[0].read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>") and not re.search(r"<script[^>]+src=", page)
    assert "Train llama3-8b, 8 x 8k tokens a step on 8 x h100-sxm" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.html"
    file.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr("cli.files.os.replace", full)
    assert "No space left" in refused(capsys, *SMALL, "--html", str(file))
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
    assert file.read_text() == "old"


def test_json_with_a_picture_is_still_one_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert document(capsys, *SMALL, "--html", str(tmp_path / "a.html"))["plans"]
    assert (tmp_path / "a.html").stat().st_size > 1e6


@pytest.mark.parametrize("job", ["train", "decode"])
def test_bars_add_up_and_the_best_is_on_top(job: str) -> None:
    from cli.charts.plan import figure
    from hwmodels import catalog
    from hwmodels.units import GIB
    from simulator.planners.parallelism import plan_parallelism
    from workloads.models.config import load_hf_config
    from workloads.models.transformer import decode_step, train_step

    config = load_hf_config(LLAMA)
    question = (
        train_step(config, len_seq=8192, global_batch=8)
        if job == "train"
        else decode_step(config, batch=16, len_context=8192)
    )
    choice = plan_parallelism(question, on=catalog.cluster("hgx-h100"))
    fig = figure(choice, question, step_ratio("h100-sxm", "Hopper"))
    shown = (choice.best, *choice.runners_up)
    totals = {
        axis: [sum(column) for column in zip(
            *(t.x for t in fig.data if t.type == "bar" and t.xaxis == axis), strict=True
        )]
        for axis in ("x", "x2")
    }  # fmt: skip
    assert any(a.text == "<b>Time (ms)</b>" for a in fig.layout.annotations)
    assert [t / 1e3 for t in totals["x"]] == pytest.approx(
        [float(c.step.seconds) for c in shown], rel=1e-2
    )
    assert totals["x2"] == pytest.approx([float(c.memory.total) / GIB for c in shown], rel=1e-2)
    dots, circled, star = (t for t in fig.data if t.type == "scatter")
    assert len(dots.x) == choice.num_feasible
    assert len(circled.x) == len(choice.runners_up)
    assert star.marker.symbol == "star"
    assert star.x[0] == pytest.approx(float(choice.best.memory.total) / GIB)
    assert star.y[0] == pytest.approx(float(choice.best.step.seconds))
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]  # the first plan is the topmost
    assert not [t for t in fig.data if t.type == "scattergl"]  # it would lie over the star


def test_a_lone_plan_is_drawn_too(tmp_path: Path) -> None:
    assert main([*SMALL, "--top", "1", "--html", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Every plan that fits" in page and "circled" not in page


@pytest.mark.parametrize("slowest", [1.0, 1.2, 2.0, 3.5, 10.0, 1000.0])
def test_the_time_axis_has_a_handful_of_ticks(slowest: float) -> None:
    import numpy as np

    from cli.charts.plan import _time_range

    for best in (3e-6, 0.0087, 1.0, 73.0):
        found = _time_range(np.array([best, best * slowest]))
        low, high = 10 ** np.asarray(found["range"])
        assert low < best < high
        assert 3 <= len(found["tickvals"]) <= 12
        assert all(low * 0.999 <= tick <= high * 1.001 for tick in found["tickvals"])
        assert len(set(found["ticktext"])) == len(found["ticktext"])


def test_plan_labels_have_room_at_the_left() -> None:
    from types import SimpleNamespace

    from cli.charts.picture import text_width
    from cli.charts.plan import LEFT, _two_lines
    from workloads.plan import Plan

    plan = Plan(dp=1024, tp=8, pp=128, cp=256, ep=256, micro_batch=16, interleave=8, recompute=2,
                zero_stage=3)  # fmt: skip
    label = re.sub(r"</?span[^>]*>", "", _two_lines(SimpleNamespace(plan=plan)))  # type: ignore[arg-type]
    mesh, schedule = label.split("<br>")
    assert (mesh, schedule) == ("dp1024 tp8 pp128 cp256 ep256", "mb16 v8 full zero3")
    assert text_width(mesh, 12) + 6 < LEFT + 6


# ---- bad input -------------------------------------------------------------------------------


def with_(job: tuple[str, ...], **changes: str) -> tuple[str, ...]:
    """The job with some options replaced or added."""
    args = list(job)
    for name, value in changes.items():
        option = {"seq": "--seq", "batch": "-b", "cluster": "-c", "nodes": "-n"}.get(
            name, "--" + name.replace("_", "-")
        )
        if option in args:
            args[args.index(option) + 1] = value
        else:
            args += [option, value]
    return tuple(args)


BAD = {
    "unknown cluster": (with_(SMALL, cluster="hgx-h10"), "did you mean hgx-h100"),
    "device for cluster": (with_(SMALL, cluster="t4"), "see `ridgeplan clusters`"),
    "no cluster file": (with_(SMALL, cluster="./none.toml"), "none.toml"),
    "phase": (with_(SMALL, phase="trian"), "did you mean train?"),
    "recipe": (with_(SMALL, recipe="bf15"), "did you mean bf16"),
    "bf16 on V100": (with_(SMALL, cluster="dgx-1-v100", nodes="4"), "has no bf16 rate"),
    "nodes zero": (with_(SMALL, nodes="0"), "nodes is 0"),
    "nodes negative": (with_(SMALL, nodes="-1"), "nodes is -1"),
    "nodes fraction": (with_(SMALL, nodes="2.5"), "'--nodes'"),
    "nodes absurd": (with_(SMALL, nodes="9999999999999"), "is more than 1M"),
    "top": (with_(SMALL, top="0"), "--top"),
    "pin without value": (with_(SMALL, pin="tp"), "write --pin tp=8"),
    "pin empty": (with_(SMALL, pin="tp="), "write --pin tp=8"),
    "pin word": (with_(SMALL, pin="tp=x"), "--pin tp = 'x'"),
    "pin negative": (with_(SMALL, pin="tp=-1"), "--pin tp = '-1'"),
    "pin zero": (with_(SMALL, pin="tp=0"), "--pin tp = '0'"),
    "pin fraction": (with_(SMALL, pin="tp=1.5"), "--pin tp = '1.5'"),
    "pin unknown": (with_(SMALL, pin="foo=2"), "pin one of dp, tp"),
    "pin twice": ((*SMALL, "--pin", "tp=1", "--pin", "tp=2"), "tp is given twice"),
    "pin twice by alias": ((*SMALL, "--pin", "mb=1", "--pin", "micro_batch=1"), "given twice"),
    "picture format": (with_(SMALL, out="x.gif"), "no known format"),
    "html suffix": (with_(SMALL, html="x.png"), "does not end in .html"),
    "no folder": (with_(SMALL, out="none/x.html"), "no folder none"),
    "no such model": (("plan", "llama.json", *SMALL[2:]), "llama.json"),
    "a folder as model": (("plan", ".", *SMALL[2:]), "not a regular file"),
    "missing option": (("plan", LLAMA, "-c", "hgx-h100"), "--seq"),
    **{f"seq {v!r}": (with_(SMALL, seq=v), f"--seq = '{v}'") for v in
       ("0", "-5", "1.5", "1e15", "1e30", "many", "nan", "inf", "8kB", "")},
    **{f"batch {v!r}": (with_(SMALL, batch=v), f"--global-batch = '{v}'") for v in
       ("0", "-5", "1.5", "1e15", "lots")},
    **{f"share {v!r}": (with_(SMALL, hbm_fraction=v), "raction") for v in
       ("0", "-1", "1.5", "120%", "most")},
    **{f"serving {v!r}": (with_(DECODE, batch=v), f"--global-batch = '{v}'") for v in ("0", "-2")},
}  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    """Run a job that must fail: nothing on stdout, one line on stderr, which is returned."""
    assert main(args) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ridgeplan: error: ") and err.count("\n") == 1, err
    assert len(err) < 500
    return err


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    picture = () if "--html" in args else ("--html", "picture.html")
    assert expected in refused(capsys, *args, *picture)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (Path(LLAMA).read_bytes()[:100], "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "holds a list"),
        (b"\xff\xfe\x00{", "not UTF-8"),
        (b'{"model_type": "llama"}', "missing"),
        (b'{"model_type": "lama", "hidden_size": 1}', "did you mean llama"),
        (Path(LLAMA).read_bytes().replace(b"4096", b"-4096"), "hidden_size"),
        (Path(LLAMA).read_bytes().replace(b"4096", b'"wide"'), "hidden_size"),
    ],
)
def test_a_broken_model_file_is_one_line(
    content: bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    html = tmp_path / "a.html"
    error = refused(capsys, "plan", str(file), *SMALL[2:], "--html", str(html))
    assert expected in error
    assert not html.exists()


def test_a_misspelt_model_is_answered_with_its_neighbours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = refused(capsys, "plan", LLAMA.replace("llama3", "lama3"), *SMALL[2:])
    assert "did you mean" in error and "llama3-8b.json" in error


CLUSTER = """
schema = 1
id = "mine"
name = "Mine"
device = "h100-sxm"
accelerators_per_node = 8

[[levels]]
name = "nvlink"
topology = "switch"
size = 8
{bandwidth}
[sources]
accelerators_per_node = "recalled: mine"
"levels.nvlink.*" = "recalled: mine"
"""


def test_a_cluster_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(CLUSTER.format(bandwidth="bytes_per_s = 450e9\n"))
    found = document(capsys, *with_(SMALL, cluster=str(file)))
    assert (found["cluster"], found["num_accelerators"]) == ("mine", 8)
    file.write_text(CLUSTER.format(bandwidth=""))
    error = refused(capsys, *with_(SMALL, cluster=str(file)))
    assert "mine.toml" in error and "bytes_per_s" in error
    file.write_text(CLUSTER.split("[[levels]]")[0])
    assert "[[levels]]" in refused(capsys, *with_(SMALL, cluster=str(file)))


def test_an_image_without_its_package_is_refused_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    error = refused(capsys, *SMALL, "--out", str(tmp_path / "a.png"))
    assert "needs kaleido; pip install 'ridgeplan[image]', or write .html" in error
    assert list(tmp_path.iterdir()) == []
    assert main([*SMALL, "--out", str(tmp_path / "a.html")]) == 0


# ---- no answer -------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_says_by_how_much_and_what_would_help(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    giant = str(EXAMPLES / "llama3-405b.json")
    html = tmp_path / "a.html"
    job = ("plan", giant, *SMALL[2:])
    error = refused(capsys, *job, "--html", str(html), code=3)
    found = re.search(r"needs ([\d.]+) GiB per accelerator of a budget of 73\.6 GiB", error)
    assert found is not None and float(found[1]) > 73.6
    nodes = re.search(r"it fits on (\d+) nodes", error)
    assert nodes is not None
    assert not html.exists()
    assert document(capsys, *with_(job, nodes=nodes[1]))["num_feasible"] > 0


def test_a_batch_that_no_plan_divides(capsys: pytest.CaptureFixture[str]) -> None:
    job = with_(SMALL, nodes="1000", batch="1", seq="8191")
    error = refused(capsys, *job, code=3)
    assert "no plan divides global batch 1" in error and "more divisors" in error


MIXTRAL = str(EXAMPLES / "mixtral-8x7b.json")
RULES = {
    "ranks do not tile": (("-n", "2"), ("tp=8", "dp=3"), "tp=8, dp=3 make 24 ranks"),
    "too few ranks": ((), ("dp=1", "tp=2", "pp=2", "cp=1"), "make 4 ranks of 8 accelerators"),
    "heads": ((), ("tp=3",), "tp=3 does not divide the 32 query heads"),
    "stages": (("-n", "8"), ("pp=64",), "pp=64 is more than the model's 32 layers"),
    "chunks": ((), ("pp=2", "v=5"), "interleave=5 does not divide the 32 layers"),
    "no experts": ((), ("ep=2",), "has no experts"),
    "ulysses": (("-n", "2", "--sequence-parallel", "ulysses"), ("cp=16",), "8 key and value heads"),
    "zero": ((), ("zero=3", "pp=2"), "would exchange for every micro-batch"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "simulate"])
@pytest.mark.parametrize("case", RULES)
def test_pins_that_contradict_name_the_rule(
    command: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, pins, said = RULES[case]
    page = tmp_path / "a.html"
    given = [word for pin in pins for word in ("--pin", pin)]
    asked = (command, *SMALL[1:], *more, *given, "--html", str(page))
    assert said in refused(capsys, *asked)
    assert not page.exists()


@pytest.mark.parametrize("command", ["plan", "simulate"])
@pytest.mark.parametrize("ep", ["3", "16"])
def test_experts_that_do_not_divide(
    command: str, ep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, command, MIXTRAL, *SMALL[2:], "-n", "2", "--pin", f"ep={ep}")
    assert f"ep={ep} does not divide the 8 experts" in error


def test_pins_of_uneven_stages_alone_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """80 layers in 8 x 4 chunks: no equal ones, yet a plan."""
    job = (str(EXAMPLES / "llama3-70b.json"), "-c", "hgx-h100", "-n", "8", "--seq", "8k")
    pins = ("-b", "64", "--pin", "pp=8", "--pin", "v=4", "--pin", "tp=8")
    found = document(capsys, "plan", *job, *pins)
    assert found["plans"][0]["plan"]["interleave"] == 4
    error = refused(capsys, "simulate", *job, *pins)
    assert "32 chunks, which do not divide the 80 layers" in error


def test_pins_that_no_plan_has_together_are_no_error_of_the_question(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = (*with_(SMALL, batch="7"), "--pin", "pp=1", "--pin", "tp=1", "--pin", "cp=1")
    assert "no plan" in refused(capsys, *asked, code=3)


def test_plans_of_a_framework_are_told_with_its_factors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["plan", "examples/llama3-8b.json", "-c", "hgx-h100", "--seq", "8k", "-b", "64"]
    seconds = {}
    for more in ([], ["--stack", "bound"], ["--stack", "megatron"]):
        assert main([*asked, *more, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        seconds[" ".join(more)] = found["plans"][0]["seconds"]
    assert found["rung"] == "calibrated" and found["stack"] == "megatron"
    assert found["measured_over_bound"] is None
    assert seconds[""] == seconds["--stack bound"] < seconds["--stack megatron"]
    assert main([*asked, "--stack", "megatron"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "calibrated: kernels as megatron runs them" in told and "matrix products" in told


def test_a_framework_does_not_serve(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "examples/llama3-8b.json", "-c", "hgx-h100", "--seq", "8k", "-b", "64"]
    assert main([*asked, "--phase", "decode", "--stack", "megatron"]) == 2
    assert "does not serve" in capsys.readouterr().err
