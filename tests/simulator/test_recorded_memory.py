"""Recorded allocator snapshots: what is read, and everything that is refused unread."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from hwmodels.errors import InputError
from simulator.planners.storage import Tensors, place
from simulator.recorded_memory import BEFORE, load_recording

MIB = 2**20


def entry(action: str, addr: int, size: int, **more: Any) -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": size, "stream": 0, "frames": []} | more


def snapshot(*traces: list[dict[str, Any]], segments: Any = ()) -> dict[str, Any]:
    return {"segments": list(segments), "device_traces": list(traces), "allocator_settings": {}}


def written(path: Path, content: Any) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return path


def segment(address: int, size: int, *blocks: tuple[int, str], device: int = 0) -> dict[str, Any]:
    return {
        "address": address, "total_size": size, "device": device, "stream": 0,
        "blocks": [{"size": s, "state": state, "requested_size": s} for s, state in blocks],
    }  # fmt: skip


STEP = [
    entry("segment_alloc", 0, 8 * MIB),
    entry("alloc", 0, 4 * MIB, frames=[
        {"filename": "/x/torch/nn/modules/linear.py", "line": 1, "name": "forward"},
        {"filename": "/home/me/model.py", "line": 7, "name": "block"},
    ]),
    entry("alloc", 4 * MIB, 2 * MIB),
    entry("free_requested", 0, 4 * MIB),
    entry("free_completed", 0, 4 * MIB),
    entry("segment_alloc", 16 * MIB, 8 * MIB),
    entry("alloc", 16 * MIB, 6 * MIB, stream=3),
    entry("free_requested", 32 * MIB, MIB),
    entry("segment_free", 32 * MIB, 2 * MIB),
    entry("free_requested", 16 * MIB, 6 * MIB),
]  # fmt: skip
HELD = [
    segment(0, 8 * MIB, (4 * MIB, "inactive"), (2 * MIB, "active_allocated"),
            (2 * MIB, "inactive")),
    segment(16 * MIB, 8 * MIB, (6 * MIB, "inactive"), (2 * MIB, "active_allocated")),
]  # fmt: skip


def test_lives_are_read(tmp_path: Path) -> None:
    found = load_recording(written(tmp_path / "s.pickle", snapshot(STEP, segments=HELD)))
    tensors = Tensors.of(found.timeline)
    rows = sorted(zip(tensors.sizes.tolist(), tensors.kinds, strict=True))
    assert rows == [
        (MIB, BEFORE), (2 * MIB, BEFORE), (2 * MIB, "recorded"), (4 * MIB, "model.py:7"),
        (6 * MIB, "recorded"),
    ]  # fmt: skip
    assert tensors.live_bytes == (1 + 2 + 2 + 6) * MIB
    # At the end 16 MiB; before the first entry 2 were there, and 18 before one was given back.
    assert found.reserved_bytes == 18 * MIB
    assert (found.device, found.num_streams) == (0, 2)
    assert place(tensors).status == "optimal"


def test_the_busiest_device_is_taken_unless_one_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "s.pickle", snapshot([entry("alloc", 0, 64)], STEP[1:3]))
    assert load_recording(path).device == 1
    assert len(load_recording(path, 0).timeline.events) == 1
    with pytest.raises(InputError, match="no actions of device 2"):
        load_recording(path, 2)


def test_an_address_used_again_is_another_tensor(tmp_path: Path) -> None:
    trace = [entry("alloc", 0, 512), entry("free_requested", 0, 512), entry("alloc", 0, 1024)]
    found = load_recording(written(tmp_path / "s.pickle", snapshot(trace)))
    assert Tensors.of(found.timeline).sizes.tolist() == [512, 1024]


class Evil:
    """Runs a command when an ordinary unpickler loads it."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch evil-was-run",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (Evil(), "asks for (posix|nt).system"),
        (snapshot([{"action": Evil()}]), "asks for"),
        (b"", "no allocator snapshot"),
        (b"not a pickle", "no allocator snapshot"),
        (pickle.dumps(snapshot(STEP))[:-40], "no allocator snapshot"),
        (b"\x80\x04]" + b"(" * 50, "no allocator snapshot"),
        ([1, 2], "no segments"),
        ({"segments": []}, "another version of torch"),
        ({"segments": [], "device_traces": [3]}, "another version of torch"),
        (snapshot([entry("alloc_v2", 0, 1)]), "unknown action 'alloc_v2'"),
        (snapshot([{"action": "alloc", "addr": 0}]), "without addr or size"),
        (snapshot([entry("alloc", 0, -5)]), "without addr or size"),
        (snapshot([3]), "unknown action"),
        (snapshot(), "no actions"),
        (snapshot([entry("alloc", 0, 8), entry("alloc", 0, 8)]), "allocated twice"),
        (snapshot([entry("alloc", 0, 8)], segments=[{"address": 0}]), "segment without blocks"),
    ],
)
def test_what_is_no_snapshot_is_refused_in_a_line(
    content: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=told) as refused:
        load_recording(written(tmp_path / "s.pickle", content))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "evil-was-run").exists()


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_recording(tmp_path / "none.pickle")
