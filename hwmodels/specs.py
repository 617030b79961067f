"""Specification files: a TOML file becomes a Device or a Cluster, or one clear `SpecError`.

The layout is flat (`schema = 1`): scalars at the top, then [tensor_flops_per_s],
[vector_flops_per_s], [sm], [[memory]] from fastest to slowest, [[links]], [measured], [extra],
and [sources], which gives every figure of the file its citation by path or by glob. A memory
level that every SM has says `per_sm = true`, and may give `bytes_per_clk` of one SM in place of
`bytes_per_s`. The files under `hwmodels/data` are the examples.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from hwmodels import dtypes
from hwmodels._toml import Table, one_line, parse
from hwmodels.cluster import Cluster, LinkLevel
from hwmodels.device import Device, Link, MemoryLevel, SmLimits, matches
from hwmodels.errors import InputError, SpecError, UnknownNameError
from hwmodels.frozen import FrozenDict, freeze

_TEXTS: Final = ("id", "name", "vendor", "architecture")
_OPTIONAL_TEXTS: Final = ("chip", "form_factor", "compute_capability")
DEVICE_KEYS: Final = (
    *_TEXTS, *_OPTIONAL_TEXTS, "sm_unit", "num_sms", "clock_hz", "tensor_clock_hz",
    "sparsity_factor", "tdp_w", "num_copy_engines", "doubts", "tensor_flops_per_s",
    "vector_flops_per_s", "sm", "memory", "links", "measured", "extra", "sources",
)  # fmt: skip
SM_KEYS: Final = tuple(field.name for field in dataclasses.fields(SmLimits))
MEMORY_KEYS: Final = (
    "name", "technology", "capacity_bytes", "bytes_per_s", "bytes_per_clk", "latency_s",
    "num_units", "per_sm",
)  # fmt: skip
LINK_KEYS: Final = tuple(field.name for field in dataclasses.fields(Link))
CLUSTER_KEYS: Final = (
    "id", "name", "device", "accelerators_per_node", "max_accelerators", "host_memory_bytes",
    "doubts", "levels", "side_levels", "measured", "extra", "sources",
)  # fmt: skip
LEVEL_KEYS: Final = tuple(field.name for field in dataclasses.fields(LinkLevel))

Derived = dict[str, tuple[str, str]]
"""Path of a figure that follows from others -> how, and the figure whose citation it shares."""


def read_device(path: Path, aliases: tuple[str, ...] = ()) -> Device:
    """The device described by the file at `path`; every figure must have a source."""
    root = Table.root(path, DEVICE_KEYS)
    num_sms, clock_hz = root.whole("num_sms"), root.number("clock_hz")
    derived: Derived = {}
    memory = _memory(root, num_sms, clock_hz, derived)
    tensor = _rates(root.table("tensor_flops_per_s"), _check_tensor_key)
    vector = _rates(root.table("vector_flops_per_s"), _check_dtype)
    if not tensor and not vector:
        root.fail(
            "vector_flops_per_s", "missing", "give at least one peak rate, e.g. fp32 = 19.5e12"
        )
    fields: dict[str, Any] = {key: root.text(key) for key in _TEXTS}
    fields |= {key: root.optional_text(key) for key in _OPTIONAL_TEXTS}
    fields |= {
        "sm_unit": root.optional_text("sm_unit") or "SM",
        "tensor_clock_hz": root.optional_number("tensor_clock_hz"),
        "sparsity_factor": _at_least_one(root, "sparsity_factor"),
        "tdp_w": root.optional_number("tdp_w"),
        "num_copy_engines": root.optional_whole("num_copy_engines"),
        "sm": _sm(root, memory, derived),
        "links": _links(root),
        "measured": FrozenDict(root.table("measured").numbers()),
        "extra": FrozenDict(root.table("extra").scalars()),
        "doubts": root.texts("doubts"),
    }
    return Device(
        **fields,
        num_sms=num_sms,
        clock_hz=clock_hz,
        memory=memory,
        tensor_flops_per_s=tensor,
        vector_flops_per_s=vector,
        sources=_sources(root, derived),
        aliases=aliases,
    )


def read_cluster(
    path: Path, device_named: Callable[[str], Device], nodes: int | None = None
) -> Cluster:
    """The system described by the file at `path`, with `nodes` nodes (one when not given)."""
    root = Table.root(path, CLUSTER_KEYS)
    levels = tuple(_level(table) for table in root.tables("levels", LEVEL_KEYS))
    _check_widening(root, levels)
    per_node = root.whole("accelerators_per_node")
    limit = root.optional_whole("max_accelerators")
    if limit is None and math.isfinite(levels[-1].size):
        limit = int(levels[-1].size)
    cluster = Cluster(
        id=root.text("id"),
        name=root.text("name"),
        device=_device(root, device_named),
        accelerators_per_node=per_node,
        num_nodes=1,
        levels=levels,
        side_levels=tuple(_level(table) for table in root.tables("side_levels", LEVEL_KEYS)),
        measured=_measurements(root),
        extra=freeze(root.table("extra").values),
        doubts=root.texts("doubts"),
        max_accelerators=limit,
        host_memory_bytes=root.optional_number("host_memory_bytes"),
        sources=_sources(root, {}),
    )
    if limit is not None and per_node > limit:
        mend = "lower it, or raise max_accelerators or the size of the outermost level"
        root.fail("accelerators_per_node", f"is {per_node}, more than the {limit} it links", mend)
    return scaled(cluster, 1 if nodes is None else nodes)


def scaled(cluster: Cluster, nodes: int) -> Cluster:
    """The same system with `nodes` nodes; an `InputError` when its links do not reach that far."""
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise InputError(f"nodes is {one_line(nodes)}; give a whole number of nodes, 1 or more")
    limit, per_node = cluster.max_accelerators, cluster.accelerators_per_node
    if limit is not None and nodes * per_node > limit:
        beyond = cluster.levels[-1].size > limit
        raise InputError(
            f"{cluster.id} {'is limited to' if beyond else 'has no link level beyond'} {limit} "
            f"accelerators and {nodes} nodes make {nodes * per_node}; the most is --nodes "
            f"{limit // per_node}, or describe the system in a file of your own (--cluster "
            f"FILE.toml with {'a larger max_accelerators' if beyond else 'a network level'})"
        )
    return dataclasses.replace(cluster, num_nodes=nodes)


def read_constants(path: Path) -> Mapping[str, Any]:
    """A file of named constants, frozen; its `sources` stay in it as they stand."""
    return FrozenDict({key: freeze(value) for key, value in parse(path).items() if key != "schema"})


def _memory(
    root: Table, num_sms: int, clock_hz: float, derived: Derived
) -> tuple[MemoryLevel, ...]:
    levels: list[MemoryLevel] = []
    for table in root.tables("memory", MEMORY_KEYS):
        level = _memory_level(table, num_sms, clock_hz, derived)
        faster = [known.bytes_per_s for known in levels if known.bytes_per_s is not None]
        if level.bytes_per_s is not None and faster and level.bytes_per_s > faster[-1]:
            table.fail("bytes_per_s", "is above that of the level before", "list fastest first")
        levels.append(level)
    if not levels or levels[-1].name != "hbm":
        mend = 'end the [[memory]] tables with the device memory, name = "hbm"'
        root.fail("memory", "has no device memory as its last level", mend)
    if levels[-1].bytes_per_s is None:
        root.fail("memory.hbm.bytes_per_s", "missing", "add it in SI base units, e.g. 2.039e12")
    return tuple(levels)


def _memory_level(table: Table, num_sms: int, clock_hz: float, derived: Derived) -> MemoryLevel:
    num_units = table.optional_whole("num_units")
    if table.flag("per_sm"):
        if num_units is not None:
            table.fail("num_units", "stands beside per_sm", "keep one of the two")
        num_units = num_sms
        derived[table.at("num_units")] = ("derived: one per SM", "num_sms")
    num_units = num_units or 1
    bytes_per_s, per_clk = (
        table.optional_number("bytes_per_s"),
        table.optional_number("bytes_per_clk"),
    )
    if per_clk is not None:
        if bytes_per_s is not None:
            table.fail("bytes_per_clk", "stands beside bytes_per_s", "keep one of the two")
        bytes_per_s = per_clk * num_units * clock_hz
        how = f"derived: {per_clk:g} bytes per clock x {num_units} units x clock_hz"
        derived[table.at("bytes_per_s")] = (how, table.at("bytes_per_clk"))
    return MemoryLevel(
        name=table.text("name"),
        capacity_bytes=table.number("capacity_bytes"),
        bytes_per_s=bytes_per_s,
        latency_s=table.optional_number("latency_s"),
        num_units=num_units,
        technology=table.optional_text("technology"),
    )


def _sm(root: Table, memory: tuple[MemoryLevel, ...], derived: Derived) -> SmLimits:
    table = root.table("sm", SM_KEYS)
    whole = [k for k in SM_KEYS if k not in ("special_ops_per_clk", "tensor_flops_per_clk")]
    limits: dict[str, Any] = {key: table.optional_whole(key) for key in whole}
    for key, level_name in (("register_file_bytes", "register"), ("smem_bytes", "smem")):
        capacity = next((x.capacity_bytes for x in memory if x.name == level_name), None)
        if limits[key] is None and capacity is not None:
            limits[key] = int(capacity)
            cited = f"memory.{level_name}.capacity_bytes"
            derived[f"sm.{key}"] = (f"as {cited}", cited)
        elif capacity is not None and limits[key] != capacity:
            problem = f"differs from memory.{level_name}.capacity_bytes = {capacity:g}"
            table.fail(key, problem, "give it in one place")
    return SmLimits(
        **limits,
        special_ops_per_clk=table.optional_number("special_ops_per_clk"),
        tensor_flops_per_clk=_rates(table.table("tensor_flops_per_clk"), _check_tensor_key),
    )


def _links(root: Table) -> tuple[Link, ...]:
    return tuple(
        Link(
            name=table.text("name"),
            bytes_per_s=table.number("bytes_per_s"),
            num_links=table.optional_whole("num_links"),
            generation=table.optional_number("generation"),
        )
        for table in root.tables("links", LINK_KEYS)
    )


def _rates(table: Table, check: Callable[[Table, str], None]) -> Mapping[str, float]:
    for key in table.values:
        check(table, key)
    return FrozenDict(table.numbers())


def _check_dtype(table: Table, key: str) -> None:
    if key not in dtypes.ALL:
        near = difflib.get_close_matches(key, dtypes.ALL, 1, 0.5)
        mend = f"did you mean {near[0]}?" if near else "known: " + ", ".join(dtypes.ALL)
        table.fail(key, "unknown number format", mend)


def _check_tensor_key(table: Table, key: str) -> None:
    parts = key.split("_acc_")
    if len(parts) != 2 or not all(part in dtypes.ALL for part in parts):
        table.fail(key, "unknown rate", "write <input>_acc_<accumulator>, e.g. bf16_acc_fp32")


def _at_least_one(table: Table, key: str) -> float:
    value = table.optional_number(key)
    if value is not None and value < 1:
        table.fail(key, f"is {value:g}", "give 1 or more (1: no gain)")
    return 1.0 if value is None else value


def _device(root: Table, device_named: Callable[[str], Device]) -> Device:
    name = root.text("device")
    try:
        return device_named(name)
    except UnknownNameError as error:
        mend = f"did you mean {error.near[0]}?" if error.near else "see the device catalogue"
        root.fail("device", f"unknown device '{one_line(name)}'", mend)


def _level(table: Table) -> LinkLevel:
    size = table.values.get("size")
    endless = isinstance(size, float) and math.isinf(size) and size > 0
    return LinkLevel(
        name=table.text("name"),
        topology=table.text("topology"),
        size=math.inf if endless else table.whole("size"),
        bytes_per_s=table.number("bytes_per_s"),
        latency_s=table.optional_number("latency_s"),
        links_per_accelerator=table.optional_whole("links_per_accelerator"),
        nics_per_node=table.optional_whole("nics_per_node"),
        bytes_per_s_per_node=table.optional_number("bytes_per_s_per_node"),
        oversubscription=_at_least_one(table, "oversubscription"),
        in_network_reduction=table.flag("in_network_reduction"),
    )


def _check_widening(root: Table, levels: tuple[LinkLevel, ...]) -> None:
    if not levels:
        mend = "add [[levels]] with name, topology, size and bytes_per_s, innermost first"
        root.fail("levels", "the system has no link level", mend)
    for inner, outer in pairwise(levels):
        if outer.size <= inner.size:
            problem = f"is {outer.size:g}, not wider than {inner.name} ({inner.size:g})"
            root.fail(f"levels.{outer.name}.size", problem, "list the levels innermost first")


def _measurements(root: Table) -> tuple[Mapping[str, object], ...]:
    entries = root.values.get("measured", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        root.fail("measured", "is not a list of tables", "write each as [[measured]]")
    for position, entry in enumerate(entries):
        for key in ("kind", "source"):
            if not isinstance(entry.get(key), str):
                root.fail(f"measured[{position}].{key}", "missing", f'add {key} = "..."')
    return tuple(freeze(entry) for entry in entries)


def _sources(root: Table, derived: Derived) -> Mapping[str, str]:
    """The citations by path or glob; an error for a figure or a citation without its match."""
    table = root.table("sources")
    sources = {key: table.text(key) for key in table.values}
    used: set[str] = set()
    for figure in root.figures:
        found = [pattern for pattern in sources if matches(figure, pattern)]
        if not found:
            root.fail(
                figure, "has no source", f'add "{figure}" = "where it stands" under [sources]'
            )
        used.update(found)
    for pattern in sorted(sources.keys() - used):
        near = difflib.get_close_matches(pattern, root.figures, 1, 0.6)
        mend = f"did you mean {near[0]}?" if near else "remove it or mend its path"
        raise SpecError(root.file, f"sources.{one_line(pattern)}", "matches no figure", mend)
    given = dict(sources)
    for path, (how, cited) in derived.items():
        pattern = cited if cited in given else max((p for p in given if matches(cited, p)), key=len)
        sources[path] = f"{how}; {given[pattern]}"
    return FrozenDict(sources)
