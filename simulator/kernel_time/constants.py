"""What a kernel model is calibrated by: named constants with a meaning, a unit and bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIT: Final = "fit"
DEVICE_ONLY: Final[tuple[str, ...]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One constant of a kernel model.

    `start` is the nominal value, used uncalibrated and as the centre of the fit's prior, which is
    log-normal with a standard deviation of `spread`; the fit stays within `low` and `high`.
    `by` names labels of a run (`kernel`, `dtype`, ...): the constant then has a factor per value of
    these labels beside its base value; a run with a label never seen takes the base. `source`
    says where `start` is from; a constant with `fitted=False` keeps it on every device. One with
    `by_instruction` describes how well kernels drive the matrix units, and a new architecture
    borrows it from those with the same kind of matrix instruction where there are any. One with
    `lent` takes the mean of all devices whose rows told it where the donor's own rows did not: it
    belongs to a way of running that only some of them were timed in (a plain send). `unlearned` is
    what stands for one that no row of the donors could tell (a profiler's wait: none).
    """

    name: str
    meaning: str
    unit: str
    start: float
    low: float
    high: float
    spread: float = 1.0
    by: tuple[str, ...] = DEVICE_ONLY
    source: str = FIT
    fitted: bool = True
    by_instruction: bool = False
    lent: bool = False
    unlearned: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.start <= self.high:
            raise ValueError(f"{self.name}: start {self.start} outside [{self.low}, {self.high}]")
