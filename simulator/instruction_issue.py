"""Time of a compiled kernel from its own instructions: pipes of an SM, memory, waves.

For a body of code run `passes` times by each of W warps of a block, and N blocks on S SMs:

    busy_p   = passes W sum over kinds of count x cost_p(kind) / rate_p      clocks of one block (1)
    issue_p  = ceil(N / S) sum over bodies busy_p / clock                    the busiest SM      (2)
    l2       = N sum over bodies passes bytes / L2 rate                                          (3)
    hbm      = from the bytes of the arguments to those that loads and stores name               (4)
    lower    = max of (2), (3) and (4)'s least,  upper = their sum, (4)'s most and what no other
               warp hides: one trip to memory for every pass that loads, in every wave           (5)
    seconds  = the 4-norm of (2), (3) and (4), plus one trip to memory a wave                    (6)

Pipes and rates: `rates`. Instructions that a pass may go around (the store of a persistent loop)
count in full in `upper`, not at all in `lower`, and by `maybe_share` in `seconds`. Ignored:
dependencies and their latencies within a pass but for (5), bank conflicts, instruction caches,
divergence, clocks below the device's. No constant is fitted: this is a bound-rung estimate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from hwmodels.device import Device
from hwmodels.errors import InputError, UnsupportedError
from simulator.kernel_time.terms import overlap
from simulator.occupancy import SUBPARTITIONS, WARP, Occupancy, Resources, occupancy, waves

ISSUE, FMA, ALU, SPECIAL, LSU, TENSOR, DOUBLE = (
    "issue", "fma", "alu", "special", "lsu", "tensor", "double"
)  # fmt: skip
L2, HBM, LATENCY = "l2", "hbm", "latency"
ALU_LANES: Final = 64
"""Results of integer and logic operations a clock of an SM, 8.0 to 10.0: CUDA programming guide,
table of arithmetic throughput."""
LSU_BYTES: Final = 128
"""Bytes between an SM's registers and its shared memory or L1 a clock: CUDA programming guide, 32
banks of 4 bytes."""
CONVERSIONS: Final[Mapping[int, int]] = {8: 16, 9: 64, 10: 64}
"""Type conversions a clock of an SM by major compute capability: the same table."""
MMA_SYNC_FLOPS: Final[Mapping[int, float]] = {9: 0.63, 10: 0.315}
"""Share of the tensor peak that warp-wide products (HMMA) reach where wider instructions exist:
0.63 on Hopper (Luo et al. 2024); on sm_100, whose peak is twice that, Hopper's flops per clock are
assumed, since nobody published a figure."""
_SHAPE: Final = re.compile(r"^(\d+)x(\d+)x(\d+)$")
_FLOPS: Final = {"16816": 4096, "1688": 2048, "1684": 1024, "16832": 8192, "16864": 16384,
                 "884": 512, "8816": 2048}  # fmt: skip
_WARPS_OF_GROUP: Final = 4
GROUPED: Final = ("HGMMA", "IGMMA", "QGMMA", "BGMMA")
WARP_WIDE: Final = ("HMMA", "IMMA", "DMMA", "QMMA", "OMMA", "BMMA")
TENSOR_MEMORY: Final = ("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA", "UTCMXQMMA")
_MOVED: Final = ("LDG", "STG", "LDGSTS", "LD", "ST", "LDS", "STS", "LDL", "STL", "ATOMIC", "ATOMS")
_MATRICES: Final = ("LDSM", "STSM", "LDSMT")
LOADS: Final = ("LDG", "LDGSTS", "UTMALDG", "LD")


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """Code of a block that runs `passes` times: instructions of one warp by kind.

    `always`: those no pass goes around. `tensor_flops`: of the whole block in one pass, where the
    instructions do not tell (tensor memory). `load_bytes`, `store_bytes`: of the whole block.
    """

    counts: Mapping[str, int]
    always: Mapping[str, int]
    passes: float
    load_bytes: float = 0.0
    store_bytes: float = 0.0
    tensor_flops: float = 0.0
    math: str = "bf16"
    maybe_share: float = 1.0

    @property
    def loads(self) -> bool:
        """Does a pass read global memory?"""
        return any(kind.split(".")[0] in LOADS for kind in self.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class IssueTime:
    """Seconds of a launch, their bounds, and the seconds of every resource in the middle estimate.

    `waves` is how many times over the grid fills the device; `tail_frac` the share of the last
    wave's places that stay empty.
    """

    seconds: float
    lower_s: float
    upper_s: float
    resources: Mapping[str, float]
    occupancy: Occupancy
    waves: float
    tail_frac: float

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.resources, key=lambda name: self.resources[name])


def issue_time(
    bodies: Sequence[Body],
    block: Resources,
    num_blocks: int,
    device: Device,
    unique_bytes: float | None = None,
) -> IssueTime:
    """Equations (1) to (6) for a grid. `unique_bytes`: what the arguments hold, if it is known."""
    if num_blocks < 1:
        raise InputError(f"a grid of {num_blocks} blocks runs nothing; give at least 1")
    fits = occupancy(block, device)
    filled = waves(num_blocks, device.num_sms, fits.blocks)
    rounds = math.ceil(filled)
    per_sm = math.ceil(num_blocks / device.num_sms)
    scale = per_sm * block.num_warps / device.clock_hz
    pipes = rates(device)
    middle, least, most = (dict.fromkeys(pipes, 0.0) for _ in range(3))
    for body in bodies:
        for pipe, (low, usual, high) in busy(body, pipes, device, block.num_warps).items():
            least[pipe] += low * scale
            middle[pipe] += usual * scale
            most[pipe] += high * scale
    moved = num_blocks * sum(b.passes * (b.load_bytes + b.store_bytes) for b in bodies)
    l2_s, hbm_s = _over(moved, device, "l2"), _over(moved, device, "hbm")
    known_s = None if unique_bytes is None else _over(min(unique_bytes, moved), device, "hbm")
    trip_s = _trip_s(device)
    hidden_s = rounds * trip_s * sum(b.passes for b in bodies if b.loads)
    middle |= {L2: l2_s, HBM: hbm_s if known_s is None else known_s, LATENCY: rounds * trip_s}
    parts = [v for name, v in middle.items() if name != LATENCY]
    return IssueTime(
        seconds=float(overlap(*parts)) + middle[LATENCY],
        lower_s=max(*least.values(), l2_s, known_s or 0.0),
        upper_s=sum(most.values()) + l2_s + hbm_s + hidden_s + middle[LATENCY],
        resources=middle, occupancy=fits, waves=filled, tail_frac=1 - filled / rounds,
    )  # fmt: skip


def rates(device: Device) -> dict[str, float]:
    """Warp instructions a clock of one SM, by pipe; of `tensor` flops a clock for bf16."""
    lanes = _vector_lanes(device, "fp32")
    special = device.sm.special_ops_per_clk
    if special is None:
        raise UnsupportedError(
            f"{device.id} has no sm.special_ops_per_clk; add it to the device file"
        )
    doubles = device.vector_flops_per_s.get("fp64")
    return {
        ISSUE: float(SUBPARTITIONS),
        FMA: lanes / WARP,
        ALU: ALU_LANES / WARP,
        SPECIAL: special / WARP,
        LSU: 1.0,
        TENSOR: 1.0,
        DOUBLE: (_vector_lanes(device, "fp64") if doubles else 2.0) / WARP,
    }


def busy(
    body: Body, pipes: Mapping[str, float], device: Device, num_warps: int
) -> dict[str, tuple[float, float, float]]:
    """Clocks of every pipe for one warp's share of a body: least, usual, most."""
    sure = _clocks(body.always, pipes, device, body.math)
    whole = _clocks(body.counts, pipes, device, body.math)
    if body.tensor_flops:
        for found in (sure, whole):
            found[TENSOR] += body.tensor_flops / num_warps / tensor_flops_per_clk(device, body.math)
    share = body.maybe_share
    return {
        pipe: (
            body.passes * sure[pipe],
            body.passes * (sure[pipe] + share * (whole[pipe] - sure[pipe])),
            body.passes * whole[pipe],
        )
        for pipe in pipes
    }


