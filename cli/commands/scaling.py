"""`ridgeplan scaling`: systems side by side over the length of the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli import options, show
from cli.quantity import count_text, seconds_text
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from cli.questions import Over
    from cli.series import Crossover, Series

DEFAULT_DEVICE: Final = "h100-sxm"
DEFAULT_OVER: Final = "seq=1k:256k:x2"
MAX_LINES: Final = 16
"""Lines a picture can label."""
MAX_POINTS: Final = 400
MOST_COLUMNS: Final = 6
COLUMN_WIDTH: Final = 12


def scaling(
    names: options.SomeNames = None,
    over: Annotated[
        str, typer.Option("--over", metavar="KEY=RANGE", help="What grows.")
    ] = DEFAULT_OVER,
    family: options.Family = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device", "-d", metavar="NAME", help=f"A device; may repeat ({DEFAULT_DEVICE})."
        ),
    ] = None,
    param: options.Params = None,
    rung: options.Rung = "best",
    best: options.Best = None,
    html: options.Html = None,
    out: options.Out = None,
    as_json: options.AsJson = False,
) -> None:
    """How systems scale with the sequence, and from which length one beats another.

    The first system named is what the others are held against; the picture rings crossovers.
    `-p OP.key=value` sets a field of one system alone (its keep ratio, its budget); `--best chunk`
    gives every chunked scan the chunk that suits the length.

    \b
    Examples:
      ridgeplan scaling flash_attention_2 streaming_llm -p heads=32 -p dim=128 -p window=1000
      ridgeplan scaling flash_attention_2 --family sparse_attention -p heads=32 -p dim=128
      ridgeplan scaling flash_attention_2 gla deltanet -p heads=16 -p dim=128 --best chunk
      ridgeplan scaling decode_attention h2o --over seq_kv=4k:1M:x2 -p heads=32 -p dim=128
    """
    from cli.charts.picture import asked_for
    from cli.files import check_writable, write_all
    from cli.progress import patience
    from cli.questions import left_out_text
    from cli.series import crossovers

    pictures = asked_for(html, out)
    check_writable(pictures)
    with patience("estimating"):
        series, swept, left_out = _asked(names or [], family, device, param or [], over, rung, best)
        crossings = crossovers(series)
    contents: dict[Path, bytes] = {}
    if pictures:
        with patience("drawing"):
            contents = _drawn(pictures, series, swept, crossings)
    write_all(contents)
    if as_json:
        show.print_json(_document(series, swept, crossings, left_out))
        return
    _show(series, swept, crossings, left_out_text(left_out, family))
    show.wrote(contents)


def _asked(
    names: Sequence[str],
    family: str | None,
    devices: Sequence[str] | None,
    params: Sequence[str],
    over: str,
    rung: str,
    best: str | None,
) -> tuple[list[Series], Over, list[str]]:
    """The series of the named systems and of the family, the swept values, who was left out."""
    from cli.questions import family_members, parse_over
    from cli.series import ask_all
    from workloads import registry

    own = [registry.resolve(name) for name in names]
    if not own and family is None:
        raise InputError("name systems, or a family with --family; `ridgeplan systems` lists both")
    swept = parse_over(over, own)
    if len(swept.values) > MAX_POINTS:
        raise InputError(f"--over has more than {MAX_POINTS} points; take a larger step")
    members, left_out = family_members(family, params, swept)
    chosen = list(dict.fromkeys([*own, *members]))
    if not chosen:
        raise InputError(
            f"no modelled system of family {family} can be asked with these parameters; "
            "give -p heads=... -p dim=... or sweep another parameter"
        )
    series = ask_all(chosen, devices or [DEFAULT_DEVICE], params, swept, rung, best)
    return series, swept, left_out


def _drawn(
    pictures: Sequence[Path], series: list[Series], swept: Over, crossings: Sequence[Crossover]
) -> dict[Path, bytes]:
    from cli.charts import sweep as chart
    from cli.charts.picture import rendered

    if len(series) > MAX_LINES:
        raise InputError(
            f"{len(series)} lines in one picture; name at most {MAX_LINES}, or leave out --out"
        )
    figure = chart.figure(series, swept, _against_first(series, crossings))
    return {path: rendered(figure, path.suffix) for path in pictures}


def _against_first(series: list[Series], crossings: Sequence[Crossover]) -> list[Crossover]:
    """Crossovers with the first system, the ones a reader asks for."""
    first = series[0].op_name
    return [c for c in crossings if first in (c.faster, c.slower)]


def _document(
    series: list[Series], over: Over, crossings: Sequence[Crossover], left_out: Sequence[str]
) -> dict[str, Any]:
    return {
        "over": {"param": over.key, "values": over.values},
        "series": [s.document() for s in series],
        "crossovers": list(crossings),
        "left_out": list(left_out),
    }


def _show(series: list[Series], over: Over, crossings: Sequence[Crossover], left_out: str) -> None:
    from cli.series import caption, choices_text, rungs_text

    out = show.console()
    picked = _picked(len(over.values))
    several = len({s.device_id for s in series}) > 1
    heads = [f"{over.key} {count_text(over.values[i])}" for i in picked]
    table = show.table("system", *(("device",) if several else ()), *heads, "bound by", right=heads)
    for s in series:
        cells = [seconds_text(float(s.seconds[i])) for i in picked]
        identity = (s.op_name, s.device_id) if several else (s.op_name,)
        table.add_row(*identity, *cells, " ".join(dict.fromkeys(str(s.bound[i]) for i in picked)))
    out.print(caption(series))
    out.print(table)
    for c in _against_first(series, crossings):
        out.print(
            f"From {over.key} = {c.value:,.0f} on, {c.faster} is faster than {c.slower} "
            f"on {c.device}"
        )
    for line in choices_text(series, over.key):
        out.print(f"Best for {line}")
    out.print(f"{rungs_text(series)}.")
    if left_out:
        out.print(left_out)


def _picked(number: int) -> list[int]:
    """As many values as the width holds, both ends among them."""
    most = max(min((show.width() - 40) // COLUMN_WIDTH, MOST_COLUMNS), 2)
    if number <= most:
        return list(range(number))
    return [round(i * (number - 1) / (most - 1)) for i in range(most)]
