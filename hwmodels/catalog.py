"""The shipped devices and clusters by name, and the user's own files by path.

A name is an id or an alias, in any case; whatever ends in .toml or contains a '/' is a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from hwmodels._toml import one_line, parse
from hwmodels.cluster import Cluster
from hwmodels.device import Device
from hwmodels.errors import UnknownNameError
from hwmodels.specs import read_cluster, read_constants, read_device, scaled

DATA: Final = Path(__file__).parent / "data"


def device(name_or_path: str | Path) -> Device:
    """The device of that id, alias or file.

    >>> device("H100-SXM-80GB").id, device("h100-sxm").hbm.bytes_per_s
    ('h100-sxm', 3352000000000.0)
    """
    if _is_path(name_or_path):
        return read_device(Path(name_or_path).expanduser())
    return _shipped_device(_resolve("device", str(name_or_path)))


def cluster(name_or_path: str | Path, nodes: int | None = None) -> Cluster:
    """The system of that id, alias or file, with `nodes` nodes (one when not given).

    >>> cluster("hgx-h100", nodes=8).num_accelerators
    64
    """
    if _is_path(name_or_path):
        path = Path(name_or_path).expanduser()
        return read_cluster(path, lambda name: _device_beside(path, name), nodes)
    one_node = _shipped_cluster(_resolve("cluster", str(name_or_path)))
    return scaled(one_node, 1 if nodes is None else nodes)


@lru_cache(maxsize=1)
def device_ids() -> tuple[str, ...]:
    """The ids of the shipped devices, sorted."""
    return _ids("device")


@lru_cache(maxsize=1)
def cluster_ids() -> tuple[str, ...]:
    """The ids of the shipped clusters, sorted."""
    return _ids("cluster")


def devices() -> tuple[Device, ...]:
    """Every shipped device, sorted by id."""
    return tuple(_shipped_device(device_id) for device_id in device_ids())


def clusters() -> tuple[Cluster, ...]:
    """Every shipped cluster with one node, sorted by id."""
    return tuple(_shipped_cluster(cluster_id) for cluster_id in cluster_ids())


def aliases(kind: str = "device") -> Mapping[str, str]:
    """Every alias of that kind ('device' or 'cluster') with the id it stands for.

    >>> aliases()["V100-SXM2(DGX-1)"]
    'v100-sxm2-16gb'
    """
    return {name: target for target, names in _alias_index(kind).items() for name in names}


@lru_cache(maxsize=1)
def nccl_constants() -> Mapping[str, Any]:
    """NCCL's tuning constants in SI units (seconds, bytes_per_s), with their sources; read-only.

    Lists run over the protocols LL, LL128 and Simple.

    >>> nccl_constants()["base_latency_ring_s"]
    (6.6e-06, 1.4e-05, 8.4e-06)
    """
    return read_constants(DATA / "nccl.toml")


@lru_cache(maxsize=256)
def _shipped_device(device_id: str) -> Device:
    known = _alias_index("device").get(device_id, {})
    return read_device(DATA / "devices" / f"{device_id}.toml", tuple(known))


@lru_cache(maxsize=256)
def _shipped_cluster(cluster_id: str) -> Cluster:
    return read_cluster(DATA / "clusters" / f"{cluster_id}.toml", device)


def _ids(kind: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (DATA / f"{kind}s").glob("*.toml")))


@lru_cache(maxsize=2)
def _alias_index(kind: str) -> Mapping[str, Mapping[str, str]]:
    """Id -> its aliases, each with the reason why it stands for that id."""
    table: Any = _alias_file()
    index: Mapping[str, Mapping[str, str]] = table[f"{kind}s"]
    return index


@lru_cache(maxsize=1)
def _alias_file() -> Mapping[str, object]:
    return parse(DATA / "aliases.toml")


@lru_cache(maxsize=2)
def _targets(kind: str) -> Mapping[str, str]:
    targets = {_fold(name): target for name, target in aliases(kind).items()}
    return targets | {_fold(name): name for name in _ids(kind)}


def _resolve(kind: str, name: str) -> str:
    if name in (device_ids() if kind == "device" else cluster_ids()):
        return name
    targets = _targets(kind)
    target = targets.get(_fold(name))
    if target is None:
        known = [*_ids(kind), *aliases(kind)]
        hint = f"see `ridgeplan {kind}s`, or give a file: ./my-{kind}.toml"
        raise UnknownNameError(kind, one_line(name), known, hint)
    return target


def _fold(name: str) -> str:
    return "-".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _is_path(name: str | Path) -> bool:
    return isinstance(name, Path) or name.endswith(".toml") or "/" in name


def _device_beside(cluster_file: Path, name: str) -> Device:
    """A device that a user's cluster file names: by id, or by a path relative to that file."""
    return device(cluster_file.parent / Path(name).expanduser() if _is_path(name) else name)
