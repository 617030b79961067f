"""Names, aliases, paths, and the labels of the measured data."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from hwmodels import catalog
from hwmodels.errors import UnknownNameError


def test_ids_and_aliases_resolve_in_any_case() -> None:
    for device_id in catalog.device_ids():
        assert catalog.device(device_id.upper().replace("-", "_")).id == device_id
    for alias, device_id in catalog.aliases().items():
        assert catalog.device(alias).id == catalog.device(alias.lower()).id == device_id
        assert alias in catalog.device(device_id).aliases
    for alias, cluster_id in catalog.aliases("cluster").items():
        assert catalog.cluster(alias).id == cluster_id


def test_aliases_are_unambiguous_and_reasoned() -> None:
    index = tomllib.loads((catalog.DATA / "aliases.toml").read_text(encoding="utf-8"))
    for kind, ids in (("devices", catalog.device_ids()), ("clusters", catalog.cluster_ids())):
        names = [name.casefold() for entry in index[kind].values() for name in entry]
        assert len(names) == len(set(names))
        assert set(index[kind]) <= set(ids)
        assert not set(names) & set(ids)
        for entry in index[kind].values():
            assert all(isinstance(reason, str) and reason for reason in entry.values())


def test_measured_labels_mean_the_part_they_name() -> None:
    meant = {
        "V100-SXM2(DGX-1)": "v100-sxm2-16gb",
        "H100-96GB-HBM2e-500W": "h100-sxm-96gb",
        "RTXPRO6000-SE": "rtx-pro-6000-blackwell-server",
        "1080Ti(PCIe?)": "gtx-1080-ti",
        "H100-SXM-80GB": "h100-sxm",
        "A100-PCIe-40GB": "a100-pcie-40gb",
        "NVIDIA H100 80GB HBM3": "h100-sxm",
    }
    assert {label: catalog.device(label).id for label in meant} == meant


def test_every_gpu_of_the_measured_data_resolves(shared_data: Path) -> None:
    labels: set[str] = set()
    for folder in ("calib", "test"):
        for path in sorted((shared_data / folder).glob("*.csv")):
            with path.open(newline="", encoding="utf-8") as rows:
                labels |= {row["gpu"] for row in csv.DictReader(rows)}
    assert len(labels) > 15
    unresolved = []
    for label in sorted(labels):
        try:
            catalog.device(label)
        except UnknownNameError:
            unresolved.append(label)
    assert not unresolved


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as error:
        catalog.device("h100-smx")
    assert "h100-sxm" in error.value.near
    with pytest.raises(
        UnknownNameError, match="unknown device 'zzzzzzzz'; see `ridgeplan devices`"
    ):
        catalog.device("zzzzzzzz")
    with pytest.raises(UnknownNameError, match="hgx-h100"):
        catalog.cluster("hgx-h10")
    with pytest.raises(UnknownNameError) as error:
        catalog.device("two\nlines")
    assert "\n" not in str(error.value)


def test_shipped_devices_are_read_once() -> None:
    assert catalog.device("H100") is catalog.device("h100-sxm")
    assert len(catalog.devices()) == len(catalog.device_ids())
    assert len(catalog.clusters()) == len(catalog.cluster_ids())


def test_a_path_is_read_afresh(tmp_path: Path) -> None:
    shipped = (catalog.DATA / "devices" / "t4.toml").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(shipped.replace("320e9", "640e9"), encoding="utf-8")
    assert catalog.device(str(path)).hbm.bytes_per_s == 640e9
    path.write_text(shipped, encoding="utf-8")
    assert catalog.device(path).hbm.bytes_per_s == 320e9


def test_nccl_constants_are_read_only() -> None:
    constants = catalog.nccl_constants()
    assert constants["base_latency_tree_s"] == (6.8e-6, 14e-6, 8.4e-6)
    assert constants["effective_nvlink_bytes_per_s_per_link"]["sm90"] == 20.6e9
    assert constants["sources"][0].startswith("checked: NVIDIA/nccl")
    with pytest.raises(TypeError, match="read-only"):
        constants["nvls_s"] = 0.0  # type: ignore[index]
    with pytest.raises(TypeError, match="read-only"):
        constants["effective_host_bytes_per_s"]["amd_cpu"] = 0.0


def test_one_device_loads_alone_and_fast() -> None:
    """A fresh interpreter: no networkx, one device file, a few milliseconds (50 allowed here)."""
    code = (
        "import sys, time; from hwmodels import catalog, _toml; opened = []; parse = _toml.parse\n"
        "import hwmodels.catalog as c\n"
        "def spy(path): opened.append(path.name); return parse(path)\n"
        "_toml.parse = c.parse = spy\n"
        "start = time.perf_counter(); catalog.device('b200-sxm')\n"
        "print(time.perf_counter() - start, 'networkx' in sys.modules, *sorted(opened))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_project()
    ).stdout.split()
    assert float(out[0]) < 0.05
    assert out[1:] == ["False", "aliases.toml", "b200-sxm.toml"]
    catalog.device("b200-sxm")
    start = time.perf_counter()
    for _ in range(100):
        catalog.device("b200-sxm")
    assert time.perf_counter() - start < 0.05


def _project() -> Path:
    return Path(catalog.__file__).resolve().parents[1]
