"""The answer to a serving question: throughput by hand, ranges, notes, parts that add up."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, NVFP4
from hwmodels.errors import InputError, UnknownNameError
from simulator.serving import Load, forward_pass, step_s
from simulator.serving_estimate import (
    decode_parts,
    estimate_serving,
    formats_of,
    most_in_flight,
    prefill_parts,
)
from simulator.serving_kernels import Batch
from tests.simulator.test_serving_kernels import LATENT, served

LOAD = Load(concurrency=8, isl=1000, osl=200)


def test_throughput_is_that_of_the_requests_in_flight() -> None:
    found = estimate_serving(served(tp=2), LOAD)
    assert found.ttft_s is not None
    each = found.ttft_s + 199 * found.tpot_s
    assert found.requests_per_s == pytest.approx(8 / each)
    assert found.tokens_per_s == pytest.approx(200 * 8 / each)
    assert found.tokens_per_s_per_gpu == pytest.approx(found.tokens_per_s / 2)
    assert found.tpot_range_s[0] < found.tpot_s < found.tpot_range_s[1]
    assert sum(found.parts.values()) == pytest.approx(found.tpot_s)
    assert sum(found.first_parts.values()) == pytest.approx(found.ttft_s)
    replicas = estimate_serving(served(LATENT, attn_dp=4, moe_ep=4, tp=1), LOAD)
    assert replicas.ttft_s is not None
    each = replicas.ttft_s + 199 * replicas.tpot_s
    assert replicas.requests_per_s == pytest.approx(4 * 8 / each)


def test_what_waits_is_told() -> None:
    assert not estimate_serving(served(), LOAD).queues
    many = estimate_serving(served(), replace(LOAD, concurrency=5000))
    assert many.queues and many.waiting == 5000 - many.terms.batch > 0
    apart = estimate_serving(served(), replace(LOAD, disaggregated=True))
    assert apart.ttft_s is None and not apart.queues and apart.first_parts == {}


def test_passes_alone_add_up() -> None:
    setting = served(tp=2)
    parts = decode_parts(setting, LOAD)
    assert sum(parts.values()) == pytest.approx(step_s(estimate_serving(setting, LOAD).terms))
    two = prefill_parts(setting, replace(LOAD, concurrency=2))
    kernels = forward_pass(setting, Batch(num_prompts=2, len_prompt=1000)).seconds
    assert sum(two.values()) > kernels
    assert sum(prefill_parts(served(tp=2, pp=2), LOAD).values()) > sum(
        prefill_parts(setting, LOAD).values()
    )


def test_formats_by_name() -> None:
    assert formats_of("bf16").cache == BF16
    assert (formats_of("fp8").mlp.dtype, formats_of("fp8").cache) == (FP8, FP8)
    assert formats_of("fp8-block").experts.scheme == "block"
    assert formats_of("nvfp4", "bf16").cache == BF16
    assert formats_of("nvfp4").mlp.dtype == NVFP4
    for given_names in (("int3", None), ("fp8", "int8")):
        with pytest.raises(UnknownNameError, match="one of"):
            formats_of(*given_names)


def test_as_many_as_surely_fit() -> None:
    most = most_in_flight(served(), 1000, 200)
    assert estimate_serving(served(), replace(LOAD, concurrency=most)).waiting == 0
    with pytest.raises(InputError, match="not one request"):
        most_in_flight(served(), 10**6, 200)


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 64), more=st.integers(1, 64))
def test_more_requests_in_flight_are_no_less_throughput(batch: int, more: int) -> None:
    setting = served()
    here, there = (
        estimate_serving(setting, replace(LOAD, concurrency=b)).tokens_per_s
        for b in (batch, batch + more)
    )
    assert there >= 0.97 * here
