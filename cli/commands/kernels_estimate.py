"""`ridgeplan kernels estimate`: your own Triton kernel on a GPU you do not have."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import kernel_asked
from cli.kernel_asked import Constants, Signature, Stages, Warps
from cli.options import AsJson


def kernels_estimate(
    name: Annotated[
        str, typer.Argument(metavar="FILE.py:FUNCTION", help="A file and a Triton kernel in it.")
    ],
    device: Annotated[
        str, typer.Option("--device", "-d", metavar="NAME", help="A device, or a TOML file.")
    ],
    grid: Annotated[
        str, typer.Option("--grid", metavar="BLOCKS", help="Blocks: 4096, 64x32 or 64x32x2.")
    ],
    signature: Signature = "",
    constants: Constants = "",
    trip: Annotated[
        list[str] | None,
        typer.Option("--trip", metavar="N", help="Passes of each loop, in the source's order."),
    ] = None,
    sizes: Annotated[
        str,
        typer.Option("--bytes", metavar="NAME=SIZE,...", help="Bytes each pointer argument holds."),
    ] = "",
    warps: Warps = 4,
    stages: Stages = 3,
    as_json: AsJson = False,
) -> None:
    """Time of your own Triton kernel on a GPU you do not have.

    From its compiled code alone, nothing fitted, so the range is wide: instructions of every loop
    times its passes against the SM's pipes, bytes against L2 and memory, waves of blocks; from
    everything overlapping to nothing. --bytes bounds memory traffic from below as well.

    \b
    Examples:
      ridgeplan kernels estimate examples/kernel.py:scale -d h100-sxm --grid 64k \\
      --signature x=*fp32,n=i32:16 --constants BLOCK=1024
      ridgeplan kernels estimate examples/kernel.py:sums -d b200-sxm --grid 4k --trip 64 \\
      --signature x=*fp32,out=*fp32,n=i32 --constants BLOCK=64
    """
    from cli import kernel_tables, show
    from hwmodels import catalog
    from simulator.instruction_issue import issue_time
    from simulator.occupancy import arch_of
    from validate.inspection.passes import passes

    on = catalog.device(device)
    blocks, unique_bytes = kernel_asked.grid(grid), kernel_asked.sizes(sizes)
    own = kernel_asked.own_kernel(name, signature, constants, warps, stages)
    for pointer in kernel_asked.pairs(sizes, "--bytes"):
        kernel_asked.must_point(own, pointer)
    runs = kernel_asked.trips(trip or [])
    found = own.compiled(arch_of(on))
    matched = passes(found, runs)
    time = issue_time(matched.bodies, found.resources, blocks, on, unique_bytes)
    notes = [*matched.notes]
    if unique_bytes is None:
        notes.append("memory traffic is what loads and stores name; --bytes bounds it from below")
    if as_json:
        head = {"name": name, "device": on.id, "grid": blocks, "trips": runs}
        show.print_json(head | kernel_tables.time_record(time, notes))
    else:
        kernel_tables.show_time(own.function, on.id, time, notes)
