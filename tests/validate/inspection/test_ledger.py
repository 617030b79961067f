"""The committed record's file, and how it is held against what is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hwmodels.errors import InputError
from tests.validate.inspection.made import binary, entry, loop, source
from validate.inspection import exceptions, ledger, upkeep
from validate.inspection.pool import Job

FOUND = binary(
    loop(HMMA_16816=8), loop(depth=1, outer=0, wait=True, SYNCS=1),
    sources=(source(dot_flops=7, math="bf16"),), registers=99,
)  # fmt: skip
ONE = entry("gemm", "gemm[bf16]:BLOCK_M64-w4-s3", 90, FOUND)
JOB = Job(kernel=ONE.kernel, name=ONE.name, arch=90, digest=ONE.digest)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "inspection.json"
    other = entry("copy", "copy:w4", 80, binary())
    ledger.write([ONE, other], path)
    assert ledger.read(path) == {ONE.key: ONE, other.key: other}
    assert ONE.launch == "BLOCK_M64-w4-s3"
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and '"copy"' in lines[1]  # one a line, sorted
    assert list(tmp_path.rglob("*.tmp")) == []


def test_no_file_is_no_entries(tmp_path: Path) -> None:
    assert ledger.read(tmp_path / "none.json") == {}


@pytest.mark.parametrize("text", ["[1", '{"version": 99, "entries": []}', "[]"])
def test_odd_files_are_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "inspection.json"
    path.write_text(text)
    with pytest.raises(InputError) as told:
        ledger.read(path)
    assert "\n" not in str(told.value) and str(path) in str(told.value)


def test_two_do_not_renew_at_once(tmp_path: Path) -> None:
    path = tmp_path / "inspection.json"
    told = pytest.raises(InputError, match="another process")
    with ledger.alone(path), told, ledger.alone(path):
        pass
    with ledger.alone(path):
        assert not path.exists()
    assert list(tmp_path.iterdir()) == []


def test_missing_stale_and_extra() -> None:
    fresh = Job(kernel="gemm", name="gemm[bf16]:new", arch=90, digest="1" * 16)
    changed = Job(kernel="gemm", name=ONE.name, arch=90, digest="2" * 16)
    gone = entry("gemm", "gemm[bf16]:old", 90, binary())
    held = upkeep.held([fresh, changed], {ONE.key: ONE, gone.key: gone})
    assert held.missing == (fresh.key,) and held.stale == (ONE.key,) and held.extra == (gone.key,)
    assert not held.fine
    assert upkeep.held([JOB], {ONE.key: ONE}).fine


def test_spills_need_a_named_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = entry(ONE.kernel, ONE.name, 90, binary(spill_store_bytes=8, spill_load_bytes=4))
    assert upkeep.held([JOB], {ONE.key: spilling}).spilling == (ONE.key,)
    allowed = {ONE.key: exceptions.Spill(most_bytes=12, reason="cold")}
    monkeypatch.setattr(upkeep, "SPILLS", allowed)
    assert upkeep.held([JOB], {ONE.key: spilling}).fine
    assert upkeep.held([JOB], {ONE.key: ONE}).idle == (ONE.key,)
    monkeypatch.setattr(upkeep, "SPILLS", {ONE.key: exceptions.Spill(most_bytes=11, reason="cold")})
    assert upkeep.held([JOB], {ONE.key: spilling}).spilling == (ONE.key,)


def test_a_fresh_binary_is_the_recorded_one_or_near_it() -> None:
    more = binary(loop(HMMA_16816=8), registers=120)
    assert upkeep.differences(FOUND, FOUND, same_version=True) == []
    assert any("registers" in x for x in upkeep.differences(FOUND, more, same_version=True))
    assert upkeep.differences(FOUND, more, same_version=False) == []
    far = binary(loop(HMMA_16816=2), registers=140)
    told = upkeep.differences(FOUND, far, same_version=False)
    assert len(told) == 2 and "HMMA.16816: recorded 8, now 2" in told[1]


def test_the_sample_moves_with_the_sources_alone() -> None:
    jobs = [Job(kernel="a", name=str(n), arch=90, digest=f"{n:016x}") for n in range(50)]
    first = upkeep.chosen(jobs, 8)
    assert upkeep.chosen(jobs[::-1], 8) == first and len(set(first)) == 8
    moved = [Job(kernel="a", name=str(n), arch=90, digest=f"{n + 1:016x}") for n in range(50)]
    assert {j.name for j in upkeep.chosen(moved, 8)} != {j.name for j in first}


def test_every_exception_has_a_reason() -> None:
    assert all(x.reason and x.most_bytes > 0 for x in exceptions.SPILLS.values())


def test_the_committed_file_is_as_it_is_written(tmp_path: Path) -> None:
    if ledger.PATH.exists():
        ledger.write(ledger.read().values(), tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == ledger.PATH.read_bytes()
        assert json.loads(ledger.PATH.read_text())["version"] == ledger.VERSION
