"""The reader believes good rows, refuses bad ones with a reason, and names bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hwmodels.errors import InputError
from tests.validate.data import kernel_row, write_csv
from validate.measurement import COLLECTIVES, KERNELS, STEPS, csv_files, read

SHAPE = {"m": 128, "n": 256, "k": 512}
GOOD = kernel_row(SHAPE, 12.5)


def test_a_good_row_is_read_whole(tmp_path: Path) -> None:
    (row,) = read(write_csv(tmp_path / "kernels_gemm.csv", [GOOD])).rows
    assert (row.family, row.source, row.gpu) == ("gemm", "made/up", "H100-SXM-80GB")
    assert (row.device_id, row.op, row.dtype) == ("h100-sxm", "gemm", "bf16")
    assert row.params == SHAPE
    assert row.seconds == pytest.approx(12.5e-6)


def without(name: str) -> dict[str, int]:
    return {k: v for k, v in SHAPE.items() if k != name}


BAD_ROWS = [
    (kernel_row("{'m': 1}", 1), "params is not JSON"),
    (kernel_row('{"m": 1', 1), "params is not JSON"),
    (kernel_row("[" * 100_000, 1), "params is not JSON"),
    (kernel_row('{"m": NaN, "n": 1, "k": 1}', 1), "params is not JSON"),
    (kernel_row("[1, 2]", 1), "params is not a JSON object"),
    (kernel_row(without("k"), 1), "params lacks size k"),
    (kernel_row(SHAPE | {"m": -5}, 1), "params: m is negative or not finite"),
    (kernel_row(SHAPE | {"pad_h": -1}, 1), "params: pad_h is negative or not finite"),
    (kernel_row('{"m": 1e999, "n": 1, "k": 1}', 1), "params: m is negative or not finite"),
    (kernel_row(SHAPE | {"m": 0}, 1), "size m is not a whole number of at least 1"),
    (kernel_row(SHAPE | {"m": 1.5}, 1), "size m is not a whole number of at least 1"),
    (kernel_row(SHAPE | {"m": 10**400}, 1), "size m is not a whole number of at least 1"),
    (kernel_row(SHAPE | {"m": "128"}, 1), "size m is not a number"),
    (kernel_row(SHAPE | {"m": True}, 1), "size m is not a number"),
    (kernel_row(SHAPE, "nan"), "latency_us is not a positive finite number"),
    (kernel_row(SHAPE, "inf"), "latency_us is not a positive finite number"),
    (kernel_row(SHAPE, "0"), "latency_us is not a positive finite number"),
    (kernel_row(SHAPE, "-3"), "latency_us is not a positive finite number"),
    (kernel_row(SHAPE, ""), "latency_us is not a positive finite number"),
    (kernel_row(SHAPE, "1_000"), "latency_us is not a positive finite number"),
    (kernel_row(SHAPE, 1, dtype="bf17"), "the dtype is unknown"),
    (kernel_row(SHAPE, 1, gpu="H999"), "the GPU is in no catalogue"),
    (kernel_row(SHAPE, 1, gpu="/etc/passwd"), "the GPU is in no catalogue"),
    (kernel_row(SHAPE, 1, gpu="./mine.toml"), "the GPU is in no catalogue"),
    (kernel_row(SHAPE, 1, op=" "), "op is empty"),
    (["only", "three", "fields"], "the row has too few fields"),
    ([*GOOD, "more"], "the row has too many fields"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_refused_and_its_neighbours_are_not(
    tmp_path: Path, bad: list[str], reason: str
) -> None:
    found = read(write_csv(tmp_path / "kernels_gemm.csv", [GOOD, bad, GOOD]))
    assert len(found.rows) == 2
    (refusal,) = found.refused
    assert refusal.reason == reason
    assert refusal.line == 3
    assert refusal.family == "gemm"


def test_collectives_and_steps_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "collectives.csv"
    row = ["s", "GB200", "1", "4", "all_reduce", "1048576", "20.5"]
    (found,) = read(write_csv(path, [row], COLLECTIVES)).rows
    assert found.op == "all_reduce"
    assert found.params == {"nodes": 1, "gpus": 4, "bytes": 1048576}
    assert found.seconds == pytest.approx(20.5e-6)
    row[3] = "0"
    (refusal,) = read(write_csv(path, [row], COLLECTIVES)).refused
    assert (refusal.op, refusal.reason) == ("all_reduce", "gpus is not a positive finite number")


@pytest.mark.parametrize(
    ("metric", "seconds"),
    [
        ("step_time_s", 2.0),
        ("step_time_s_derived", 2.0),
        ("tpot_ms", 2e-3),
        ("mfu_pct", None),
        ("tokens_per_s", None),
        ("tokens_per_s_per_gpu", None),
    ],
)
def test_a_step_metric_is_a_time_or_it_is_not(
    tmp_path: Path, metric: str, seconds: float | None
) -> None:
    row = ["s", "B200-SXM", "8", '{"layers":32}', '{"tp":8}', "amp_bf16", metric, "2"]
    (found,) = read(write_csv(tmp_path / "steps_training.csv", [row], STEPS)).rows
    assert found.seconds == pytest.approx(seconds) if seconds else found.seconds is None
    assert found.params["num_gpus"] == 8
    assert found.params["model"] == {"layers": 32}


BAD_FILES = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "header": (b"gpu,time\nH100,3\n", "line 1 holds 'gpu,time', not a known header"),
    "header-only": (",".join(KERNELS).encode() + b"\n", "a header and no rows"),
    "binary": (b"\xff\xfe\x00\x01", "byte 0 is not UTF-8"),
    "quote": (",".join(KERNELS).encode() + b'\na,b,c,d,"e\n', "line 2 is not CSV"),
    "long": (",".join(KERNELS).encode() + b"\n" + b"x" * 200_000, "line 2 is not CSV"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, kind: str) -> None:
    content, expected = BAD_FILES[kind]
    path = tmp_path / "kernels_gemm.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))


def test_what_a_spreadsheet_saves_is_read(tmp_path: Path) -> None:
    path = tmp_path / "kernels_gemm.csv"
    text = write_csv(path, [GOOD, GOOD]).read_text(encoding="utf-8")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n")
    assert len(read(path).rows) == 2


def test_files_are_found_by_folder_file_and_family(tmp_path: Path) -> None:
    for name in ("kernels_gemm.csv", "kernels_bmm.csv", "notes.txt"):
        (tmp_path / name).write_text("x")
    assert [f.name for f in csv_files(tmp_path)] == ["kernels_bmm.csv", "kernels_gemm.csv"]
    assert [f.name for f in csv_files(tmp_path, "gemm")] == ["kernels_gemm.csv"]
    assert csv_files(tmp_path / "notes.txt") == (tmp_path / "notes.txt",)
    with pytest.raises(InputError, match="no family 'gem'; it has bmm, gemm"):
        csv_files(tmp_path, "gem")
    with pytest.raises(InputError, match="no such file or folder"):
        csv_files(tmp_path / "nowhere")
    (tmp_path / "inner").mkdir()
    with pytest.raises(InputError, match=r"holds no \.csv file"):
        csv_files(tmp_path / "inner")


def test_every_published_row_is_accounted_for(shared_data: Path) -> None:
    for split in ("calib", "test"):
        for path in csv_files(shared_data / split):
            with path.open(encoding="utf-8") as file:
                num_lines = sum(1 for _ in file) - 1
            found = read(path)
            assert len(found.rows) + len(found.refused) == num_lines
            assert not found.refused, json.dumps(found.refused[0].reason)
