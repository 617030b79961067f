"""Random training steps that fit their cluster, for properties of the step and of its timeline."""

from __future__ import annotations

import random

from hwmodels import catalog
from hwmodels.step_factors import shipped_factors
from simulator.stack import STACKS, OnDevice, factors_of
from workloads.models.config import load_hf_config
from workloads.models.transformer import TrainStep, train_step
from workloads.plan import Plan

CONFIGS = [load_hf_config(f"examples/{name}.json") for name in ("llama3-8b", "gpt3-175b", "gpt2")]
CLUSTERS = [catalog.cluster(name, nodes=16) for name in ("hgx-h100", "dgx-a100-80gb")]


def random_case(rng: random.Random) -> tuple[TrainStep, Plan, OnDevice, int] | None:
    cfg, which = rng.choice(CONFIGS), rng.randrange(len(CLUSTERS))
    tp, pp, dp = rng.choice([1, 2, 4, 8]), rng.choice([1, 1, 2, 4, 8]), rng.choice([1, 2, 8, 16])
    v, mb = rng.choice([1, 1, 2, 4]) if pp > 1 else 1, rng.choice([1, 2, 4])
    num_micro = pp * rng.choice([1, 2, 4, 8])
    if cfg.num_layers % (pp * v) or tp * pp * dp > 128 or cfg.attention.num_heads % tp:
        return None
    plan = Plan(
        dp=dp, tp=tp, pp=pp, micro_batch=mb, interleave=v, recompute=rng.choice([0, 1, 2]),
        zero_stage=rng.choice([0, 1, 2, 3] if pp == 1 else [0, 1]),
    )  # fmt: skip
    framework, shipped = STACKS[rng.choice(list(STACKS))], shipped_factors()
    assert shipped is not None
    factors = factors_of(framework, CLUSTERS[which].device, shipped.values)
    step = train_step(cfg, len_seq=rng.choice([1024, 2048, 8192]), global_batch=dp * mb * num_micro)
    return step, plan, OnDevice(stack=framework, factors=factors), which


def random_cases(seed: int, count: int) -> list[tuple[TrainStep, Plan, OnDevice, int]]:
    """So many of them: the step, its plan, the framework, and which cluster."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        case = random_case(rng)
        if case is not None:
            found.append(case)
    return found
