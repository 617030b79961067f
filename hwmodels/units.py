"""SI constants and the decimal/binary prefixes, so that no factor is ever typed by hand.

Quantities inside Ridgeplan are in SI base units and carry the unit in their name:
`_s`, `_bytes`, `_bytes_per_s`, `_flops` (a count; one multiply-add is two),
`_flops_per_s`, `_hz`, `_w`; `_frac` lies in [0, 1].
"""

from __future__ import annotations

from typing import Final

KB: Final = 10**3
MB: Final = 10**6
GB: Final = 10**9
TB: Final = 10**12

KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30
TIB: Final = 2**40

UNIT_SUFFIXES: Final = (
    "_bytes_per_s",
    "_flops_per_s",
    "_bytes",
    "_flops",
    "_hz",
    "_w",
    "_s",
    "_frac",
)
"""Suffixes a name may use to state its unit, longest match first."""
