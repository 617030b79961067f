"""Hardware counters of a kernel's launch, laid beside the bytes that its op counts.

    python -m validate.counters --out DIR

runs Nsight Compute (`ncu`) on one launch of the largest case of every kernel of ours and appends
what it reads to DIR/counters.jsonl. Clocks are left alone (`--clock-control none`), caches emptied
before each pass, as NVIDIA's default is. Where ncu is absent or may not read counters, one line
says so. The counts stand against the counters at three boundaries:

    hbm    dram__bytes_read + dram__bytes_write        op.work(all that the chip holds)
    l2     lts__t_bytes                                op.work(what one SM holds)
    smem   smsp__sass_data_bytes_mem_shared            op.work(an SM's registers)

Operands that the matrix unit fetches itself from shared memory (wgmma) are in no counter of the
last. Lines written to the L2 and not yet to memory when a kernel ends are missing in the first: at
most one L2 full. Metrics: NVIDIA, Nsight Compute documentation, metrics reference.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from hwmodels import catalog
from hwmodels.errors import InputError
from validate.record import Case, RecordWriter, Trial, canonical, plain, read_records
from validate.recorded import device_of
from validate.session import RECORDS, now

FILE: Final = "counters.jsonl"
VERSION: Final = 1
ROOT: Final = Path(__file__).resolve().parents[1]
WORKER: Final = "validate.counted_run"
LAUNCH_S: Final = 240.0
"""Longest that counting one launch may take: its start, its compilation, its passes."""

HBM: Final = ("dram__bytes_read.sum", "dram__bytes_write.sum")
L2: Final = ("lts__t_bytes.sum",)
SMEM: Final = ("smsp__sass_data_bytes_mem_shared.sum",)
BOUNDARIES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"hbm": HBM, "l2": L2, "smem": SMEM}
)
"""The counters whose sum crosses the boundary above each level."""
TENSOR: Final = "sm__inst_executed_pipe_tensor.sum"
TENSOR_BUSY: Final = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
BUSY: Final = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
METRICS: Final = (*HBM, *L2, *SMEM, TENSOR, TENSOR_BUSY, BUSY)

LIMIT_FRAC: Final = 0.05
"""How far counted device-memory bytes may lie from the counter (the project's bar)."""
L2S: Final = 4.0
"""Working sets from so many L2s on are judged."""

UNITS: Final[Mapping[str, float]] = MappingProxyType({
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12,
    "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "%": 1e-2, "": 1.0, "inst": 1.0, "Kinst": 1e3, "Minst": 1e6, "Ginst": 1e9,
})  # fmt: skip
"""What ncu's units are worth; its prefixes are decimal."""
MISSING: Final = ("n/a", "(!) n/a", "nan", "(!) nan", "")
DENIED: Final = "ERR_NVGPUCTRPERM"
NO_PERMISSION: Final = (
    f"this user may not read the GPU's counters ({DENIED}): run as root, or have the driver loaded "
    "with NVreg_RestrictProfilingToAdminUsers=0"
)
NO_NCU: Final = "ncu (Nsight Compute) is not on PATH: hardware counters are not read here"


class Denied(InputError):
    """The driver gives this user no counters, whatever the launch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """The counters of one launch, summed over its kernels; None where the GPU has no such one."""

    trial: Trial
    gpu: str
    launch: str
    kernels: tuple[str, ...]
    metrics: Mapping[str, float | None]
    measured_at: str

    def line(self) -> str:
        """One line of JSON."""
        return canonical({"version": VERSION, "kind": "counters", **plain(self)})

    def bytes_of(self, level: str) -> float:
        """What crossed the boundary above a level; NaN where a counter is missing."""
        values = [self.metrics.get(name) for name in BOUNDARIES[level]]
        return math.nan if None in values else float(sum(v for v in values if v is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncounted:
    """Why there are no counters: of one launch, or (without a trial) of any."""

    trial: Trial | None
    reason: str
    measured_at: str

    def line(self) -> str:
        """One line of JSON."""
        return canonical({"version": VERSION, "kind": "uncounted", **plain(self)})


@dataclass(frozen=True, slots=True)
class Held:
    """Counted bytes of a launch beside those of the counters, by level.

    `judged`: the working set is large enough for the bar; `kept`: and the bytes of device memory
    agree.
    """

    counted: Counted
    working_set_bytes: float
    counts: Mapping[str, float]
    judged: bool

    def ratio(self, level: str) -> float:
        """Counted over measured; NaN where either is unknown or nothing was moved."""
        measured = self.counted.bytes_of(level)
        return self.counts.get(level, math.nan) / measured if measured else math.nan

    @property
    def kept(self) -> bool:
        """Counted device-memory bytes within the bar."""
        return abs(self.ratio("hbm") - 1) <= LIMIT_FRAC


# ---- what ncu prints -----------------------------------------------------------------------


def parse(text: str) -> tuple[tuple[str, ...], dict[str, float | None]]:
    """The kernels and the sums of their counters from ncu's CSV; percentages are those of the
    longest kernel's, the largest. Raises `InputError` with ncu's own error, `Denied` for want of
    permission.
    """
    if DENIED in text:
        raise Denied(NO_PERMISSION)
    rows = list(_rows(text))
    if not rows:
        raise InputError(_error(text))
    kernels: dict[str, str] = {}
    found: dict[str, float | None] = {}
    for row in rows:
        kernels[row["ID"]] = row.get("Kernel Name", "")
        name = row["Metric Name"]
        value = value_of(row["Metric Value"], row["Metric Unit"])
        before = found.get(name)
        if before is None or value is None:
            found[name] = value if name not in found else None
        else:
            found[name] = max(before, value) if row["Metric Unit"] == "%" else before + value
    return tuple(kernels.values()), found


def _rows(text: str) -> Iterator[dict[str, str]]:
    """The lines of the table, whatever ncu and the program print around it."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if '"Metric Name"' in line), None)
    if start is None:
        return
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row.get("Metric Name") and row.get("Metric Value") is not None and row.get("ID"):
            yield {key: value for key, value in row.items() if isinstance(value, str)}


def _error(text: str) -> str:
    """ncu's own complaint in a line."""
    said = [line for line in text.splitlines() if line.startswith(("==ERROR==", "==WARNING=="))]
    if said:
        return f"ncu: {said[0].split('==')[2].strip()[:300]}"
    return "ncu printed no table of metrics; run the command by hand to see why"


def value_of(text: str, unit: str) -> float | None:
    """A cell in SI units or as a fraction; None where the GPU has no such counter.

    >>> value_of("1,234.5", "Kbyte"), value_of("37.5", "%"), value_of("n/a", "byte")
    (1234500.0, 0.375, None)
    """
    plain_text = text.strip()
    if plain_text in MISSING:
        return None
    if unit.strip() not in UNITS:
        raise InputError(f"ncu: unit '{unit[:20]}' is unknown; give --print-units base")
    try:
        return float(plain_text.replace(",", "")) * UNITS[unit.strip()]
    except ValueError:
        raise InputError(f"ncu: '{plain_text[:30]}' is not a number") from None


# ---- reading counters ----------------------------------------------------------------------


def found_ncu() -> str | None:
    """Where ncu is; None where it is not on PATH."""
    return shutil.which("ncu")


def count(trial: Trial, launch: str, gpu: str, ncu: str) -> Counted:
    """Run one launch under ncu; raises `InputError` with the reason where it gives nothing."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            ncu, "--csv", "--log-file", str(log), "--clock-control", "none", "--print-units",
            "base", "--profile-from-start", "off", "--metrics", ",".join(METRICS),
            sys.executable, "-m", WORKER, json.dumps({"trial": plain(trial), "launch": launch}),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LAUNCH_S, cwd=ROOT, check=False
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"no end within {LAUNCH_S:g} s under ncu") from None
        except OSError as error:
            raise InputError(f"ncu does not start: {error.strerror}") from None
        text = log.read_text(errors="replace") if log.exists() else ""
    said = text + done.stdout + done.stderr
    if done.returncode and '"Metric Name"' not in text and DENIED not in said:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise InputError(" ".join(last)[:300] or _error(said))
    kernels, metrics = parse(text if '"Metric Name"' in text else said)
    return Counted(
        trial=trial, gpu=gpu, launch=launch, kernels=kernels, metrics=metrics, measured_at=now()
    )


def chosen(
    folder: Path, gpu: str, arch: int, kernels: Sequence[str] = ()
) -> list[tuple[Trial, str]]:
    """Every kernel's largest case by our implementation, with the tile set that was fastest.

    The largest is the recorded one, so that what is counted is known to run; without records the
    largest of the grid.
    """
    from validate.agenda import suites

    best = _recorded_launches(folder, gpu)
    found = []
    for spec in suites()[0]:
        ours = spec.implementations[0]
        if kernels and spec.name not in kernels:
            continue
        cases = [c for c in spec.grid if ours.refusal(c, arch) is None and ours.launches(c, arch)]
        trials = [Trial(kernel=spec.name, implementation=ours.name, case=c) for c in cases]
        known = [trial for trial in trials if trial.key in best] if best else trials
        if known:
            last = max(known, key=lambda t: float(spec.op(t.case).compulsory_bytes()))
            found.append((last, best.get(last.key, "")))
    return found


def _recorded_launches(folder: Path, gpu: str) -> dict[str, str]:
    """The tile set of every record on that GPU."""
    path = folder / RECORDS
    records = read_records(path).records if path.exists() else ()
    return {r.trial.key: r.launch for r in records if r.environment.gpu == gpu}


def collect(
    folder: Path,
    gpu: str,
    arch: int,
    *,
    kernels: Sequence[str] = (),
    seconds: float = math.inf,
    records: Path | None = None,
) -> tuple[list[Counted], list[Uncounted]]:
    """Count every kernel once; each result is on the disk before the next. Never raises for what
    ncu says: that is a line too. `records` is a profile's folder, if it is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counted: list[Counted] = []
    uncounted: list[Uncounted] = []
    until, ncu = time.monotonic() + seconds, found_ncu()
    with RecordWriter(folder / FILE) as writer:
        trials = chosen(records or folder, gpu, arch, kernels) if ncu is not None else []
        if ncu is None:
            uncounted.append(Uncounted(trial=None, reason=NO_NCU, measured_at=now()))
            writer.append(uncounted[-1])
        for trial, launch in trials:
            if time.monotonic() > until or ncu is None:
                break
            try:
                counted.append(count(trial, launch, gpu, ncu))
                writer.append(counted[-1])
            except InputError as why:
                denied = isinstance(why, Denied)
                reason = " ".join(str(why).split())
                uncounted.append(
                    Uncounted(trial=None if denied else trial, reason=reason, measured_at=now())
                )
                writer.append(uncounted[-1])
                if denied:
                    break
    return counted, uncounted


# ---- looking at them -----------------------------------------------------------------------


def path_of(path: Path) -> Path:
    """The file of counters: the path itself, or a folder's."""
    return path / FILE if path.is_dir() else path


def read_counters(path: Path) -> tuple[tuple[Counted, ...], tuple[Uncounted, ...]]:
    """Counters and refusals of a file, torn lines passed over; of a trial the latest counts."""
    counted: dict[str, Counted] = {}
    uncounted: list[Uncounted] = []
    for number, raw in enumerate(path_of(path).read_bytes().split(b"\n"), start=1):
        try:
            line = json.loads(raw) if raw.strip() else None
        except ValueError:
            continue  # half a line of a killed writer
        if line is None:
            continue
        entry = _entry(line, f"{path_of(path)}: line {number}")
        if isinstance(entry, Counted):
            counted[f"{entry.gpu} {entry.trial.key}"] = entry
        else:
            uncounted.append(entry)
    return tuple(counted.values()), tuple(uncounted)


def _entry(line: Any, where: str) -> Counted | Uncounted:
    kinds: Mapping[str, type[Counted | Uncounted]] = {"counters": Counted, "uncounted": Uncounted}
    if not isinstance(line, dict) or line.get("kind") not in kinds:
        raise InputError(f"{where}: is no line of counters; give counters.jsonl or its folder")
    if line.get("version") != VERSION:
        raise InputError(
            f"{where}: version {line.get('version')!r} is unknown; this reads {VERSION}"
        )
    kind = kinds[line["kind"]]
    try:
        given = {f.name: line[f.name] for f in fields(kind)}
        trial = given["trial"]
        if trial is not None:
            given["trial"] = Trial(**{**trial, "case": Case(**trial["case"])})
        if "kernels" in given:
            given["kernels"] = tuple(given["kernels"])
        return kind(**given)
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: has no known form ({error}); mend or remove it") from None


def held(counted: Iterable[Counted]) -> tuple[list[Held], dict[str, int]]:
    """Every launch beside its counts; those that nothing counts, by reason."""
    from validate.adapters.part import Uncounted as NoCount
    from validate.adapters.recorded import op_of

    found: list[Held] = []
    reasons: dict[str, int] = {}
    for entry in counted:
        device_id = device_of(entry.gpu)
        try:
            if device_id is None:
                raise NoCount(f"GPU '{entry.gpu[:60]}' is in no catalogue")
            op = op_of(entry.trial.kernel, entry.trial.case)
            found.append(_held(entry, op, device_id))
        except (NoCount, InputError) as why:
            reasons[str(why)] = reasons.get(str(why), 0) + 1
    return found, reasons


def _held(entry: Counted, op: Any, device_id: str) -> Held:
    from simulator.estimate import BOUND, estimate

    device = catalog.device(device_id)
    counts = estimate(op, on=device, rung=BOUND).bytes_by_level
    level = next((m for m in device.memory if m.name == "l2"), None)
    l2_bytes = level.capacity_bytes * level.num_units if level is not None else math.inf
    working_set = float(op.compulsory_bytes())
    return Held(
        counted=entry,
        working_set_bytes=working_set,
        counts={name: float(value) for name, value in counts.items()},
        judged=working_set > L2S * l2_bytes,
    )


def main(argv: Sequence[str]) -> int:
    """Read counters on this machine's GPU."""
    from validate.torch_gpu import open_gpu

    parser = argparse.ArgumentParser(
        prog="python -m validate.counters", description="Read hardware counters of the kernels."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="N", help="end by then")
    given = parser.parse_args(list(argv))
    if found_ncu() is None:
        print(NO_NCU)
        return 0
    try:
        gpu = open_gpu()
        name, arch = gpu.name, gpu.arch
        gpu.close()
        counted, uncounted = collect(
            given.out, name, arch, kernels=given.kernel, seconds=given.seconds
        )
    except InputError as error:
        print(f"validate.counters: error: {error}", file=sys.stderr)
        return 2
    for entry in uncounted:
        print(f"{entry.trial or 'no counters'}: {entry.reason}")
    print(f"{len(counted)} launches counted in {given.out / FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
