"""`ridgeplan estimate`: one op on one device, and why it takes that long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli import show
from cli.options import AsJson, Best, Params, Rung
from cli.quantity import digits, percent_text, scaled_text, seconds_text
from cli.wording import resource_text

if TYPE_CHECKING:
    from rich.table import Table

    from hwmodels.device import Device
    from simulator.estimate import Estimate
    from simulator.tuning import Tuned
    from workloads.op import Op

ROOFLINE: Final = (
    "roofline at peak rates, all resources overlapping .. none; "
    "a real kernel is slower than the first and can exceed the second"
)
LEAST_ELASTICITY: Final = 0.005
"""Smallest elasticity worth a line."""


def estimate(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The op; `ridgeplan systems` lists them.")
    ],
    device: Annotated[
        str, typer.Option("--device", "-d", metavar="NAME", help="A device, or a TOML file.")
    ],
    param: Params = None,
    rung: Rung = "best",
    best: Best = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="How the time answers to each device figure.")
    ] = False,
    fast_memory: Annotated[
        str | None,
        typer.Option(
            "--fast-memory",
            metavar="SIZE",
            help="Also the best tile in a fast memory of that size.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How long one op takes on one device, how sure that is, and what bounds it.

    Shows the predicted time with its interval and where its constants come from, what the op
    computes and moves at every memory level, how long each of that takes at the device's peak
    rates, and how far it is from what any algorithm could reach.

    \b
    Examples:
      ridgeplan estimate matmul -d h100-sxm -p m=4k -p n=4k -p k=4k
      ridgeplan estimate flash_attention_2 -d t4 -p heads=32 -p seq=8k -p dim=128 -p dtype=fp16
    """
    from cli.records import record
    from cli.series import ask_all

    (series,) = ask_all([name], [device], param or [], None, rung, best)
    answer, asked = series.estimate, series.op_name
    op, on = answer.op, answer.device
    found_record = record(answer) | {"op": asked}
    found = _elasticities(op, on) if sensitivity else {}
    tiled = {} if fast_memory is None else _tiled(op, fast_memory)
    if as_json:
        more: dict[str, Any] = {"elasticities": found} if sensitivity else {}
        more |= {"tiled": tiled} if tiled else {}
        more |= {"best": _best(series.tuned)} if series.tuned else {}
        show.print_json(found_record | more)
        return
    _show(answer, found_record)
    if series.tuned:
        _show_best(series.tuned)
    if tiled:
        _show_tiled(tiled)
    if sensitivity:
        _show_sensitivity(found, on)


def _best(tuned: Tuned) -> dict[str, Any]:
    """What was chosen, the seconds of every value, why the others are not possible."""
    seconds = {str(value): float(s) for value, s in tuned.seconds.items()}
    refused = {str(value): why for value, why in tuned.refused.items()}
    return {"field": tuned.field, "value": int(tuned.best), "seconds": seconds, "refused": refused}


def _show_best(tuned: Tuned) -> None:
    seconds = {value: float(s) for value, s in tuned.seconds.items()}
    told = [f"{value}: {seconds_text(s)}" for value, s in seconds.items()]
    told += [f"{value}: refused" for value in tuned.refused]
    lines = [(tuned.field.capitalize(), f"{tuned.best:g} is the fastest ({', '.join(told)})")]
    lines += [("Refused", why) for why in list(tuned.refused.values())[:1]]
    show.console().print(show.pairs(lines))


def _tiled(op: Op, size: str) -> dict[str, Any]:
    """The tile that a fast memory of that size allows, what it moves, and the least any could."""
    from cli.quantity import parse

    fast_bytes = parse(size, "bytes", "--fast-memory")
    moved, least = float(op.work(fast_bytes).bytes), float(op.io_lower_bound_bytes(fast_bytes))
    return {
        "fast_bytes": fast_bytes,
        "tile": {key: float(value) for key, value in op.tiling(fast_bytes).items()},
        "bytes": moved,
        "io_lower_bound_bytes": least,
        "ratio": moved / least,
    }


def _show_tiled(tiled: dict[str, Any]) -> None:
    tile = ", ".join(f"{key} {value:g}" for key, value in tiled["tile"].items()) or "none is chosen"
    moved = (
        f"moves {scaled_text(tiled['bytes'], 'B')}, {digits(tiled['ratio'])} x the lower bound of "
        f"{scaled_text(tiled['io_lower_bound_bytes'], 'B')}"
    )
    size = scaled_text(tiled["fast_bytes"], "B")
    show.console().print(show.pairs([(f"In {size}", f"tile: {tile}; {moved}")]))


