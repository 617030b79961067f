"""What may happen to a layer's activations between its forward and its backward pass, and its cost.

    none            all stay on the device
    selective       scores of unfused attention (or what the framework's policy names) run again
    full            only the layer's input stays, the forward pass runs again
    offload         nothing stays: a copy to the host under the forward pass, back under the
                    backward pass
    offload+full    the layer's input goes to the host, the forward pass runs again

A stage of layers in modes j, n_j of each, works for sum_j n_j t_j on a micro-batch and holds

    states + in_flight sum_j n_j kept_j + max_(j used) working_j <= budget             device memory
    in_flight sum_j n_j host_j <= host memory of a rank                                host memory
    sum_j n_j host_j <= host bandwidth * forward seconds of the stage                  host link

so that copies hide under kernels; a copied byte is read or written on the device as well, which
slows kernels by its share of the memory bandwidth: 2 host_j / bandwidth are part of t_j. `working`
is what one layer needs at once beyond what is kept: the layer that is being redone, or the buffers
of the layer on its way out and of the one coming back.

With many layers of several kinds the ways to give them modes multiply. Then the ways of all kinds
but one are met with those of the last one by one, both in the order of time: of each the first that
fits beside it is the best, and no later one is looked at once its time alone is too long.

    Implemented in: `best_modes` (the three rows, exact by enumeration in the order of time),
    `_met` (the same, kinds met in pairs), `undominated` (modes that can never be of use).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from hwmodels.errors import UnsupportedError
from workloads.numeric import Array

MOST_COMPOSITIONS: Final = 2**21
"""Ways to give layers their modes that are held at once."""
MOST_TOGETHER: Final = 2**12
"""Ways to give a stage's layers their modes that are put in one order; more are met in pairs."""
BUDGET_SLACK: Final = 1e-12
"""Relative rounding that a full memory may exceed its budget by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One layer in one mode, for one micro-batch: see the module's equations.

    `backward_s` is the part of `seconds` under which gradients can be exchanged.
    """

    name: str
    seconds: float
    backward_s: float
    kept_bytes: float
    host_bytes: float = 0.0
    working_bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Layers that are alike: their modes, their parameters on one rank, and their forward pass.

    `forward_s` hides copies and gathered weights; `dense` parameters are replicated over data
    and context ranks, `experts` over fewer.
    """

    name: str
    modes: tuple[Mode, ...]
    forward_s: float
    dense: float = 0.0
    experts: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one rank may hold and copy; no host where its figures are zero."""

    budget_bytes: float
    host_bytes: float = 0.0
    host_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The fastest modes of stages that hold the same layers: arrays over these stages.

    `counts[k][j]`: layers of kind k in mode j. `seconds` is infinite where nothing fits.
    """

    seconds: Array
    backward_s: Array
    counts: tuple[Array, ...]


def undominated(modes: Sequence[Mode]) -> tuple[Mode, ...]:
    """Modes that no other beats in time, kept, host and working bytes at once; fastest first."""

    def figures(mode: Mode) -> tuple[float, ...]:
        return mode.seconds, mode.kept_bytes, mode.host_bytes, mode.working_bytes

    kept: list[Mode] = []
    for mode in sorted(modes, key=figures):
        own = figures(mode)
        if not any(all(a <= b for a, b in zip(figures(k), own, strict=True)) for k in kept):
            kept.append(mode)
    return tuple(kept)


@lru_cache(maxsize=512)
def compositions(total: int, parts: int) -> Array:
    """Every way to write `total` as an ordered sum of `parts` counts, one a row.

    >>> compositions(2, 2).tolist()
    [[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]]
    """
    if parts == 1:
        return np.array([[float(total)]])
    blocks = []
    for first in range(total + 1):
        rest = compositions(total - first, parts - 1)
        blocks.append(np.hstack([np.full((len(rest), 1), float(first)), rest]))
    return np.vstack(blocks)


def best_modes(
    kinds: Sequence[LayerKind],
    layers: Sequence[int],
    *,
    in_flight: Array,
    free_bytes: Array,
    limits: Limits,
) -> Chosen:
    """The fastest modes for `layers[k]` layers of each kind, for stages that differ in the rest.

    `free_bytes` is the budget less states and ends. Enumerated in the order of time: the first
    that fits is the best.
    """
    fastest = _all_in(kinds, layers, 0)
    fits = in_flight * fastest.kept[0] + fastest.working[0] <= _room(free_bytes, limits)
    fits &= fastest.host[0] == 0
    if fits.all():
        return _picked(fastest, np.zeros(len(in_flight), dtype=np.int64), fits)
    if len(kinds) > 1 and _num_ways(kinds, layers) > MOST_TOGETHER:
        return _met(kinds, layers, in_flight, _room(free_bytes, limits), limits)
    ways = _ways(kinds, layers)
    picks, found = np.zeros(len(in_flight), dtype=np.int64), np.zeros(len(in_flight), dtype=bool)
    forward_s = sum(k.forward_s * n for k, n in zip(kinds, layers, strict=True))
    copied = ways.host <= limits.host_bytes_per_s * forward_s * (1 + BUDGET_SLACK)
    for i, (f, room) in enumerate(zip(in_flight, _room(free_bytes, limits), strict=True)):
        good = copied & (f * ways.kept + ways.working <= room)
        good &= f * ways.host <= limits.host_bytes * (1 + BUDGET_SLACK)
        picks[i] = int(good.argmax())
        found[i] = bool(good[picks[i]])
    return _picked(ways, picks, found)


def _room(free_bytes: Array, limits: Limits) -> Array:
    return free_bytes + BUDGET_SLACK * limits.budget_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ways:
    """Compositions of modes, fastest first; `counts[k]` has a row for each."""

    counts: tuple[Array, ...]
    seconds: Array
    backward_s: Array
    kept: Array
    host: Array
    working: Array


def _all_in(kinds: Sequence[LayerKind], layers: Sequence[int], mode: int) -> _Ways:
    """The one composition in which every layer has the same mode."""
    counts = []
    for kind, number in zip(kinds, layers, strict=True):
        row = np.zeros((1, len(kind.modes)))
        row[0, mode] = number
        counts.append(row)
    return _weighed(kinds, counts)


def _num_ways(kinds: Sequence[LayerKind], layers: Sequence[int]) -> int:
    """How many compositions there are."""
    return math.prod(
        math.comb(number + len(kind.modes) - 1, len(kind.modes) - 1)
        for kind, number in zip(kinds, layers, strict=True)
    )


def _met(
    kinds: Sequence[LayerKind],
    layers: Sequence[int],
    in_flight: Array,
    rooms: Array,
    limits: Limits,
) -> Chosen:
    """The fastest of all kinds' compositions without a list of them; see the module's text."""
    first, last = _ways(kinds[:-1], layers[:-1]), _ways(kinds[-1:], layers[-1:])
    forward_s = sum(k.forward_s * n for k, n in zip(kinds, layers, strict=True))
    link = limits.host_bytes_per_s * forward_s * (1 + BUDGET_SLACK)
    pairs = [
        _first_pair(first, last, float(f), float(room), link, limits)
        for f, room in zip(in_flight, rooms, strict=True)
    ]
    rows = [0 if p is None else p[0] for p in pairs], [0 if p is None else p[1] for p in pairs]
    both = _weighed(kinds, [*(c[rows[0]] for c in first.counts), last.counts[0][rows[1]]])
    return _picked(both, np.arange(len(pairs)), np.array([p is not None for p in pairs]))


def _first_pair(
    first: _Ways, last: _Ways, in_flight: float, room: float, link: float, limits: Limits
) -> tuple[int, int] | None:
    """Rows of both lists that fit together in the least time; of equal ones, that keep least."""
    swapped = len(first.seconds) > len(last.seconds)
    outer, inner = (last, first) if swapped else (first, last)
    host_most = limits.host_bytes * (1 + BUDGET_SLACK)
    best: tuple[float, float] = (math.inf, math.inf)
    found: tuple[int, int] | None = None
    for i, own_s in enumerate(outer.seconds.tolist()):
        end = int(np.searchsorted(inner.seconds, best[0] - own_s + BUDGET_SLACK * own_s, "right"))
        if not end:
            break
        kept, host = outer.kept[i] + inner.kept[:end], outer.host[i] + inner.host[:end]
        good = in_flight * kept + np.maximum(outer.working[i], inner.working[:end]) <= room
        good &= (host <= link) & (in_flight * host <= host_most)
        at = int(good.argmax())
        if good[at]:
            told = float(own_s + inner.seconds[at]), float(kept[at])
            if told < best:
                best, found = told, (at, i) if swapped else (i, at)
    return found


def _ways(kinds: Sequence[LayerKind], layers: Sequence[int]) -> _Ways:
    """All compositions in the order of their time, then of what they keep."""
    total = _num_ways(kinds, layers)
    if total > MOST_COMPOSITIONS:
        raise UnsupportedError(
            f"{total:,} ways to give {sum(layers)} layers of a stage their modes; allow fewer "
            "modes, or more stages"
        )
    lists = [
        compositions(number, len(kind.modes)) for kind, number in zip(kinds, layers, strict=True)
    ]
    index = np.indices([len(rows) for rows in lists]).reshape(len(lists), -1)
    ways = _weighed(kinds, [rows[i] for rows, i in zip(lists, index, strict=True)])
    order = np.lexsort((ways.kept, ways.seconds))
    return _Ways(
        counts=tuple(c[order] for c in ways.counts),
        seconds=ways.seconds[order],
        backward_s=ways.backward_s[order],
        kept=ways.kept[order],
        host=ways.host[order],
        working=ways.working[order],
    )


def _weighed(kinds: Sequence[LayerKind], counts: Sequence[Array]) -> _Ways:
    size = len(counts[0])
    sums = {name: np.zeros(size) for name in ("seconds", "backward_s", "kept_bytes", "host_bytes")}
    working = np.zeros(size)
    for kind, rows in zip(kinds, counts, strict=True):
        for name, total in sums.items():
            total += rows @ np.array([getattr(mode, name) for mode in kind.modes])
        needs = np.array([mode.working_bytes for mode in kind.modes])
        working = np.maximum(working, np.where(rows > 0, needs, 0.0).max(axis=1))
    return _Ways(
        counts=tuple(counts),
        seconds=sums["seconds"],
        backward_s=sums["backward_s"],
        kept=sums["kept_bytes"],
        host=sums["host_bytes"],
        working=working,
    )


def _picked(ways: _Ways, picks: np.ndarray, found: np.ndarray) -> Chosen:
    return Chosen(
        seconds=np.where(found, ways.seconds[picks], math.inf),
        backward_s=np.where(found, ways.backward_s[picks], 0.0),
        counts=tuple(rows[picks] for rows in ways.counts),
    )
