"""`ridgeplan plan memory`: where tensors lie, what is swapped, what is computed again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from cli.commands.plan import Nodes, Pins, RecipeName
from cli.options import AsJson, Html, Out
from cli.quantity import parse, shown
from hwmodels.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    pass

ENGINES: Final = ("highs", "cbc", "cp-sat")
MOST_EXPLAINED: Final = 400
"""Tensors up to which the storage program is written out with its choices."""

Source: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A model's config.json, a graph (.json with nodes), a recorded allocator snapshot "
        "(.pickle), or tensors (.csv: name,size,start,end).",
    ),
]
MaybeCluster: TypeAlias = Annotated[
    str | None, typer.Option("--cluster", "-c", metavar="NAME", help="Of a model: the cluster.")
]
MaybeSeq: TypeAlias = Annotated[
    str | None, typer.Option("--seq", metavar="N", help="Of a model: tokens per sequence.")
]
HostMemory: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--host-memory",
        metavar="SIZE",
        help="Of a model: a node's memory for swapping, where not what the catalogue has.",
    ),
]
HostBandwidth: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--host-bandwidth",
        metavar="RATE",
        help="What one device's link to the host sustains (its peak).",
    ),
]
StackName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--stack", metavar="NAME", help="The framework; 'bound': kernels at the roofline."
    ),
]
Budget: TypeAlias = Annotated[
    str | None, typer.Option("--budget", metavar="SIZE", help="Of a graph: memory it may take.")
]
Prove: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--prove",
        metavar="ENGINE",
        help="Have highs, cbc or cp-sat improve and prove a placement that is not proven.",
    ),
]
OfDevice: TypeAlias = Annotated[
    int | None, typer.Option("--device", metavar="N", help="Of a snapshot: the device's number.")
]
TimeLimit: TypeAlias = Annotated[
    str, typer.Option("--time-limit", metavar="TIME", help="Time a search may take.")
]
Gap: TypeAlias = Annotated[
    str, typer.Option("--gap", metavar="SHARE", help="Stop at this distance from the bound.")
]
Explain: TypeAlias = Annotated[
    bool, typer.Option("--explain", help="Print the program with its numbers.")
]
Lp: TypeAlias = Annotated[
    Path | None, typer.Option("--lp", metavar="FILE", help="Write the program: .lp or .mps.")
]


def plan_memory(
    source: Source,
    cluster: MaybeCluster = None,
    seq: MaybeSeq = None,
    nodes: Nodes = 1,
    host_memory: HostMemory = None,
    host_bandwidth: HostBandwidth = None,
    pin: Pins = None,
    recipe: RecipeName = "bf16",
    stack: StackName = "megatron",
    budget: Budget = None,
    device: OfDevice = None,
    prove: Prove = None,
    time_limit: TimeLimit = "10s",
    gap: Gap = "0%",
    explain: Explain = False,
    lp: Lp = None,
    html: Html = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Where tensors lie, what leaves for the host, what is made again.

    A model: the share of activations that leaves for the host while layers run (MEMO), and a place
    for every tensor of a step. A snapshot or a CSV file: a place for every tensor in it. A graph:
    what to compute again within --budget (Checkmate).

    \b
    Examples:
      ridgeplan plan memory examples/llama3-8b.json -c hgx-h100 --seq 64k --host-memory 2TB
      ridgeplan plan memory examples/memory/branches.json --budget 6GB --explain
      ridgeplan plan memory examples/memory/tensors.csv --html places.html --lp places.lp
    """
    from cli.charts.picture import asked_for
    from cli.files import check_writable
    from cli.progress import patience

    pictures = asked_for(html, out)
    check_writable([*pictures, *([lp] if lp else [])])
    if lp is not None and lp.suffix.lower() not in (".lp", ".mps"):
        raise InputError(f"--lp {shown(lp, 200)} has no known format; end it in .lp or .mps")
    if prove is not None and prove not in ENGINES:
        raise UnknownNameError("--prove", shown(prove), ENGINES, f"give {', '.join(ENGINES)}")
    limit_s, gap_frac = parse(time_limit, "s", "--time-limit"), parse(gap, "frac", "--gap")
    if not limit_s > 0:
        raise InputError(f"--time-limit = '{shown(time_limit)}' must be above 0 s; give 10s")
    asked: dict[str, Any] = {
        "time_limit_s": limit_s, "gap_frac": gap_frac, "engine": prove, "explain": explain,
        "as_json": as_json, "pictures": pictures, "lp": lp,
    }  # fmt: skip
    with patience("planning memory"):
        suffix = _kind(source)
        if suffix in (".pickle", ".pkl"):
            answer = _recording(source, device, asked)
        elif suffix == ".csv":
            answer = _tensors(source, asked)
        else:
            answer = _document(
                source, asked, cluster=cluster, seq=seq, nodes=nodes, host_memory=host_memory,
                host_bandwidth=host_bandwidth, pin=pin, recipe=recipe, stack=stack, budget=budget,
            )  # fmt: skip
        answer.files(asked)
    answer.show(asked)


def _kind(source: Path) -> str:
    """The file's suffix; refused where there is no such file."""
    if not source.is_file():
        raise InputError(f"no file {shown(source, 200)}; give a model, graph, snapshot or CSV file")
    return source.suffix.lower()


def _document(source: Path, asked: dict[str, Any], *, budget: str | None, **model: Any) -> Any:
    """A model's answer, or a graph's where the file has nodes."""
    from cli.memory_answers import GraphAnswer, model_answer
    from cli.memory_files import graph_of, load_json

    document = load_json(source)
    if isinstance(document, dict) and "nodes" in document:
        if budget is None:
            raise InputError("a graph needs --budget, the memory it may take, e.g. --budget 5GB")
        return GraphAnswer.of(
            graph_of(document, source.name), parse(budget, "bytes", "--budget"), asked
        )
    return model_answer(source, asked, **model)


def _recording(source: Path, device: int | None, asked: dict[str, Any]) -> Any:
    from cli.memory_answers import PlacementAnswer
    from cli.memory_plans import gib
    from simulator.planners.storage import Tensors
    from simulator.recorded_memory import load_recording

    found = load_recording(source, device)
    tensors = Tensors.of(found.timeline)
    return PlacementAnswer.of(
        tensors, asked, title=f"{len(tensors):,} tensors of {shown(source.name, 60)}",
        rows=[("Recorded", f"device {found.device}, {found.num_streams} streams; its allocator "
               f"reserved {gib(found.reserved_bytes)}")],
        record={"source": "recording", "device": found.device,
                "recorded_reserved_bytes": found.reserved_bytes},
    )  # fmt: skip


def _tensors(source: Path, asked: dict[str, Any]) -> Any:
    from cli.memory_answers import PlacementAnswer
    from cli.memory_files import load_tensors

    tensors = load_tensors(source)
    return PlacementAnswer.of(
        tensors, asked, title=f"{len(tensors):,} tensors of {shown(source.name, 60)}", rows=[],
        record={"source": "tensors"},
    )  # fmt: skip