def _elasticities(op: Op, on: Device) -> dict[str, float]:
    """d ln T / d ln figure by the figure's path, those that matter first."""
    from simulator.sensitivity import sensitivities

    found = {s.path: float(s.elasticity) for s in sensitivities(op, on=on)}
    return dict(sorted(found.items(), key=lambda item: -abs(item[1])))


def _show_sensitivity(found: dict[str, float], on: Device) -> None:
    out = show.console()
    table = show.table("device figure", "1 % more changes the time by", right=("1 % more",))
    for path, elasticity in found.items():
        if abs(elasticity) >= LEAST_ELASTICITY:
            table.add_row(path, f"{elasticity:+.2f} %")
    out.print(table)
    out.print(f"Figures of {on.id} not shown change it by less than {LEAST_ELASTICITY} %.")


def params_text(params: dict[str, Any]) -> str:
    """The question in a line: 'm=4096 n=4096 dtype=bf16'."""
    shown = {
        key: str(value).lower() if isinstance(value, bool) else value
        for key, value in params.items()
        if value is not None
    }
    return "  ".join(f"{key}={value}" for key, value in shown.items())


def _show(e: Estimate, r: dict[str, Any]) -> None:
    out = show.console()
    out.print(f"{r['op']} on {e.device.id} ({e.device.name})", style="bold")
    out.print(params_text(r["params"]))
    out.print()
    out.print(show.pairs([*_time(e, r), *_bounds(e, r)]))
    out.print(_resources(e, r))
    source = r["sources"][r["bound"]]
    lines = _masked(r) + _reading(e, r)
    if e.unrated:
        left_out = f"{', '.join(e.unrated)}: {e.device.id} publishes no rate; left out"
        lines.append(("Unrated", left_out))
    basis = e.prediction.notes[:1] if e.prediction else ()
    lines += [("Note", note) for note in e.notes if note not in basis]
    lines.append(("Source", f"{source['figure']}: {source['source']}"))
    out.print(show.pairs(lines))


def _time(e: Estimate, r: dict[str, Any]) -> list[tuple[str, str]]:
    """The predicted time: interval, terms, provenance; nothing on the bound rung."""
    if e.prediction is None:
        return []
    ends = [seconds_text(r[k]) for k in ("low_80_s", "high_80_s", "low_90_s", "high_90_s")]
    terms = [
        f"{name} {seconds_text(float(t))}"
        for name, t in sorted(r["terms_s"].items(), key=lambda item: -item[1])
        if t > 0
    ]
    return [
        ("Time", f"{seconds_text(r['seconds'])}; 80 % of kernels in {ends[0]} .. {ends[1]}, "
                 f"90 % in {ends[2]} .. {ends[3]}"),
        ("Rung", f"{e.rung}: {e.prediction.basis.describe()}"),
        _parts_or_terms(e, terms),
    ]  # fmt: skip


def _parts_or_terms(e: Estimate, terms: Sequence[str]) -> tuple[str, str]:
    """The stages of an op that runs several kernels, or the overlapping terms of a single one."""
    if e.prediction is None or len(e.prediction.parts) < 2:
        return "Terms", f"{', '.join(terms)} (they overlap)"
    beside = [part.name for part in e.prediction.parts if part.beside]
    hidden = f"; {', '.join(beside)} beside the rest" if beside else ""
    return "Stages", f"{', '.join(terms)}, one after another{hidden}"


def _bounds(e: Estimate, r: dict[str, Any]) -> list[tuple[str, str]]:
    """The roofline beside it, or alone."""
    span = f"{seconds_text(r['lower_s'])} .. {seconds_text(r['upper_s'])}"
    text = f"{span}, bound by {resource_text(r['bound'])}"
    if e.prediction is None:
        return [("Rung", f"{e.rung}: {ROOFLINE}"), ("Time", text)]
    return [("Roofline", f"{text}; the time is {digits(r['seconds'] / r['lower_s'])} x the first")]


