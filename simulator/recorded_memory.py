"""Tensors and their lives from a recorded snapshot of PyTorch's CUDA allocator.

`torch.cuda.memory._record_memory_history()` and `_dump_snapshot("file.pickle")` write a pickled
dictionary of plain values: `segments` (what the driver has handed out, in blocks) and
`device_traces`, for each device the actions in order. Used here:

    alloc                 a tensor's life begins
    free_requested        it ends; free_completed is when its block may be used again
    segment_alloc, _free  what the allocator reserves, for the comparison
    blocks in use         allocated before the recording began and alive at its end

A free of an address that was never allocated ends a tensor that lived before the recording.
The file is read without running anything that it contains: it may hold numbers, texts, lists,
tuples, dictionaries and nothing else. Files of other layouts (Python's `pickle` of other things,
snapshots of releases before `device_traces`, or with actions that are unknown here) are refused.

Layouts read, torch 2.1 to 2.13 (a file names no version: its fields must tell):

    segments  address, total_size, device, stream, blocks of size and state; a block without its
              address follows the one before
    entries   action, addr (an "oom" has device_free instead), size, stream, frames where kept
    state     "active_pending_free" as written, "active_awaiting_free" as documented
    2.13      skip_actions: free_completed ends a life where free_requested was left out

and whatever else later releases put beside these (pool ids, compile contexts, annotations, times)
is not needed here.

Source: torch/csrc/cuda/memory_snapshot.cpp and torch/cuda/memory.py, `_snapshot` (fields),
c10/core/CachingDeviceAllocator.h, `TraceEntry::Action` (2.13's actions), torch/cuda/_memory_viz.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from hwmodels.errors import InputError
from simulator.memory_timeline import Timeline, Trace
from simulator.planners.storage_search import Ints

ALLOC, FREE, FREED = "alloc", "free_requested", "free_completed"
SEGMENTS: Final = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
IGNORED: Final = ("oom", "snapshot", "workspace_snapshot")
KNOWN: Final = (ALLOC, FREE, FREED, *SEGMENTS, *IGNORED)
IN_USE: Final = ("active_allocated", "active_awaiting_free", "active_pending_free")
STATES: Final = (*IN_USE, "inactive")
BEFORE, WITHIN = "before the recording", "recorded"
MOST_BYTES: Final = 2**31
MOST_ADDRESS: Final = 2**62
RECORD: Final = "record it with torch.cuda.memory._record_memory_history() and _dump_snapshot()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One device's lives; `reserved_bytes` is the most its allocator held at once."""

    timeline: Timeline
    device: int
    reserved_bytes: int
    num_streams: int


class _PlainUnpickler(pickle.Unpickler):
    """Loads plain values; a file that asks for any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for objects outside the file")


def load_recording(path: Path, device: int | None = None) -> Recording:
    """The recording of a device: the one with most actions where none is named."""
    snapshot = _plain(path)
    traces = _checked(path, snapshot)
    if device is None:
        device = max(range(len(traces)), key=lambda d: len(traces[d]), default=0)
    if not 0 <= device < len(traces) or not traces[device]:
        raise InputError(f"{path.name}: no actions of device {device}; {RECORD}, before the step")
    return _read(path, snapshot, traces[device], device)


def _plain(path: Path) -> Any:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path.name} is larger than 2 GiB; record with fewer max_entries")
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; name a snapshot") from None
    except InputError:
        raise
    except Exception as error:  # pickle raises whatever the bytes lead it to
        raise InputError(f"{path.name} is no allocator snapshot ({error}); {RECORD}") from None


def _checked(path: Path, snapshot: Any) -> list[Sequence[Mapping[str, Any]]]:
    """The traces, after a look at every entry's shape."""
    if not isinstance(snapshot, Mapping) or not isinstance(snapshot.get("segments"), list):
        raise InputError(f"{path.name} is no allocator snapshot (no segments); {RECORD}")
    traces = snapshot.get("device_traces")
    if not isinstance(traces, list) or not all(isinstance(one, list) for one in traces):
        raise InputError(
            f"{path.name} has no device_traces: another version of torch, or no recorded history; "
            + RECORD
        )
    for trace in traces:
        for entry in trace:
            _check_entry(path, entry)
    for segment in snapshot["segments"]:
        _check_segment(path, segment)
    return traces


def _other_version(path: Path, what: str) -> InputError:
    return InputError(
        f"{path.name}: {what}: a snapshot of another version of torch; record it with torch 2.1 "
        "to 2.13"
    )


