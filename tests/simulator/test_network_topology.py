"""Placement of groups: meshes by hand, groups that do not tile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.errors import InputError
from simulator.network import calibrated_seconds, estimate_collective, on_node, over_nodes
from simulator.network_topology import check_tiles, mesh_frac, node_size
from workloads.ops.collective import Collective
from workloads.ops.collective_transfer import StagedCollective

DGX1, MI300X, HGX4 = (catalog.cluster(n) for n in ("dgx-1-v100", "mi300x-8", "hgx-a100-4"))
H100 = catalog.cluster("hgx-h100", nodes=8)


@pytest.mark.parametrize(
    ("on", "n", "stride", "links"),
    [
        (MI300X, 2, 1, 1 / 7), (MI300X, 2, 4, 1 / 7), (MI300X, 4, 2, 3 / 7), (MI300X, 8, 1, 1),
        (HGX4, 2, 1, 1 / 3), (HGX4, 3, 1, 2 / 3), (HGX4, 4, 1, 1),
        (DGX1, 2, 1, 1 / 6), (DGX1, 2, 4, 1 / 6), (DGX1, 4, 1, 4 / 6), (DGX1, 8, 1, 1),
        (H100, 2, 1, 1),
    ],
)  # fmt: skip
def test_a_group_has_the_links_among_its_members(on, n: int, stride: int, links: float) -> None:  # type: ignore[no-untyped-def]
    assert mesh_frac(on, on.levels[0], n, stride) == pytest.approx(links)


def test_the_links_of_the_cube_mesh_are_six_each_both_ways() -> None:
    counts = np.array(DGX1.extra["link_counts"])
    assert (counts == counts.T).all() and (counts.sum(axis=1) == 6).all()
    assert DGX1.levels[0].links_per_accelerator == 6


def test_ranks_that_no_link_joins_go_over_pci_express() -> None:
    pairs = mesh_frac(DGX1, DGX1.levels[0], 2, 3)  # 0 and 3 are joined, 1 and 4 are not
    assert pairs == pytest.approx(15.75e9 / 150e9)


def test_a_pair_of_a_mesh_is_as_slow_as_its_own_link() -> None:
    """Measured on eight MI300X: 47.7 GB/s between two, 312.9 among all."""
    size = 2**32
    pair, all_ = (Collective("all_reduce", size, n) for n in (2, 8))
    bound = [estimate_collective(c, on=MI300X).lower_s for c in (pair, all_)]
    assert bound[0] == pytest.approx(size / 64e9)
    assert bound[1] == pytest.approx(2 * 7 / 8 * size / 448e9)
    found = [calibrated_seconds(c, on=MI300X) for c in (pair, all_)]
    bus = [size / found[0], 2 * 7 / 8 * size / found[1]]
    assert bus[0] == pytest.approx(47.7e9, rel=0.25)
    assert bus[1] == pytest.approx(312.9e9, rel=0.25)


def test_arrays_of_groups_agree_with_scalars() -> None:
    ranks, apart = np.array([2.0, 4.0, 8.0, 2.0]), np.array([1.0, 2.0, 1.0, 4.0])
    many = mesh_frac(DGX1, DGX1.levels[0], ranks, apart)
    one = [mesh_frac(DGX1, DGX1.levels[0], n, s) for n, s in zip(ranks, apart, strict=True)]
    assert np.asarray(many).tolist() == one


@pytest.mark.parametrize(("n", "stride"), [(3, 1), (8, 9), (128, 1), (64, 2), (5, 8)])
def test_groups_that_do_not_tile_are_refused_in_one_line(n: int, stride: int) -> None:
    with pytest.raises(InputError, match=r"do not tile the 64 accelerators of hgx-h100: ranks tim"):
        check_tiles(H100, n, stride)


@given(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_divisors_tile(n: int, stride: int) -> None:
    if n * stride <= 64:
        check_tiles(H100, n, stride)


# ---- the calibrated answer over several nodes ----------------------------------------------


def test_rails_a_group_of_whole_nodes_sees_all_ports_and_a_strided_one_its_own() -> None:
    size = 2**32
    whole = float(calibrated_seconds(Collective("all_gather", size, 64), on=H100))
    strided = float(calibrated_seconds(Collective("all_gather", size, 8), on=H100, stride=8))
    assert strided / whole == pytest.approx(8 * (7 / 8) / (63 / 64), rel=0.05)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "all_to_all", "send_recv"])
def test_nothing_between_nodes_beats_the_bound(kind: str) -> None:
    size = 2.0 ** np.arange(8, 34)
    for n, stride in ((16, 1), (64, 1), (8, 8), (4, 4)):
        made = Collective(kind, size, n)
        bound = estimate_collective(made, on=H100, stride=stride).lower_s
        found = np.asarray(calibrated_seconds(made, on=H100, stride=stride))
        assert (found >= bound * (1 - 1e-12)).all()
        assert (np.diff(found) >= 0).all()


def test_arrays_of_groups_inside_and_across_agree_with_scalars() -> None:
    n, stride = np.array([1.0, 2.0, 8.0, 16.0, 64.0, 8.0]), np.array([1.0, 4.0, 1.0, 1.0, 1.0, 8.0])
    many = np.asarray(
        calibrated_seconds(Collective("all_reduce", 2**26, n), on=H100, stride=stride)
    )
    for i in range(len(n)):
        one = Collective("all_reduce", 2**26, int(n[i]))
        alone = calibrated_seconds(one, on=H100, stride=int(stride[i]))
        assert many[i] == pytest.approx(alone, rel=1e-12), i
    assert many[0] == 0


def test_a_rack_is_one_domain_and_host_memory_is_a_way_of_its_own() -> None:
    rack = catalog.cluster("gb200-nvl72", nodes=36)
    assert node_size(rack) == 72
    assert on_node(Collective("all_reduce", 2**20, 72), on=rack).num_ranks == 72
    racks = over_nodes(Collective("all_reduce", 2**20, 144), on=rack)
    assert (racks.num_nodes, racks.hop_s, racks.port_bytes_per_s) == (2, 5e-6, 50e9)
    from dataclasses import replace

    through = replace(H100.levels[1], topology="sockets by way of host memory")
    staged = replace(H100, levels=(H100.levels[0], through))
    op = over_nodes(Collective("all_reduce", 2**20, 16), on=staged)
    assert isinstance(op, StagedCollective)
    slow, fast = (calibrated_seconds(Collective("all_reduce", 2**28, 16), on=c)
                  for c in (staged, H100))  # fmt: skip
    assert slow > 3 * fast
