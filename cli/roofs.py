"""The roofs of a device and the places of ops under them: the roofline's numbers, undrawn.

Attainable FLOP/s at intensity I is min(P, I * B) for a compute roof P and a level of bandwidth B
(Williams et al. 2009); their corner, the ridge, is at I = P / B. An op with matrix products is
placed by its matrix flops, any other by its vector flops, as many as its result needs: then an op
on the bound rung lies exactly on the roof that binds it, and below all of them where something
else does (special functions, or vector flops beside products).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError

if TYPE_CHECKING:
    from cli.series import Series
    from hwmodels.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeRoof:
    """A flat roof: the peak of the tensor path for one format, or of the vector units."""

    name: str
    unit: str
    flops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRoof:
    """A slanted roof: the bandwidth of one memory level."""

    level: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ridge:
    """Where a memory level stops binding: intensity in FLOP per byte."""

    level: str
    roof: str
    flops_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofs:
    """All roofs of one device that the ops asked about can meet, highest and fastest first."""

    device: Device
    compute: tuple[ComputeRoof, ...]
    memory: tuple[MemoryRoof, ...]

    @property
    def ridges(self) -> tuple[Ridge, ...]:
        """Every corner of a memory level with a compute roof."""
        return tuple(
            Ridge(level=m.level, roof=c.name, flops_per_byte=c.flops_per_s / m.bytes_per_s)
            for c in self.compute
            for m in self.memory
        )

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "device": self.device.id,
            "compute_roofs": self.compute,
            "memory_roofs": self.memory,
            "ridges": self.ridges,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One op on one device: FLOP/s at its lower bound, and intensity at every rated level."""

    series: Series
    flops: NDArray[np.float64]
    flops_per_s: NDArray[np.float64]
    intensity: Mapping[str, NDArray[np.float64]]

    def document(self) -> dict[str, Any]:
        """The JSON form: one list entry per swept value."""
        return {
            "op": self.series.op_name,
            "params": self.series.fixed_params(),
            "device": self.series.device_id,
            "rung": self.series.estimate.rung,
            "seconds": self.series.seconds,
            "bound": self.series.bound,
            "flops": self.flops,
            "flops_per_s": self.flops_per_s,
            "flops_per_byte_by_level": dict(self.intensity),
        }


def roofs_of(device: Device, series: Iterable[Series]) -> Roofs:
    """The device's roofs for the formats that the ops multiply in, and its vector roof."""
    compute: dict[str, ComputeRoof] = {}
    for s in series:
        for dtype in s.estimate.work.tensor_flops:
            rate, unit = device.matmul_rate_flops_per_s(dtype)
            name = f"{dtype} {unit}"
            compute[name] = ComputeRoof(name=name, unit=unit, flops_per_s=rate)
    vector = device.vector_flops_per_s.get("fp32")
    if vector is not None:
        compute["fp32 vector"] = ComputeRoof(name="fp32 vector", unit="vector", flops_per_s=vector)
    memory = [
        MemoryRoof(level=level.name, bytes_per_s=level.bytes_per_s)
        for level in device.memory
        if level.bytes_per_s is not None
    ]
    return Roofs(
        device=device,
        compute=tuple(sorted(compute.values(), key=lambda roof: -roof.flops_per_s)),
        memory=tuple(sorted(memory, key=lambda roof: -roof.bytes_per_s)),
    )


def place_of(series: Series) -> Place:
    """Where an op stands under its device's roofs."""
    e = series.estimate
    needed = e.op.unmasked(e.work)
    tensor = sum(needed.tensor_flops.values(), start=0.0)
    flops = series.along(tensor if needed.tensor_flops else needed.vector_flops)
    if not (flops > 0).all():
        raise InputError(
            f"{series.op_name} does no floating-point work; a roofline cannot place it"
        )
    rated = [level.name for level in e.device.memory if level.bytes_per_s is not None]
    intensity = {
        level: flops / series.along(moved)
        for level, moved in e.bytes_by_level.items()
        if level in rated and (series.along(moved) > 0).all()
    }
    return Place(
        series=series, flops=flops, flops_per_s=flops / series.seconds, intensity=intensity
    )


def by_device(series: Sequence[Series]) -> dict[str, list[Series]]:
    """The series of each device, in the order asked."""
    found: dict[str, list[Series]] = {}
    for s in series:
        found.setdefault(s.device_id, []).append(s)
    return found