@dataclass(frozen=True, slots=True)
class _Row:
    """One amount of one resource, with its unit and the device's rate for it."""

    label: str
    amount: float
    unit: str
    resource: str
    rate: float | None


def _resources(e: Estimate, r: dict[str, Any]) -> Table:
    """What the result needs of every resource, how fast that is, how long it takes."""
    right = ("amount", "rate", "time", "of the bound")
    table = show.table("resource", *right, right=right)
    for row in (*_compute_rows(e, r), *_memory_rows(e, r)):
        amount = scaled_text(row.amount, row.unit)
        if row.rate is None:
            table.add_row(row.label, amount, "unrated", "-", "-")
            continue
        seconds = row.amount / row.rate
        share = percent_text(seconds / r["lower_s"]) if r["lower_s"] else "-"
        mark = " <" if row.resource == r["bound"] else "  "
        rate = scaled_text(row.rate, f"{row.unit}/s")
        table.add_row(row.label, amount, rate, seconds_text(seconds), share + mark)
    table.add_row("kernel launches", f"{r['work']['launches']:g}", "", "", "")
    return table


def _compute_rows(e: Estimate, r: dict[str, Any]) -> Iterator[_Row]:
    from hwmodels.dtypes import FP32

    work = r["work"]
    for dtype in e.work.tensor_flops:
        rate, unit = e.device.matmul_rate_flops_per_s(dtype)
        yield _Row(f"{dtype} products", work["needed_tensor_flops"][str(dtype)], "FLOP", unit, rate)
    vector_rate, special_rate = e.device.vector_rate_flops_per_s(FP32), e.device.special_ops_per_s
    yield _Row("vector flops", work["needed_vector_flops"], "FLOP", "vector", vector_rate)
    yield _Row("special functions", work["needed_special_ops"], "op", "special", special_rate)


def _memory_rows(e: Estimate, r: dict[str, Any]) -> Iterator[_Row]:
    for level in reversed(e.device.memory[1:]):
        moved = r["bytes_by_level"][level.name]
        yield _Row(f"{level.name} bytes", moved, "B", level.name, level.bytes_per_s)
    if e.work.host_bytes:
        rate = e.device.host_bytes_per_s
        yield _Row("host link bytes", float(e.work.host_bytes), "B", "host", rate)


def _masked(r: dict[str, Any]) -> list[tuple[str, str]]:
    """A line where the tiles compute products that a mask then drops."""
    work = r["work"]
    needed = sum(work["needed_tensor_flops"].values())
    more = sum(work["tensor_flops"].values()) / needed - 1 if needed else 0.0
    if more <= 0:
        return []
    return [("Tiles", f"compute {percent_text(more)} more, masked out; not in these times")]


def _reading(e: Estimate, r: dict[str, Any]) -> list[tuple[str, str]]:
    """What the counts mean: ceilings, intensity, and how far from the limit."""
    lines = []
    hbm, least = r["bytes_by_level"]["hbm"], r["io_lower_bound_bytes"]
    # Products alone where there are any: vector flops have a roof of their own.
    work = r["work"]
    flops = sum(work["needed_tensor_flops"].values()) or work["needed_vector_flops"]
    if r["lower_s"]:
        rates = [scaled_text(flops / r["lower_s"], "FLOP/s")] if flops else []
        rates.append(f"{scaled_text(hbm / r['lower_s'], 'B/s')} of HBM")
        lines.append(("Ceiling", f"{' and '.join(rates)}, if nothing else slows it"))
    if flops:
        lines.append(("Intensity", f"{digits(flops / hbm)} FLOP per HBM byte{_ridge(e)}"))
    share = percent_text(r["limit_frac"])
    lines.append(
        ("Limit", f"{seconds_text(r['limit_s'])} for any algorithm, {share} of the estimate")
    )
    moved = f"{scaled_text(hbm, 'B')} of HBM traffic, {digits(hbm / least)} x the lower bound of"
    lines.append(("I/O", f"{moved} {scaled_text(least, 'B')}"))
    return lines


def _ridge(e: Estimate) -> str:
    if not e.work.tensor_flops or not e.device.hbm.bytes_per_s:
        return ""
    dtype = next(iter(e.work.tensor_flops))
    rate, unit = e.device.matmul_rate_flops_per_s(dtype)
    return f"; the {dtype} {unit} ridge is at {digits(rate / e.device.hbm.bytes_per_s)}"
