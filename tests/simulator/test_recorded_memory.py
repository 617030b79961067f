"""Recorded allocator snapshots: what is read, and everything that is refused unread."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hwmodels.errors import InputError
from simulator.planners.storage import Tensors, place
from simulator.recorded_memory import BEFORE, KNOWN, load_recording

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


def without(layout: Any, *keys: str) -> Any:
    """A layout with those keys left out, however deep."""
    if isinstance(layout, dict):
        return {k: without(v, *keys) for k, v in layout.items() if k not in keys}
    return [without(one, *keys) for one in layout] if isinstance(layout, list) else layout


def layouts() -> dict[str, Any]:
    """One recording as releases write it: fields of torch 2.1 and of 2.13, and frees left out."""
    old = snapshot(STEP, segments=HELD)
    new = snapshot(
        [one | {"time_us": i, "pool_id": (0, 0), "compile_context": "N/A", "user_metadata": ""}
         for i, one in enumerate(STEP)]
        + [{"action": "oom", "device_free": 2**30, "size": 2**40, "stream": 0, "time_us": 99},
           {"action": "snapshot", "addr": 0, "size": 0, "stream": 0}],
        segments=[one | {"is_expandable": False, "segment_pool_id": (0, 0), "segment_type": "large"}
                  for one in HELD],
    ) | {"external_annotations": []}  # fmt: skip
    completed = [
        one | {"action": "free_completed"} if one["action"] == "free_requested" else one
        for one in STEP if one["action"] != "free_completed"
    ]  # fmt: skip
    return {
        "2.1": without(old, "frames", "requested_size") | {"allocator_settings": {}},
        "2.13": new,
        "skipped frees": snapshot(completed, segments=HELD),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_layout_reads_alike(layout: str, protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps(layouts()[layout], protocol=protocol)
    found = load_recording(written(tmp_path / "s.pickle", content))
    tensors = Tensors.of(found.timeline)
    sizes = sorted(tensors.sizes.tolist())
    assert sizes == [MIB, 2 * MIB, 2 * MIB, 4 * MIB, 6 * MIB]
    assert (tensors.live_bytes, found.reserved_bytes) == (11 * MIB, 18 * MIB)


def test_expandable_segments_count_what_is_mapped(tmp_path: Path) -> None:
    trace = [
        entry("segment_map", 0, 4 * MIB), entry("alloc", 0, 3 * MIB),
        entry("segment_map", 4 * MIB, 4 * MIB), entry("free_requested", 0, 3 * MIB),
        entry("segment_unmap", 4 * MIB, 4 * MIB),
    ]  # fmt: skip
    held = segment(0, 4 * MIB, (4 * MIB, "inactive")) | {"is_expandable": True}
    found = load_recording(written(tmp_path / "s.pickle", snapshot(trace, segments=[held])))
    assert found.reserved_bytes == 8 * MIB


def test_the_installed_release_has_the_actions_that_are_known() -> None:
    """torch's own header: an action more would be a layout that is not read."""
    header = Path(torch.__file__).parent / "include/c10/core/CachingDeviceAllocator.h"
    if not header.is_file():
        pytest.skip("this release keeps its trace actions elsewhere")
    body = header.read_text().split("enum Action {", 1)[1].split("};", 1)[0]
    actions = re.findall(r"^\s*([A-Z_]+)\b", body, flags=re.MULTILINE)
    assert {a.lower() for a in actions} <= set(KNOWN) and len(actions) == 9


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
        (snapshot([entry("alloc", 0, 2**63)]), "without addr or size"),
        (snapshot([entry("alloc", 0, 8, stream="s")]), "stream is no number"),
        (snapshot([entry("alloc", 0, 8, frames=[7])]), "frames are no list of dictionaries"),
        (
            snapshot([entry("alloc", 0, 8)], segments=[segment(0, 8) | {"total_size": "8"}]),
            "segment without address or total_size",
        ),
        (
            snapshot([entry("alloc", 0, 8)], segments=[segment(0, 8, (8, "resting"))]),
            "unknown state 'resting'",
        ),
        (
            snapshot([entry("alloc", 0, 8)], segments=[segment(0, 8) | {"blocks": [{}]}]),
            "block without size",
        ),
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
