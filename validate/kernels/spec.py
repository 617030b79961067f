"""What a profiled kernel is: its shapes, its truth, its implementations, its shipped binaries.

A folder `validate/kernels/<noun>/` holds `reference.py` (the truth in float64), `kernel.py` (the
Triton code with its tile configurations) and `suite.py`, which states both as `KernelSpec`s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from validate.record import Case
from workloads.op import Op

if TYPE_CHECKING:
    import torch

TRITON: Final = "triton"
"""Name of our own implementation; the others are vendors' or the framework's."""
ARCHITECTURES: Final = (80, 90, 100)
"""Compute capabilities, times ten, for which every shipped configuration is compiled."""
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One tile configuration: the values of a kernel's tile parameters, its warps, its stages.

    `least_arch`, `most_arch`: the compute capabilities (90 is 9.0) that it is shipped for.
    """

    meta: Mapping[str, int] = field(default_factory=lambda: NOTHING)
    num_warps: int = 4
    num_stages: int = 2
    least_arch: int = 0
    most_arch: int = 10**6

    @property
    def label(self) -> str:
        """The configuration in one word.

        >>> Launch(meta={"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3).label
        'BLOCK_M128-BLOCK_N64-w8-s3'
        """
        sizes = [f"{name}{value}" for name, value in self.meta.items()]
        return "-".join([*sizes, f"w{self.num_warps}", f"s{self.num_stages}"])

    def suits(self, arch: int) -> bool:
        """Whether it is shipped for that compute capability."""
        return self.least_arch <= arch <= self.most_arch


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """One binary that is shipped: a jitted function, its argument types, its constants.

    `signature` names every argument's Triton type ('*fp16', 'i32', 'fp32', 'constexpr');
    `aligned` those known to be divisible by 16, as a launch on real tensors would find them.
    """

    kernel: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    launch: Launch
    aligned: tuple[str, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """Function, variant and configuration: unique among all that is shipped."""
        variant = f"[{self.label}]" if self.label else ""
        return f"{self.function.__name__}{variant}:{self.launch.label}"


Inputs = Mapping[str, Any]
"""Tensors and numbers by name, as a case's `inputs` made them."""
Outputs = "tuple[torch.Tensor, ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One way to run a kernel: ours, a vendor's, the framework's.

    `prepare(case, inputs, launch)` allocates what it needs and returns a function without
    arguments that launches everything once and returns the outputs, in the order of the
    reference's; it may be captured in a CUDA graph. `launches(case, arch)` are the tile
    configurations worth trying there, the default first; one entry `None` where there is none to
    choose. `refusal(case, arch)` says in a few words why it cannot run there, else None.
    `vendor` names the library that a record of it stands for ('' for our own).
    """

    name: str
    prepare: Callable[[Case, Inputs, Launch | None], Callable[[], tuple[torch.Tensor, ...]]]
    launches: Callable[[Case, int], Sequence[Launch | None]] = lambda case, arch: (None,)
    refusal: Callable[[Case, int], str | None] = lambda case, arch: None
    vendor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """A kernel of the profiling suite.

    name             what the command line calls it, e.g. 'gemm'
    op               the op of `workloads` that counts a case
    inputs           (case, generator, device) -> random inputs by name; never zeros
    reference        (case, inputs) -> the outputs in float64, from the same inputs
    implementations  ours first
    checks           small ragged cases, fit for the CPU interpreter (fp32, fp16)
    grid             the cases worth timing, smallest first
    compilations     every binary that is shipped
    tolerances       per number format, the greatest relative error ||out - ref|| / ||ref||;
                     `errors` may name others per output
    row              (case) -> (family, op, params) as public tables name it (`measurement`), so
                     that a record calibrates as a published row does; None where none exists
    source           the paper or the library whose algorithm it is
    """

    name: str
    op: Callable[[Case], Op]
    inputs: Callable[[Case, torch.Generator, torch.device], Inputs]
    reference: Callable[[Case, Inputs], tuple[torch.Tensor, ...]]
    implementations: tuple[Implementation, ...]
    checks: tuple[Case, ...]
    grid: tuple[Case, ...]
    compilations: Callable[[], tuple[Compilation, ...]]
    tolerances: Mapping[str, float]
    source: str
    row: Callable[[Case], tuple[str, str, Mapping[str, Any]] | None] | None = None

    def implementation(self, name: str) -> Implementation:
        """The implementation of that name."""
        return next(i for i in self.implementations if i.name == name)
