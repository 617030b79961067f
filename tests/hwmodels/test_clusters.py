"""Systems: levels, scaling by nodes, the graph, and a user's own files."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from hwmodels import catalog
from hwmodels.errors import InputError, SpecError, UnsupportedError

IDS = catalog.cluster_ids()
EXPECTED = {
    "dgx-1-v100", "dgx-a100-80gb", "dgx-a100-40gb", "hgx-a100-4", "a100-pcie-8", "hgx-h100",
    "dgx-h100", "hgx-h800", "hgx-h200", "hgx-b200", "gb200-nvl72", "l40s-pcie-8", "a10-pcie-4",
    "rtx-4090-2", "aws-p4d", "aws-p5", "tpu-v4-pod", "tpu-v5p-pod", "tpu-v5e-pod", "mi300x-8",
}  # fmt: skip


def test_all_twenty_systems_are_there() -> None:
    assert set(IDS) == EXPECTED


@pytest.mark.parametrize("cluster_id", IDS)
def test_levels_are_sourced_and_widen_outwards(cluster_id: str) -> None:
    cluster = catalog.cluster(cluster_id)
    assert cluster.id == cluster_id
    assert cluster.num_nodes == 1
    assert cluster.doubts
    assert cluster.levels
    for inner, outer in pairwise(cluster.levels):
        assert outer.size > inner.size
        assert outer.bytes_per_s <= inner.bytes_per_s
    for level in (*cluster.levels, *cluster.side_levels):
        if level.bytes_per_s_per_node is not None:
            per_accelerator = level.bytes_per_s_per_node / cluster.accelerators_per_node
            assert math.isclose(per_accelerator, level.bytes_per_s)
    side = {level.name for level in cluster.side_levels}
    assert side <= {"pcie", "c2c"}
    assert all(str(entry["source"]) for entry in cluster.measured)


@pytest.mark.parametrize("cluster_id", IDS)
def test_nvlink_of_the_system_is_that_of_its_device(cluster_id: str) -> None:
    cluster = catalog.cluster(cluster_id)
    inner = cluster.levels[0]
    ports = {link.name: link.bytes_per_s for link in cluster.device.links}
    name = inner.name.removesuffix("_bridge")
    assert inner.bytes_per_s == ports[name]


def test_scaling_by_nodes() -> None:
    cluster = catalog.cluster("hgx-h100", nodes=8)
    assert (cluster.num_nodes, cluster.num_accelerators) == (8, 64)
    assert cluster.device is catalog.device("h100-sxm")
    assert catalog.cluster("hgx-h100").num_accelerators == 8
    assert catalog.cluster("gb200-nvl72", nodes=18).num_accelerators == 72
    assert catalog.cluster("gb200-nvl72", nodes=36).level_spanning(72).name == "nvlink"
    assert catalog.cluster("gb200-nvl72", nodes=36).level_spanning(73).name == "inter_rack"
    assert catalog.cluster("tpu-v4-pod", nodes=1024).num_accelerators == 4096


@pytest.mark.parametrize(
    ("cluster_id", "limit", "nodes"),
    [
        ("hgx-h800", 8, 2), ("hgx-a100-4", 4, 2), ("rtx-4090-2", 2, 2), ("a10-pcie-4", 4, 2),
        ("mi300x-8", 8, 2), ("a100-pcie-8", 8, 2), ("tpu-v4-pod", 4096, 1025),
        ("tpu-v5p-pod", 8960, 2241), ("tpu-v5e-pod", 256, 33),
    ],
)  # fmt: skip
def test_more_nodes_than_the_links_reach(cluster_id: str, limit: int, nodes: int) -> None:
    assert catalog.cluster(cluster_id).max_accelerators == limit
    catalog.cluster(cluster_id, nodes=nodes - 1)
    with pytest.raises(InputError) as error:
        catalog.cluster(cluster_id, nodes=nodes)
    message = str(error.value)
    assert f"{limit} accelerators" in message
    assert "--cluster" in message
    assert "\n" not in message


@pytest.mark.parametrize("nodes", [0, -1, True, 2.0, "2"])
def test_nodes_must_be_a_positive_count(nodes: object) -> None:
    with pytest.raises(InputError, match="whole number of nodes"):
        catalog.cluster("hgx-h100", nodes=nodes)  # type: ignore[arg-type]


def test_a_group_wider_than_every_level_is_refused() -> None:
    cluster = catalog.cluster("hgx-a100-4")
    assert cluster.level_spanning(4).name == "nvlink"
    with pytest.raises(UnsupportedError, match="no link level for 5 accelerators"):
        cluster.level_spanning(5)


def test_graph_runs_outwards_through_the_levels() -> None:
    graph = catalog.cluster("dgx-h100", nodes=64).graph
    chain = ["accelerator", "nvlink", "infiniband_ndr_leaf", "infiniband_ndr_spine"]
    assert list(graph.nodes) == [*chain, "pcie"]
    assert set(graph.edges) == {*pairwise(chain), ("accelerator", "pcie")}
    assert [graph.nodes[name]["group_size"] for name in chain] == [1, 8, 256, 512]
    edge = graph.edges["accelerator", "nvlink"]
    assert edge["bytes_per_s"] == 450e9
    assert edge["group_size"] == 8
    side = catalog.cluster("gb200-nvl72", nodes=18).graph
    assert set(side.successors("accelerator")) == {"nvlink", "c2c"}
    assert side.graph["num_accelerators"] == 72


@pytest.mark.parametrize("cluster_id", IDS)
def test_every_system_has_a_graph_with_sane_groups(cluster_id: str) -> None:
    cluster = catalog.cluster(cluster_id)
    graph = cluster.graph
    assert graph.number_of_nodes() == 1 + len(cluster.levels) + len(cluster.side_levels)
    for _, _, edge in graph.edges(data=True):
        assert edge["bytes_per_s"] > 0
        assert 1 <= edge["group_size"] <= cluster.num_accelerators


def test_measurements_are_kept() -> None:
    rings = [
        entry["ring_busbw_bytes_per_s"]
        for entry in catalog.cluster("hgx-h200").measured
        if entry["kind"] == "all_reduce" and "ring_busbw_bytes_per_s" in entry
    ]
    assert rings == [367.61e9]
    curve = next(e for e in catalog.cluster("hgx-b200").measured if e["kind"] == "all_reduce_curve")
    assert len(curve["payload_bytes"]) == len(curve["busbw_bytes_per_s"]) == 20  # type: ignore[arg-type]


OWN = """
schema = 1
id = "lab"
name = "Lab rack"
device = "h100-sxm"
accelerators_per_node = 8

