"""The time of an output token: what it is made of, what it grows with, what fits."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InputError
from simulator.serving import (
    HOST,
    Host,
    Load,
    Terms,
    capacity,
    forward_pass,
    least_s,
    terms,
    tpot_parts,
    tpot_s,
    ttft_parts,
    ttft_s,
)
from simulator.serving_kernels import ENGINES
from simulator.serving_memory import cache_bytes, weight_bytes
from tests.simulator.test_serving_kernels import DECODING, LATENT, LLAMA, served

MADE = Host(step_s={"vllm": 1e-3, "sglang": 2e-3}, sequence_s=1e-5, prompt_s=4e-3,
            launch_s={"vllm": 5e-5, "sglang": 1e-4})  # fmt: skip
LOAD = Load(concurrency=16, isl=1000, osl=500)


def made(engine: str, load: Load = LOAD) -> Terms:
    return Terms(engine=ENGINES[engine], load=load, batch=11, decode_s=10e-3, prompt_s=60e-3,
                 extra_s=50e-3, prompts=10 / 500, decode_kernels=400,
                 prompt_kernels=600)  # fmt: skip


def test_an_output_token_by_hand() -> None:
    step = 10e-3 + 1e-3 + 11e-5
    assert tpot_s(made("vllm"), MADE) == pytest.approx(step + 10 / 500 * 54e-3)
    apart = 10e-3 + 2e-3 + 11e-5 + 10 / 500 * (50e-3 + 2e-3 + 4e-3)
    assert tpot_s(made("sglang"), MADE) == pytest.approx(apart)
    first = 60e-3 + 1e-3 + 600 * 5e-5 + step / 2
    assert ttft_s(made("vllm"), MADE) == pytest.approx(first)


def test_what_a_run_does_to_its_tokens() -> None:
    tenth, held = replace(LOAD, sent_frac=0.1), replace(LOAD, wait_steps=20)
    assert tpot_s(made("vllm"), MADE) - tpot_s(made("vllm", tenth), MADE) == pytest.approx(9.9e-5)
    step = 10e-3 + 1e-3 + 11e-5
    waited = ttft_s(made("vllm", held), MADE) - ttft_s(made("vllm"), MADE)
    assert waited == pytest.approx(20 * step)
    eager = replace(LOAD, graphs=False)  # 400 launches of 50 us take 20 ms
    assert tpot_s(made("vllm", eager), MADE) == pytest.approx(tpot_s(made("vllm"), MADE) + 10e-3)


def test_parts_add_up() -> None:
    found = terms(served(tp=2), LOAD)
    assert sum(tpot_parts(found).values()) == pytest.approx(tpot_s(found))
    assert sum(tpot_parts(made("sglang"), MADE).values()) == pytest.approx(
        tpot_s(made("sglang"), MADE)
    )
    assert sum(ttft_parts(found).values()) == ttft_s(found)


def test_an_engine_never_fitted_is_refused() -> None:
    with pytest.raises(InputError, match="no host time of trtllm is known"):
        tpot_s(made("trtllm"), MADE)


def test_no_more_requests_run_than_fit() -> None:
    setting = served()  # 80 GB with 16 GB of weights: about 340 requests of 1250 tokens
    load = replace(LOAD, concurrency=10_000)
    most = capacity(setting, load)
    room = 0.9 * setting.device.hbm.capacity_bytes - weight_bytes(setting)
    assert most == pytest.approx(room / cache_bytes(setting, 1250 + 7.5))  # half a page is empty
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
    in_step = replace(LOAD, together=True)
    assert terms(served(), in_step).prompts == 15 / 500
    assert terms(served(name="sglang"), in_step).prompts == 0.5 * 15 / 500
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
    assert set(HOST.step_s) == set(HOST.launch_s) == set(ENGINES)
    assert all(0 <= s < 5e-3 for s in HOST.step_s.values())
    assert all(1e-6 < s < 1e-3 for s in HOST.launch_s.values())
    assert 0 <= HOST.sequence_s < 1e-4 and 0 <= HOST.prompt_s < 0.05


def test_stages_share_layers_and_keep_each_other_busy() -> None:
    whole, halves = served(), served(pp=2)
    busy = Load(concurrency=64, isl=1000, osl=500, disaggregated=True)
    one, two = terms(whole, busy), terms(halves, busy)
    half = terms(whole, replace(busy, concurrency=32))
    assert two.decode_s > half.decode_s  # two slots of 32, one after the other in either stage
    assert two.decode_s == pytest.approx(half.decode_s, rel=0.1)
    assert two.decode_s < 1.5 * one.decode_s
    lonely = terms(halves, replace(busy, concurrency=1))
    assert lonely.decode_s > terms(whole, replace(busy, concurrency=1)).decode_s
    assert terms(halves, replace(busy, disaggregated=False)).extra_s < 0.6 * (
        terms(whole, replace(busy, disaggregated=False)).extra_s
    )
    with pytest.raises(InputError, match="33 stages are more than 32 layers"):
        served(pp=33)


@pytest.mark.parametrize(("concurrency", "isl", "osl"), [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_loads_below_one_are_refused(concurrency: int, isl: int, osl: int) -> None:
    with pytest.raises(InputError, match="none may be below 1"):
        Load(concurrency=concurrency, isl=isl, osl=osl)


def closed_loop(batch: int, isl: int, osl: int, *, mixes: bool, even: bool) -> float:
    """Prompts met, as a share of the others, in a closed loop of 20 rounds with unit costs.

    A scheduler as engines describe theirs: 8192 tokens a pass, first come first served; decoding 1
    a pass, a prompt 10. `even`: outputs between 0.8 and 1 of `osl`.
    """
    rng, clock = random.Random(1), 0.0
    done: list[float] = []
    waiting = [isl] * batch  # tokens left of each prompt
    running: list[list[float]] = []  # tokens left, tokens in all, time of the first
    while len(done) < 20 * batch:
        room = 8192 if waiting and not mixes else 8192 - len(running)
        fresh, prompt = 0, 0
        while waiting and room:
            taken = min(room, waiting[0])
            waiting[0] -= taken
            room, prompt = room - taken, prompt + taken
            if not waiting[0]:
                waiting.pop(0)
                fresh += 1
        decodes = running if mixes or not prompt else []
        clock += (1 if decodes else 0) + 10 * prompt / isl
        for one in decodes:
            one[0] -= 1
        for one in [one for one in decodes if one[0] == 0]:
            running.remove(one)
            done.append((clock - one[2]) / (one[1] - 1))
            waiting.append(isl)
        for _ in range(fresh):
            length = rng.randint(osl * 4 // 5, osl) if even else osl
            running.append([length - 1, length, clock])
    mean_osl = 0.9 * osl if even else osl
    settled = done[len(done) // 2 :]
    return (sum(settled) / len(settled) - 1) / (10 * (batch - 1) / mean_osl)


@pytest.mark.parametrize(("batch", "isl", "osl"), [(16, 8192, 200), (32, 4096, 200)])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("together", [True, False])
def test_the_prompts_met_are_those_of_a_closed_loop(
    batch: int, isl: int, osl: int, engine: str, together: bool
) -> None:
    load = Load(concurrency=batch, isl=isl, osl=osl, together=together)
    told = terms(served(name=engine), load).prompts * osl / (batch - 1)
    mixes = ENGINES[engine].mixes
    assert told == pytest.approx(
        closed_loop(batch, isl, osl, mixes=mixes, even=not together), abs=0.1
    )
