"""Hybrid data parallelism (ByteScale): every sequence on as many ranks as its length needs.

N ranks of C tokens each. Statically, N / c groups of c ranks work on packs of c C tokens: every
pack goes round a ring of c ranks, though most of its sequences would fit a few. In hybrid data
parallelism (arXiv 2502.21231, sections 4 and 5) a sequence of s tokens takes its own ring of

    D(s) = ceil( (2 Act(s) + (1 - r) (l - 2) Act(s)) / (l Act(C)) ),   Act(s) = a s            (1)
    forward(s) / l >= r Act(s) / host bandwidth,   r (l - 2) Act(s) / D <= host memory of a rank (2)

ranks at least, r in [0, 1] being the share of the activations of all but two of the l layers that
goes to the host under the layer's forward pass; without offloading r = 0. Short sequences share a
rank, packed best-fit to C, and pass nothing on. A unit (a sequence or a pack) of D ranks takes

    T = token sum s / D + max( square sum s^2 / D,  ring(sum s, D) )                            (3)
    ring(t, D) = 3 kv_bytes t (D - 1) / D / bandwidth       K and V forward; again, and their
                                                            gradients, backward

where attention hides the ring as far as it is as long. Ranks of a unit start together; gradients
are exchanged when all are done. `naive` deals units to ranks in the order they come; `balanced`
gives the longest units first to the ranks that are free soonest (the balance scheduler, whose
ranks may run different numbers of micro-batches). Fewer ranks pass less on but take longer:
with offloading a sequence gets the fewest, between its D with and without it, that finish within a
deadline, and the deadline is the best of `DEADLINES`. No schedule of given units ends before

    max( max_j T_j,  sum_j D_j T_j / N )                                                        (4)

    Implemented in: `RingCost.ranks` (1), `RingCost.offload_frac` (2), `RingCost.unit_s` (3),
    `static_step`, `hybrid_step`, `Schedule.lower_s` (4).

Ignored: pipeline stages, the optimizer, packs of several long sequences, ranks of one ring that
lie in different nodes than others (the port of a node's last rank bounds a ring that leaves it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hwmodels.cluster import Cluster
from hwmodels.dtypes import BF16
from hwmodels.errors import InfeasibleError, InputError
from simulator.exchange import kv_elements_per_token
from simulator.planners.sequence_groups import best_fit
from simulator.sequence_parallel import PORT_FRAC
from simulator.variable_length import Floats, Ints, kernel_seconds
from workloads.models.activations import layer_bytes
from workloads.models.config import TransformerConfig

RING_PASSES: Final = 3
"""Times K and V travel: forward, backward, and as gradients."""
KEPT_LAYERS: Final = 2
"""Layers that are never offloaded: backward needs them at once."""
SHARES: Final = np.linspace(0.0, 1.0, 11)
"""Parts of the largest share that may be offloaded."""
DEADLINES: Final = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0)
"""Times within which units are to finish, in parts of the step without offloading."""
NAIVE, BALANCED = "naive", "balanced"


@dataclass(frozen=True, slots=True, kw_only=True)
class RingCost:
    """Coefficients of (1) to (3); `forward_frac` is the share of the work that is forward.

    `kv_bytes` and `token_bytes` are K and V, and activations, of a token in all layers; rings of up
    to `node_ranks` ranks run at `inside_bytes_per_s`, others at `outside_bytes_per_s`.
    `host_bytes` of host memory are a rank's to offload to.
    """

    square_s: float
    token_s: float
    kv_bytes: float
    token_bytes: float
    num_layers: int
    node_ranks: int
    inside_bytes_per_s: float
    outside_bytes_per_s: float
    host_bytes_per_s: float
    host_bytes: float
    fixed_s: float = 0.0
    forward_frac: float = 1 / 3

    def ring_s(self, tokens: Floats | float, degree: Ints | int) -> Floats:
        """Seconds that K and V of so many tokens take round a ring."""
        d = np.asarray(degree)
        rate = np.where(d <= self.node_ranks, self.inside_bytes_per_s, self.outside_bytes_per_s)
        return np.asarray(RING_PASSES * self.kv_bytes * np.asarray(tokens) * (d - 1) / d / rate)

    def unit_s(
        self, tokens: Floats | float, squares: Floats | float, degree: Ints | int,
        passed: float | None = None,
    ) -> Floats:  # fmt: skip
        """Seconds of sequences with that sum of lengths and of squared lengths on one ring.

        `passed` tokens go round it; those of the sequences where left out.
        """
        attention = self.square_s * np.asarray(squares) / degree
        ring = self.ring_s(tokens if passed is None else passed, degree)
        return np.asarray(self.token_s * np.asarray(tokens) / degree + np.maximum(attention, ring))

    def offload_frac(self, length: Floats | Ints) -> Floats:
        """Share of the activations that the forward pass hides the copy of: (2)."""
        s = np.asarray(length, dtype=np.float64)
        forward = self.forward_frac * (self.square_s * s + self.token_s)
        return np.minimum(forward * self.host_bytes_per_s / self.token_bytes, 1.0)

    def ranks(self, length: Ints, rank_tokens: int, *, offload: bool) -> Ints:
        """Ranks that each sequence needs at least: (1), the best of `SHARES` of r."""
        most = self.offload_frac(length) if offload else np.zeros(len(length))
        layers = max(self.num_layers, KEPT_LAYERS)
        best = np.full(len(length), np.iinfo(np.int64).max)
        for r in SHARES[:, None] * most if offload else most[None, :]:
            moved = r * (layers - KEPT_LAYERS) / layers
            held = np.ceil((1 - moved) * length / rank_tokens - 1e-9)
            host = np.ceil(moved * self.token_bytes * length / self.host_bytes)
            best = np.minimum(best, np.maximum(np.maximum(held, host), 1).astype(np.int64))
        return best


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Sequences (by number) that one ring of `degree` ranks works on together."""

    members: Ints
    degree: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Units with their ranks and starts; `seconds` from the first start to the exchanged end."""

    units: tuple[Unit, ...]
    ranks: tuple[Ints, ...]
    starts: Floats
    num_ranks: int
    fixed_s: float

    @property
    def seconds(self) -> float:
        """The last end, and the exchange of gradients."""
        ends = self.starts + np.array([u.seconds for u in self.units])
        return float(ends.max()) + self.fixed_s

    @property
    def lower_s(self) -> float:
        """(4): no schedule of these units is shorter."""
        work = sum(u.degree * u.seconds for u in self.units) / self.num_ranks
        return max(work, *(u.seconds for u in self.units)) + self.fixed_s


def static_step(
    held: Ints, cost: RingCost, *, num_ranks: int, rank_tokens: int, degree: int,
    fill_frac: float = 1.0,
) -> Schedule:  # fmt: skip
    """All rings of `degree` ranks; packs filled in the order sequences come, dealt in turn.

    Packs that are filled to less than all of their room, to `fill_frac` (a longer sequence has one
    to itself), pass K and V of the whole room round: buffers have one size.
    """
    if num_ranks % degree:
        raise InputError(f"rings of {degree} ranks do not divide {num_ranks}; give a divisor")
    _checked(held, num_ranks, rank_tokens)
    room = degree * rank_tokens
    if held.max() > room:
        raise InfeasibleError(f"{held.max()} tokens do not fit {degree} ranks of {rank_tokens}")
    packs = [pack for pack in _in_order(held, int(fill_frac * room)) if len(pack)]
    passed = room if fill_frac < 1 else None
    units = [unit_of(held, pack, degree, cost, passed=passed) for pack in packs]
    return _scheduled(units, cost, num_ranks, BALANCED if len(units) < 2 else NAIVE)


def hybrid_step(
    held: Ints, cost: RingCost, *, num_ranks: int, rank_tokens: int, balance: bool = True,
    offload: bool = True,
) -> Schedule:  # fmt: skip
    """Rings as long as each sequence needs; `balance` and `offload` are ByteScale's two parts."""
    _checked(held, num_ranks, rank_tokens)
    most = cost.ranks(held, rank_tokens, offload=False)
    least = cost.ranks(held, rank_tokens, offload=True) if offload else most
    if least.max() > num_ranks:
        raise InfeasibleError(
            f"{held.max()} tokens need {least.max()} of {num_ranks} ranks; use more ranks"
        )
    most = np.minimum(most, num_ranks)
    plain = _hybrid(held, cost, most, num_ranks, rank_tokens, balance)
    found = [plain] if (least <= most).all() and (held <= num_ranks * rank_tokens).all() else []
    for part in DEADLINES if offload else ():
        degrees = within(held, cost, least, most, part * plain.seconds)
        found.append(_hybrid(held, cost, degrees, num_ranks, rank_tokens, balance))
    return min(found, key=lambda schedule: schedule.seconds)


