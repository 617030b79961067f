"""`ridgeplan estimate`: one op on one device, and why it takes that long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli import show
from cli.quantity import digits, percent_text, scaled_text, seconds_text
from cli.questions import PARAM_HELP

if TYPE_CHECKING:
    from rich.table import Table

    from simulator.estimate import Estimate

RUNGS: Final = {"bound": "roofline lower and upper bound; a real kernel is slower than the lower"}


def estimate(
    name: Annotated[str, typer.Argument(help="The op; `ridgeplan systems` lists them.")],
    device: Annotated[str, typer.Option("--device", "-d", help="A device, or a TOML file.")],
    param: Annotated[
        list[str] | None, typer.Option("-p", "--param", metavar="KEY=VALUE", help=PARAM_HELP)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Estimate one op: counts, bytes per level, time, what bounds it, distance from the limit."""
    from cli.questions import ops_asked
    from cli.records import record
    from hwmodels import catalog
    from simulator.estimate import estimate as ask

    on = catalog.device(device)
    (op,) = ops_asked([name], param or []).values()
    answer = ask(op, on=on)
    if as_json:
        show.print_json(record(answer))
    else:
        _show(answer, record(answer))


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
    out.print(f"{e.op.name} on {e.device.id} ({e.device.name})", style="bold")
    out.print(params_text(r["params"]))
    out.print()
    time = f"{seconds_text(r['lower_s'])} .. {seconds_text(r['upper_s'])}"
    out.print(
        show.pairs(
            [
                ("Rung", f"{e.rung}: {RUNGS.get(e.rung, '')}"),
                ("Time", f"{time}, bound by {_resource_name(e, r['bound'])}"),
            ]
        )
    )
    out.print(_resources(e, r))
    source = r["sources"][r["bound"]]
    lines = _reading(e, r)
    if e.unrated:
        left_out = f"{', '.join(e.unrated)}: {e.device.id} publishes no rate; left out"
        lines.append(("Unrated", left_out))
    lines += [("Note", note) for note in e.notes]
    lines.append(("Source", f"{source['figure']}: {source['source']}"))
    out.print(show.pairs(lines))


def _resource_name(e: Estimate, resource: str) -> str:
    if resource in e.bytes_by_level:
        return f"{resource.upper() if len(resource) < 4 else resource} bandwidth"
    return {"special": "special functions"}.get(resource, f"{resource} units")


def _resources(e: Estimate, r: dict[str, Any]) -> Table:
    """One row per resource: what it does, how fast it is, how long it takes."""
    right = ("amount", "rate", "time", "of the bound")
    table = show.table("resource", *right, right=right)
    work = r["work"]
    compute = [(f"{d} products", f, _unit(e, d)) for d, f in work["tensor_flops"].items()]
    compute.append(("vector flops", work["vector_flops"], "vector"))
    for label, amount, resource in compute:
        rate = _rate(e, label, resource)
        table.add_row(
            label, scaled_text(amount, "FLOP"), *_timed(r, resource, amount, rate, "FLOP/s")
        )
    special_rate = e.device.special_ops_per_s
    table.add_row(
        "special functions",
        scaled_text(work["special_ops"], "op"),
        *_timed(r, "special", work["special_ops"], special_rate, "op/s"),
    )
    for level in reversed(e.device.memory[1:]):
        amount = r["bytes_by_level"][level.name]
        table.add_row(
            f"{level.name} bytes",
            scaled_text(amount, "B"),
            *_timed(r, level.name, amount, level.bytes_per_s, "B/s"),
        )
    table.add_row("kernel launches", f"{work['launches']:g}", "", "", "")
    return table


def _unit(e: Estimate, dtype_name: str) -> str:
    from hwmodels.dtypes import dtype

    return e.device.matmul_rate_flops_per_s(dtype(dtype_name))[1]


def _rate(e: Estimate, label: str, resource: str) -> float | None:
    from hwmodels.dtypes import FP32, dtype

    if label == "vector flops":
        return e.device.vector_rate_flops_per_s(FP32)
    return e.device.matmul_rate_flops_per_s(dtype(label.split()[0]))[0]


def _timed(
    r: dict[str, Any], resource: str, amount: float, rate: float | None, unit: str
) -> tuple[str, str, str]:
    if rate is None:
        return "unrated", "-", "-"
    seconds = amount / rate
    mark = " <" if resource == r["bound"] else "  "
    share = percent_text(seconds / r["lower_s"]) if r["lower_s"] else "-"
    return scaled_text(rate, unit), seconds_text(seconds), share + mark


def _reading(e: Estimate, r: dict[str, Any]) -> list[tuple[str, str]]:
    """What the counts mean: ceilings, intensity, and how far from the limit."""
    lines = []
    hbm, least = r["bytes_by_level"]["hbm"], r["io_lower_bound_bytes"]
    # Products alone where there are any: vector flops have a roof of their own.
    flops = sum(r["work"]["tensor_flops"].values()) or r["work"]["vector_flops"]
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
