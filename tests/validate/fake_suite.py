"""A suite without torch: kernels whose times a model makes up, and a GPU that is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hwmodels import catalog
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.rates import rates_of
from simulator.kernel_time.registry import model_of
from validate.kernels.spec import Implementation, Inputs, KernelSpec, Launch
from validate.record import Case, Environment, Record, Trial
from workloads.op import Op
from workloads.ops.elementwise import Elementwise
from workloads.ops.matmul import Matmul

GPU = "H100-SXM-80GB"
LAUNCHES = (Launch(meta={"BLOCK": 64}), Launch(meta={"BLOCK": 128}), Launch(meta={"BLOCK": 256}))


def product(m: int, n: int, k: int, dtype: str = "bf16") -> Case:
    return Case(op="gemm", dtype=dtype, params={"m": m, "n": n, "k": k})


def mapped(elements: int, dtype: str = "bf16") -> Case:
    return Case(op="relu", dtype=dtype, params={"elements": elements, "inputs": 1})


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Callable[[], Any]:
    return lambda: (case, inputs, launch)


def spec(
    name: str,
    op: Callable[[Case], Op],
    grid: tuple[Case, ...],
    family: str,
    implementations: tuple[Implementation, ...] | None = None,
) -> KernelSpec:
    ours = Implementation(name="triton", prepare=_prepare, launches=lambda case, arch: LAUNCHES)
    vendor = Implementation(name="torch", prepare=_prepare, vendor="cublas")
    return KernelSpec(
        name=name,
        op=op,
        inputs=lambda case, generator, device: {"case": case},
        reference=lambda case, inputs: (case, inputs, "truth"),
        implementations=implementations or (ours, vendor),
        checks=(product(3, 5, 7, "fp32"), product(4, 4, 4, "fp32")),
        grid=grid,
        compilations=lambda: (),
        tolerances={"fp32": 1e-4, "bf16": 1e-2},
        source="made up",
        row=lambda case: (family, case.op, dict(case.params)),
    )


def gemm_op(case: Case) -> Matmul:
    return Matmul(**case.params)


def map_op(case: Case) -> Elementwise:
    return Elementwise(num_elements=case.params["elements"])


def grid(count: int = 40) -> tuple[Case, ...]:
    rng = np.random.default_rng(5)
    sizes = np.round(2 ** rng.uniform(5, 13, (count, 3)))
    return tuple(product(int(m), int(n), int(k)) for m, n, k in sizes)


def suite(count: int = 40) -> tuple[KernelSpec, ...]:
    maps = tuple(mapped(2**p) for p in range(10, 30))
    return (spec("gemm", gemm_op, grid(count), "gemm"), spec("map", map_op, maps, "elementwise"))


ENVIRONMENT = Environment(
    gpu=GPU,
    sm_clock_hz=1.98e9,
    memory_clock_hz=2.6e9,
    driver="580.1",
    versions={"torch": "2.11"},
    l2_state="rotated",
)


def seconds_of(trial: Trial, scale: float = 1.0) -> float:
    """What the kernel model says with its nominal constants, times a fifth less for the vendor."""
    op = {"gemm": gemm_op, "map": map_op}[trial.kernel](trial.case)
    model, on = model_of(type(op)), rates_of(catalog.device(GPU))
    found = model.time(op, on, model.nominal(), Conditions()).seconds
    noise = 1 + 0.01 * math.sin(sum(ord(c) for c in trial.key))
    return float(found) * scale * noise * (0.8 if trial.implementation == "torch" else 1.0)


def record_of(trial: Trial, seconds: float | None = None, **more: Any) -> Record:
    family = {"gemm": "gemm", "map": "elementwise"}[trial.kernel]
    case = trial.case
    return Record(
        **{
            "case": case,
            "environment": ENVIRONMENT,
            "seconds": seconds_of(trial) if seconds is None else seconds,
            "repetitions": 100,
            "spread_frac": 0.01,
            "measured_at": "2026-11-21T02:00:00Z",
            "kernel": trial.kernel,
            "implementation": trial.implementation,
            "vendor": "cublas" if trial.implementation == "torch" else "",
            "method": "graph",
            "row": {"family": family, "op": case.op, "params": dict(case.params)},
            **more,
        }
    )


def trials(count: int = 40) -> list[Trial]:
    return [
        Trial(kernel=s.name, implementation=how.name, case=case)
        for s in suite(count)
        for case in s.grid
        for how in s.implementations
    ]


@dataclass
class FakeGpu:
    """Scripted answers in place of CUDA's: seconds by launch, errors by implementation."""

    arch: int = 90
    l2_bytes: float = 50e6
    set_bytes: float = 30e6
    memory_bytes: float = 80e9
    base: Mapping[str, float] = field(default_factory=dict)
    noise: Callable[[int], float] = lambda i: 1.0
    error_of: Callable[[Any], float] = lambda outputs: 1e-5
    fail: Callable[[Any], None] = lambda outputs: None
    throttle: str = "none"
    log: list[str] = field(default_factory=list)
    clock_s: float = 0.0
    samples: int = 0
    poisoned: int = 0

    def clock(self) -> float:
        return self.clock_s

    def environment(self, l2_state: str) -> Environment:
        return Environment(
            gpu=GPU,
            sm_clock_hz=None,
            memory_clock_hz=None,
            driver="unknown",
            versions={},
            l2_state=l2_state,
            throttle=self.throttle,
        )

    def inputs(self, spec: KernelSpec, case: Case, seed: int) -> Inputs:
        self.log.append(f"inputs {case.dtype} {dict(case.params)}")
        return dict(spec.inputs(case, seed, None))  # type: ignore[arg-type]

    def copy(self, inputs: Inputs) -> Inputs:
        self.log.append("copy")
        return dict(inputs)

    def size_bytes(self, *held: object) -> float:
        return self.set_bytes

    def free_bytes(self) -> float:
        return self.memory_bytes

    def outputs(self, run: Callable[[], Any]) -> Any:
        found = run()
        self.fail(found)
        return found

    def poison(self, outputs: Any, inputs: Inputs) -> None:
        self.poisoned += 1

    def error(self, outputs: Any, truth: Any) -> float:
        return self.error_of(outputs)

    def capture(self, runs: Sequence[Callable[[], Any]], count: int) -> FakeGraph:
        self.log.append(f"capture {count} of {len(runs)}")
        return FakeGraph(self, runs, count)

    def release(self) -> None:
        pass


@dataclass
class FakeGraph:
    gpu: FakeGpu
    runs: Sequence[Callable[[], Any]]
    count: int
    method: str = "graph"

    def seconds(self, samples: int, *, flush: bool) -> list[float]:
        self.gpu.log.append(f"time {samples}{' flushed' if flush else ''}")
        launch = self.runs[0]()[2]
        base = self.gpu.base.get(launch.label if launch is not None else "", 2e-5)
        found = []
        for _ in range(samples):
            self.gpu.samples += 1
            found.append(base * self.count * self.gpu.noise(self.gpu.samples))
            self.gpu.clock_s += found[-1]
        return found
