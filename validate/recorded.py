"""Our own records as measurements, so that they calibrate and validate as published rows do.

A record names the public row of its case (family, op, params); its source becomes

    ridgeplan/<library or implementation>/<state of the L2>[-eager]

of which `run_of` makes the conditions of the run: the kernel's label, a graph replay, a cold or a
warm L2. A case that no public table names becomes a row of the kernel itself (family NAME, op
'kernel:NAME'), which `validate.adapters.recorded` counts by the suite. Collectives keep the layout
of theirs: ridgeplan/<backend>/<format>. An imported record keeps its publisher's source, and so the
publisher's conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hwmodels import catalog
from hwmodels.errors import InputError
from simulator.kernel_time.model import COLD, REPLAYED, Conditions
from validate.measurement import NO_DEVICES, UNKNOWN_GPU, Measurement
from validate.record import EVENTS, NOISY, THROTTLED, WARM, Record

PUBLISHER: Final = "ridgeplan"
COLLECTIVES: Final = "collectives"
KERNEL: Final = "kernel:"
"""How the op of a row begins that only the suite can count."""
TOO_NOISY: Final = "noisy: its interval never became tight"
TOO_SLOW: Final = "throttled: the driver held its clocks down"


@dataclass(frozen=True, slots=True)
class Recorded:
    """Measurements of records, and every record left out with the reason."""

    rows: tuple[Measurement, ...]
    records: tuple[Record, ...]
    left_out: tuple[tuple[Record, str], ...]


def recorded(
    records: Iterable[Record],
    devices: Mapping[str, str] = NO_DEVICES,
    *,
    noisy: bool = True,
) -> Recorded:
    """The rows of records, in their order; `records` of the answer are those that `rows` stand for.

    `devices` gives GPU names a meaning, as in `measurement.read`. Without `noisy`, records whose
    interval never became tight, or whose clocks were held down, are left out.
    """
    rows: list[Measurement] = []
    kept: list[Record] = []
    left_out: list[tuple[Record, str]] = []
    for record in records:
        row = (None if noisy else _doubt(record)) or _measurement(record, devices)
        if isinstance(row, Measurement):
            rows.append(row)
            kept.append(record)
        else:
            left_out.append((record, row))
    return Recorded(tuple(rows), tuple(kept), tuple(left_out))


def measurements(
    records: Iterable[Record], devices: Mapping[str, str] = NO_DEVICES
) -> list[Measurement]:
    """The rows of all records that have one."""
    return list(recorded(records, devices).rows)


def source_of(implementation: str, vendor: str, l2_state: str) -> str:
    """The source of a record of ours.

    >>> source_of("triton", "", "rotated"), source_of("torch", "cublas", "warm")
    ('ridgeplan/triton/rotated', 'ridgeplan/cublas/warm')
    """
    return f"{PUBLISHER}/{vendor or implementation}/{l2_state}"


def _doubt(record: Record) -> str | None:
    """Why a time is no figure of the device; None where it is."""
    doubts = {NOISY: TOO_NOISY, THROTTLED: TOO_SLOW}
    return next((said for flag, said in doubts.items() if flag in record.flags), None)


def is_own_kernel(source: str) -> bool:
    """Is it the source of a record of one of our own kernels?

    >>> is_own_kernel("ridgeplan/triton-tma/warm"), is_own_kernel("ridgeplan/cublas/warm")
    (True, False)
    """
    return source.startswith(f"{PUBLISHER}/{OWN}")


def is_ours(source: str) -> bool:
    """Is it the source of a kernel record of ours?"""
    return source.startswith(f"{PUBLISHER}/")


def run_of(source: str) -> Conditions:
    """The conditions of a record of ours by its source.

    >>> run_of("ridgeplan/triton/rotated").kernel, run_of("ridgeplan/cublas/warm").l2
    ('ridgeplan:triton', 'replayed')
    """
    pieces = source.split("/")
    label = pieces[1] if len(pieces) > 1 else ""
    kernel = f"{PUBLISHER}:{label}" if label.startswith(OWN) else label
    state, _, host = pieces[-1].partition("-")
    return Conditions(kernel=kernel, l2=REPLAYED if state == WARM else COLD, host=host)


OWN: Final = "triton"
"""How our implementations' names begin: told from kernels of others that bear the same name."""
EAGER: Final = "eager"
"""Who pays the launch of what could not be captured in a graph."""


def device_of(gpu: str, devices: Mapping[str, str] = NO_DEVICES) -> str | None:
    """The catalogue's id of a GPU, or what `devices` says it is; None where nothing tells."""
    if gpu in devices:
        return devices[gpu]
    if "/" in gpu or gpu.endswith(".toml"):
        return None  # a record must not make us open a file
    try:
        return catalog.device(gpu).id
    except InputError:
        return None


def _measurement(record: Record, devices: Mapping[str, str]) -> Measurement | str:
    """The row of a record, or the reason why there is none."""
    gpu = record.environment.gpu
    device_id = device_of(gpu, devices)
    if device_id is None:
        return UNKNOWN_GPU
    row: Mapping[str, Any] = record.row or _of_kernel(record)
    return Measurement(
        family=str(row["family"]),
        source=record.source or _source(record),
        gpu=gpu,
        device_id=device_id,
        op=str(row["op"]),
        dtype="" if row["family"] == COLLECTIVES else record.case.dtype,
        params=dict(row["params"]),
        seconds=record.seconds,
    )


def _of_kernel(record: Record) -> Mapping[str, Any]:
    """What stands for a case that no public table names: its kernel."""
    kernel, case = record.trial.kernel, record.case
    op = kernel if case.op == kernel else f"{kernel}:{case.op}"
    return {"family": kernel, "op": f"{KERNEL}{op}", "params": case.params}


def _source(record: Record) -> str:
    if record.row is not None and record.row["family"] == COLLECTIVES:
        return source_of(record.implementation, record.vendor, record.case.dtype)
    state = record.environment.l2_state + (f"-{EAGER}" if record.method == EVENTS else "")
    return source_of(record.implementation, record.vendor, state)
