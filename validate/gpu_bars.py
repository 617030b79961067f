"""Every bar that needs a GPU, measured and judged by one command.

    python3 -m validate.gpu_bars --out DIR      measure on this machine's GPU, then judge
    python3 -m validate.gpu_bars --judge DIR    judge what is there, on any machine

Measuring needs torch, triton and numpy alone and writes DIR/quick and DIR/full (records of the two
suites) and DIR/counters.jsonl. Judging reads nothing else; the calibration needs scipy and
networkx and is unmeasured where they are missing. A bar whose records are missing is unmeasured,
never kept. A ratio over several shapes is the least of them.

    correct     no kernel of ours was refused for what it computed, and every kernel has a record
    triad       best triad bandwidth / best copy bandwidth                        at least 90 %
    gemm        cuBLAS seconds / ours, bf16 products of 4096^3 and more           at least 80 %
    flash       best SDPA seconds / ours, 8K queries and keys, head_dim 128       at least 75 %
    streams     compulsory bytes / seconds / triad's, where device memory binds   at least 80 %
    fft         torch.fft seconds / ours, 4K to 32K                               at least 2
    calibrated  MAPE of `full` by a calibration on `quick` alone, by family       at most 8 %
    covered     share of all these rows in the 90 % interval                      86 to 94 %
    counted     counted / measured bytes of device memory, above four L2s         within 5 %
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hwmodels import catalog
from hwmodels.errors import InputError, UnsupportedError
from validate.record import Record, Refused
from validate.session import read_store, write_whole

if TYPE_CHECKING:
    from validate.compare import Errors

QUICK, FULL, RESULT = "quick", "full", "bars.json"
VERSION: Final = 1
DONE, BAD_INPUT = 0, 2

TRIAD_FRAC, GEMM_FRAC, FLASH_FRAC, STREAM_FRAC, FFT_TIMES = 0.9, 0.8, 0.75, 0.8, 2.0
MAPE_FRAC, COVERAGE_FRAC, COVERAGE_SLACK = 0.08, 0.9, 0.04
LARGE_FLOPS: Final = 2 * 4096.0**3
FLASH_LEN, FLASH_DIM = 8192, 128
FFT_LENS: Final = (4096, 32768)
L2S: Final = 4.0
"""Working sets from so many L2s on stream from device memory."""
STREAMS: Final = (
    "softmax", "softmax_backward", "rmsnorm", "rmsnorm_backward", "layernorm", "elementwise",
    "swiglu", "associative_scan", "associative_scan_backward", "selective_scan", "ssd_scan",
)  # fmt: skip
"""The scans, norms and maps."""
FAULTS: Final = ("wrong", "failed", "compile", "lost", "hung")
"""Refusals that speak of a kernel, not of the machine."""
KEPT, MISSED, UNMEASURED = "kept", "missed", "unmeasured"
PERCENT: Final = "{:.1%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One bar: what was asked, what was measured, whether it is kept; `note` says over what."""

    bar: str
    asked: str
    measured: str
    value: float | None
    state: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Profiled:
    """What a suite left behind."""

    records: tuple[Record, ...]
    refused: tuple[Refused, ...]

    def of(self, kernel: str) -> list[Record]:
        """The records of a kernel."""
        return [r for r in self.records if r.trial.kernel == kernel]


def judge(folder: Path) -> list[Result]:
    """Every bar on what a folder holds; raises `InputError` where it holds no record."""
    quick, full = (_profiled(folder / name) for name in (QUICK, FULL))
    together = Profiled((*full.records, *quick.records), (*full.refused, *quick.refused))
    if not together.records:
        raise InputError(f"{folder}: holds no records; measure there first (--out {folder})")
    gpus = {r.environment.gpu for r in together.records}
    if len(gpus) > 1:
        raise InputError(f"{folder}: records of several GPUs ({', '.join(sorted(gpus))})")
    return [
        *correctness(together),
        triad(together),
        ratio("gemm", "80 % of torch's speed on large bf16 products", GEMM_FRAC,
              rivals(together, "gemm", _is_large)),
        ratio("flash attention", "75 % of the best SDPA backend at 8K, 128 wide", FLASH_FRAC,
              rivals(together, "flash_attention", _is_long)),
        *streams(together),
        ratio("fft convolution", "twice as fast as torch.fft at 4K to 32K", FFT_TIMES,
              rivals(together, "fft_convolution", _is_fft), text="{:.2f}x"),
        *calibrated(quick, full),
        *counted(folder),
    ]  # fmt: skip


