"""Storage plans: time to meet the live bytes on layer traces, and the gap left on random ones."""

from __future__ import annotations

import json
import sys

import numpy as np

from benchmarks.cases import ROOT, Case
from simulator.planners.layer_requests import step_requests
from simulator.planners.storage import Tensors, place, place_in_passes
from workloads.models.config import load_hf_config
from workloads.models.transformer import train_step
from workloads.plan import Plan

MODELS = ("gpt2", "llama3-8b", "mixtral-8x7b", "deepseek-v3")
NUM_TENSORS = 400
SECONDS = 3.0


def layer_trace(model: str, num_layers: int) -> tuple[Tensors, tuple[tuple[int, int], ...]]:
    """The requests of a model's layers, forward and backward."""
    step = train_step(load_hf_config(ROOT / f"examples/{model}.json"), len_seq=4096, global_batch=1)
    requests = step_requests(step, plan=Plan(), num_layers=num_layers)
    return Tensors.of(requests.timeline), requests.passes


def largest_trace(model: str) -> tuple[Tensors, tuple[tuple[int, int], ...]]:
    """As many layers as stay within `NUM_TENSORS` tensors."""
    layers = 1
    while len(layer_trace(model, layers + 1)[0]) <= NUM_TENSORS:
        layers += 1
    return layer_trace(model, layers)


def random_tensors(kind: str, seed: int) -> Tensors:
    """`NUM_TENSORS` tensors: lives between two moments or short, sizes of three distributions."""
    rng, num = np.random.default_rng(seed), NUM_TENSORS
    moments = np.sort(rng.integers(0, 2 * num, (num, 2)), axis=1)
    starts, ends = moments[:, 0], moments[:, 1] + 1
    if kind in ("short", "powers"):
        starts = rng.integers(0, 2 * num, num)
        ends = starts + 1 + (rng.geometric(4 / num, num) if kind == "short"
                             else rng.integers(0, num // 2, num))  # fmt: skip
    sizes = {
        "uniform": lambda: rng.integers(1, 1000, num),
        "lognormal": lambda: np.exp(rng.normal(5, 1, num)).astype(np.int64) + 1,
        "short": lambda: np.exp(rng.normal(5, 1.5, num)).astype(np.int64) + 1,
        "powers": lambda: 2 ** rng.integers(0, 10, num),
    }[kind]()
    names = tuple(f"t{i}" for i in range(num))
    return Tensors(names=names, sizes=sizes, starts=starts, ends=ends)


def storage_cases() -> list[Case]:
    """At most 0.1 s for a layer trace of up to 400 tensors."""
    found = []
    for model in MODELS:
        tensors, passes = largest_trace(model)
        found.append(
            Case(
                name=f"storage of {len(tensors)} tensors of {model}, "
                f"{100 * place(tensors).above_live_frac:.2g} % above live",
                run=lambda tensors=tensors: place(tensors),  # type: ignore[misc]
                baseline_name="two levels",
                baseline=lambda t=tensors, p=passes: place_in_passes(t, p),  # type: ignore[misc]
                bar_s=0.1,
            )
        )
    return found


def gaps(num_seeds: int) -> dict[str, list[float]]:
    """Gap left after `SECONDS` on random instances, by kind."""
    kinds = ("uniform", "lognormal", "short", "powers")
    return {
        kind: [
            place(random_tensors(kind, seed), time_limit_s=SECONDS).gap_frac
            for seed in range(num_seeds)
        ]
        for kind in kinds
    }


def main() -> None:
    """Print the gaps of random instances: python -m benchmarks.planners [seeds]."""
    found = gaps(int(sys.argv[1]) if sys.argv[1:] else 10)
    for kind, values in found.items():
        met = sum(value <= 0.005 for value in values)
        print(
            f"{kind}: {met} of {len(values)} within 0.5 %, proven optimal "
            f"{sum(value == 0 for value in values)}, median {100 * np.median(values):.3f} %, "
            f"worst {100 * max(values):.3f} %",
            flush=True,
        )
    if "--json" in sys.argv:
        print(json.dumps({"version": 1, "gaps": found}))


if __name__ == "__main__":
    main()
