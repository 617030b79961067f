"""The ratio of real steps to the bound: looked up device first, and read strictly."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hwmodels import catalog, step_ratios
from hwmodels.errors import InputError, SpecError
from hwmodels.step_ratios import digest_of, read_step_ratios, step_ratio

ROWS = [hashlib.sha256(text).hexdigest() for text in (b"one", b"two")]
ENTRY = {"num_rows": 12, "median": 1.5, "p10": 1.25, "p90": 2.0, "sources": ["a/b", "c"]}
DOCUMENT: dict[str, Any] = {
    "schema": 1,
    "kind": "step-ratio",
    "rung": "bound",
    "date": "2026-11-21",
    "rows_digest": digest_of(ROWS),
    "rows": ROWS,
    "devices": {"h100-sxm": ENTRY},
    "architectures": {"Hopper": {**ENTRY, "median": 1.75}},
}


def written(path: Path, document: object) -> Path:
    file = path / "steps.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def test_the_device_comes_before_its_architecture(tmp_path: Path) -> None:
    ratios = read_step_ratios(written(tmp_path, DOCUMENT))
    same = ratios.ratio("h100-sxm", "Hopper")
    near = ratios.ratio("h200-sxm", "Hopper")
    assert same is not None
    assert near is not None
    assert (same.scope, same.median) == ("device", 1.5)
    assert (near.scope, near.median) == ("architecture", 1.75)
    assert ratios.ratio("t4", "Turing") is None
    assert (same.num_rows, same.p10, same.p90, same.source) == (12, 1.25, 2.0, "a/b, c")
    assert same.rows_digest == digest_of(ROWS)
    assert ratios.rows == frozenset(ROWS)
    assert ratios.date.isoformat() == "2026-11-21"


def test_the_digest_of_a_set_of_rows_does_not_depend_on_their_order() -> None:
    assert digest_of(ROWS) == digest_of(reversed(ROWS)) != digest_of(ROWS[:1])


def test_the_shipped_file_answers_for_known_devices_and_no_others() -> None:
    a100, h200 = (catalog.device(name) for name in ("a100-sxm4-80gb", "h200-sxm"))
    own, borrowed = step_ratio(a100.id, a100.architecture), step_ratio(h200.id, h200.architecture)
    assert own is not None
    assert borrowed is not None
    assert (own.scope, borrowed.scope) == ("device", "architecture")
    for ratio in (own, borrowed):
        assert 1 < ratio.p10 <= ratio.median <= ratio.p90 < 10
        assert ratio.num_rows >= 9
    assert step_ratio("mi300x", catalog.device("mi300x").architecture) is None


def test_without_a_file_there_is_no_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(step_ratios, "STEPS_FILE", tmp_path / "none.json")
    step_ratios.shipped_ratios.cache_clear()
    try:
        assert step_ratio("a100-sxm4-80gb", "Ampere") is None
    finally:
        step_ratios.shipped_ratios.cache_clear()


def changed(*path: str, to: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


DEFECTS = {
    "schema": changed("schema", to=2),
    "schema of a kind": changed("schema", to=True),
    "kind": changed("kind", to="gemm"),
    "rung": changed("rung", to=""),
    "date": changed("date", to="21.11.2026"),
    "rows_digest": changed("rows_digest", to=digest_of(ROWS[:1])),
    "rows_digest short": changed("rows_digest", to="abc"),
    "rows": changed("rows", to=["abc"]),
    "rows twice": changed("rows", to=[ROWS[0], ROWS[0]]),
    "extra": changed("extra", to=1),
    "devices": changed("devices", to=[]),
    "devices.h100-sxm": changed("devices", "h100-sxm", to=1.5),
    "devices.h100-sxm.mean": changed("devices", "h100-sxm", "mean", to=1.5),
    "devices.h100-sxm.num_rows": changed("devices", "h100-sxm", "num_rows", to=0),
    "devices.h100-sxm.num_rows float": changed("devices", "h100-sxm", "num_rows", to=1.5),
    "devices.h100-sxm.median": changed("devices", "h100-sxm", "median", to=2.5),
    "devices.h100-sxm.p10": changed("devices", "h100-sxm", "p10", to=-1),
    "devices.h100-sxm.p90": changed("devices", "h100-sxm", "p90", to="2"),
    "devices.h100-sxm.p90 of a kind": changed("devices", "h100-sxm", "p90", to=True),
    "architectures.Hopper.sources": changed("architectures", "Hopper", "sources", to=[]),
    "architectures.Hopper.p90": changed("architectures", "Hopper", "p90", to=float("inf")),
}


@pytest.mark.parametrize("case", DEFECTS)
def test_a_defect_names_the_file_and_the_key(tmp_path: Path, case: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    DEFECTS[case](document)
    file = written(tmp_path, document)
    with pytest.raises(SpecError) as caught:
        read_step_ratios(file)
    assert caught.value.key == case.split(" ")[0]
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("key", sorted(DOCUMENT))
def test_every_key_is_required(tmp_path: Path, key: str) -> None:
    document = {k: v for k, v in DOCUMENT.items() if k != key}
    with pytest.raises(SpecError, match=f"{key}: missing"):
        read_step_ratios(written(tmp_path, document))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00", '{"a": NaN', "[" * 100_000])
def test_a_file_that_is_no_object_is_an_input_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError) as caught:
        read_step_ratios(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_step_ratios(tmp_path / "none.json")
    (tmp_path / "odd.json").write_bytes(bytes(range(256)))
    with pytest.raises(SpecError, match="not valid JSON"):
        read_step_ratios(tmp_path / "odd.json")