def _profiled(folder: Path) -> Profiled:
    found = read_store(folder)
    return Profiled(found.records, found.refused)


def unmeasured(bar: str, asked: str, why: str) -> Result:
    """A bar of which nothing is known."""
    return Result(bar=bar, asked=asked, measured="-", value=None, state=UNMEASURED, note=why)


def _result(
    bar: str, asked: str, value: float, kept: bool, note: str = "", text: str = PERCENT
) -> Result:
    state = KEPT if kept else MISSED
    return Result(
        bar=bar, asked=asked, measured=text.format(value), value=value, state=state, note=note
    )


# ---- one bar each --------------------------------------------------------------------------


def correctness(found: Profiled) -> list[Result]:
    """Every kernel of ours within its tolerance of the float64 reference."""
    asked = "all kernels within tolerance of float64"
    wrong = [e for e in found.refused if _own(e.trial.implementation) and e.kind in FAULTS]
    right = {r.trial.kernel for r in found.records if _own(r.implementation)}
    missing = [name for name in _own_kernels() if name not in right]
    seen = len(right | {e.trial.kernel for e in wrong})
    if wrong:
        first = wrong[0]
        note = f"{len(wrong)} trials refused; {first.trial}: {first.kind}: {first.reason}"[:200]
        share = 1 - len({e.trial.kernel for e in wrong}) / seen
        return [_result("correct", asked, share, kept=False, note=note)]
    if missing:
        return [unmeasured("correct", asked, f"no record of {', '.join(missing)}")]
    errors = [r.error for r in found.records if _own(r.implementation) and r.error is not None]
    worst = max(errors, default=math.nan)
    return [_result("correct", asked, 1.0, kept=True, note=f"worst relative error {worst:.2g}")]


def _own_kernels() -> list[str]:
    from validate.agenda import suites

    return [s.name for s in suites()[0] if any(_own(i.name) for i in s.implementations)]


def _own(implementation: str) -> bool:
    return implementation.startswith("triton")


def triad(found: Profiled) -> Result:
    """The best bandwidths of both, whoever ran them."""
    asked = "90 % of the best copy rate"
    ours = [rate for r, rate in _rates(found, "triad") if _own(r.implementation)]
    copies = [rate for _, rate in _rates(found, "copy")]
    if not ours or not copies:
        return unmeasured("triad", asked, "no record of triad and of copy beyond the L2")
    value = max(ours) / max(copies)
    note = f"{max(ours) * 1e-12:.2f} of {max(copies) * 1e-12:.2f} TB/s"
    return _result("triad", asked, value, value >= TRIAD_FRAC, note)


def _rates(found: Profiled, kernel: str) -> Iterator[tuple[Record, float]]:
    """Compulsory bytes per second of the records whose working set lies far beyond the L2."""
    from validate.adapters.part import Uncounted

    for record in found.of(kernel):
        try:
            moved = float(_op(record).compulsory_bytes())
        except Uncounted:  # a record of another version's suite
            continue
        if moved > L2S * _l2_bytes(record):
            yield record, moved / record.seconds


def _op(record: Record) -> Any:
    from validate.adapters.recorded import op_of

    return op_of(record.trial.kernel, record.case)


def _l2_bytes(record: Record) -> float:
    device = _device(record)
    level = next((m for m in device.memory if m.name == "l2"), None)
    return math.inf if level is None else float(level.capacity_bytes * level.num_units)


def _device(record: Record) -> Any:
    from validate.recorded import device_of

    device_id = device_of(record.environment.gpu)
    if device_id is None:
        raise InputError(f"GPU '{record.environment.gpu}' is in no catalogue; nothing to judge by")
    return catalog.device(device_id)


def ratio(
    bar: str, asked: str, least: float, pairs: Sequence[tuple[str, float]], text: str = PERCENT
) -> Result:
    """The least of some ratios of a rival's seconds to ours."""
    if not pairs:
        return unmeasured(bar, asked, "no such shape was timed both ways")
    where, value = min(pairs, key=lambda pair: pair[1])
    middle = text.format(float(np.median([v for _, v in pairs])))
    note = f"least of {len(pairs)} shapes, at {where}; median {middle}"
    return _result(bar, asked, value, value >= least, note, text)


