"""An estimate as a flat record: what `--json`, CSV and the charts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwmodels.device import Device
    from hwmodels.dtypes import DType
    from simulator.estimate import Estimate


def record(e: Estimate) -> dict[str, Any]:
    """The whole answer of one estimate; numbers or arrays, as the op has them.

    `work` counts what the tiles compute; its `needed_*` leave out what they mask, and those are
    what the times divide by the rates.
    """
    needed = e.op.unmasked(e.work)
    return {
        "op": e.op.name,
        "params": params_of(e),
        "device": e.device.id,
        "rung": e.rung,
        "seconds": e.seconds,
        **_interval(e),
        "lower_s": e.lower_s,
        "upper_s": e.upper_s,
        "bound": e.bound,
        "seconds_by_resource": dict(e.seconds_by_resource),
        "bytes_by_level": dict(e.bytes_by_level),
        "work": {
            "tensor_flops": {str(d): f for d, f in e.work.tensor_flops.items()},
            "vector_flops": e.work.vector_flops,
            "special_ops": e.work.special_ops,
            "needed_tensor_flops": {str(d): f for d, f in needed.tensor_flops.items()},
            "needed_vector_flops": needed.vector_flops,
            "needed_special_ops": needed.special_ops,
            "read_bytes": e.work.read_bytes,
            "write_bytes": e.work.write_bytes,
            "launches": e.work.launches,
        },
        "compulsory_bytes": e.op.compulsory_bytes(),
        "io_lower_bound_bytes": io_lower_bound_bytes(e),
        "limit_s": e.limit_s,
        "limit_frac": e.limit_frac,
        "unrated": list(e.unrated),
        "notes": list(e.notes),
        "sources": sources(e),
        "calibration": _calibration(e),
    }


def _interval(e: Estimate) -> dict[str, Any]:
    """Ends of the 80 % and 90 % intervals, the kernel's terms; None on the bound rung."""
    if e.prediction is None:
        names = ("low_80_s", "high_80_s", "low_90_s", "high_90_s", "terms_s", "regime")
        return dict.fromkeys(names)
    (low_80, high_80), (low_90, high_90) = e.interval(80), e.interval(90)
    return {
        "low_80_s": low_80,
        "high_80_s": high_80,
        "low_90_s": low_90,
        "high_90_s": high_90,
        "terms_s": dict(e.prediction.terms),
        "regime": e.prediction.regime,
    }


def _calibration(e: Estimate) -> dict[str, Any] | None:
    """Whose constants the time rests on; None on the bound rung."""
    if e.prediction is None:
        return None
    basis = e.prediction.basis
    return {
        "model": e.prediction.model,
        "scope": basis.scope,
        "devices": [d.device_id for d in basis.donors],
        "num_rows": sum(d.num_rows for d in basis.donors),
        "text": basis.describe(),
    }


def params_of(e: Estimate) -> dict[str, Any]:
    """The op's fields by name, number formats by theirs."""
    fields = {f.name: getattr(e.op, f.name) for f in dataclasses.fields(e.op)}
    return {name: _named(value) for name, value in fields.items()}


def io_lower_bound_bytes(e: Estimate) -> Any:
    """Device-memory bytes that no algorithm for this result can avoid, given the level above."""
    from simulator.estimate import boundaries

    _, fast_bytes, _ = boundaries(e.device)[-1]
    return e.op.io_lower_bound_bytes(fast_bytes)


def sources(e: Estimate) -> dict[str, dict[str, Any]]:
    """For every resource with a time: the device's figure, its value and its citation."""
    found = {}
    for resource in e.seconds_by_resource:
        path, value = figure_of(e.device, resource, e.work.tensor_flops)
        found[resource] = {"figure": path, "value": value, "source": e.device.source_of(path)}
    return found


def figure_of(
    device: Device, resource: str, tensor_flops: Mapping[DType, Any]
) -> tuple[str, float | None]:
    """The path and value of the figure that rates a resource."""
    if resource == "tensor":
        for dtype in tensor_flops:
            rate, unit = device.matmul_rate_flops_per_s(dtype)
            if unit == "tensor":
                return f"tensor_flops_per_s.{_tensor_key(device, dtype, rate)}", rate
    if resource == "vector":
        return _vector_figure(device, tensor_flops)
    if resource == "special":
        return "sm.special_ops_per_clk", device.sm.special_ops_per_clk
    if resource == "host":
        links = {link.name for link in device.links}
        name = "c2c" if "c2c" in links else "pcie"
        return f"links.{name}.bytes_per_s", device.host_bytes_per_s
    return f"memory.{resource}.bytes_per_s", device.level(resource).bytes_per_s


def _vector_figure(device: Device, tensor_flops: Mapping[DType, Any]) -> tuple[str, float | None]:
    """The rate of products that have no tensor path, else the fp32 rate."""
    for dtype in tensor_flops:
        rate, unit = device.matmul_rate_flops_per_s(dtype)
        if unit == "vector":
            return f"vector_flops_per_s.{dtype}", rate
    return "vector_flops_per_s.fp32", device.vector_flops_per_s.get("fp32")


def _tensor_key(device: Device, dtype: DType, rate: float) -> str:
    """The key of `tensor_flops_per_s` that holds the rate; block formats use their payload's."""
    payload = dtype.name.removeprefix("mx").removeprefix("nv")
    matching = [k for k, value in device.tensor_flops_per_s.items() if value == rate]
    for name in (dtype.name, payload):
        for key in matching:
            if key.startswith(f"{name}_acc_"):
                return key
    return matching[0]


def _named(value: Any) -> Any:
    return (
        value if value is None or isinstance(value, (bool, int, float)) else _text_or_array(value)
    )


def _text_or_array(value: Any) -> Any:
    return value if hasattr(value, "tolist") else str(value)
