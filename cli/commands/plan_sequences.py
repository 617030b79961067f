"""`ridgeplan plan sequences`: groups, rings or packed rows for sequences of all lengths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from cli.commands.plan import ClusterName, Model, Nodes
from cli.options import AsJson, Html, Out
from cli.plans import whole
from cli.quantity import parse, shown
from hwmodels.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from cli.sequence_answers import Asked, SequenceAnswer
    from hwmodels.cluster import Cluster
    from simulator.variable_length import Ints

GROUPS, HYBRID, PREPACK = "groups", "hybrid", "prepack"
WAITING: Final = {
    GROUPS: "planning groups", HYBRID: "planning rings", PREPACK: "packing prompts",
}  # fmt: skip
"""Methods, and what is said while one works."""
OPTION_OF: Final = {"prompts": PREPACK, "row": PREPACK, "host_memory": HYBRID}
CORPUS: Final = "common_crawl"
BATCH: Final = "512"

Method: TypeAlias = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        help="groups (FlexSP), hybrid (ByteScale), or prepack: prompts in rows, for serving.",
    ),
]
Prompts: TypeAlias = Annotated[
    str | None, typer.Option("--prompts", metavar="N", help="Of prepack: prompts a pass (64).")
]
RowTokens: TypeAlias = Annotated[
    str | None,
    typer.Option("--row", metavar="N", help="Of prepack: tokens of a row (the longest prompt)."),
]
HostMemory: TypeAlias = Annotated[
    str | None,
    typer.Option("--host-memory", metavar="SIZE", help="Of hybrid: a node's memory, or 'node'."),
]
Lengths: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--lengths", metavar="FILE", help="The step's lengths: one a line, or 'length,count'."
    ),
]
Seq: TypeAlias = Annotated[
    str | None,
    typer.Option("--seq", metavar="N", help="Longest sequence allowed (a file's: its longest)."),
]
Batch: TypeAlias = Annotated[
    str | None,
    typer.Option("--global-batch", "-b", metavar="N", help=f"Of a corpus: sequences ({BATCH})."),
]
Corpus: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--corpus", metavar="NAME", help="Draw from github, byted, wikipedia or common_crawl."
    ),
]
TimeLimit: TypeAlias = Annotated[
    str, typer.Option("--time-limit", metavar="TIME", help="Time the search may take.")
]
Gap: TypeAlias = Annotated[
    str, typer.Option("--gap", metavar="SHARE", help="Stop at this distance from the bound.")
]
Explain: TypeAlias = Annotated[
    bool, typer.Option("--explain", help="Print the program behind the bound, with its numbers.")
]


def plan_sequences(
    model: Model,
    cluster: ClusterName,
    lengths: Lengths = None,
    method: Method = GROUPS,
    seq: Seq = None,
    nodes: Nodes = 1,
    batch: Batch = None,
    corpus: Corpus = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Of a corpus: which batch is drawn.")
    ] = None,
    prompts: Prompts = None,
    row: RowTokens = None,
    host_memory: HostMemory = None,
    time_limit: TimeLimit = "5s",
    gap: Gap = "2%",
    explain: Explain = False,
    html: Html = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """A step over sequences of all lengths: how many ranks, or which row, for each.

    Takes the lengths of a file, or draws a batch from a corpus. groups: micro-batches and Ulysses
    groups of mixed sizes with ZeRO-3 (FlexSP), against the best single size. hybrid: rings as long
    as each sequence needs (ByteScale), against rings of one size. prepack: prompts packed into rows
    of one pass of an accelerator (Prepacking), against padding. Each with a proven bound.

    \b
    Examples:
      ridgeplan plan sequences examples/llama3-8b.json -c hgx-h100 -n 4 --lengths batch.txt
      ridgeplan plan sequences examples/llama3-8b.json -c dgx-a100-80gb -n 8 --seq 512k \\
        --corpus github -b 1024 --explain
      ridgeplan plan sequences examples/llama3-8b.json -c hgx-h100 --seq 4k --method prepack
    """
    from cli.charts.picture import asked_for
    from cli.files import check_writable
    from cli.progress import patience
    from cli.sequence_answers import Asked
    from hwmodels import catalog
    from workloads.models.config import load_model

    pictures = asked_for(html, out)
    check_writable(pictures)
    _check_method(method, prompts=prompts, row=row, host_memory=host_memory)
    limit_s, gap_frac = parse(time_limit, "s", "--time-limit"), parse(gap, "frac", "--gap")
    if not limit_s > 0 or gap_frac < 0:
        raise InputError(
            f"--time-limit = '{shown(time_limit)}' must be above 0 s and --gap = '{shown(gap)}' "
            "at least 0; give 5s and 2%"
        )
    system, cfg = catalog.cluster(cluster, nodes), load_model(model)
    limit = whole(seq, "--seq") if seq is not None else None
    multiple = 1 if method == PREPACK else 2 * system.num_accelerators
    held, lines, about = _lengths(lengths, limit, multiple, batch=batch, corpus=corpus, seed=seed)
    asked = Asked(
        config=cfg, system=system, held=held, lines=lines, about=about, limit=limit,
        limit_s=limit_s, gap_frac=gap_frac, host_bytes=_host_bytes(host_memory, system, method),
        num_prompts=whole(prompts, "--prompts") if prompts is not None else None,
        room=whole(row, "--row") if row is not None else None,
    )  # fmt: skip
    with patience(WAITING[method]):
        answer = _answer(method, asked)
        answer.write(pictures)
    answer.show(pictures, explain=explain, as_json=as_json)


def _answer(method: str, asked: Asked) -> SequenceAnswer:
    """The answer of one method, whose module is loaded on demand."""
    if method == HYBRID:
        from cli.hybrid_answers import HybridAnswer

        return HybridAnswer.of(asked)
    if method == PREPACK:
        from cli.prefill_answers import PrefillAnswer

        return PrefillAnswer.of(asked)
    from cli.group_answers import GroupAnswer

    return GroupAnswer.of(asked)


def _check_method(method: str, **given: str | None) -> None:
    """Refuse an unknown method, and options of another one."""
    if method not in WAITING:
        raise UnknownNameError("--method", shown(method), WAITING, f"give {', '.join(WAITING)}")
    for key, value in given.items():
        if value is not None and OPTION_OF[key] != method:
            raise InputError(
                f"--{key.replace('_', '-')} is for --method {OPTION_OF[key]}; leave it out"
            )


def _host_bytes(given: str | None, system: Cluster, method: str) -> float:
    """A rank's share of its node's memory, 0 where the cluster has no link to a host.

    The hybrid method asks for a figure, given or the catalogue's; others do with none.
    """
    from cli.host_memory import NODE, host_bytes

    if not system.side_levels:
        if given is not None:
            raise InputError(
                f"{system.id} has no known link to a host, so that --host-memory is of no use; "
                "leave it out or take another cluster"
            )
        return 0.0
    if method == HYBRID:
        whole_node = host_bytes(given, system, default=NODE)
    else:
        whole_node = system.host_memory_bytes or 0.0
    return whole_node / float(system.accelerators_per_node)


def _lengths(
    file: Path | None, limit: int | None, multiple: int, **drawing: Any
) -> tuple[Ints, Ints | None, dict[str, Any]]:
    """The lengths, the lines they stand in, and where they come from."""
    from cli.sequence_files import load_lengths
    from simulator.variable_length import lengths

    words = {"batch": "--global-batch", "corpus": "--corpus", "seed": "--seed"}
    if file is not None:
        for key, value in drawing.items():
            if value is not None:
                raise InputError(f"{words[key]} is for drawn lengths; leave it or --lengths out")
        held, lines = load_lengths(file)
        return held, lines, {"corpus": None, "source": shown(file.name, 80)}
    if limit is None:
        raise InputError("drawn lengths need --seq, the longest allowed; or give --lengths FILE")
    name = drawing["corpus"] or CORPUS
    drawn, num = lengths(name), whole(drawing["batch"] or BATCH, "--global-batch")
    held = drawn.sample(num, limit=limit, seed=drawing["seed"] or 0, multiple=multiple)
    return held, None, {"corpus": name, "source": drawn.source}