def rivals(
    found: Profiled, kernel: str, wanted: Callable[[Record], bool]
) -> list[tuple[str, float]]:
    """By case: the best rival's seconds over our best."""
    by_case: dict[str, list[Record]] = {}
    for record in found.of(kernel):
        if wanted(record):
            by_case.setdefault(record.case.key, []).append(record)
    pairs = []
    for records in by_case.values():
        ours = [r.seconds for r in records if _own(r.implementation)]
        theirs = [r.seconds for r in records if not _own(r.implementation)]
        if ours and theirs:
            pairs.append((_shape(records[0]), min(theirs) / min(ours)))
    return pairs


def _shape(record: Record) -> str:
    sizes = " ".join(f"{name}={value}" for name, value in record.case.params.items())
    return f"{record.case.dtype} {sizes}"


def _is_large(record: Record) -> bool:
    p = record.case.params
    return record.case.dtype == "bf16" and 2.0 * p["m"] * p["n"] * p["k"] >= LARGE_FLOPS


def _is_long(record: Record) -> bool:
    p = record.case.params
    lens = {p.get("seq_q", p.get("len_q")), p.get("seq_kv", p.get("len_kv"))}
    return lens == {FLASH_LEN} and p["head_dim"] == FLASH_DIM


def _is_fft(record: Record) -> bool:
    return bool(FFT_LENS[0] <= record.case.params["len_seq"] <= FFT_LENS[1])


def streams(found: Profiled) -> list[Result]:
    """Every scan, norm and map whose bound is device memory, at its largest input a format."""
    asked = "80 % of triad's bandwidth on large inputs"
    base = max((rate for r, rate in _rates(found, "triad") if _own(r.implementation)), default=0.0)
    results = []
    for kernel in STREAMS:
        largest: dict[str, tuple[float, float, str]] = {}
        for record, rate in _rates(found, kernel):
            if _own(record.implementation) and _is_streamed(record):
                moved = rate * record.seconds
                entry = (moved, rate, _shape(record))
                largest[record.case.dtype] = max(largest.get(record.case.dtype, entry), entry)
        if base and largest:
            pairs = [(shape, rate / base) for _, rate, shape in largest.values()]
            results.append(ratio(kernel, asked, STREAM_FRAC, pairs))
        elif kernel in {r.trial.kernel for r in found.records}:
            why = "no large input that device memory binds" if base else "no record of triad"
            results.append(unmeasured(kernel, asked, why))
    return results or [unmeasured("scans, norms, maps", asked, "no record of them")]


def _is_streamed(record: Record) -> bool:
    """Does device memory bind the case by its counts?"""
    from simulator.estimate import BOUND, estimate

    try:
        found = estimate(_op(record), on=_device(record), rung=BOUND)
    except (InputError, UnsupportedError):
        return False
    return str(found.bound) == "hbm"


def calibrated(quick: Profiled, full: Profiled) -> list[Result]:
    """A calibration on `quick` alone against the rest of `full`, by family."""
    asked = "MAPE of 8 % or less on held-out shapes"
    try:
        points = held_out(quick.records, full.records)
    except ImportError as error:
        return [unmeasured("calibrated", asked, f"needs {error.name}: judge where it is installed")]
    except InputError as error:
        return [unmeasured("calibrated", asked, str(error))]
    from validate.compare import errors

    found = {family: errors(mine) for (family,), mine in points.groups("family").items()}
    results = [
        _result(f"calibrated: {family}", asked, e.mape, e.mape <= MAPE_FRAC, f"{e.n} rows")
        for family, e in found.items()
        if e.mape is not None
    ]
    return [*results, _covered(errors(points), found)]


def _covered(together: Errors, found: Mapping[str, Errors]) -> Result:
    """All held-out rows together: a family's few rows could not tell 90 from 100 %."""
    share = together.coverage_90
    assert share is not None
    said = ", ".join(f"{family} {e.coverage_90:.0%} of {e.n}" for family, e in found.items()
                     if e.coverage_90 is not None)  # fmt: skip
    kept = abs(share - COVERAGE_FRAC) <= COVERAGE_SLACK + 1e-9
    asked = "90 % of held-out rows within the 90 % interval, give or take 4"
    return _result("covered", asked, share, kept, f"{together.n} rows: {said}")