def _clocks(
    counts: Mapping[str, int], pipes: Mapping[str, float], device: Device, math: str
) -> dict[str, float]:
    found = dict.fromkeys(pipes, 0.0)
    for kind, number in counts.items():
        found[ISSUE] += number / pipes[ISSUE]
        pipe, cost = cost_of(kind, device)
        if pipe == TENSOR:
            found[TENSOR] += number * cost / _tensor_rate(kind, device, math)
        elif pipe is not None:
            found[pipe] += number * cost / pipes[pipe]
    return found


def cost_of(kind: str, device: Device) -> tuple[str | None, float]:
    """The pipe of an instruction kind and what one costs there (flops on the tensor pipe).

    >>> from hwmodels import catalog
    >>> h100 = catalog.device("h100-sxm")
    >>> cost_of("HMMA.16816", h100), cost_of("LDG.128", h100), cost_of("CONTROL", h100)
    (('tensor', 4096.0), ('lsu', 4.0), (None, 0.0))
    """
    base, _, rest = kind.partition(".")
    if base in WARP_WIDE or base in GROUPED:
        return TENSOR, warp_flops(kind)
    if base == "MUFU":
        return SPECIAL, 1.0
    if base == "CONVERT":
        per_clk = CONVERSIONS.get(_major(device), 16)
        return SPECIAL, (device.sm.special_ops_per_clk or 16) / per_clk
    if base in _MOVED:
        width = int(rest) // 8 if rest.isdigit() else 4
        return LSU, max(width, 4) * WARP / LSU_BYTES
    if base in _MATRICES:
        return LSU, float(rest) if rest.isdigit() else 1.0
    simple = {"FMA": (FMA, 1.0), "FMA2": (FMA, 2.0), "HALF": (FMA, 1.0), "ALU": (ALU, 1.0),
              "SHFL": (LSU, 1.0), "DOUBLE": (DOUBLE, 1.0)}  # fmt: skip
    return simple.get(base, (None, 0.0))