def _check_entry(path: Path, entry: Any) -> None:
    action = entry.get("action") if isinstance(entry, Mapping) else None
    if not isinstance(action, str) or action not in KNOWN:
        raise _other_version(path, f"unknown action '{str(action)[:40]}'")
    if action in IGNORED:
        return
    if not (_is_count(entry, "addr") and _is_count(entry, "size")):
        raise _other_version(path, "an entry without addr or size")
    if not isinstance(entry.get("stream", 0), int):
        raise _other_version(path, "an entry whose stream is no number")
    frames = entry.get("frames") or []
    if not isinstance(frames, list) or not all(isinstance(one, Mapping) for one in frames):
        raise _other_version(path, "an entry whose frames are no list of dictionaries")


def _check_segment(path: Path, segment: Any) -> None:
    if not isinstance(segment, Mapping) or not isinstance(segment.get("blocks"), list):
        raise _other_version(path, "a segment without blocks")
    if not (_is_count(segment, "address") and _is_count(segment, "total_size")):
        raise _other_version(path, "a segment without address or total_size")
    for block in segment["blocks"]:
        if not isinstance(block, Mapping) or not _is_count(block, "size"):
            raise _other_version(path, "a block without size")
        if "address" in block and not _is_count(block, "address"):
            raise _other_version(path, "a block whose address is no number")
        if block.get("state") not in STATES:
            raise _other_version(path, f"unknown state '{str(block.get('state'))[:40]}'")


def _is_count(entry: Mapping[str, Any], key: str) -> bool:
    value = entry.get(key)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_ADDRESS


def _read(
    path: Path, snapshot: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], device: int
) -> Recording:
    trace = Trace()
    standing = _standing(path, snapshot, entries, device)
    for address, size in standing.items():
        trace.allocate((address, "before"), size, kind=BEFORE)
    alive: dict[int, tuple[int, Any]] = {address: (address, "before") for address in standing}
    for at, entry in enumerate(entries):
        if entry["action"] not in (ALLOC, FREE, FREED) or not entry["size"]:
            continue
        address = int(entry["addr"])
        if entry["action"] == ALLOC:
            if address in alive:
                raise InputError(
                    f"{path.name}: address {address:#x} is allocated twice, its free was not "
                    "recorded; record without skip_actions and with more max_entries"
                )
            alive[address] = (address, at)
            trace.allocate(alive[address], int(entry["size"]), kind=_kind(entry))
        elif address in alive:
            trace.free(alive.pop(address))
    streams = {entry.get("stream", 0) for entry in entries if entry["action"] == ALLOC}
    return Recording(
        timeline=trace.timeline(), device=device, num_streams=len(streams),
        reserved_bytes=_reserved(snapshot, entries, device),
    )  # fmt: skip


def _standing(
    path: Path, snapshot: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], device: int
) -> dict[int, int]:
    """Address and size of what was alive before the first entry."""
    first: dict[int, tuple[str, int]] = {}
    for entry in entries:
        if entry["action"] in (ALLOC, FREE, FREED):
            first.setdefault(int(entry["addr"]), (entry["action"], int(entry["size"])))
    found = {address: size for address, (action, size) in first.items() if action != ALLOC and size}
    for segment in snapshot["segments"]:
        if segment.get("device", device) != device:
            continue
        address = int(segment["address"])
        for block in segment["blocks"]:
            here = int(block.get("address", address))
            address = here + int(block["size"])
            if block.get("state") in IN_USE and here not in first:
                found[here] = int(block["size"])
    return found


def _kind(entry: Mapping[str, Any]) -> str:
    """The innermost frame of the user's that allocated: file and line, where frames were kept."""
    frames = entry.get("frames") or []
    for frame in frames:
        name = str(frame.get("filename", ""))
        if name.endswith(".py") and "/torch/" not in name:
            return f"{Path(name).name}:{frame.get('line', 0)}"
    return WITHIN


def _reserved(
    snapshot: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], device: int
) -> int:  # fmt: skip
    """The most reserved at once: the segments at the end, followed back through the entries."""
    now = sum(
        int(one["total_size"]) for one in snapshot["segments"]
        if one.get("device", device) == device
    )  # fmt: skip
    change: Ints = np.array(
        [SEGMENTS[e["action"]] * int(e["size"]) if e["action"] in SEGMENTS else 0 for e in entries],
        dtype=np.int64,
    )
    held = now - np.concatenate([np.cumsum(change[::-1])[::-1], [0]])
    return int(held.max())
