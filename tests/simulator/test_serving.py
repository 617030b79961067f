"""The time of an output token: what it is made of, what it grows with, what fits."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import FP8
from hwmodels.errors import InputError
from simulator.serving import (
    HOST,
    Host,
    Load,
    Terms,
    cache_bytes,
    capacity,
    forward_pass,
    least_s,
    terms,
    tpot_s,
    ttft_s,
    weight_bytes,
)
from simulator.serving_kernels import ENGINES, Formats, Linear
from tests.simulator.test_serving_kernels import DECODING, LATENT, LLAMA, served

MADE = Host(step_s={"vllm": 1e-3, "sglang": 2e-3}, sequence_s=1e-5, interleave_mixed=1.0,
            interleave_apart=0.5)  # fmt: skip
LOAD = Load(concurrency=16, isl=1000, osl=500)


def made(engine: str) -> Terms:
    return Terms(engine=ENGINES[engine], batch=11, decode_s=10e-3, prompt_s=60e-3, extra_s=50e-3,
                 prompts=10 / 500)  # fmt: skip


def test_an_output_token_by_hand() -> None:
    assert tpot_s(made("vllm"), MADE) == pytest.approx(10e-3 + 1e-3 + 11e-5 + 1e-3)
    apart = 10e-3 + 2e-3 + 11e-5 + 0.5 * (10 / 500) * (50e-3 + 2e-3)
    assert tpot_s(made("sglang"), MADE) == pytest.approx(apart)
    assert ttft_s(made("vllm"), MADE) == pytest.approx(60e-3 + 1e-3 + (10e-3 + 1e-3 + 11e-5) / 2)


def test_an_engine_never_fitted_is_refused() -> None:
    with pytest.raises(InputError, match="no host time of trtllm is known"):
        tpot_s(made("trtllm"), MADE)


def test_cache_and_weights_of_llama_by_hand() -> None:
    one = served()
    assert cache_bytes(one, 1000) == 32 * 2 * 8 * 128 * 1000 * 2
    assert cache_bytes(served(tp=4), 1000) == 32 * 2 * 2 * 128 * 1000 * 2
    windowed = served(replace(LLAMA, window=100, num_windowed_layers=16))
    assert cache_bytes(windowed, 1000) == 2 * 8 * 128 * 2 * (16 * 1000 + 16 * 100)
    assert cache_bytes(served(LATENT, tp=4, moe_tp=4), 10) == 32 * 576 * 10 * 2
    assert weight_bytes(one) == pytest.approx(2 * 8.03e9, rel=1e-3)
    half = Linear(dtype=FP8)
    narrow = served(formats=Formats(attention=half, mlp=half))
    assert weight_bytes(narrow) == pytest.approx(6.98e9 + 2 * 2 * 128256 * 4096, rel=1e-3)


def test_no_more_requests_run_than_fit() -> None:
    setting = served()  # 80 GB with 16 GB of weights: about 340 requests of 1250 tokens
    load = replace(LOAD, concurrency=10_000)
    most = capacity(setting, load)
    assert most == pytest.approx((0.9 * setting.device.hbm.capacity_bytes - weight_bytes(setting))
                                 / cache_bytes(setting, 1250))  # fmt: skip
    assert terms(setting, load).batch == int(most)
    assert terms(setting, LOAD).batch == 16
    big = replace(LLAMA, num_layers=320)
    with pytest.raises(InputError, match="weights do not fit"):
        terms(served(big), LOAD)
    with pytest.raises(InputError, match="not one request's cache fits"):
        terms(setting, Load(concurrency=1, isl=10**6, osl=10))


def test_prompts_cost_decoding_sequences_what_the_engine_makes_of_them() -> None:
    mixed, apart = terms(served(), LOAD), terms(served(name="sglang"), LOAD)
    assert mixed.extra_s == pytest.approx(mixed.prompt_s - mixed.decode_s)
    assert apart.extra_s == apart.prompt_s
    assert mixed.prompts == apart.prompts == 15 / 500
    alone = terms(served(), replace(LOAD, disaggregated=True))
    assert (alone.prompts, alone.extra_s) == (0, 0)
    assert tpot_s(alone) < tpot_s(mixed)


def test_a_pass_is_the_sum_of_its_parts_and_hides_shared_experts() -> None:
    setting = served(LATENT, tp=4, moe_tp=4)
    found = forward_pass(setting, DECODING)
    assert found.seconds == pytest.approx(sum(s for _, s in found.parts))
    parts = dict(found.parts)
    assert parts["shared experts"] == 0 < parts["experts"]


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 256),
    isl=st.integers(64, 8192),
    tp=st.sampled_from([1, 2, 8]),
    name=st.sampled_from(sorted(ENGINES)),
)
def test_no_token_is_faster_than_its_bytes(batch: int, isl: int, tp: int, name: str) -> None:
    setting = served(name=name, tp=tp)
    load = Load(concurrency=batch, isl=isl, osl=256)
    assert least_s(setting, load) <= tpot_s(terms(setting, load))


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 100), isl=st.integers(64, 4096))
def test_more_requests_and_longer_prompts_take_longer(batch: int, isl: int) -> None:
    setting = served()
    here, more, longer = (
        tpot_s(terms(setting, load))
        for load in (
            Load(concurrency=batch, isl=isl, osl=256),
            Load(concurrency=2 * batch, isl=isl, osl=256),
            Load(concurrency=batch, isl=2 * isl, osl=256),
        )
    )
    assert here <= more * 1.02 and here <= longer * 1.02


def test_the_shipped_constants_are_physical() -> None:
    assert set(HOST.step_s) == set(ENGINES)
    assert all(0 <= s < 5e-3 for s in HOST.step_s.values())
    assert 0 <= HOST.sequence_s < 1e-4
    assert 0.4 <= HOST.interleave_apart <= HOST.interleave_mixed <= 1.2