def held_out(quick: Iterable[Record], full: Iterable[Record]) -> Any:
    """The evidence of `full` for a calibration on `quick`: no row that it was fitted on."""
    from hwmodels.calibration import shipped
    from validate.compare import compare
    from validate.fit_report import fit_report, usable
    from validate.recorded import measurements

    known = usable(quick, {})
    if not known.rows:
        raise InputError("no record of `quick` to calibrate on")
    device_id = known.rows[0].device_id
    fitted = fit_report(known.rows, device_id, donors=shipped()).calibration
    others = [c for c in shipped() if c.device_id != device_id]
    points = compare(measurements(full), calibrations=(*others, fitted)).points
    if not len(points):
        raise InputError("no record of `full` that the calibration had not seen")
    return points


def counted(folder: Path) -> list[Result]:
    """Bytes of device memory: counted against the counter, a bar a kernel."""
    from validate.counters import LIMIT_FRAC, held, path_of, read_counters

    asked = "counted bytes within 5 % of the counter beyond 4 L2s"
    if not path_of(folder).is_file():
        return [unmeasured("counted", asked, "no counters were read (python -m validate.counters)")]
    entries, missing = read_counters(folder)
    results = []
    for h in held(entries)[0]:
        value = h.ratio("hbm")
        if h.judged and math.isfinite(value):
            trial = h.counted.trial
            kept = abs(value - 1) <= LIMIT_FRAC
            results.append(_result(f"counted: {trial.kernel}", asked, value, kept, str(trial)))
    why = missing[-1].reason if missing else "no launch beyond 4 L2s has counters"
    return results or [unmeasured("counted", asked, why)]


# ---- the command ---------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """bar | asked | measured | kept, as text."""
    rows = [("bar", "asked", "measured", "kept", "over"),
            *((r.bar, r.asked, r.measured, r.state, r.note) for r in results)]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]
    states = [r.state for r in results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in (KEPT, MISSED, UNMEASURED))
    return "\n".join([*lines, counts])


def document(results: Sequence[Result]) -> Mapping[str, Any]:
    """The same as JSON."""
    return {"version": VERSION, "bars": [asdict(r) for r in results]}


def measure(folder: Path, seconds: Mapping[str, float | None]) -> None:
    """Both suites and the counters on this machine's GPU; goes on where a run was ended."""
    from validate.counters import collect
    from validate.profile import Options, line_of, profile
    from validate.torch_gpu import open_gpu

    gpu = open_gpu()
    name, arch = gpu.name, gpu.arch
    gpu.close()
    del gpu  # its buffer would be in the way
    for suite in (QUICK, FULL):
        options = Options(suite=suite, out=folder / suite, seconds=seconds[suite], resume=True)
        profile(options, lambda event: print(line_of(event), file=sys.stderr, flush=True))
    limit = seconds["counters"] or math.inf
    counted_now, missing = collect(folder, name, arch, seconds=limit, records=folder / FULL)
    said = f"; {missing[0].reason}" if missing else ""
    print(f"counters of {len(counted_now)} launches{said}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """Measure and judge, or judge alone."""
    parser = argparse.ArgumentParser(
        prog="python3 -m validate.gpu_bars", description="Measure every bar that needs a GPU."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="measure there, then judge")
    where.add_argument("--judge", type=Path, metavar="DIR", help="judge what is there")
    for name in (QUICK, FULL, "counters"):
        parser.add_argument(f"--{name}-seconds", type=float, metavar="N", help="end by then")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    given = parser.parse_args(list(argv))
    folder = given.judge or given.out
    limits = {name: getattr(given, f"{name}_seconds") for name in (QUICK, FULL, "counters")}
    try:
        if given.out is not None:
            measure(folder, limits)
        results = judge(folder)
    except (ImportError, InputError) as error:
        print(f"validate.gpu_bars: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    write_whole(folder / RESULT, document(results))
    print(json.dumps(document(results), indent=2) if given.json else table(results))
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
