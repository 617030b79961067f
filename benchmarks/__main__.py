"""Time every case and its baseline in turn; print seconds, ratio and bar.

`--systems` times every modelled attention system over a million shapes; `--json` is for programs.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks.cases import Case, cases, system_cases
from benchmarks.planners import storage_cases


def seconds(call: Callable[[], object], repeat: int) -> float:
    """Median wall time of a call after one warm-up."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measured(case: Case) -> dict[str, object]:
    """One row of the report."""
    own, base = seconds(case.run, case.repeat), seconds(case.baseline, case.repeat)
    return {
        "case": case.name,
        "seconds": own,
        "per_second": case.units / own,
        "baseline": case.baseline_name,
        "baseline_seconds": base,
        "ratio": (own / case.units) / (base / case.baseline_units),
        "bar_seconds": case.bar_s,
        "met": own <= case.bar_s,
    }


def main() -> None:
    """Run all cases."""
    rows = []
    for case in system_cases() if "--systems" in sys.argv else [*cases(), *storage_cases()]:
        row = measured(case)
        rows.append(row)
        if "--json" not in sys.argv:
            print(
                f"{row['case']}: {row['seconds']:.4f} s ({row['per_second']:,.0f}/s), "
                f"{row['ratio']:.3g}x {row['baseline']}, bar {row['bar_seconds']:.3g} s: "
                f"{'met' if row['met'] else 'MISSED'}",
                flush=True,
            )
    if "--json" in sys.argv:
        print(json.dumps({"version": 1, "cases": rows}, indent=1))


if __name__ == "__main__":
    main()
