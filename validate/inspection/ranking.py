"""Tile configurations of a kernel in the order that static analysis alone expects of them.

For a configuration, the work of one block follows from its compiled loops (`PASSES` passes of each
where the shape does not tell), the number of blocks from the work of the case, and the time from
`simulator.instruction_issue`. Where the op's calibrated model takes a tile (matrix products), the
configuration's tile, parts of k and step go into it, and the two times are joined by their 4-norm.
Against records that tried several configurations, the order is judged by Spearman's coefficient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Final

from hwmodels.device import Device
from hwmodels.errors import InputError
from simulator.instruction_issue import issue_time
from simulator.kernel_time.own_tiles import own_matmul_seconds
from simulator.kernel_time.terms import overlap
from simulator.occupancy import arch_of
from validate.inspection import ledger
from validate.inspection.ledger import Entry
from validate.inspection.passes import passes
from validate.record import Case, Record
from workloads.op import Op
from workloads.ops.matmul import Matmul

if TYPE_CHECKING:
    from validate.kernels.spec import KernelSpec

PASSES: Final = 16
"""Passes of a loop whose number the case does not tell: what stands outside is then small."""
LEAST: Final = 3
"""Configurations from which an order says anything."""
FAST_BYTES: Final = 2.0**17
FORMATS: Final = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")
"""Words of a binary's name that say which format it is for."""
NEAR: Final = 1.05
"""A choice within 5 % of the fastest is as good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """One configuration and the seconds that static analysis expects, fastest first in a list."""

    launch: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """How well the expected order of configurations matched the measured one for a kernel.

    `rho`: Spearman's coefficients of its cases; `near_frac`: share of cases whose expected best
    ran within 5 % of the fastest; `left_out` counts records without an answer, by reason.
    """

    kernel: str
    implementation: str
    rho: tuple[float, ...]
    near_frac: float
    left_out: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON."""
        return {
            "kernel": self.kernel, "implementation": self.implementation,
            "cases": len(self.rho), "median_rho": median(self.rho) if self.rho else None,
            "mean_rho": fmean(self.rho) if self.rho else None,
            "near_frac": self.near_frac if self.rho else None, "left_out": dict(self.left_out),
        }  # fmt: skip


def rank(
    spec: KernelSpec,
    case: Case,
    device: Device,
    *,
    implementation: str = "triton",
    entries: Iterable[Entry] | None = None,
) -> tuple[Ranked, ...]:
    """The launches that an implementation would try there, the fastest expected first."""
    arch = arch_of(device)
    launches = spec.implementation(implementation).launches(case, arch)
    labels = [launch.label for launch in launches if launch is not None]
    return ranked(spec.name, spec.op(case), case, labels, device, entries=entries)


def ranked(
    kernel: str,
    op: Op,
    case: Case,
    labels: Sequence[str],
    device: Device,
    *,
    entries: Iterable[Entry] | None = None,
) -> tuple[Ranked, ...]:
    """The same for configurations by label; those without a usable binary are left out."""
    arch = arch_of(device)
    held = ledger.read().values() if entries is None else entries
    mine = [e for e in held if e.kernel == kernel and e.arch == arch]
    found = []
    for label in labels:
        seconds = _seconds(_variants(mine, label, case), op, label, device)
        if seconds is not None:
            found.append(Ranked(launch=label, seconds=seconds))
    return tuple(sorted(found, key=lambda x: (x.seconds, x.launch)))


def _variants(entries: Iterable[Entry], label: str, case: Case) -> list[Entry]:
    """Binaries of a configuration that run a case: of its format, then of its head width."""
    found = [e for e in entries if e.launch == label]
    if any(set(_words(e)) & set(FORMATS) for e in found):
        found = [e for e in found if case.dtype in _words(e)]
    for wanted in (f"d{v}" for k, v in case.params.items() if k.endswith("dim")):
        fitting = [e for e in found if wanted in _words(e)]
        found = fitting or found
    causal = [e for e in found if ("causal" in _words(e)) == bool(case.params.get("causal"))]
    return causal or found


def _words(entry: Entry) -> list[str]:
    inside = re.search(r"\[([^\]]*)\]", entry.name)
    return inside[1].split("-") if inside else []


def _seconds(entries: Sequence[Entry], op: Op, label: str, device: Device) -> float | None:
    """Seconds of a configuration: its kernels one after another, variants on average."""
    by_function: dict[str, list[float]] = {}
    for entry in entries:
        found = _static(entry, op, label, device)
        if found is not None:
            by_function.setdefault(entry.name.split("[")[0].split(":")[0], []).append(found)
    if not by_function:
        return None
    static = max(fmean(times) for times in by_function.values())
    modelled = _modelled(op, label, device)
    return static if modelled is None else float(overlap(static, modelled))


