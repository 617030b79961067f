"""`ridgeplan clusters`: the catalogue of systems, or one of them with its links."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.options import AsJson
from cli.quantity import capacity_text, scaled_text, seconds_text
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from hwmodels.cluster import Cluster, LinkLevel


def clusters(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A cluster, or a TOML file of your own.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", "-n", metavar="N", help="Nodes of it (default 1).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The clusters, or one with its links and their sources.

    \b
    Examples:
      ridgeplan clusters
      ridgeplan clusters hgx-h100 --nodes 8
    """
    from hwmodels import catalog

    if name is None:
        if nodes is not None:
            raise InputError("--nodes needs the name of a cluster; see `ridgeplan clusters`")
        found = [catalog.cluster(cluster_id) for cluster_id in catalog.cluster_ids()]
        if as_json:
            show.print_json({"clusters": [_document(cluster) for cluster in found]})
        else:
            _show_all(found)
        return
    cluster = catalog.cluster(name, nodes)
    if as_json:
        show.print_json({"cluster": _document(cluster)})
    else:
        _show_one(cluster)


def _document(cluster: Cluster) -> dict[str, Any]:
    return {
        "id": cluster.id,
        "name": cluster.name,
        "device": cluster.device.id,
        "num_nodes": cluster.num_nodes,
        "accelerators_per_node": cluster.accelerators_per_node,
        "num_accelerators": cluster.num_accelerators,
        "max_accelerators": cluster.max_accelerators,
        "host_memory_bytes": cluster.host_memory_bytes,
        "levels": cluster.levels,
        "side_levels": cluster.side_levels,
        "measured": cluster.measured,
        "extra": cluster.extra,
        "sources": cluster.sources,
        "doubts": cluster.doubts,
    }


def _show_all(found: list[Cluster]) -> None:
    table = show.table("cluster", "device", "per node", "links, inside out", right=("per node",))
    for cluster in found:
        links = ", ".join(f"{x.name} {scaled_text(x.bytes_per_s, 'B/s')}" for x in cluster.levels)
        table.add_row(cluster.id, cluster.device.id, str(cluster.accelerators_per_node), links)
    out = show.console()
    out.print(table)
    out.print(
        f"{len(found)} clusters. Bandwidths are per accelerator and direction.\n"
        "`ridgeplan clusters NAME --nodes N` shows one with its sources."
    )


def _show_one(cluster: Cluster) -> None:
    out = show.console()
    out.print(f"{cluster.id}  {cluster.name}", style="bold")
    nodes = "1 node" if cluster.num_nodes == 1 else f"{cluster.num_nodes} nodes"
    out.print(
        f"{nodes} of {cluster.accelerators_per_node} x {cluster.device.id}: "
        f"{cluster.num_accelerators} accelerators"
    )
    if cluster.host_memory_bytes is not None:
        out.print(f"Host memory of a node: {capacity_text(cluster.host_memory_bytes)}")
    columns = "level", "topology", "joins", "bandwidth", "latency", "notes"
    table = show.table(*columns, right=("joins", "bandwidth", "latency"))
    for level in cluster.levels:
        table.add_row(*_level_row(level))
    for level in cluster.side_levels:
        name, *rest = _level_row(level)
        table.add_row(f"{name} (side)", *rest)
    out.print(table)
    out.print("Bandwidths are per accelerator and direction.\n")
    sources = show.table("figure", "source")
    for path, source in cluster.sources.items():
        sources.add_row(path, source)
    out.print(sources)
    if cluster.doubts:
        out.print("Doubts", style="bold")
        for doubt in cluster.doubts:
            out.print(f"- {doubt}")


def _level_row(level: LinkLevel) -> tuple[str, ...]:
    notes = []
    if level.nics_per_node is not None:
        notes.append(f"{level.nics_per_node} NICs per node")
    if level.in_network_reduction:
        notes.append("reduces in the network")
    if level.oversubscription != 1:
        notes.append(f"oversubscribed {level.oversubscription:g}:1")
    return (
        level.name,
        level.topology,
        "all" if math.isinf(level.size) else f"{level.size:g}",
        scaled_text(level.bytes_per_s, "B/s"),
        "-" if level.latency_s is None else seconds_text(level.latency_s),
        ", ".join(notes),
    )
