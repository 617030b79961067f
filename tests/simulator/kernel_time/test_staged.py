"""Ops of several kernels: times add up, what runs beside hides, doubts and slopes go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.errors import UnsupportedError
from simulator.estimate import BOUND, estimate
from simulator.kernel_time.predict import predict
from simulator.sensitivity import sensitivities
from simulator.uncertainty import samples
from workloads.numeric import Num
from workloads.op import Stage
from workloads.ops.attention import StandardAttention
from workloads.ops.elementwise import Elementwise
from workloads.ops.host_copy import HostCopy
from workloads.ops.matmul import Matmul
from workloads.ops.staged import StagedOp

H100 = catalog.device("h100-sxm")


@dataclass(frozen=True, kw_only=True)
class Pair(StagedOp):
    """A product and, in turn or beside it, a copy from the host."""

    name: ClassVar[str] = "pair"
    m: Num
    num_bytes: Num
    beside: bool = True

    def stages(self) -> tuple[Stage, ...]:
        product = Matmul(m=self.m, n=4096, k=4096)
        copy = HostCopy(num_bytes=self.num_bytes)
        return Stage("product", product, times=2), Stage("fetch", copy, beside=self.beside)

    def compulsory_bytes(self) -> Num:
        return self.num_bytes


def seconds(op: object) -> float:
    return float(predict(op, on=H100).seconds)  # type: ignore[arg-type]


def test_stages_add_up_and_those_beside_hide() -> None:
    product, copy = seconds(Matmul(m=4096, n=4096, k=4096)), seconds(HostCopy(num_bytes=10**6))
    assert seconds(Pair(m=4096, num_bytes=10**6, beside=False)) == pytest.approx(2 * product + copy)
    assert seconds(Pair(m=4096, num_bytes=10**6)) == pytest.approx(2 * product)
    assert seconds(Pair(m=16, num_bytes=10**9)) == pytest.approx(seconds(HostCopy(num_bytes=10**9)))


def test_counts_add_up_with_their_repetitions() -> None:
    op = Pair(m=64, num_bytes=1000)
    product = Matmul(m=64, n=4096, k=4096).work(2**20)
    assert op.work(2**20).flops == 2 * product.flops
    assert op.work(2**20).host_bytes == 1000 and op.work(2**20).launches == 3
    assert op.min_flops() == {d: 2 * f for d, f in product.tensor_flops.items()}
    assert set(op.tiling(2**20)) >= {"product_tm", "product_tn"}


def test_the_host_link_is_a_resource_of_the_bound() -> None:
    found = estimate(Pair(m=16, num_bytes=10**9), on=H100, rung=BOUND)
    assert found.bound == "host"
    assert found.seconds == pytest.approx(1e9 / (H100.host_bytes_per_s or 0))


def test_intervals_are_those_of_the_stages() -> None:
    op = StandardAttention(num_heads=8, len_q=2048, head_dim=64)
    found = predict(op, on=H100)
    lows, highs = zip(*(p.prediction.interval(80) for p in found.parts), strict=True)
    low, high = found.interval(80)
    assert high == pytest.approx(sum(highs)) and sum(lows) * 0.9 < low < found.seconds
    assert set(found.terms) == {"scores", "softmax", "output"} and found.regime == "softmax"
    drawn = samples(found, key="one")
    assert low * 0.8 < drawn.interval(80)[0] < found.seconds < drawn.interval(80)[1] < high * 1.2


def test_arrays_go_through_as_they_are() -> None:
    op = Pair(m=np.array([16.0, 4096.0]), num_bytes=np.array([10.0**9, 10.0**6]))
    found = predict(op, on=H100)
    one, two = (seconds(Pair(m=m, num_bytes=n)) for m, n in ((16, 10**9), (4096, 10**6)))
    assert np.allclose(found.seconds, [one, two])
    assert list(found.regime) == ["fetch", "product"]


def test_slopes_follow_what_binds() -> None:
    def slopes(op: Pair) -> Mapping[str, float]:
        return {s.path: float(s.elasticity) for s in sensitivities(op, on=H100)}

    copying, multiplying = slopes(Pair(m=16, num_bytes=10**9)), slopes(Pair(m=4096, num_bytes=10))
    assert copying["links.host.bytes_per_s"] == pytest.approx(-1, abs=0.01)
    assert multiplying["links.host.bytes_per_s"] == 0
    assert multiplying["tensor_flops_per_s"] < -0.8


def test_a_kernel_label_of_a_stage_wins() -> None:
    from workloads.ops.flash_attention import FlashAttention2

    @dataclass(frozen=True, kw_only=True)
    class First(StagedOp):
        name: ClassVar[str] = "first"

        def stages(self) -> tuple[Stage, ...]:
            op = FlashAttention2(num_heads=16, len_q=4096, head_dim=64, dtype="fp16")
            return (Stage("attend", op, kernel="figure:fa1"),)

        def compulsory_bytes(self) -> Num:
            return 0

    a100 = catalog.device("a100-sxm4-80gb")
    found = predict(First(), on=a100)
    assert found.parts[0].prediction.kernel == "figure:fa1" and found.known


def test_a_device_without_a_host_link_is_refused() -> None:
    import dataclasses

    lonely = dataclasses.replace(H100, links=())
    for rung in ("best", BOUND):
        with pytest.raises(UnsupportedError, match="no link to the host's memory"):
            estimate(HostCopy(num_bytes=8), on=lonely, rung=rung)


def test_a_mean_error_of_many_kernels_is_no_narrower_than_one() -> None:
    one = predict(Elementwise(num_elements=2**24), on=H100)

    @dataclass(frozen=True, kw_only=True)
    class Twice(StagedOp):
        name: ClassVar[str] = "twice"

        def stages(self) -> tuple[Stage, ...]:
            op = Elementwise(num_elements=2**24)
            return Stage("a", op), Stage("b", op)

        def compulsory_bytes(self) -> Num:
            return 0

    assert predict(Twice(), on=H100).half_80 == pytest.approx(float(one.half_80))