def warp_flops(kind: str) -> float:
    """Flops of one warp's share of a matrix instruction; 0 where its name does not tell.

    >>> warp_flops("HGMMA.64x256x16"), warp_flops("HMMA.1688"), warp_flops("UTCHMMA")
    (131072.0, 2048.0, 0.0)
    """
    base, _, shape = kind.partition(".")
    sizes = _SHAPE.match(shape)
    if base in GROUPED and sizes:
        m, n, k = (int(x) for x in sizes.groups())
        return 2.0 * m * n * k / _WARPS_OF_GROUP
    return float(_FLOPS.get(shape, 0))


def tensor_flops_per_clk(device: Device, math: str) -> float:
    """Dense flops a clock of one SM for products of a format; raises where the device has none."""
    table = device.sm.tensor_flops_per_clk
    for name, value in table.items():
        if name.startswith(f"{math}_acc_"):
            return float(value)
    raise UnsupportedError(
        f"{device.id} has no matrix rate for {math}; it has "
        f"{', '.join(sorted({name.split('_acc_')[0] for name in table})) or 'none'}"
    )


def _tensor_rate(kind: str, device: Device, math: str) -> float:
    base = kind.split(".")[0]
    share = MMA_SYNC_FLOPS.get(_major(device), 1.0) if base in WARP_WIDE else 1.0
    return share * tensor_flops_per_clk(device, math)


def _major(device: Device) -> int:
    return int((device.compute_capability or "0").split(".")[0])


def _vector_lanes(device: Device, name: str) -> float:
    rate = device.vector_flops_per_s.get(name)
    if rate is None:
        raise UnsupportedError(f"{device.id} has no {name} rate; add it to the device file")
    return rate / 2 / device.num_sms / device.clock_hz


def _over(num_bytes: float, device: Device, level: str) -> float:
    found = next((x for x in device.memory if x.name == level), None)
    rate = device.hbm.bytes_per_s if level == "hbm" else found.bytes_per_s if found else None
    return num_bytes / rate if rate else 0.0


def _trip_s(device: Device) -> float:
    """One trip to device memory and back; 0 where nobody published it."""
    return device.hbm.latency_s or 0.0
