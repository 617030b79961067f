"""`ridgeplan devices`: the catalogue of accelerators, or one of them with every source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.options import AsJson
from cli.quantity import capacity_text, digits, scaled_text, seconds_text

if TYPE_CHECKING:
    from hwmodels.device import Device


def devices(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A device, or a TOML file of your own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The accelerators, or one with every figure and its source.

    \b
    Examples:
      ridgeplan devices
      ridgeplan devices h100-sxm
      ridgeplan devices ./my-gpu.toml --json
    """
    from hwmodels import catalog

    if name is not None:
        device = catalog.device(name)
        if as_json:
            show.print_json({"device": _document(device)})
        else:
            _show_one(device)
        return
    found = [catalog.device(device_id) for device_id in catalog.device_ids()]
    if as_json:
        show.print_json({"devices": [_document(device) for device in found]})
    else:
        _show_all(found)


def figures(device: Device) -> Iterator[tuple[str, float]]:
    """Every figure of a device that has a value, as (path, value), paths as in `sources`."""
    for key in ("num_sms", "clock_hz", "tensor_clock_hz", "sparsity_factor", "tdp_w"):
        yield from _present(key, getattr(device, key))
    yield from _present("num_copy_engines", device.num_copy_engines)
    for group in ("tensor_flops_per_s", "vector_flops_per_s"):
        for key, value in getattr(device, group).items():
            yield f"{group}.{key}", value
    for level in device.memory:
        for key in ("capacity_bytes", "num_units", "bytes_per_s", "latency_s"):
            yield from _present(f"memory.{level.name}.{key}", getattr(level, key))
    for key in device.sm.__dataclass_fields__:
        value = getattr(device.sm, key)
        if isinstance(value, Mapping):
            for name, rate in value.items():
                yield f"sm.{key}.{name}", rate
        else:
            yield from _present(f"sm.{key}", value)
    for link in device.links:
        for key in ("bytes_per_s", "num_links", "generation"):
            yield from _present(f"links.{link.name}.{key}", getattr(link, key))
    for key, value in device.measured.items():
        yield f"measured.{key}", value


def figure_text(path: str, value: float) -> str:
    """A figure with the unit its path states, as people write it."""
    for suffix, text in (
        ("bytes_per_s", lambda v: scaled_text(v, "B/s")),
        ("capacity_bytes", capacity_text),
        ("_bytes", capacity_text),
        ("_bytes_per_block", capacity_text),
        ("_s", seconds_text),
        ("_hz", lambda v: scaled_text(v, "Hz", 4)),
        ("_w", lambda v: f"{v:g} W"),
    ):
        if path.endswith(suffix) and "flops" not in path:
            return text(value)
    if "flops_per_s" in path:
        return scaled_text(value, "FLOP/s", 4)
    return f"{value:g}" if value == int(value) else digits(value, 4)


def _present(path: str, value: float | None) -> Iterator[tuple[str, float]]:
    if value is not None:
        yield path, value


def _document(device: Device) -> dict[str, Any]:
    return {
        **{key: getattr(device, key) for key in ("id", "name", "vendor", "architecture", "chip")},
        "form_factor": device.form_factor,
        "compute_capability": device.compute_capability,
        "sm_unit": device.sm_unit,
        "aliases": device.aliases,
        "memory": device.memory,
        "figures": [
            {"path": path, "value": value, "source": device.source_of(path)}
            for path, value in figures(device)
        ],
        "extra": device.extra,
        "doubts": device.doubts,
    }


def _show_all(found: list[Device]) -> None:
    from hwmodels.dtypes import BF16, FP8, FP16

    right = ("memory", "bandwidth", "16-bit", "fp8", "fp32")
    table = show.table("device", "architecture", *right, right=right)
    table.columns[0].no_wrap = show.width() >= 80
    for device in found:
        half = device.tensor_rate_flops_per_s(BF16) or device.tensor_rate_flops_per_s(FP16)
        table.add_row(
            device.id,
            device.architecture,
            capacity_text(device.hbm.capacity_bytes),
            scaled_text(device.hbm.bytes_per_s or 0, "B/s"),
            _rate(half),
            _rate(device.tensor_rate_flops_per_s(FP8)),
            _rate(device.vector_flops_per_s.get("fp32")),
        )
    out = show.console()
    out.print(table)
    out.print(
        f"{len(found)} devices. 16-bit and fp8: dense tensor FLOP/s (16-bit: bf16, else fp16); "
        "fp32: vector FLOP/s.\n`ridgeplan devices NAME` shows every figure with its source."
    )


def _rate(value: float | None) -> str:
    return "-" if value is None else scaled_text(value, "")


def _show_one(device: Device) -> None:
    out = show.console()
    facts = [device.vendor, device.architecture, device.chip, device.form_factor]
    if device.compute_capability:
        facts.append(f"compute capability {device.compute_capability}")
    out.print(f"{device.id}  {device.name}", style="bold")
    out.print(", ".join(fact for fact in facts if fact))
    if device.aliases:
        out.print(f"also known as {', '.join(device.aliases)}")
    table = show.table("figure", "value", "source", right=("value",))
    table.columns[0].no_wrap = show.width() >= 80
    for path, value in figures(device):
        table.add_row(path, figure_text(path, value), device.source_of(path) or "-")
    out.print(table)
    for key, value in device.extra.items():
        out.print(f"{key} = {value}  ({device.source_of(f'extra.{key}') or 'no source'})")
    if device.doubts:
        out.print("\nDoubts", style="bold")
        for doubt in device.doubts:
            out.print(f"- {doubt}")
