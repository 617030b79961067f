"""The timer's GPU on the CPU: torch's own calls where they are the same, a clock where not."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from validate.record import Environment
from validate.torch_gpu import TorchGpu


class CpuGpu(TorchGpu):
    """Everything of `TorchGpu` but streams, events and graphs."""

    def __init__(self, arch: int = 80) -> None:
        self.arch, self.device, self.name = arch, torch.device("cpu"), "cpu"
        self.l2_bytes = 1e6

    def environment(self, l2_state: str) -> Environment:
        return Environment(
            gpu="cpu",
            sm_clock_hz=None,
            memory_clock_hz=None,
            driver="none",
            versions={},
            l2_state=l2_state,
        )

    def free_bytes(self) -> float:
        return 1e9

    def capture(self, runs: Sequence[Callable[[], Any]], count: int) -> Any:
        return CpuLaunches(runs, min(count, 2))

    def release(self) -> None:
        pass


class CpuLaunches:
    method = "events"

    def __init__(self, runs: Sequence[Callable[[], Any]], count: int) -> None:
        self._runs, self._count = runs, count

    def seconds(self, samples: int, *, flush: bool) -> list[float]:
        start = time.perf_counter()
        for i in range(self._count):
            self._runs[i % len(self._runs)]()
        each = time.perf_counter() - start
        return [each] * samples
