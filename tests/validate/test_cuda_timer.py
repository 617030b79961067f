"""The whole logic of the CUDA timer on a GPU that is none: checks, choices, repetitions, flags."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.validate.fake_suite import LAUNCHES, FakeGpu, gemm_op, product, spec
from validate.cuda_timer import CudaTimer, reason_of, small_checks
from validate.kernels.spec import Implementation, KernelSpec
from validate.record import Trial
from validate.timer import DeviceLost, Unmeasured

CASE = product(256, 256, 256)


def trial(implementation: str = "triton") -> Trial:
    return Trial(kernel="gemm", implementation=implementation, case=CASE)


def kernel(*implementations: Implementation) -> KernelSpec:
    return spec("gemm", gemm_op, (CASE,), "gemm", implementations or None)


def timer(gpu: FakeGpu, of: KernelSpec | None = None, **more: Any) -> CudaTimer:
    return CudaTimer(gpu, [of or kernel()], clock=gpu.clock, **more)


def launch_of(outputs: Any) -> Any:
    return outputs[2]


def test_a_steady_kernel_is_timed_with_its_fastest_tiles() -> None:
    gpu = FakeGpu(base={LAUNCHES[0].label: 3e-5, LAUNCHES[1].label: 2e-5, LAUNCHES[2].label: 4e-5})
    record = timer(gpu).measure(trial())
    assert record.seconds == pytest.approx(2e-5)
    assert record.launch == LAUNCHES[1].label
    assert record.tried[LAUNCHES[2].label] == pytest.approx(4e-5)
    assert record.flags == () and record.attempts == 1 and record.judge == "reference"
    assert record.environment.l2_state == "rotated" and record.method == "graph"
    assert record.low_s == pytest.approx(2e-5) == record.high_s
    assert record.row == {"family": "gemm", "op": "gemm", "params": dict(CASE.params)}
    assert record.repetitions % 4 == 0  # whole turns of four sets of 30 MB over 50 MB of L2
    assert gpu.log.count("copy") == 3
    assert record.trial == trial()


def test_outputs_are_poisoned_and_checked_before_anything_is_timed() -> None:
    gpu = FakeGpu()
    timer(gpu).measure(trial())
    first_time = next(i for i, entry in enumerate(gpu.log) if entry.startswith("time"))
    checks = [entry for entry in gpu.log[:first_time] if entry.startswith("inputs bf16")]
    assert len(checks) == 3  # two small checks in the trial's format, and the case
    assert gpu.poisoned == 3


def test_a_wrong_kernel_is_never_timed_and_named() -> None:
    gpu = FakeGpu(error_of=lambda outputs: 0.3)
    with pytest.raises(Unmeasured, match=r"relative error 0.3 above 0.01 on the check m=3") as why:
        timer(gpu).measure(trial())
    assert why.value.kind == "wrong"
    assert not any(entry.startswith("time") for entry in gpu.log)


def test_nan_is_wrong() -> None:
    gpu = FakeGpu(error_of=lambda outputs: float("nan"))
    with pytest.raises(Unmeasured, match="relative error nan"):
        timer(gpu).measure(trial())


def test_a_kernel_wrong_on_the_timed_case_alone_is_refused() -> None:
    gpu = FakeGpu(error_of=lambda outputs: 0.3 if outputs[0] == CASE else 0.0)
    with pytest.raises(Unmeasured, match=r"above 0.01 \(reference\)"):
        timer(gpu).measure(trial())


def test_small_checks_run_once_an_implementation() -> None:
    gpu = FakeGpu()
    of = timer(gpu)
    of.measure(trial())
    of.measure(trial())
    assert sum(entry.startswith("inputs") for entry in gpu.log) == 3
    of.measure(trial("torch"))
    assert sum(entry.startswith("inputs") for entry in gpu.log) == 5


def test_checks_are_turned_to_the_format_of_the_trial() -> None:
    assert {case.dtype for case in small_checks(kernel(), "bf16")} == {"bf16"}
    assert small_checks(kernel(), "fp32") == list(kernel().checks)


def test_noise_is_repeated_then_flagged_and_not_averaged() -> None:
    gpu = FakeGpu(noise=lambda i: 1.0 + 0.5 * (i % 2))
    record = timer(gpu).measure(trial())
    assert record.flags == ("noisy",) and record.attempts == 3
    assert record.half_width_frac is not None and record.half_width_frac > 0.01


def test_a_quiet_attempt_after_a_noisy_one_stands() -> None:
    gpu = FakeGpu(base={"BLOCK64-w4-s2": 1e-3, "BLOCK128-w4-s2": 2e-3, "BLOCK256-w4-s2": 2e-3})
    gpu.noise = lambda i: 1.0 if gpu.clock_s > 1.5 else 1.0 + 0.3 * (i % 2)
    record = timer(gpu).measure(trial())
    assert record.attempts >= 2 and record.flags == ()
    assert record.seconds == pytest.approx(1e-3)


def test_slow_clocks_are_flagged_and_the_power_cap_is_not() -> None:
    hot = timer(FakeGpu(throttle="sw_power_cap+hw_thermal_slowdown")).measure(trial())
    assert hot.flags == ("throttled",)
    assert timer(FakeGpu(throttle="sw_power_cap")).measure(trial()).flags == ()


def test_small_sets_are_warm_and_large_ones_flushed() -> None:
    warm = FakeGpu(set_bytes=1e5)
    assert timer(warm).measure(trial()).environment.l2_state == "warm"
    assert "copy" not in warm.log
    cold = FakeGpu(set_bytes=60e9, memory_bytes=20e9)
    record = timer(cold).measure(trial())
    assert record.environment.l2_state == "cold"
    assert "time 11 flushed" in cold.log and "capture 1 of 1" in cold.log


def test_tiles_that_do_not_compile_are_passed_over() -> None:
    class OutOfResources(Exception):
        pass

    def fail(outputs: Any) -> None:
        if launch_of(outputs) == LAUNCHES[1]:
            raise OutOfResources("shared memory, Required: 300000")

    record = timer(FakeGpu(fail=fail)).measure(trial())
    assert set(record.tried) == {LAUNCHES[0].label, LAUNCHES[2].label}

    def fail_all(outputs: Any) -> None:
        if outputs[0] == CASE and launch_of(outputs) in LAUNCHES:
            raise OutOfResources("shared memory, Required: 300000")

    with pytest.raises(Unmeasured, match="OutOfResources: shared memory") as why:
        timer(FakeGpu(fail=fail_all)).measure(trial())
    assert why.value.kind == "compile"


def test_out_of_memory_is_a_refusal_of_that_trial() -> None:
    def fail(outputs: Any) -> None:
        if outputs[0] == CASE:
            raise RuntimeError("CUDA out of memory. Tried to allocate 200 GiB")

    gpu = FakeGpu(fail=fail)
    of = timer(gpu)
    with pytest.raises(Unmeasured) as why:
        of.measure(trial())
    assert why.value.kind == "memory"
    gpu.fail = lambda outputs: None
    assert of.measure(trial()).flags == ()


def test_a_lost_device_is_passed_on() -> None:
    def fail(outputs: Any) -> None:
        raise DeviceLost("an illegal memory access")

    with pytest.raises(DeviceLost):
        timer(FakeGpu(fail=fail)).measure(trial())


def test_where_the_reference_does_not_fit_another_implementation_judges() -> None:
    def fail(outputs: Any) -> None:
        if outputs[0] == CASE and outputs[-1] == "truth":
            raise RuntimeError("out of memory")

    record = timer(FakeGpu(fail=fail)).measure(trial())
    assert record.judge == "torch"

    def fail_both(outputs: Any) -> None:
        fail(outputs)
        if outputs[0] == CASE and launch_of(outputs) is None:
            raise RuntimeError("out of memory")

    with pytest.raises(Unmeasured, match="neither the reference nor another"):
        timer(FakeGpu(fail=fail_both)).measure(trial())


def test_refusals_of_the_suite_are_named() -> None:
    old = replace(kernel().implementations[0], refusal=lambda case, arch: "needs sm_100")
    with pytest.raises(Unmeasured, match="needs sm_100") as why:
        timer(FakeGpu(), kernel(old)).measure(trial())
    assert why.value.kind == "unsupported"
    none = replace(kernel().implementations[0], launches=lambda case, arch: ())
    with pytest.raises(Unmeasured, match="no tile configuration"):
        timer(FakeGpu(), kernel(none)).measure(trial())
    with pytest.raises(Unmeasured, match="the suite has no"):
        timer(FakeGpu()).measure(trial("cudnn"))
    odd = replace(kernel(), tolerances={})
    with pytest.raises(Unmeasured, match="no tolerance in bf16"):
        timer(FakeGpu(), odd).measure(trial())


def test_fewer_tiles_are_tried_where_time_is_short() -> None:
    assert len(timer(FakeGpu(), most_launches=2).measure(trial()).tried) == 2


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "memory"),
        (type("CompilationError", (Exception,), {})("at 3:4\nmore"), "compile"),
        (ValueError("odd\nlines"), "failed"),
    ],
)
def test_errors_become_kinds_in_one_line(error: Exception, kind: str) -> None:
    found, text = reason_of(error)
    assert found == kind and "\n" not in text
