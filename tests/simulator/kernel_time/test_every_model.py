"""What every kernel model owes, for every op of the catalogue: order, bounds, constants."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP16, FP32
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.model import REPLAYED, ROTATED, USUAL, Conditions, KernelModel
from simulator.kernel_time.predict import predict
from simulator.kernel_time.rates import PATHS, rates_of
from simulator.kernel_time.registry import MODELS, model_of
from simulator.sensitivity import seconds_at
from tests.simulator.test_estimate import small
from workloads import registry
from workloads.op import Op
from workloads.ops.collective_transfer import CollectiveTransfer, StagedCollective
from workloads.ops.conv2d import Conv2d
from workloads.ops.counted import CountedOp
from workloads.ops.expert_exchange import ExpertExchange

DEVICES = ("h100-sxm", "a100-sxm4-80gb", "b200-sxm", "rtx-pro-6000-blackwell-server", "mi300x")
KERNELS = ("custom-vllm", "vllm:fa3", "sglang:triton", "nccl-profiled")
"""Labels under which some model does more than for the usual kernel."""
RATES = [field for field in PATHS if field != "num_sms"]
"""More SMs at the same peak are smaller SMs: no rate."""


def sizes(op: Op) -> Iterator[tuple[str, float]]:
    """The op's sizes that may grow: neither fractions nor the ranks that share the work."""
    for f in dataclasses.fields(op):
        value = getattr(op, f.name)
        if (
            "Num" in str(f.type)
            and isinstance(value, (int, float))
            and not f.name.endswith(("_frac", "_ranks", "_nodes"))
            and f.name not in (*op.cheaper, *op.tunable)
        ):
            yield f.name, value


def seconds(op: Op, device: str, **rates: float) -> float:
    whole = rates_of(catalog.device(device))
    moved = {name: getattr(whole, name) * factor for name, factor in rates.items()}
    return float(seconds_at(op, dataclasses.replace(whole, **moved), USUAL, None))


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("device", DEVICES)
def test_a_cold_kernel_is_never_faster_than_its_bound(name: str, device: str) -> None:
    on = catalog.device(device)
    for scale in (1, 3, 16, 64):
        op = grown(small(name), scale)
        found = predict(op, on=on)
        assert found.seconds >= estimate(op, on=on, rung=BOUND).lower_s * (1 - 1e-9), (op, scale)
        low, high = found.interval(80)
        assert 0 < low < found.seconds < high


def grown(op: Op, factor: int) -> Op:
    """The op with its first size that may grow multiplied."""
    for name, value in sizes(op):
        try:
            return op.over(**{name: value * factor})
        except Exception:
            continue
    return op


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("device", ["h100-sxm", "rtx-pro-6000-blackwell-server"])
def test_no_rate_makes_a_kernel_slower(name: str, device: str) -> None:
    for scale in (1, 64):
        op = grown(small(name), scale)
        before = seconds(op, device)
        for rate in RATES:
            assert seconds(op, device, **{rate: 1.3}) <= before * (1 + 1e-9), (rate, op)


@pytest.mark.parametrize("name", registry.names())
def test_no_size_makes_a_kernel_faster(name: str) -> None:
    from hwmodels.errors import InputError

    op = small(name)
    moved = 0
    for field, value in sizes(op):
        times = []
        for factor in (1, 2, 4, 8, 16):
            try:
                times.append(seconds(op.over(**{field: value * factor}), "h100-sxm"))
            except InputError:  # a size of a fixed kind (heads per group, a power of two)
                break
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(times)), field
        moved += len(times) > 1
    assert moved


@pytest.mark.parametrize("name", registry.names())
def test_arrays_agree_with_scalars(name: str) -> None:
    op = small(name)
    field, value = next(sizes(op))
    several = np.array([value, value * 2, value * 8], dtype=np.float64)
    on = catalog.device("h100-sxm")
    many = predict(op.over(**{field: several}), on=on)
    for i, one in enumerate(several):
        alone = predict(op.over(**{field: one}), on=on)
        assert np.asarray(many.seconds)[i] == pytest.approx(alone.seconds, rel=1e-12)
        assert np.broadcast_to(many.regime, 3)[i] == alone.regime
        assert np.broadcast_to(many.half_80, 3)[i] == pytest.approx(alone.half_80, rel=1e-12)


class Reads(dict[str, float]):
    """Constants that remember which of them were asked for."""

    def __init__(self, values: dict[str, float]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> float:
        self.asked.add(key)
        return super().__getitem__(key)


def asked() -> Iterator[Op]:
    """The catalogue's ops in several formats and forms, and one that states its thread blocks."""
    for name in registry.names():
        for dtype in (BF16, FP16, FP32):
            op = small(name, dtype)
            if type(op) is Conv2d:
                op = op.over(algorithm="best", direction="bwd_data")
                op = op.over(in_channels=3) if dtype == BF16 else op
            if type(op) is CollectiveTransfer:
                op = op.over(kind="send_recv") if dtype == BF16 else op
            if type(op) is ExpertExchange:
                op = op.over(low_latency=dtype == BF16)
            if type(op) is StagedCollective:
                op = op.over(sockets=dtype == BF16)
            yield op
    yield CountedOp(moved_bytes=2**20, num_blocks=8)


def asked_for() -> dict[str, set[str]]:
    """By model, the constants that some op under some conditions reads."""
    found: dict[str, set[str]] = defaultdict(set)
    for op in asked():
        model = model_of(type(op))
        for l2, kernel in product(("cold", REPLAYED, ROTATED), ("", *KERNELS)):
            reads = Reads(model.nominal())
            conditions = Conditions(l2=l2, kernel=kernel)
            model.time(op, rates_of(catalog.device("h100-sxm")), reads, conditions)
            found[model.name] |= reads.asked
    return found


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_constants_are_declared_once_with_unit_and_meaning(model: KernelModel) -> None:
    names = [c.name for c in model.all_constants()]
    assert len(names) == len(set(names))
    known: dict[str, Any] = model.nominal()
    for c in model.constants:
        assert len(c.meaning) > 8 and c.unit and c.source
        assert c.low <= known[c.name] <= c.high
        assert c.fitted or c.source != "fit", f"{c.name} is fixed and names no source"
        if c.name.endswith("_frac"):
            assert c.high <= 1, c.name
        if c.name.endswith("_bytes_per_s"):
            assert c.unit == "B/s", c.name
        elif c.name.endswith("_s"):
            assert c.unit == "s", c.name


def test_no_model_of_the_catalogue_declares_a_constant_it_never_reads() -> None:
    found = asked_for()
    for model in MODELS:
        if model.name in found:
            assert {c.name for c in model.constants} == found[model.name], model.name


def test_models_of_one_name_share_their_constants_and_no_op_has_two() -> None:
    """Grouped products are timed with what routed experts were fitted to."""
    first = {m.name: m for m in reversed(MODELS)}
    assert all(m.constants is first[m.name].constants for m in MODELS)
    assert sorted(m.name for m in MODELS if m is not first[m.name]) == ["moe"]
    every = [op for m in MODELS for op in m.ops]
    assert len(every) == len(set(every))
