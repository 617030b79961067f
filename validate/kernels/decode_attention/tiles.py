"""Tile configurations of the decoding kernels: what each is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from validate.kernels.flash_attention.tiles import FULL, HALVES, Tile, suiting
from validate.kernels.spec import Launch


def _tile(
    block_m: int, block_n: int, warps: int, stages: int, least_dim: int = 16, most_dim: int = 128,
    formats: tuple[str, ...] = HALVES, arch: tuple[int, int] = (0, 10**6),
) -> Tile:  # fmt: skip
    launch = Launch(
        meta={"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages,
        least_arch=arch[0], most_arch=arch[1],
    )  # fmt: skip
    return Tile(launch=launch, least_dim=least_dim, most_dim=most_dim, formats=formats)


DECODE: Final = (
    # Bytes in flight decide: 64 keys of 128 in 16 bits are 32 KiB with their values, three stages
    # of it twice a multiprocessor. 16 rows are the least a tensor core instruction takes.
    _tile(16, 64, 4, 3, least_dim=128),
    _tile(16, 64, 4, 2, most_dim=64),
    _tile(16, 128, 8, 2, arch=(90, 10**6)),
    _tile(16, 32, 4, 4),
    _tile(16, 32, 4, 3, least_dim=256, most_dim=256),
    # Groups of more than 16 heads.
    _tile(64, 64, 4, 2, arch=(90, 10**6)),
    _tile(64, 32, 8, 2, arch=(0, 89)),
    # fp32 products run on the ordinary lanes: small tiles, or operands spill.
    _tile(16, 32, 4, 2, most_dim=64, formats=FULL),
    _tile(16, 16, 8, 1, least_dim=128, formats=FULL),
)
"""One new token: rows are the query heads of a group."""

PREFIX: Final = (
    # Rows are the heads of all sequences: a matrix product, tiled as a prompt's attention.
    _tile(128, 64, 8, 2, arch=(90, 10**6)),
    _tile(64, 64, 4, 2, arch=(90, 10**6)),
    _tile(64, 32, 8, 2, arch=(0, 89)),
    _tile(16, 32, 4, 2, most_dim=64, formats=FULL),
)
"""A prefix that many sequences share."""


def for_rows(
    tiles: Sequence[Tile], rows: int, arch: int, dim: int, dtype: str
) -> tuple[Launch, ...]:
    """The launches whose tile holds all rows with the least to spare, else the largest there is."""
    found = suiting(tiles, arch, dim, dtype)
    heights = sorted({x.meta["BLOCK_M"] for x in found})
    if not heights:
        return ()
    height = next((h for h in heights if h >= rows), heights[-1])
    return tuple(x for x in found if x.meta["BLOCK_M"] == height)
