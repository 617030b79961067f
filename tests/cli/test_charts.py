"""The pictures: what is drawn is what was computed, labels keep apart, files are whole."""

from __future__ import annotations

import os
import re
import shutil
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from cli.charts import roofline, sweep
from cli.charts.picture import Box, Placer
from cli.charts.plane import Plane, count_ticks, decades
from cli.main import main
from cli.questions import Over, parse_over
from cli.roofs import by_device, place_of, roofs_of
from cli.series import Series, ask_all, crossovers
from simulator.estimate import BOUND

PARAMS = ("heads=32", "batch=1", "dim=128", "channels=4096")
OPS = ("mamba_scan", "flash_attention_2", "attention")
CHROME = shutil.which("chromium") or shutil.which("google-chrome") or os.environ.get("BROWSER_PATH")


@pytest.fixture(scope="module")
def over() -> Over:
    return parse_over("seq=128:64k:x2", list(OPS))


@pytest.fixture(scope="module")
def series(over: Over) -> list[Series]:
    return ask_all(OPS, ["h100-sxm"], PARAMS, over, BOUND)


def test_a_sweep_draws_its_seconds_and_rings_its_crossovers(
    series: list[Series], over: Over
) -> None:
    crossings = crossovers(series)
    fig = sweep.figure(series, over, crossings)
    lines = [t for t in fig.data if t.mode == "lines" and t.x[0] is not None]
    assert len(lines) == len(OPS)
    for line, s in zip(lines, series, strict=True):
        assert np.array_equal(line.x, over.values)
        assert np.array_equal(line.y, s.seconds)
    rings = [t for t in fig.data if t.marker.symbol == "circle-open"]
    assert [t.x[0] for t in rings] == [c.value for c in crossings]
    assert len(rings) == 2
    texts = " ".join(a.text for a in fig.layout.annotations)
    assert all(name in texts for name in OPS)
    assert "Rung bound" in texts and "aiconfigurator" in texts
    assert fig.layout.xaxis.type == fig.layout.yaxis.type == "log"


def test_the_binding_resource_is_the_marker(series: list[Series], over: Over) -> None:
    fig = sweep.figure(series, over, [])
    drawn = [t for t in fig.data if t.mode == "markers" and t.x[0] is not None]
    for trace, s in zip(drawn, series, strict=True):
        expected = [sweep.SYMBOLS[str(b)] for b in s.bound]
        assert list(trace.marker.symbol) == expected
    names = {t.name for t in fig.data if t.name}
    assert "bound by special functions" in names and "bound by tensor units" in names


@pytest.mark.parametrize("devices", [["h100-sxm"], ["h100-sxm", "b200-sxm", "mi300x"]])
@pytest.mark.parametrize("swept", [False, True])
def test_a_roofline_draws_every_roof_and_every_op(
    devices: list[str], swept: bool, over: Over
) -> None:
    params = PARAMS if swept else (*PARAMS, "seq=8k")
    found = by_device(ask_all(OPS, devices, params, over if swept else None, BOUND))
    panels = [
        (roofs_of(s[0].estimate.device, s), [place_of(one) for one in s]) for s in found.values()
    ]
    fig = roofline.figure(panels, over if swept else None)
    hovers = [str(t.hovertext) for t in fig.data if t.hovertext is not None]
    for roofs, places in panels:
        for memory in roofs.memory:
            name = roofline.LEVEL_NAMES[memory.level]
            assert any(h.startswith(f"{name}: ") for h in hovers), memory
        for place in places:
            assert any(
                f"<b>{place.series.op_name}</b> on {place.series.device_id}" in h for h in hovers
            )
    texts = " ".join(a.text for a in fig.layout.annotations)
    assert "bf16 tensor" in texts and "fp32 vector" in texts and "HBM" in texts and "ridge" in texts
    if not swept:
        filled = [t for t in fig.data if t.marker.symbol == "circle" and t.marker.size == 15]
        hbm = [float(p.intensity["hbm"][0]) for _, places in panels for p in places]
        assert [t.x[0] for t in filled] == hbm


def test_labels_keep_apart_and_inside_the_frame() -> None:
    placer = Placer(Box(0, 0, 600, 400))
    rng = np.random.default_rng(0)
    for x, y in rng.uniform((50, 50), (550, 350), (12, 2)):
        placer.keep_clear(x, y, 8)
    before = len(placer.taken)
    for mark in list(placer.taken):
        placer.place((mark.left + mark.right) / 2, (mark.bottom + mark.top) / 2, "some name")
    labels = placer.taken[before:]
    assert len(labels) >= 10
    assert not any(a.overlaps(b) for a, b in combinations(labels, 2))
    assert all(label.within(placer.frame) for label in labels)
    assert not any(a.overlaps(b) for a in labels for b in placer.taken[:before])


