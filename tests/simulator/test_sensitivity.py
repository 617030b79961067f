"""Derivatives by the complex step are those of finite differences, for every kernel model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hwmodels import catalog
from simulator.kernel_time.model import COLD, REPLAYED, Conditions
from simulator.kernel_time.predict import predict
from simulator.kernel_time.rates import PATHS, rates_of
from simulator.kernel_time.registry import model_of
from simulator.sensitivity import sensitivities
from workloads.op import Op
from workloads.ops.elementwise import Elementwise
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import Matmul

OPS = (
    Matmul(m=4096, n=4096, k=4096),
    Matmul(m=8, n=8192, k=8192),
    FlashAttention2(batch=2, num_heads=32, len_q=4096, head_dim=128, causal=True),
    Elementwise(num_elements=2**26),
)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("l2", [COLD, REPLAYED])
@pytest.mark.parametrize("device", ["h100-sxm", "l40s"])
def test_exact_slopes_are_those_of_differences(op: Op, l2: str, device: str) -> None:
    on, conditions = catalog.device(device), Conditions(l2=l2)
    model, rates = model_of(type(op)), rates_of(catalog.device(device))
    found = {s.path: s.elasticity for s in sensitivities(op, on=on, conditions=conditions)}
    values = predict(op, on=on, conditions=conditions).basis.constants(model.labels(op, conditions))
    for field, path in PATHS.items():
        ends = [
            model.time(
                op,
                dataclasses.replace(rates, **{field: getattr(rates, field) * (1 + sign * 1e-6)}),
                values,
                conditions,
            ).seconds
            for sign in (1, -1)
        ]
        difference = float(np.log(ends[0] / ends[1]) / 2e-6)
        assert found[path] == pytest.approx(difference, abs=2e-4), path


def test_arrays_have_a_slope_each() -> None:
    op = Matmul(m=np.array([1.0, 16384.0]), n=8192, k=8192)
    found = {s.path: s.elasticity for s in sensitivities(op, on=catalog.device("h100-sxm"))}
    small, large = np.asarray(found["tensor_flops_per_s"])
    assert abs(small) < 0.2 and large < -0.7
    small, large = np.asarray(found["memory.hbm.bytes_per_s"])
    assert small < -0.7 and abs(large) < 0.2


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_rate_makes_a_kernel_slower(op: Op) -> None:
    # more SMs at the same peak are smaller SMs, which is no rate
    found = {s.path: float(s.elasticity) for s in sensitivities(op, on=catalog.device("a10"))}
    assert all(value <= 1e-9 for path, value in found.items() if path != "num_sms"), found