def within(held: Ints, cost: RingCost, least: Ints, most: Ints, deadline_s: float) -> Ints:
    """The fewest ranks, from `least` to `most`, that finish in time; else the fastest number."""
    degrees = most.copy()
    for k in np.flatnonzero(least < most):
        tried = np.arange(least[k], most[k] + 1)
        took = cost.unit_s(float(held[k]), float(held[k]) ** 2, tried)
        in_time = np.flatnonzero(took <= deadline_s)
        degrees[k] = tried[in_time[0] if len(in_time) else int(np.argmin(took))]
    return degrees


def _hybrid(
    held: Ints, cost: RingCost, degrees: Ints, num_ranks: int, rank_tokens: int, balance: bool
) -> Schedule:
    long = np.flatnonzero(held > rank_tokens)
    short = np.flatnonzero(held <= rank_tokens)
    units = [unit_of(held, np.array([k]), int(degrees[k]), cost) for k in long]
    packs = best_fit(held[short], rank_tokens) if len(short) else []
    units += [unit_of(held, short[p], 1, cost) for p in packs]
    if not balance:
        units.sort(key=lambda u: int(u.members.min()))
    return _scheduled(units, cost, num_ranks, BALANCED if balance else NAIVE)


def _checked(held: Ints, num_ranks: int, rank_tokens: int) -> None:
    if num_ranks < 1 or rank_tokens < 1 or not len(held) or held.min() < 1:
        raise InputError("give at least one rank of one token, and sequences of at least one token")


