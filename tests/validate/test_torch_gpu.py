"""What the timer does to tensors, on the CPU, where it is the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.validate.cpu_gpu import CpuGpu
from validate.cuda_timer import CudaTimer
from validate.record import Case, Trial
from validate.timer import DeviceLost, Unmeasured


@pytest.fixture()
def gpu(monkeypatch: pytest.MonkeyPatch) -> CpuGpu:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return CpuGpu()


@dataclass
class Paged:
    table: torch.Tensor
    size: int


def test_storages_count_once_wherever_they_are_held(gpu: CpuGpu) -> None:
    whole = torch.zeros(100)
    held = {"a": whole, "b": whole[10:20], "c": [torch.zeros(5), 3, "x"]}
    assert gpu.size_bytes(held, (whole,), Paged(torch.zeros(7), 1)) == 400 + 20 + 28


def test_a_copy_shares_nothing_but_what_it_shared(gpu: CpuGpu) -> None:
    whole = torch.arange(6.0)
    copied = gpu.copy({"a": whole, "view": whole[2:4], "n": 3})
    copied["a"].fill_(0)
    assert whole.sum() == 15 and copied["view"].sum() == 0 and copied["n"] == 3


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32]
)
def test_what_is_left_unwritten_shows(gpu: CpuGpu, dtype: torch.dtype) -> None:
    truth = torch.arange(-8, 8).double()
    out = truth.to(dtype)
    assert gpu.error((out,), (truth,)) < 0.1
    gpu.poison((out,), {"x": truth})
    assert gpu.error((out,), (truth,)) > 1
    assert gpu.error((out,), (truth, truth)) == math.inf
    assert gpu.error((out[:3],), (truth,)) == math.inf


def test_outputs_that_are_inputs_are_left_alone(gpu: CpuGpu) -> None:
    cache, flag = torch.ones(4), torch.ones(2, dtype=torch.bool)
    gpu.poison((cache, cache[1:], flag), {"cache": cache})
    assert torch.equal(cache, torch.ones(4)) and flag.all()


def test_large_outputs_are_sampled_and_searched_for_nan_throughout(gpu: CpuGpu) -> None:
    truth = torch.randn(3 * 2**20)
    out = truth.clone()
    assert gpu.error((out,), (truth,)) == 0.0
    out[7] = math.nan
    assert gpu.error((out,), (truth,)) == math.inf
    assert gpu.error((truth * 1.5,), (truth,)) == pytest.approx(0.5, rel=1e-3)


def test_errors_of_kernels_are_told_from_a_lost_device(
    gpu: CpuGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad() -> Any:
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        gpu.outputs(bad)

    def dead(device: object = None) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(DeviceLost, match="sizes do not match"):
        gpu.outputs(bad)


def test_a_suite_of_torch_goes_through_the_timer(gpu: CpuGpu) -> None:
    from tests.validate.fake_suite import gemm_op, product, spec
    from validate.kernels.spec import Implementation

    def inputs(case: Case, generator: torch.Generator, device: torch.device) -> dict[str, Any]:
        m, n, k = (case.params[name] for name in "mnk")
        return {
            "a": torch.randn(m, k, generator=generator),
            "b": torch.randn(k, n, generator=generator),
        }

    def product_of(case: Case, given: Any, launch: Any) -> Any:
        return lambda: (given["a"] @ given["b"],)

    def lazy(case: Case, given: Any, launch: Any) -> Any:
        out = torch.zeros(case.params["m"], case.params["n"])

        def run() -> Any:
            out[:-1] = (given["a"] @ given["b"])[:-1]  # the last row is never written
            return (out,)

        return run

    from dataclasses import replace

    case = product(64, 32, 16, "fp32")
    kernel = replace(
        spec("gemm", gemm_op, (case,), "gemm"),
        inputs=inputs,
        reference=lambda case, given: (given["a"].double() @ given["b"].double(),),
        implementations=(
            Implementation(name="torch", prepare=product_of),
            Implementation(name="triton", prepare=lazy),
        ),
        tolerances={"fp32": 1e-5},
    )
    timer = CudaTimer(gpu, [kernel])
    record = timer.measure(Trial(kernel="gemm", implementation="torch", case=case))
    assert record.error is not None and record.error < 1e-6 and record.method == "events"
    with pytest.raises(Unmeasured, match="relative error inf") as why:
        timer.measure(Trial(kernel="gemm", implementation="triton", case=case))
    assert why.value.kind == "wrong"
