"""Layers of each pipeline stage as the command line tells them: '30,33,33,30'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cli.quantity import shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from simulator.staged import StageLayers
    from workloads.models.transformer import TrainStep
    from workloads.plan import Plan


def stages_given(text: str | None) -> tuple[int, ...]:
    """The numbers; none where nothing is given.

    >>> stages_given("30, 33,33,30")
    (30, 33, 33, 30)
    """
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    # A layer count of more digits than this is no model's, and int() of thousands is slow.
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise InputError(
            f"--stages = '{shown(text)}' is not a list of whole numbers; give the layers of every "
            "stage, like --stages 30,33,33,30"
        )
    return tuple(map(int, words))


def pinned_stages(pins: Mapping[str, int], counts: Sequence[int], layers: int) -> dict[str, int]:
    """Pins with what stages of those layers imply: as many stages, one chunk each if unpinned."""
    from simulator.staged import check_counts

    if not counts:
        return dict(pins)
    found = {"pp": len(counts), "interleave": 1} | dict(pins)
    check_counts(counts, layers, found["pp"], found["interleave"])
    return found


def stages_of(question: TrainStep, plan: Plan, counts: Sequence[int]) -> tuple[StageLayers, ...]:
    """Those stages, every layer in the mode that the plan recomputes in."""
    from simulator.layer_modes import FULL, NONE, SELECTIVE
    from simulator.staged import counted_stages

    return counted_stages(question, plan, counts, (NONE, SELECTIVE, FULL)[int(plan.recompute)])


def counts_text(counts: Sequence[float]) -> str:
    """Runs of equal stages as one.

    >>> counts_text((7, 8, 8, 8, 7))
    '7, 3 x 8, 7'
    """
    from itertools import groupby

    runs = [(f"{size:g}", len(list(own))) for size, own in groupby(counts)]
    return ", ".join(f"{times} x {size}" if times > 1 else size for size, times in runs)
