"""How much memory a node's hosts have: as given, or as the catalogue has it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from cli.quantity import parse, shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from hwmodels.cluster import Cluster

NODE: Final = "node"
"""The word for what the catalogue has."""


def host_bytes(text: str | None, on: Cluster, *, default: str | None = None) -> float:
    """Bytes of a node's hosts: a size, or 'node' for the catalogue's figure; 0 where nothing asks.

    `default` stands for what is not given.
    """
    text = default if text is None else text
    if text is None:
        return 0.0
    if text.strip().lower() == NODE:
        if on.host_memory_bytes is None:
            raise InputError(
                f"the catalogue has no figure for the memory of a host of {on.id}; give "
                "--host-memory, e.g. --host-memory 2TB"
            )
        return on.host_memory_bytes
    size = parse(text, "bytes", "--host-memory")
    if not 0 < size < math.inf:
        raise InputError(f"--host-memory = '{shown(text)}' is no size; give 2TB, or node")
    return size