def _static(entry: Entry, op: Op, label: str, device: Device) -> float | None:
    """Seconds from instructions: as many blocks as the case's work takes."""
    num_loops = len(entry.found.source) - 1
    trips = _trips(op, label, num_loops)
    try:
        bodies = passes(entry.found, trips).bodies
    except InputError:
        return None
    runs = [1.0]
    for loop, trip in zip(entry.found.source[1:], trips, strict=True):
        runs.append(trip * runs[loop.outer or 0])
    source = list(zip(entry.found.source, runs, strict=True))
    flops = sum(x.dot_flops * n for x, n in source)
    moved = sum((x.load_bytes + x.store_bytes) * n for x, n in source)
    whole = sum(float(f) for f in op.work(FAST_BYTES).tensor_flops.values())
    if flops and whole:
        blocks = whole / flops
    elif moved:
        blocks = float(op.compulsory_bytes()) / moved
    else:
        return None
    unique = float(op.compulsory_bytes())
    return issue_time(
        bodies, entry.found.resources, max(math.ceil(blocks), 1), device, unique
    ).seconds  # fmt: skip


def sizes_of(label: str) -> dict[str, int]:
    """The tile parameters in a configuration's label.

    >>> sizes_of("BLOCK_M128-BLOCK_N64-w8-s3")
    {'BLOCK_M': 128, 'BLOCK_N': 64, 'w': 8, 's': 3}
    """
    found = (re.match(r"^(.*?[A-Za-z_])(\d+)$", part) for part in label.split("-"))
    return {m[1]: int(m[2]) for m in found if m}


def _trips(op: Op, label: str, num_loops: int) -> list[float]:
    """Passes of each loop; of a product's innermost, the steps of its k."""
    trips = [float(PASSES)] * num_loops
    step = sizes_of(label).get("BLOCK_K")
    if isinstance(op, Matmul) and step and num_loops:
        parts = sizes_of(label).get("SPLIT_K", 1)
        trips = [1.0] * num_loops
        trips[-1] = float(max(math.ceil(float(op.k) / step / parts), 1))
    return trips


def _modelled(op: Op, label: str, device: Device) -> float | None:
    """Seconds by the op's calibrated model, where it takes a tile."""
    sizes = sizes_of(label)
    if not isinstance(op, Matmul) or not {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= set(sizes):
        return None
    return own_matmul_seconds(
        op, device, tile_m=sizes["BLOCK_M"], tile_n=sizes["BLOCK_N"],
        step_bytes=int(sizes["BLOCK_K"] * op.dtype.bytes_per_element),
        split=sizes.get("SPLIT_K", 1),
    )  # fmt: skip


# ---- against records -----------------------------------------------------------------------


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, ties at their mean rank.

    >>> spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
    0.5
    """
    x, y = _ranks(a), _ranks(b)
    mean_x, mean_y = fmean(x), fmean(y)
    over = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True))
    under = math.sqrt(sum((p - mean_x) ** 2 for p in x) * sum((q - mean_y) ** 2 for q in y))
    return over / under if under else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values
    ]  # fmt: skip


def orders(
    records: Iterable[Record],
    device: Device,
    specs: Mapping[str, KernelSpec],
    *,
    entries: Iterable[Entry] | None = None,
) -> tuple[Order, ...]:
    """Expected against measured order for every kernel whose records tried enough configurations.

    `device` is the one the records were measured on.
    """
    held = tuple(ledger.read().values() if entries is None else entries)
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.tried:
            groups.setdefault((record.trial.kernel, record.implementation), []).append(record)
    return tuple(
        _order(kernel, how, some, device, specs, held)
        for (kernel, how), some in sorted(groups.items())
    )


def _order(
    kernel: str, implementation: str, records: Sequence[Record], device: Device,
    specs: Mapping[str, KernelSpec], entries: Sequence[Entry],
) -> Order:  # fmt: skip
    rho, near = [], []
    left: dict[str, int] = {}
    for record in records:
        reason = ""
        found: tuple[Ranked, ...] = ()
        if kernel not in specs:
            reason = "no such kernel"
        elif len(record.tried) < LEAST:
            reason = f"fewer than {LEAST} configurations"
        else:
            op = specs[kernel].op(record.case)
            found = ranked(kernel, op, record.case, list(record.tried), device, entries=entries)
            if len(found) < LEAST:
                reason = "binaries whose loops are not told apart, or that are not in the record"
        measured = [record.tried[x.launch] for x in found]
        value = spearman([x.seconds for x in found], measured) if not reason else math.nan
        if reason or math.isnan(value):
            reason = reason or "all configurations alike"
            left[reason] = left.get(reason, 0) + 1
            continue
        rho.append(value)
        near.append(measured[0] <= NEAR * min(measured))
    return Order(
        kernel=kernel, implementation=implementation, rho=tuple(rho),
        near_frac=fmean(near) if near else 0.0, left_out=left,
    )  # fmt: skip
