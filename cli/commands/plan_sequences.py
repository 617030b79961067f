"""`ridgeplan plan sequences`: groups for sequences of all lengths, against one size for all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from cli import show
from cli.commands.plan import ClusterName, Model, Nodes
from cli.options import AsJson, Html, Out
from cli.plans import whole
from cli.quantity import count_text, digits, parse, percent_text, seconds_text, shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from hwmodels.cluster import Cluster
    from simulator.planners.sequence_groups import StepPlan
    from simulator.variable_length import GroupCost, Ints
    from workloads.models.config import TransformerConfig

HOST_BYTES: Final = 2e12 / 8
"""Host memory that a rank may offload to: 2 TB a node of eight (DGX A100 and H100 datasheets)."""
CORPUS: Final = "common_crawl"
BATCH: Final = "512"
MOST_SHOWN: Final = 16
EXPLAINED_CLASSES: Final = 6
"""Length classes of the program that `--explain` prints; the search has up to 64."""
RUNG: Final = (
    "calibrated kernels and all-to-alls inside a node; links between nodes and ZeRO-3's exchange "
    "at their bound"
)

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
    bool, typer.Option("--explain", help="Print the program of the slowest micro-batch.")
]


def plan_sequences(
    model: Model,
    cluster: ClusterName,
    lengths: Lengths = None,
    seq: Seq = None,
    nodes: Nodes = 1,
    batch: Batch = None,
    corpus: Corpus = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Of a corpus: which batch is drawn.")
    ] = None,
    time_limit: TimeLimit = "5s",
    gap: Gap = "2%",
    explain: Explain = False,
    html: Html = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """A step over sequences of all lengths: how many ranks each should have.

    Takes the lengths of a file, or draws a batch from a corpus, and plans Ulysses groups of mixed
    sizes with ZeRO-3 (FlexSP), with a proven bound; compares them with the best single size and
    with the one that the longest sequence allowed needs; and for rings with the model whole on
    every rank, ByteScale's hybrid data parallelism with rings of one size.

    \b
    Examples:
      ridgeplan plan sequences examples/llama3-8b.json -c hgx-h100 -n 4 --lengths batch.txt
      ridgeplan plan sequences examples/llama3-8b.json -c dgx-a100-80gb -n 8 --seq 512k \\
        --corpus github -b 1024 --explain
    """
    from cli.charts.picture import asked_for
    from cli.files import check_writable
    from cli.progress import patience
    from cli.sequence_answers import cost_or_refusal
    from hwmodels import catalog
    from simulator.planners.sequence_groups import plan_step
    from workloads.models.config import load_model

    pictures = asked_for(html, out)
    check_writable(pictures)
    limit_s, gap_frac = parse(time_limit, "s", "--time-limit"), parse(gap, "frac", "--gap")
    if not limit_s > 0 or gap_frac < 0:
        raise InputError(
            f"--time-limit = '{shown(time_limit)}' must be above 0 s and --gap = '{shown(gap)}' "
            "at least 0; give 5s and 2%"
        )
    system, cfg = catalog.cluster(cluster, nodes), load_model(model)
    limit = whole(seq, "--seq") if seq is not None else None
    held, lines, about = _lengths(lengths, limit, system, batch=batch, corpus=corpus, seed=seed)
    with patience("planning groups"):
        cost = cost_or_refusal(cfg, system, held, lines, limit)
        step = plan_step(
            held, cost, system.num_accelerators, gap_frac=gap_frac, time_limit_s=limit_s
        )
        document = _document(cfg, system, held, about, limit, cost, step)
    if pictures:
        _draw(document, pictures)
    if as_json:
        show.print_json(document)
        return
    _show(document)
    if explain:
        print(_explained(step, cost, system.num_accelerators))
    for path in pictures:
        print(f"wrote {path}")


def _lengths(
    file: Path | None, limit: int | None, system: Cluster, **drawing: Any
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
    held = drawn.sample(
        num, limit=limit, seed=drawing["seed"] or 0, multiple=2 * system.num_accelerators
    )
    return held, None, {"corpus": name, "source": drawn.source}


def _document(
    cfg: TransformerConfig, system: Cluster, held: Ints, about: dict[str, Any],
    limit: int | None, cost: GroupCost, step: StepPlan,
) -> dict[str, Any]:  # fmt: skip
    """The whole answer."""
    from cli.sequence_answers import micro_batches
    from simulator.planners.sequence_groups import best_homogeneous

    allowed, ranks = limit or int(held.max()), system.num_accelerators
    single = best_homogeneous(held, cost, ranks)
    return {
        "model": cfg.name, "cluster": system.id, "num_accelerators": ranks, **about,
        "max_seq": allowed, "num_sequences": len(held), "num_tokens": int(held.sum()),
        "longest": int(held.max()), "rung": RUNG, "rank_tokens": cost.rank_tokens,
        "recomputed_frac": cost.recomputed_frac, "seconds": step.seconds, "lower_s": step.lower_s,
        "gap_frac": step.gap_frac, "best_homogeneous_s": single.seconds,
        "gain_over_homogeneous": single.seconds / step.seconds,
        "steps": _rows(cfg, system, held, allowed, cost, step, single),
        "micro_batches": micro_batches(step, held, cost),
    }  # fmt: skip


def _rows(
    cfg: TransformerConfig, system: Cluster, held: Ints, limit: int, cost: GroupCost,
    step: StepPlan, single: StepPlan,
) -> list[dict[str, Any]]:  # fmt: skip
    """Seconds of a step by system, each beside the static one of its kind."""
    from simulator.planners.hybrid_data import (
        hybrid_step,
        least_ring,
        predicted_ring_cost,
        static_step,
    )
    from simulator.planners.sequence_groups import homogeneous_step

    ranks = system.num_accelerators
    degree = cost.least_degree(limit)
    groups = {
        f"Ulysses groups of {degree}": homogeneous_step(held, cost, ranks, degree).seconds,
        "best single size (FlexSP-BatchAda)": single.seconds,
        "mixed groups (FlexSP)": step.seconds,
    }
    room = int(cost.rank_tokens)
    ring = next((r for r in range(least_ring(limit, room), ranks) if ranks % r == 0), ranks)
    own = predicted_ring_cost(cfg, on=system, host_bytes=HOST_BYTES)
    given: dict[str, Any] = {"num_ranks": ranks, "rank_tokens": room}
    rings = {
        f"rings of {ring}": static_step(held, own, degree=ring, **given).seconds,
        "hybrid data parallel, as they come": hybrid_step(
            held, own, balance=False, offload=False, **given
        ).seconds,
        "hybrid data parallel, balanced (ByteScale)": hybrid_step(held, own, **given).seconds,
    }
    return [
        {"system": name, "seconds": seconds, "speedup": next(iter(kind.values())) / seconds}
        for kind in (groups, rings)
        for name, seconds in kind.items()
    ]


def _headline(document: dict[str, Any]) -> str:
    return (
        f"{document['model']}, {document['num_sequences']} sequences of "
        f"{document['corpus'] or document['source']} "
        f"({count_text(document['num_tokens'])} tokens, the longest "
        f"{count_text(document['longest'])}) on {document['num_accelerators']} accelerators of "
        f"{document['cluster']}"
    )


def _proof(document: dict[str, Any]) -> str:
    return (
        f"Mixed groups take {seconds_text(document['seconds'])}, "
        f"{digits(document['gain_over_homogeneous'], 2)} x as fast as the best single size; no "
        f"grouping of these micro-batches takes less than {seconds_text(document['lower_s'])} "
        f"(gap {percent_text(document['gap_frac'])})"
    )


def _show(document: dict[str, Any]) -> None:
    out = show.console()
    out.print(_headline(document), style="bold")
    table = show.table("a step with", "time", "speedup", right=("time", "speedup"))
    for row in document["steps"]:
        speedup = f"{digits(row['speedup'], 2)} x"
        table.add_row(row["system"], seconds_text(row["seconds"]), speedup)
    out.print(table)
    right = ("sequences", "tokens", "time", "proven", "gap")
    table = show.table("groups (ranks x how many)", *right, right=right)
    batches = document["micro_batches"]
    for batch in batches[:MOST_SHOWN]:
        table.add_row(
            batch["shape"].strip("<>").replace(",", " "), str(batch["num_sequences"]),
            count_text(batch["num_tokens"]), seconds_text(batch["seconds"]),
            seconds_text(batch["lower_s"]), percent_text(batch["gap_frac"]),
        )  # fmt: skip
    out.print(table)
    if len(batches) > MOST_SHOWN:
        out.print(f"... and {len(batches) - MOST_SHOWN} more micro-batches (--json has them all)")
    out.print(_proof(document) + ".")
    out.print(f"Rung: {document['rung']}. Lengths: {document['source']}.")


def _explained(step: StepPlan, cost: GroupCost, num_ranks: int) -> str:
    """The program of the slowest micro-batch at its plan's makespan, with a solution."""
    from simulator.planners import program_text
    from simulator.planners.group_program import program_at
    from simulator.planners.program import solve

    held, plan = max(step.micro_batches, key=lambda one: one[1].seconds)
    program = program_at(held, cost, num_ranks, plan.seconds, num_classes=EXPLAINED_CLASSES)
    note = (
        f"\nThe slowest micro-batch ({plan}) in {EXPLAINED_CLASSES} length classes: the fewest "
        "ranks whose groups end by the plan's time. More than there are prove a time too short.\n"
    )
    return note + program_text.text(program, solve(program, time_limit_s=2.0))


def _draw(document: dict[str, Any], pictures: list[Path]) -> None:
    from cli.charts.groups import figure
    from cli.charts.picture import rendered
    from cli.files import write_all

    drawn = figure(document, title=_headline(document), subtitle=_proof(document))
    write_all({path: rendered(drawn, path.suffix) for path in pictures})
