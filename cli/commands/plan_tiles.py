"""`ridgeplan plan tiles`: the best tiles of a kernel on a device, and what binds them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cli.commands.plan_memory import Explain, Gap, Lp, TimeLimit
from cli.options import AsJson, Html, Out, Params
from cli.quantity import parse, shown
from hwmodels.errors import InputError, UnknownNameError

FLASH_RNN: Final = "flash_rnn"
TILED: Final = ("matmul", "flash_attention_2", FLASH_RNN)


def plan_tiles(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="matmul, flash_attention_2 or flash_rnn.")
    ],
    device: Annotated[
        str, typer.Option("--device", "-d", metavar="NAME", help="A device, or a TOML file.")
    ],
    params: Params = None,
    time_limit: TimeLimit = "10s",
    gap: Gap = "0%",
    explain: Explain = False,
    lp: Lp = None,
    html: Html = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The best tiles of a kernel on a device: proven, who lost and why, what binds.

    An integer program (tiles in whole matrix instructions, stages, blocks per SM, within registers,
    shared and tensor memory), listed whole, with modelled seconds as its objective. And what one
    more KiB of shared memory would be worth. --time-limit and --gap end the listing early: then
    the best so far is "feasible", with a bound. flash_rnn: FlashRNN's own program, always whole.

    \b
    Examples:
      ridgeplan plan tiles matmul -d h100-sxm -p m=8k -p n=8k -p k=8k
      ridgeplan plan tiles flash_attention_2 -d a100-sxm4-80gb -p heads=32 -p seq=8k -p dim=128
      ridgeplan plan tiles flash_rnn -d h100-sxm -p head_dim=768 -p gates=4 --explain
    """
    from cli.charts.picture import asked_for
    from cli.files import check_writable
    from hwmodels import catalog

    pictures = asked_for(html, out)
    check_writable([*pictures, *([lp] if lp else [])])
    if lp is not None and lp.suffix.lower() not in (".lp", ".mps"):
        raise InputError(f"--lp {shown(lp, 200)} has no known format; end it in .lp or .mps")
    limits: dict[str, Any] = {
        "time_limit_s": parse(time_limit, "s", "--time-limit"),
        "gap_frac": parse(gap, "frac", "--gap"),
    }
    if not limits["time_limit_s"] > 0:
        raise InputError(f"--time-limit = '{shown(time_limit)}' must be above 0 s; give 10s")
    on = catalog.device(device)
    if name == FLASH_RNN:
        if pictures or lp is not None:
            raise InputError("flash_rnn has no curve to draw and no linear program; leave out "
                             "--html, --out and --lp")  # fmt: skip
        _rnn(params or [], on, explain=explain, as_json=as_json)
    else:
        _tiles(
            name, params or [], on, limits, pictures=pictures, lp=lp, explain=explain,
            as_json=as_json,
        )  # fmt: skip


def _rnn(params: list[str], on: Any, *, explain: bool, as_json: bool) -> None:
    from cli import show
    from cli.tile_answers import rnn_answer, rnn_rules, show_rnn

    found, record = rnn_answer(params, on)
    words = rnn_rules(found, record, on) if explain else None
    if as_json:
        show.print_json(record | ({} if words is None else {"explanation": words}))
        return
    show_rnn(record)
    if words is not None:
        print(f"\n{words}")


def _tiles(
    name: str, params: list[str], on: Any, limits: dict[str, Any], *, pictures: list[Path],
    lp: Path | None, explain: bool, as_json: bool,
) -> None:  # fmt: skip
    from cli import show
    from cli.progress import patience
    from cli.questions import ops_asked
    from cli.tile_answers import explained, plan_record, show_plan
    from simulator.planners.tiles import Tiled, plan_tiles
    from workloads import registry

    resolved = registry.resolve(name)
    if resolved not in TILED:
        raise UnknownNameError("tiled kernel", shown(name), TILED, f"give {', '.join(TILED)}")
    op = ops_asked([resolved], params)[resolved]
    assert isinstance(op, Tiled)
    with patience("listing kernels"):
        plan = plan_tiles(op, on=on, **limits)
        _write(plan, pictures, lp)
    words = explained(plan) if explain else None
    if as_json:
        show.print_json(plan_record(plan) | ({} if words is None else {"explanation": words}))
        return
    show_plan(plan)
    if words is not None:
        print(f"\n{words}")
    show.wrote([*pictures, *([lp] if lp else [])])


def _write(plan: Any, pictures: list[Path], lp: Path | None) -> None:
    """Charts and the program, as far as asked for."""
    from cli.files import write_all

    contents: dict[Path, bytes] = {}
    if pictures:
        from cli.charts.picture import rendered
        from cli.charts.tiles import figure

        drawn = figure(plan)
        contents = {path: rendered(drawn, path.suffix) for path in pictures}
    if lp is not None:
        from simulator.planners.engines import exported

        contents[lp] = exported(plan.program, lp.suffix.lower()[1:]).encode()
    write_all(contents)
