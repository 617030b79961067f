"""What is timed, against what, and the bar each case is held to (reported, never asserted)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwmodels import catalog
from hwmodels.step_factors import shipped_values
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.predict import predict
from simulator.memory import training_memory
from simulator.planners.parallelism import plan_parallelism, plan_space
from simulator.planners.training import plan_training
from simulator.recipe import RECIPES
from simulator.stack import STACKS, OnDevice, factors_of
from simulator.step import step_seconds, training_step
from workloads import registry
from workloads.models.config import load_hf_config
from workloads.models.transformer import train_step
from workloads.op import Op
from workloads.ops.matmul import Matmul
from workloads.plan import Plan

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One timed call, the baseline beside it, and the bar in seconds per call.

    `units` and `baseline_units` are how many answers a call gives: ratios compare single answers.
    """

    name: str
    run: Callable[[], object]
    baseline_name: str
    baseline: Callable[[], object]
    bar_s: float
    units: int = 1
    baseline_units: int = 1
    repeat: int = 5


def command(*arguments: str) -> Callable[[], object]:
    """A whole process, as a user starts it."""
    return lambda: subprocess.run(
        [*arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def ridgeplan(*arguments: str) -> Callable[[], object]:
    """The console script beside this interpreter."""
    return command(str(Path(sys.executable).parent / "ridgeplan"), *arguments)


def plain_roofline(m: object, n: object, k: object) -> object:
    """The textbook roofline of a bf16 product on an H100: two divisions and a maximum."""
    flops, moved = 2 * m * n * k, 2 * (m * k + k * n + m * n)  # type: ignore[operator]
    return np.maximum(flops / 989.4e12, moved / 3.352e12)


def cases() -> list[Case]:
    """All cases, in the order they are reported."""
    h100 = catalog.device("h100-sxm")
    one = Matmul(m=4096, n=4096, k=4096)
    rng = np.random.default_rng(0)
    m, n, k = (rng.integers(1, 32768, 1_000_000).astype(np.float64) for _ in range(3))
    python = command(sys.executable, "-c", "pass")
    return [
        Case(
            name="ridgeplan --help",
            run=ridgeplan("--help"),
            baseline_name="python -c pass",
            baseline=python,
            bar_s=0.3,
        ),
        Case(
            name="ridgeplan estimate (one op)",
            run=ridgeplan(
                "estimate", "matmul", "--device", "h100-sxm", "-p", "m=4k", "-p", "n=4k",
                "-p", "k=4k",
            ),
            baseline_name="python -c pass",
            baseline=python,
            bar_s=0.8,
        ),
        Case(
            name="bound, one shape",
            run=lambda: [estimate(one, on=h100, rung=BOUND).lower_s for _ in range(1000)],
            baseline_name="plain roofline, one shape",
            baseline=lambda: [plain_roofline(4096, 4096, 4096) for _ in range(1000)],
            bar_s=1000 * 100e-6,
            units=1000,
            baseline_units=1000,
        ),
        Case(
            name="predict, one shape",
            run=lambda: [predict(one, on=h100).seconds for _ in range(1000)],
            baseline_name="plain roofline, one shape",
            baseline=lambda: [plain_roofline(4096, 4096, 4096) for _ in range(1000)],
            bar_s=1000 * 100e-6,
            units=1000,
            baseline_units=1000,
        ),
        Case(
            name="predict, 1,000,000 shapes in one call",
            run=lambda: predict(Matmul(m=m, n=n, k=k), on=h100).seconds,
            baseline_name="plain roofline, same shapes",
            baseline=lambda: plain_roofline(m, n, k),
            bar_s=1.0,
            units=1_000_000,
            baseline_units=1_000_000,
            repeat=3,
        ),
        Case(
            name="bound, 1,000,000 shapes in one call",
            run=lambda: estimate(Matmul(m=m, n=n, k=k), on=h100, rung=BOUND).lower_s,
            baseline_name="plain roofline, same shapes",
            baseline=lambda: plain_roofline(m, n, k),
            bar_s=2.0,
            units=1_000_000,
            baseline_units=1_000_000,
            repeat=3,
        ),
        step_case(),
        proof_case(),
        plan_case(),
    ]  # fmt: skip


FAMILIES = (
    "attention", "sparse_attention", "kv_compression", "linear_attention", "scan_ssm", "rnn",
    "convolution",
)  # fmt: skip
MILLION = 1_000_000
SIZES = {"length": 4096, "size": 16, "fraction": 0.5}
FIELDS = {"head_dim": 128, "num_heads": 32, "num_kv_heads": 8, "len_q": 1024}


def system_cases() -> list[Case]:
    """Every modelled system over a million batch sizes in one call: at most five seconds."""
    batch = np.random.default_rng(0).integers(1, 64, MILLION).astype(np.float64)
    names = [s.id for s in registry.systems() if s.op and s.family in FAMILIES]
    return [system_case(registry.resolve(name), batch) for name in names]


def system_case(name: str, batch: NDArray[np.float64]) -> Case:
    """One system over those batches."""
    h100 = catalog.device("h100-sxm")
    return Case(
        name=f"{name}, {MILLION:,} shapes in one call",
        run=lambda: estimate(asked(name, batch), on=h100).seconds,
        baseline_name="plain roofline, same shapes",
        baseline=lambda: plain_roofline(batch, 4096, 4096),
        bar_s=5.0,
        units=MILLION,
        baseline_units=MILLION,
        repeat=1,
    )


def asked(name: str, batch: object) -> Op:
    """The op of that name with usual sizes and those batches; without any, as many more voxels."""
    values: dict[str, object] = {
        p.name: FIELDS.get(p.name, SIZES[p.kind])
        for p in registry.params(name).values()
        if p.required and p.kind in SIZES
    }
    known = registry.params(name)
    varied = {"batch": batch} if "batch" in known else {"num_voxels": batch * SIZES["length"]}  # type: ignore[operator]
    return registry.build(name, values | varied)


def step_case() -> Case:
    """A million plans of a dense model as a framework trains it: seconds alone."""
    model = load_hf_config(ROOT / "examples/llama3-405b.json")
    step = train_step(model, len_seq=8192, global_batch=61_440)
    cluster, recipe = catalog.cluster("dgx-h100", nodes=512), RECIPES["bf16"]
    framework = STACKS["megatron"]
    stack = OnDevice(
        stack=framework, factors=factors_of(framework, cluster.device, shipped_values())
    )
    space = plan_space(step, on=cluster)
    times = -(-1_000_000 // np.size(space.dp))
    many = Plan(
        **{
            f.name: np.tile(np.broadcast_to(getattr(space, f.name), np.shape(space.dp)), times)
            for f in fields(Plan)
        }
    )
    single = space.at(0)
    return Case(
        name=f"step_seconds, {np.size(many.dp):,} plans in one call",
        run=lambda: step_seconds(step, plan=many, on=cluster, recipe=recipe, stack=stack),
        baseline_name="a plan at a time",
        baseline=lambda: [
            step_seconds(step, plan=single, on=cluster, recipe=recipe, stack=stack)
            for _ in range(20)
        ],
        bar_s=np.size(many.dp) / 2_000_000,
        units=np.size(many.dp),
        baseline_units=20,
        repeat=3,
    )


def proof_case() -> Case:
    """GPT-1T on 3,072 A100: the proven best plan, as `plan` answers it."""
    step = train_step(
        load_hf_config(ROOT / "examples/megatron-1t.json"), len_seq=2048, global_batch=3072
    )
    cluster = catalog.cluster("dgx-a100-80gb", nodes=384)
    feasible = plan_parallelism(step, on=cluster).num_feasible
    return Case(
        name="plan proven for GPT-1T on 3,072 A100",
        run=lambda: plan_training(step, on=cluster),
        baseline_name=f"enumeration of {feasible:,} even plans that fit, ranked",
        baseline=lambda: plan_parallelism(step, on=cluster),
        bar_s=2.0,
        baseline_units=1,
        repeat=3,
    )


def plan_case() -> Case:
    """At least 100,000 feasible plans: their memory and their step, in one call."""
    model = load_hf_config(ROOT / "examples/qwen3-30b-a3b.json")
    step = train_step(model, len_seq=4096, global_batch=61_440)
    cluster, recipe = catalog.cluster("hgx-h200", nodes=512), RECIPES["bf16"]
    space = plan_space(step, on=cluster)
    memory = training_memory(step, plan=space, recipe=recipe)
    feasible = int(np.sum(np.asarray(memory.total) <= 0.92 * cluster.device.hbm.capacity_bytes))
    single = plan_parallelism(step, on=cluster).plan
    return Case(
        name=f"plan search, {feasible:,} feasible plans of {np.size(memory.total):,}",
        run=lambda: plan_parallelism(step, on=cluster, recipe=recipe),
        baseline_name="a plan at a time",
        baseline=lambda: [
            (
                training_memory(step, plan=single, recipe=recipe),
                training_step(step, plan=single, on=cluster, recipe=recipe).seconds,
            )
            for _ in range(20)
        ],
        bar_s=10.0 * feasible / 100_000,
        units=feasible,
        baseline_units=20,
        repeat=3,
    )
