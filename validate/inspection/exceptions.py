"""Shipped binaries that spill registers all the same: how many bytes, and why they are shipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Spill:
    """Bytes that a binary stores to and loads from memory for want of registers, and the reason
    that it is shipped with them."""

    most_bytes: int
    reason: str


SPILLS: Final[Mapping[str, Spill]] = {}
"""By the entry's key, 'kernel/function[variant]:launch@sm_90'."""
