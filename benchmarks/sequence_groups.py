"""FlexSP groups: gap and time for micro-batches of 512 long-tailed lengths on 64 accelerators."""

from __future__ import annotations

import json
import sys
import time
from typing import Final

import numpy as np

from benchmarks.cases import ROOT
from hwmodels import catalog
from simulator.planners.sequence_groups import plan_groups
from simulator.variable_length import GroupCost, Ints, lengths, predicted_cost
from workloads.models.config import load_model

NUM_SEQUENCES: Final = 512
NUM_NODES: Final = 8
LIMIT: Final = 2**18
"""Tokens of the longest sequence allowed."""
LEAST_FILL, MOST_FILL = 0.30, 0.95
"""Share of all memory that a micro-batch takes, drawn evenly."""
GAP_FRAC: Final = 0.02


def cost_of() -> GroupCost:
    """Llama-3-8B on eight DGX A100-80GB."""
    system = catalog.cluster("dgx-a100-80gb", NUM_NODES)
    return predicted_cost(load_model(ROOT / "examples/llama3-8b.json"), on=system, len_max=LIMIT)


def micro_batch(seed: int, cost: GroupCost) -> tuple[Ints, float]:
    """Lognormal lengths with the spread of ByteScale's GitHub, scaled to a fill that is drawn."""
    rng = np.random.default_rng(seed)
    fill = float(rng.uniform(LEAST_FILL, MOST_FILL))
    spread = np.exp(lengths("github").sigma * rng.standard_normal(NUM_SEQUENCES))
    low, high = 1e-3, 1e7
    for _ in range(60):
        scale = (low * high) ** 0.5
        total = np.clip(spread * scale, 1, LIMIT).astype(np.int64).sum()
        fits = total < fill * 8 * NUM_NODES * cost.rank_tokens
        low, high = (scale, high) if fits else (low, scale)
    return np.clip(spread * low, 1, LIMIT).astype(np.int64), fill


def main() -> None:
    """Print gaps and times: python -m benchmarks.sequence_groups [seeds] [--json]."""
    cost, rows = cost_of(), []
    for seed in range(int(sys.argv[1]) if sys.argv[1:2] and sys.argv[1].isdigit() else 100):
        held, fill = micro_batch(seed, cost)
        start = time.perf_counter()
        plan = plan_groups(held, cost, 8 * NUM_NODES, gap_frac=GAP_FRAC)
        rows.append((fill, plan.gap_frac, time.perf_counter() - start))
    fills, gaps, seconds = np.array(rows).T
    met = gaps <= GAP_FRAC + 1e-9
    print(
        f"{met.sum()} of {len(rows)} within {GAP_FRAC:.0%} (fill of at most 85 %: "
        f"{met[fills <= 0.85].sum()} of {(fills <= 0.85).sum()}), worst gap {gaps.max():.2%}; "
        f"time: median {np.median(seconds):.3f} s, 95 % {np.quantile(seconds, 0.95):.2f} s, "
        f"worst {seconds.max():.2f} s"
    )
    if "--json" in sys.argv:
        names = ("fill_frac", "gap_frac", "seconds")
        print(json.dumps({"version": 1, "rows": [dict(zip(names, r, strict=True)) for r in rows]}))


if __name__ == "__main__":
    main()
