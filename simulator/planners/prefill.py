"""Prompts read in passes of so many: padded, ordered by length, or packed, and what each takes.

    padded          passes of `num_prompts` in the order they come, each padded to its longest
    by length       the same after sorting all prompts: neighbours are of about one length
    packed          the passes of `padded`, each with its prompts packed into rows (Prepacking)

Time is that of all passes, memory the largest pass's. A pass whose peak exceeds the device runs on
no device of its kind; what would fit is fewer prompts a pass.

Implemented in: `plan_prefill`, `Way`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hwmodels.device import Device
from hwmodels.errors import InfeasibleError, InputError
from simulator.packed_prefill import BLOCKS, DENSE, Pass, packed, padded
from simulator.planners.prepacking import LIMIT_S, Packing, pack
from simulator.variable_length import Ints
from workloads.models.config import TransformerConfig

PADDED: Final = "padded, as they come"
BY_LENGTH: Final = "padded, ordered by length"
PACKED: Final = "packed, mask as numbers (Prepacking)"
APART: Final = "packed, prompts known to the kernel"
LEAST_S: Final = 0.01
"""Time that proving one pass may take when none is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """All prompts in passes of one kind; `seconds` of all, `peak_bytes` of the largest."""

    name: str
    passes: tuple[Pass, ...]
    seconds: float
    peak_bytes: float

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding included."""
        return sum(one.num_tokens for one in self.passes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """Every way, and the packing of each pass with the numbers of its prompts."""

    ways: tuple[Way, ...]
    packings: tuple[Packing, ...]
    places: tuple[Ints, ...]

    def way(self, name: str) -> Way:
        """The way of that name."""
        return next(way for way in self.ways if way.name == name)

    @property
    def num_rows(self) -> int:
        """Rows of all passes."""
        return sum(one.num_rows for one in self.packings)

    @property
    def lower_rows(self) -> int:
        """No packing of these passes has fewer."""
        return sum(one.lower_rows for one in self.packings)

    @property
    def gap_frac(self) -> float:
        """(rows - bound) / rows."""
        return 1 - self.lower_rows / self.num_rows


def plan_prefill(
    held: Ints,
    config: TransformerConfig,
    on: Device,
    *,
    num_prompts: int,
    room: int | None = None,
    time_limit_s: float = LIMIT_S,
    gap_frac: float = 0.0,
    **how: Any,
) -> PrefillPlan:
    """Passes of `num_prompts` prompts; `room` tokens a row, else each pass's longest prompt."""
    if num_prompts < 1 or not len(held) or held.min() < 1:
        raise InputError("give passes of at least one prompt and prompts of at least one token")
    end = time.perf_counter() + time_limit_s
    places = _parts(np.arange(len(held)), num_prompts)
    packings = []
    for i, place in enumerate(places):
        left_s = max((end - time.perf_counter()) / (len(places) - i), LEAST_S)
        try:
            packings.append(pack(held[place], room, time_limit_s=left_s, gap_frac=gap_frac))
        except InfeasibleError as error:
            longest = int(np.argmax(held))
            raise InfeasibleError(
                f"prompt {longest + 1} of {held[longest]} tokens fits no row of {room}; give rows "
                f"of {held[longest]} tokens or leave their length out"
            ) from error
    ordered = _parts(np.argsort(held, kind="stable"), num_prompts)
    passes = {
        PADDED: [padded(config, held[place], **how) for place in places],
        BY_LENGTH: [padded(config, held[place], **how) for place in ordered],
        PACKED: [packed(config, one, DENSE, **how) for one in packings],
        APART: [packed(config, one, BLOCKS, **how) for one in packings],
    }
    return PrefillPlan(
        ways=tuple(_way(name, found, on) for name, found in passes.items()),
        packings=tuple(packings),
        places=tuple(places),
    )


def _parts(places: Ints, size: int) -> list[Ints]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def _way(name: str, passes: list[Pass], on: Device) -> Way:
    """The same pass is timed once."""
    seconds = dict.fromkeys(passes, 0.0)
    seconds = {one: one.seconds(on) for one in seconds}
    return Way(
        name=name,
        passes=tuple(passes),
        seconds=sum(seconds[one] for one in passes),
        peak_bytes=max(one.memory().total for one in passes),
    )