def unit_of(
    held: Ints, members: Ints, degree: int, cost: RingCost, passed: float | None = None
) -> Unit:
    """A unit, with the tokens that it passes round where those are not its own."""
    own = held[members].astype(np.float64)
    seconds = float(cost.unit_s(own.sum(), (own**2).sum(), degree, passed))
    return Unit(members=members, degree=degree, seconds=seconds)


def _in_order(held: Ints, room: int) -> list[Ints]:
    """Packs of adjacent sequences, each as full as it gets."""
    packs: list[list[int]] = [[]]
    left = room
    for k, length in enumerate(held.tolist()):
        if length > left:
            packs.append([])
            left = room
        packs[-1].append(k)
        left -= length
    return [np.array(p, dtype=np.int64) for p in packs]


def _scheduled(units: Sequence[Unit], cost: RingCost, num_ranks: int, order: str) -> Schedule:
    """Units to ranks: longest first to the soonest free, or in turn as they come."""
    longest = sorted(range(len(units)), key=lambda j: -units[j].seconds)
    turns = longest if order == BALANCED else range(len(units))
    free, at = np.zeros(num_ranks), 0
    starts = np.zeros(len(units))
    taken: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)] * len(units)
    for j in turns:
        d = units[j].degree
        if order == BALANCED:
            ranks = np.argpartition(free, d - 1)[:d]
        else:
            ranks = (at + np.arange(d)) % num_ranks
            at = (at + d) % num_ranks
        starts[j] = free[ranks].max()
        free[ranks] = starts[j] + units[j].seconds
        taken[j] = np.sort(ranks)
    return Schedule(
        units=tuple(units),
        ranks=tuple(taken),
        starts=starts,
        num_ranks=num_ranks,
        fixed_s=cost.fixed_s,
    )


def predicted_ring_cost(
    cfg: TransformerConfig, *, on: Cluster, host_bytes: float = 0.0
) -> RingCost:
    """Coefficients of a model that every rank holds whole, from the kernels' predictions.

    `host_bytes` of host memory are a rank's to offload to; none where the cluster has no known
    link to its host.
    """
    token_s, square_s = kernel_seconds(cfg, on=on)
    host = on.side_levels[0].bytes_per_s if on.side_levels else 0.0
    kind = next(iter(cfg.kinds))
    kv_elements = cfg.num_layers * kv_elements_per_token(cfg)
    return RingCost(
        square_s=square_s,
        token_s=token_s,
        kv_bytes=float(kv_elements * BF16.bytes_per_element),
        token_bytes=cfg.num_layers * float(layer_bytes(cfg, kind=kind, batch=1, len_seq=1)),
        num_layers=cfg.num_layers,
        node_ranks=on.accelerators_per_node,
        inside_bytes_per_s=on.levels[0].bytes_per_s,
        outside_bytes_per_s=PORT_FRAC * on.levels[-1].bytes_per_s,
        host_bytes_per_s=host or 1.0,
        host_bytes=host_bytes if host and host_bytes else 1.0,
    )


def least_ring(length: float, rank_tokens: float) -> int:
    """The smallest power of two of ranks that hold a sequence.

    >>> least_ring(2**21, 8192)
    256
    """
    return int(2 ** max(math.ceil(math.log2(length / rank_tokens)), 0))
