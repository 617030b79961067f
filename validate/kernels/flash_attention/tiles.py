"""Tile configurations of the attention kernels, with what each is for, and their binaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from validate.kernels.spec import Compilation, Launch

HALVES: Final = ("fp16", "bf16")
FULL: Final = ("fp32", "tf32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A launch with the head widths and number formats it is shipped for."""

    launch: Launch
    least_dim: int = 16
    most_dim: int = 128
    formats: tuple[str, ...] = HALVES

    def suits(self, arch: int, dim: int, dtype: str) -> bool:
        """Whether it is shipped for that GPU, head width and format."""
        fits = self.least_dim <= dim <= self.most_dim and dtype in self.formats
        return fits and self.launch.suits(arch)


def suiting(tiles: Sequence[Tile], arch: int, dim: int, dtype: str) -> tuple[Launch, ...]:
    """The launches shipped there, in their order."""
    return tuple(tile.launch for tile in tiles if tile.suits(arch, dim, dtype))


def binary(
    kernel: str,
    function: Any,
    launch: Launch,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    label: str,
    ragged: Sequence[str] = (),
) -> Compilation:
    """A binary: `types` of the arguments that are neither constants nor 32-bit sizes.

    Pointers and strides count as divisible by 16, as contiguous tensors have them, but for those
    named in `ragged`.
    """
    kinds = {**types, **dict.fromkeys(constants, "constexpr")}
    unknown = sorted(set(kinds) - set(function.arg_names))
    if unknown:
        raise ValueError(f"{function.__name__} has no arguments {unknown}")
    signature = {name: kinds.get(name, "i32") for name in function.arg_names}
    aligned = tuple(
        name
        for name, kind in signature.items()
        if name not in ragged and (kind.startswith("*") or name.startswith("stride"))
    )
    return Compilation(
        kernel=kernel, function=function, signature=signature, constants=dict(constants),
        launch=launch, aligned=aligned, label=label,
    )  # fmt: skip


def _tile(
    sizes: Mapping[str, int],
    warps: int,
    stages: int,
    arch: tuple[int, int] = (0, 10**6),
    **rest: Any,
) -> Tile:
    launch = Launch(
        meta=dict(sizes), num_warps=warps, num_stages=stages, least_arch=arch[0],
        most_arch=arch[1],
    )  # fmt: skip
    return Tile(launch=launch, **rest)


HOPPER_ON: Final = (90, 10**6)
HOPPER: Final = (90, 99)
BLACKWELL_ON: Final = (100, 10**6)
BEFORE_BLACKWELL: Final = (0, 99)
WIDE: Final = {"least_dim": 256, "most_dim": 256}

FORWARD: Final = (
    # Two warp groups of 64 rows each, as wgmma and tcgen05 take them; a 128 x 128 tile of scores
    # gives each byte of K and V from L2 256 flops. Copies by the bulk engine free registers.
    _tile({"BLOCK_M": 128, "BLOCK_N": 128, "TMA": 1}, 8, 2, HOPPER_ON),
    _tile({"BLOCK_M": 128, "BLOCK_N": 128, "TMA": 1}, 8, 3, HOPPER_ON),
    # Fewer keys a step: a narrower masked edge, for short sequences and windows.
    _tile({"BLOCK_M": 128, "BLOCK_N": 64, "TMA": 1}, 8, 3, HOPPER),
    # One warp group a program and two programs an SM: one's softmax beside the other's products.
    _tile({"BLOCK_M": 64, "BLOCK_N": 64, "TMA": 1}, 4, 3, HOPPER),
    _tile({"BLOCK_M": 128, "BLOCK_N": 64, "TMA": 1}, 8, 2, HOPPER, **WIDE),
    _tile({"BLOCK_M": 128, "BLOCK_N": 32, "TMA": 1}, 8, 2, BLACKWELL_ON, **WIDE),
    # Copies by the threads (cp.async): any layout, packed sequences, sm_80.
    _tile({"BLOCK_M": 128, "BLOCK_N": 64, "TMA": 0}, 8, 3, BEFORE_BLACKWELL),
    _tile({"BLOCK_M": 128, "BLOCK_N": 64, "TMA": 0}, 8, 2, BLACKWELL_ON),
    _tile({"BLOCK_M": 64, "BLOCK_N": 32, "TMA": 0}, 8, 2, BEFORE_BLACKWELL, **WIDE),
    _tile({"BLOCK_M": 64, "BLOCK_N": 32, "TMA": 0}, 4, 2, BLACKWELL_ON, **WIDE),
    # fp32 products run on the ordinary lanes: small tiles, or operands spill.
    _tile({"BLOCK_M": 32, "BLOCK_N": 32, "TMA": 0}, 4, 2, formats=FULL, most_dim=64),
    _tile({"BLOCK_M": 16, "BLOCK_N": 16, "TMA": 0}, 4, 1, formats=FULL, least_dim=128),
)
"""Forward; dense inputs take all, packed ones those without TMA."""

BACKWARD: Final = (
    # dK and dV are two fp32 accumulators: 128 keys of 128 leave room for 32 queries a step.
    _tile({"RESIDENT": 128, "STREAMED": 32, "TMA": 1}, 8, 2, HOPPER, least_dim=128),
    _tile({"RESIDENT": 64, "STREAMED": 64, "TMA": 1}, 8, 2, HOPPER_ON),
    _tile({"RESIDENT": 128, "STREAMED": 64, "TMA": 1}, 8, 2, HOPPER_ON, most_dim=64),
    _tile({"RESIDENT": 64, "STREAMED": 64, "TMA": 1}, 4, 2, HOPPER_ON, most_dim=64),
    # Copies by the threads: any layout, packed sequences, sm_80.
    _tile({"RESIDENT": 64, "STREAMED": 32, "TMA": 0}, 8, 2, BEFORE_BLACKWELL),
    _tile({"RESIDENT": 64, "STREAMED": 32, "TMA": 0}, 8, 1, BEFORE_BLACKWELL),
    _tile({"RESIDENT": 32, "STREAMED": 64, "TMA": 0}, 8, 2, BEFORE_BLACKWELL),
    _tile({"RESIDENT": 64, "STREAMED": 32, "TMA": 0}, 4, 1, BLACKWELL_ON),
    _tile({"RESIDENT": 32, "STREAMED": 32, "TMA": 0}, 4, 2, BLACKWELL_ON),
    _tile({"RESIDENT": 32, "STREAMED": 16, "TMA": 0}, 8, 1, (0, 89), formats=FULL, most_dim=64),
    _tile({"RESIDENT": 32, "STREAMED": 16, "TMA": 0}, 4, 1, HOPPER_ON, formats=FULL, most_dim=64),
)
"""Backward: both kernels of a launch take the same tile."""
