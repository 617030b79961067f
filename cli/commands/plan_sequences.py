"""`ridgeplan plan sequences`: groups for sequences of all lengths, against one size for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli import show
from cli.commands.plan import ClusterName, Model, Nodes, Seq
from cli.options import AsJson
from cli.plans import whole
from cli.quantity import count_text, digits, seconds_text

if TYPE_CHECKING:
    from hwmodels.cluster import Cluster
    from simulator.variable_length import Ints
    from workloads.models.config import TransformerConfig

HOST_BYTES: Final = 2e12 / 8
"""Host memory that a rank may offload to: 2 TB a node of eight (DGX A100 and H100 datasheets)."""


def plan_sequences(
    model: Model,
    cluster: ClusterName,
    seq: Seq,
    nodes: Nodes = 1,
    batch: Annotated[
        str, typer.Option("--global-batch", "-b", metavar="N", help="Sequences of a step.")
    ] = "512",
    corpus: Annotated[
        str,
        typer.Option(
            "--corpus", metavar="NAME", help="Lengths: github, byted, wikipedia, common_crawl."
        ),
    ] = "common_crawl",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Which batch is drawn.")] = 0,
    as_json: AsJson = False,
) -> None:
    """A step over sequences of all lengths: how many ranks each should have.

    Draws a batch from a corpus and compares, for Ulysses groups with ZeRO-3, FlexSP's mixed groups
    with the best single size and with the one the longest sequence allowed needs; and for rings
    with the model whole on every rank, ByteScale's hybrid data parallelism with rings of one size.

    \b
    Examples:
      ridgeplan plan sequences examples/llama3-8b.json -c hgx-h100 -n 4 --seq 256k
      ridgeplan plan sequences examples/llama3-8b.json -c dgx-a100-80gb -n 8 --seq 512k \\
        --corpus github -b 1024
    """
    from cli.progress import patience
    from hwmodels import catalog
    from simulator.variable_length import lengths
    from workloads.models.config import load_model

    system, cfg = catalog.cluster(cluster, nodes), load_model(model)
    limit, num = whole(seq, "--seq"), whole(batch, "--global-batch")
    drawn = lengths(corpus)
    held = drawn.sample(num, limit=limit, seed=seed, multiple=2 * system.num_accelerators)
    with patience("planning groups"):
        rows = _rows(cfg, system, held, limit)
    document = {
        "model": cfg.name, "cluster": system.id, "num_accelerators": system.num_accelerators,
        "corpus": corpus, "source": drawn.source, "max_seq": limit, "num_sequences": num,
        "num_tokens": int(held.sum()), "longest": int(held.max()), "steps": rows,
    }  # fmt: skip
    if as_json:
        show.print_json(document)
        return
    _show(document)


def _rows(cfg: TransformerConfig, system: Cluster, held: Ints, limit: int) -> list[dict[str, Any]]:
    """Seconds of a step by system, each beside the static one of its kind."""
    from simulator.planners.hybrid_data import (
        hybrid_step,
        least_ring,
        predicted_ring_cost,
        static_step,
    )
    from simulator.planners.sequence_groups import best_homogeneous, homogeneous_step, plan_step
    from simulator.variable_length import predicted_cost

    ranks = system.num_accelerators
    cost = predicted_cost(cfg, on=system, len_max=limit)
    degree = cost.least_degree(limit)
    groups = {
        f"Ulysses groups of {degree}": homogeneous_step(held, cost, ranks, degree).seconds,
        "best single size (FlexSP-BatchAda)": best_homogeneous(held, cost, ranks).seconds,
        "mixed groups (FlexSP)": plan_step(held, cost, ranks, prove=False).seconds,
    }
    room = int(cost.rank_tokens)
    ring = min(least_ring(limit, room), ranks)
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


def _show(document: dict[str, Any]) -> None:
    out = show.console()
    out.print(
        f"{document['model']}, {document['num_sequences']} sequences of {document['corpus']} "
        f"({count_text(document['num_tokens'])} tokens, the longest "
        f"{count_text(document['longest'])}) on {document['num_accelerators']} accelerators of "
        f"{document['cluster']}",
        style="bold",
    )
    table = show.table("a step with", "time", "speedup", right=("time", "speedup"))
    for row in document["steps"]:
        speedup = f"{digits(row['speedup'], 2)} x"
        table.add_row(row["system"], seconds_text(row["seconds"]), speedup)
    out.print(table)
    out.print(f"Lengths: {document['source']}.")
