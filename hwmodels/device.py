"""One accelerator: its rates, its per-SM resources and its memory levels, every figure sourced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from hwmodels.dtypes import DType
from hwmodels.errors import UnsupportedError
from hwmodels.frozen import FrozenDict

# Formats that multiply at the rate of another one when the device quotes no rate of their own:
# block-scaled formats run on the tensor path of their payload.
_PAYLOAD = {"nvfp4": "fp4", "mxfp8": "fp8", "mxfp4": "fp4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLevel:
    """One level of the memory hierarchy.

    `capacity_bytes` is per unit (one SM's shared memory, the one L2); `num_units` of them share
    the aggregate `bytes_per_s`. A figure nobody published is None: whoever needs it must say so.
    """

    name: str
    capacity_bytes: float
    bytes_per_s: float | None = None
    latency_s: float | None = None
    num_units: int = 1
    technology: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SmLimits:
    """What one SM (CU, TensorCore) holds; bounds occupancy. None: not published."""

    register_file_bytes: int | None = None
    max_registers_per_thread: int | None = None
    smem_bytes: int | None = None
    smem_bytes_per_block: int | None = None
    tensor_memory_bytes: int | None = None
    warp_size: int | None = None
    max_threads: int | None = None
    max_warps: int | None = None
    max_blocks: int | None = None
    max_threads_per_block: int | None = None
    num_tensor_cores: int | None = None
    special_ops_per_clk: float | None = None
    tensor_flops_per_clk: Mapping[str, float] = field(default_factory=FrozenDict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A port of the device: bandwidth per direction, all its lanes together."""

    name: str
    bytes_per_s: float
    num_links: int | None = None
    generation: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator. Peaks are dense; `sparsity_factor` multiplies them for 2:4.

    `tensor_flops_per_s` is keyed `<input>_acc_<accumulator>` (`bf16_acc_fp32`),
    `vector_flops_per_s` by dtype name. `memory` runs from fastest to slowest level.
    `sources` maps a figure's path (`memory.hbm.bytes_per_s`), or a glob over paths, to its
    citation; `measured` holds micro-benchmark results that are facts about this part but not
    its specification; `extra` holds specified facts that no model field carries (bus widths,
    L1 sizes, how a capacity is labelled).
    """

    id: str
    name: str
    vendor: str
    architecture: str
    num_sms: int
    clock_hz: float
    memory: tuple[MemoryLevel, ...]
    vector_flops_per_s: Mapping[str, float]
    tensor_flops_per_s: Mapping[str, float]
    sources: Mapping[str, str]
    chip: str | None = None
    form_factor: str | None = None
    compute_capability: str | None = None
    sm_unit: str = "SM"
    tensor_clock_hz: float | None = None
    sparsity_factor: float = 1.0
    sm: SmLimits = field(default_factory=SmLimits)
    links: tuple[Link, ...] = ()
    tdp_w: float | None = None
    num_copy_engines: int | None = None
    measured: Mapping[str, float] = field(default_factory=FrozenDict)
    extra: Mapping[str, float | str | bool] = field(default_factory=FrozenDict)
    aliases: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    def level(self, name: str) -> MemoryLevel:
        """The memory level of that name (`hbm` is always the device memory)."""
        for level in self.memory:
            if level.name == name:
                return level
        known = ", ".join(level.name for level in self.memory)
        raise UnsupportedError(f"{self.id} has no memory level '{name}'; it has {known}")

    @property
    def hbm(self) -> MemoryLevel:
        """The device memory, the slowest level, whatever its technology (HBM, GDDR, LPDDR)."""
        return self.memory[-1]

    @property
    def special_ops_per_s(self) -> float | None:
        """Special-function results (exp2, rsqrt, sin) per second over all SMs; None: unpublished.

        >>> from hwmodels import catalog
        >>> catalog.device("a100-sxm4-80gb").special_ops_per_s == 16 * 108 * 1.41e9
        True
        """
        per_clk = self.sm.special_ops_per_clk
        return None if per_clk is None else per_clk * self.num_sms * self.clock_hz

    @property
    def host_bytes_per_s(self) -> float | None:
        """Bandwidth to the host's memory, per direction: chip-to-chip where there is one, or PCIe.

        >>> from hwmodels import catalog
        >>> round(catalog.device("a100-sxm4-80gb").host_bytes_per_s / 1e9, 1)
        31.5
        """
        rates = {link.name: link.bytes_per_s for link in self.links}
        return rates.get("c2c", rates.get("pcie"))

    def tensor_rate_flops_per_s(self, dtype: DType) -> float | None:
        """Dense tensor-core rate for `dtype` inputs, widest accumulator first; None if absent."""
        for name in (dtype.name, _PAYLOAD.get(dtype.name)):
            for accumulator in (dtype.accumulator, "fp32", "fp64", "fp16", "int32"):
                rate = self.tensor_flops_per_s.get(f"{name}_acc_{accumulator}")
                if rate is not None:
                    return rate
        return None

    def vector_rate_flops_per_s(self, dtype: DType) -> float | None:
        """Rate of the general-purpose units for `dtype`; None if the device quotes none."""
        return self.vector_flops_per_s.get(dtype.name)

    def matmul_rate_flops_per_s(self, dtype: DType) -> tuple[float, str]:
        """The rate a matrix product of `dtype` can reach, and the unit it runs on.

        Units: 'tensor' where the device has a tensor path for the format, else 'vector'.
        Raises `UnsupportedError` where it has neither: nothing stands in silently.
        """
        rate = self.tensor_rate_flops_per_s(dtype)
        if rate is not None:
            return rate, "tensor"
        rate = self.vector_rate_flops_per_s(dtype)
        if rate is not None:
            return rate, "vector"
        known = sorted({k.split("_acc_")[0] for k in self.tensor_flops_per_s})
        known += [k for k in self.vector_flops_per_s if k not in known]
        raise UnsupportedError(
            f"{self.id} has no {dtype} rate; choose a format it computes: {', '.join(known)}"
        )

    def source_of(self, path: str) -> str | None:
        """The citation of a figure: an exact path wins over the longest matching glob."""
        if path in self.sources:
            return self.sources[path]
        globs = [pattern for pattern in self.sources if matches(path, pattern)]
        return self.sources[max(globs, key=len)] if globs else None


def matches(path: str, pattern: str) -> bool:
    """Whether a figure's path is meant by a pattern of `sources` (equal, or a glob over it).

    >>> matches("memory.hbm.bytes_per_s", "memory.*")
    True
    """
    start, star, end = pattern.partition("*")
    if "*" in end or "?" in pattern or "[" in pattern:
        return fnmatchcase(path, pattern)
    if not star:
        return path == pattern
    return len(path) >= len(pattern) - 1 and path.startswith(start) and path.endswith(end)
