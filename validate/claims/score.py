"""How well the model does on claims: shares and errors by system, over rows and over systems.

Claims of low confidence are listed and never scored, nor are those whose setting does not fix the
device and the shape. `exact` claims follow from shapes (memory, complexity, ratio: within 2 %),
`timed` ones are times, speedups, throughputs and utilisations (15 %; a factor 1.5 at the worst).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Final

from validate.claims.claim import EXACT_KINDS
from validate.claims.evaluate import NOT_MODELLED, OFF, REPRODUCED, Verdict

INCOMPLETE: Final = "setting incomplete"
"""Start of the reason of a claim whose setting does not fix the device and the shape."""
FACTOR: Final = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Counts of one system's claims (or of several systems'), and errors of the evaluated ones.

    `num_complete` leaves out claims of low confidence and incomplete setting; the errors are of
    what is left: shares in [0, 1], None where nothing was evaluated.
    """

    id: str
    family: str
    num_claims: int
    reproduced: int
    off: int
    not_modelled: int
    num_complete: int
    num_evaluated: int
    exact_within_frac: float | None
    timed_median_error: float | None
    timed_within_factor_frac: float | None


def is_scored(verdict: Verdict) -> bool:
    """Does the claim count for a bar: sure enough, and its setting complete?"""
    return verdict.claim.confidence != "low" and not verdict.reason.startswith(INCOMPLETE)


def score(name: str, family: str, verdicts: Sequence[Verdict]) -> Score:
    """The score of these verdicts together, every row weighing the same."""
    counts = {s: sum(v.status == s for v in verdicts) for s in (REPRODUCED, OFF, NOT_MODELLED)}
    complete = [v for v in verdicts if is_scored(v)]
    evaluated = [v for v in complete if v.status != NOT_MODELLED]
    exact = [v for v in evaluated if v.claim.kind in EXACT_KINDS]
    errors = [abs(v.ratio - 1) for v in _timed(evaluated) if v.ratio is not None]
    return Score(
        id=name,
        family=family,
        num_claims=len(verdicts),
        reproduced=counts[REPRODUCED],
        off=counts[OFF],
        not_modelled=counts[NOT_MODELLED],
        num_complete=len(complete),
        num_evaluated=len(evaluated),
        exact_within_frac=_share(v.status == REPRODUCED for v in exact),
        timed_median_error=median(errors) if errors else None,
        timed_within_factor_frac=_share(_near(v) for v in _timed(evaluated)),
    )


def scores(verdicts: Iterable[Verdict]) -> list[Score]:
    """A score a system, in the order they come."""
    by_system: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for v in verdicts:
        by_system[v.claim.id, v.claim.family].append(v)
    return [score(name, family, found) for (name, family), found in by_system.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Balanced:
    """The same with every system weighing the same: means over systems (median error: median)."""

    num_systems: int
    evaluated_frac: float | None
    exact_within_frac: float | None
    timed_median_error: float | None
    timed_within_factor_frac: float | None


def balanced(found: Iterable[Score]) -> Balanced:
    """One vote a system."""
    some = [s for s in found if s.num_complete]
    errors = [s.timed_median_error for s in some if s.timed_median_error is not None]
    return Balanced(
        num_systems=len(some),
        evaluated_frac=_mean(s.num_evaluated / s.num_complete for s in some),
        exact_within_frac=_mean(s.exact_within_frac for s in some),
        timed_median_error=median(errors) if errors else None,
        timed_within_factor_frac=_mean(s.timed_within_factor_frac for s in some),
    )


def record(verdicts: Iterable[Verdict]) -> dict[str, dict[str, int]]:
    """Counts by system, as `ridgeplan systems` shows them."""
    return {
        s.id: {
            "claims": s.num_claims,
            "scored": s.num_complete,
            "evaluated": s.num_evaluated,
            "reproduced": s.reproduced,
            "off": s.off,
        }
        for s in scores(verdicts)
    }


@lru_cache(maxsize=1)
def shipped_record() -> Mapping[str, Mapping[str, int]]:
    """The counts of the last evaluation of the published claims; empty without one."""
    if not _RECORD.is_file():
        return {}
    found: Mapping[str, Mapping[str, int]] = json.loads(_RECORD.read_text(encoding="utf-8"))
    return found


_RECORD: Final = Path(__file__).parent.parent / "data" / "claim_scores.json"


def _timed(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return [v for v in verdicts if v.claim.kind not in EXACT_KINDS]


def _near(verdict: Verdict) -> bool:
    """Within a factor of the published figure; a word must be the same word."""
    if verdict.ratio is None or verdict.ratio <= 0:
        return verdict.status == REPRODUCED
    return abs(math.log(verdict.ratio)) <= math.log(FACTOR)


def _share(flags: Iterable[bool]) -> float | None:
    found = list(flags)
    return mean(found) if found else None


def _mean(values: Iterable[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return mean(found) if found else None
