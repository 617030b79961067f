"""Peak memory of training steps: published measurements against the replay of the trainer.

A row counts where its publisher's trainer is one that `simulator.fsdp_memory` replays (torchtitan)
and where it states model, parallel degrees, micro-batch and recompute. The measured figure is what
PyTorch had reserved; the predicted one is the peak of the replayed allocator. Nothing is fitted, so
every row is evidence. Rows that give no run are counted by reason. `python -m validate.peak_memory
DIR` prints the comparison of a folder's steps_training.csv.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from hwmodels import catalog
from hwmodels.errors import InfeasibleError, InputError
from simulator.fsdp_memory import FsdpTrainer, fsdp_timeline
from simulator.memory_timeline import Alive, Timeline
from validate.adapters import TRAINING_FAMILY, Uncounted, is_training_step
from validate.measurement import Measurement, csv_files, read
from validate.runs import plan_of, transformer_of
from workloads.models.architecture import TransformerConfig
from workloads.plan import Plan

METRIC: Final = "peak_mem_gib"
GIB: Final = 2**30
COMPILES_LOSS_FROM: Final = (2025, 3)
"""Month from which torchtitan compiles the loss with the model (its pull requests 996 and 1033)."""
TOLERANCE_FRAC: Final = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakRun:
    """A published run with its measured peak."""

    row: Measurement
    config: TransformerConfig
    len_seq: int
    plan: Plan
    trainer: FsdpTrainer
    measured_bytes: float

    def timeline(self) -> Timeline:
        """The tensors of the step."""
        return fsdp_timeline(
            self.config, len_seq=self.len_seq, plan=self.plan, trainer=self.trainer
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakPrediction:
    """A run beside its predicted peak; `alive` explains the live part of it."""

    run: PeakRun
    predicted_bytes: float
    live_bytes: float
    alive: tuple[Alive, ...]

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_bytes / self.run.measured_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakComparison:
    """Every run predicted, and the other rows of the metric by reason, commonest first."""

    predictions: tuple[PeakPrediction, ...] = ()
    reasons: tuple[tuple[str, int], ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the metric that were looked at."""
        return len(self.predictions) + sum(n for _, n in self.reasons)

    def summary(self) -> Mapping[str, Any]:
        """n, mean and largest error, bias, and the share within `TOLERANCE_FRAC`."""
        if not self.predictions:
            return {"n": 0, "mape": None, "max": None, "bias": None, "within_frac": None}
        errors = np.array([p.ratio - 1 for p in self.predictions])
        return {
            "n": len(errors),
            "mape": float(np.abs(errors).mean()),
            "max": float(np.abs(errors).max()),
            "bias": float(errors.mean()),
            "within_frac": float((np.abs(errors) <= TOLERANCE_FRAC).mean()),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and None."""
        rows = [
            {
                "source": p.run.row.source,
                "gpu": p.run.row.gpu,
                "model": p.run.config.name,
                "plan": str(p.run.plan),
                "measured_bytes": p.run.measured_bytes,
                "predicted_bytes": p.predicted_bytes,
                "live_bytes": p.live_bytes,
                "alive": [dict(a._asdict()) for a in p.alive],
            }
            for p in self.predictions
        ]
        return {
            **self.summary(),
            "rows": rows,
            "unsupported": [{"reason": reason, "n": n} for reason, n in self.reasons],
        }


def compare_peaks(rows: Iterable[Measurement]) -> PeakComparison:
    """Hold every row of a measured peak against the replay."""
    reasons: Counter[str] = Counter()
    found: list[PeakPrediction] = []
    for row in rows:
        if not is_training_step(row) or row.op != METRIC:
            continue
        try:
            found.append(predicted(peak_run(row)))
        except (Uncounted, InputError, InfeasibleError) as why:
            reasons[str(why)] += 1
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return PeakComparison(predictions=tuple(found), reasons=tuple(ordered))


def predicted(run: PeakRun) -> PeakPrediction:
    """The peak that the allocator reserves; out of memory raises `InfeasibleError`."""
    timeline = run.timeline()
    capacity = catalog.device(run.row.device_id).hbm.capacity_bytes
    cache = timeline.replayed(capacity_bytes=float(capacity))
    return PeakPrediction(
        run=run,
        predicted_bytes=float(cache.peak_reserved_bytes),
        live_bytes=timeline.peak_bytes,
        alive=timeline.alive_at_peak(),
    )


def peak_run(row: Measurement) -> PeakRun:
    """The run that a row states; raises `Uncounted` with what is missing."""
    model, layout = row.params["model"], row.params["parallelism"]
    return PeakRun(
        row=row,
        config=transformer_of(model),
        len_seq=int(model["seq"]),
        plan=plan_of(layout, row.params["num_gpus"]),
        trainer=_trainer(row, layout),
        measured_bytes=float(row.params["value"]) * GIB,
    )


def _trainer(row: Measurement, layout: Mapping[str, Any]) -> FsdpTrainer:
    found = re.match(r"torchtitan/(\d{4})-(\d{2})", row.source)
    if found is None:
        raise Uncounted("no replay of this publisher's trainer is known")
    if "compile" not in layout:
        raise Uncounted("the row does not say whether the model was compiled")
    is_compiled = bool(layout["compile"])
    return FsdpTrainer(
        compiled=is_compiled,
        compiled_loss=is_compiled and (int(found[1]), int(found[2])) >= COMPILES_LOSS_FROM,
        fp8=row.dtype.startswith("fp8"),
        async_tp=bool(layout.get("async_tp", 0)),
    )


# ---- the command ---------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m validate.peak_memory DIR`: hold a folder's measured peaks against the replay."""
    parser = argparse.ArgumentParser(prog="python -m validate.peak_memory", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder of published rows")
    given = parser.parse_args(arguments)
    try:
        files = csv_files(given.folder, TRAINING_FAMILY)
        found = compare_peaks(row for file in files for row in read(file).rows)
    except (InputError, OSError) as error:
        print(f"validate.peak_memory: error: {error}", file=sys.stderr)
        return 2
    for p in found.predictions:
        sizes = f"{p.predicted_bytes / GIB:6.1f} GiB predicted, x {p.ratio:.3f} of measured"
        shares = ", ".join(f"{a.kind} {a.num_bytes / GIB:.1f}" for a in p.alive[:5])
        print(f"{p.run.config.name} {p.run.row.dtype} {p.run.plan}: {sizes}; live: {shares}")
    summary = found.summary()
    if found.predictions:
        figures = f"MAPE {summary['mape']:.1%}, largest {summary['max']:.1%}"
        print(f"{summary['n']} runs: {figures}, within 10 %: {summary['within_frac']:.0%}")
    for reason, number in found.reasons:
        print(f"{number}  {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