def test_no_room_means_no_label() -> None:
    placer = Placer(Box(0, 0, 40, 20))
    assert placer.place(20, 10, "much too long a label") is None


def test_end_labels_are_pushed_apart_in_order() -> None:
    heights = sweep._pushed_apart([10.0, 11.0, 12.0, 100.0], 20.0)
    assert np.allclose(np.diff(heights[:3]), 20.0)
    assert heights[1] == 11.0
    assert heights[3] == 100.0


def test_pixels_are_logarithmic() -> None:
    plane = Plane(x_low=1, x_high=100, y_low=1, y_high=100)
    left, middle = plane.pixel(1, 1), plane.pixel(10, 10)
    right = plane.pixel(100, 100)
    assert np.allclose(np.add(left, right), np.multiply(2, middle))
    assert 0 < plane.slope_degrees() < 90


def test_ticks() -> None:
    assert decades(0.5, 2000) == [1, 10, 100, 1000]
    values, texts = count_ticks(1000, 140_000, powers_of_two=True)
    assert (values[0], texts[0], texts[-1]) == (1024, "1k", "128k")
    assert count_ticks(900, 5000, powers_of_two=False)[1] == ["1,000", "2,000", "5,000"]


def test_html_is_one_self_contained_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "roofline.html"
    args = ["roofline", "matmul", "-p", "m=64", "-p", "n=64", "-p", "k=64", "-d", "t4"]
    args += ["-p", "dtype=fp16", "--html", str(file)]
    assert main(args) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    page = file.read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    assert not re.search(r"<script[^>]+src=", page)
    assert "Roofline of matmul on t4" in page
    assert [p.name for p in tmp_path.iterdir()] == ["roofline.html"]


def test_without_a_browser_an_image_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import kaleido
    from kaleido.errors import ChromeNotFoundError

    def no_browser(*_: object, **__: object) -> bytes:
        raise ChromeNotFoundError

    monkeypatch.setattr(kaleido, "calc_fig_sync", no_browser)
    args = ["sweep", "matmul", "-p", "n=64", "-p", "k=64", "--over", "m=1,2"]
    args += ["--csv", str(tmp_path / "a.csv"), "--out", str(tmp_path / "a.png")]
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ridgeplan: error: drawing .png needs a Chrome or Chromium")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_the_image_extra_one_line_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    for command in (["sweep", "--over", "m=1,2"], ["roofline", "-d", "h100-sxm", "-p", "m=1"]):
        args = [*command, "matmul", "-p", "n=64", "-p", "k=64"]
        for suffix in ("png", "svg", "pdf"):
            assert main([*args, "--out", str(tmp_path / f"a.{suffix}")]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err == (
                f"ridgeplan: error: drawing .{suffix} needs kaleido; "
                "pip install 'ridgeplan[image]', or write .html\n"
            )
        assert list(tmp_path.iterdir()) == []
    assert main([*args, "--out", str(tmp_path / "a.html")]) == 0


def test_a_long_subtitle_shrinks_and_then_is_cut_between_words() -> None:
    import plotly.graph_objects as go

    from cli.charts.picture import style

    for words, cut in ((10, False), (30, False), (90, True)):
        fig = go.Figure()
        style(fig, title="t", subtitle=" ".join(["sizes"] * words), footnote="f")
        found = re.search(r"font-size:(\d+)px[^>]*>(.*)</span>", fig.layout.title.text)
        assert found is not None
        assert 12 <= int(found[1]) <= 15
        assert found[2].endswith("...") == cut
        assert 0.5 * int(found[1]) * len(found[2]) <= 1280
        assert set(found[2].removesuffix("...").split()) == {"sizes"}


@pytest.mark.slow
@pytest.mark.skipif(CHROME is None, reason="no browser to draw with")
@pytest.mark.parametrize(
    ("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")]
)
def test_images_are_drawn_by_a_browser(suffix: str, magic: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"roofline.{suffix}"
    args = ["roofline", "matmul", "-p", "m=64", "-p", "n=64", "-p", "k=64", "-d", "h100-sxm"]
    assert main([*args, "--out", str(file)]) == 0
    assert file.read_bytes().startswith(magic)