[[levels]]
name = "nvlink"
topology = "crossbar"
size = 8
bytes_per_s = 450e9

[[levels]]
name = "network"
topology = "fat tree"
size = inf
bytes_per_s = 25e9

[sources]
"*" = "our rack"
"""

BAD = {
    "no levels": (OWN[OWN.index("[[levels]]") : OWN.index("[sources]")], "", "levels"),
    "unknown device": ('"h100-sxm"', '"h100-smx"', "device"),
    "unit": ("bytes_per_s = 25e9", "bandwidth_gbps = 25", "levels.network.bandwidth_gbps"),
    "value in GB/s": ("bytes_per_s = 25e9", "bytes_per_s = 25", "levels.network.bytes_per_s"),
    "not wider": ("size = inf", "size = 8", "levels.network.size"),
    "negative size": ("size = inf", "size = -inf", "levels.network.size"),
    "no topology": ('topology = "fat tree"', "", "levels.network.topology"),
    "measured without source": ("[sources]", '[[measured]]\nkind = "p2p"\n[sources]',
                                "measured[0].source"),
    "unsourced": ('"*" = "our rack"', '"levels.*" = "our rack"', "accelerators_per_node"),
    "too many per node": ("accelerators_per_node = 8",
                          "accelerators_per_node = 8\nmax_accelerators = 4",
                          "accelerators_per_node"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_cluster_file(case: str, tmp_path: Path) -> None:
    old, new, key = BAD[case]
    assert old in OWN
    path = tmp_path / "lab.toml"
    path.write_text(OWN.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SpecError) as error:
        catalog.cluster(str(path))
    assert error.value.key == key
    assert error.value.mend
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_own_cluster_with_own_device_beside_it(tmp_path: Path) -> None:
    device = (catalog.DATA / "devices" / "a30.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(device.replace('"a30"', '"mine"'), encoding="utf-8")
    path = tmp_path / "lab.toml"
    path.write_text(OWN.replace('"h100-sxm"', '"mine.toml"'), encoding="utf-8")
    cluster = catalog.cluster(path, nodes=3)
    assert cluster.device.id == "mine"
    assert cluster.num_accelerators == 24
    assert cluster.max_accelerators is None


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("dgx-1-v100", 512e9), ("dgx-a100-40gb", 1e12), ("dgx-a100-80gb", 2e12),
        ("dgx-h100", 2e12), ("aws-p4d", 1152 * 2**30), ("aws-p5", 2 * 2**40),
        ("gb200-nvl72", 17.28e12 / 18), ("hgx-h100", None),
    ],
)  # fmt: skip
def test_host_memory_is_that_of_the_system_as_sold(name: str, num_bytes: float | None) -> None:
    """A board (HGX) has no host of its own."""
    found = catalog.cluster(name)
    assert found.host_memory_bytes == num_bytes
    assert ("host_memory_bytes" in found.sources) == (num_bytes is not None)
