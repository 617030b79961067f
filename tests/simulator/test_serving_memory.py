"""Memory of a serving rank: pages, what they waste, what fits; by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.dtypes import FP8
from hwmodels.errors import InputError
from simulator.serving_kernels import ENGINES, Formats, Linear
from simulator.serving_memory import MEMORY_FRAC, cache_bytes, held_bytes, paged, weight_bytes
from tests.simulator.test_serving_kernels import LATENT, LLAMA, served

TOKEN = 32 * 2 * 8 * 128 * 2  # layers, keys and values, heads, width, bytes


def test_cache_and_weights_of_llama_by_hand() -> None:
    one = served()
    assert cache_bytes(one, 1000) == 1000 * TOKEN
    assert cache_bytes(served(tp=4), 1000) == 32 * 2 * 2 * 128 * 1000 * 2
    windowed = served(replace(LLAMA, window=100, num_windowed_layers=16))
    assert cache_bytes(windowed, 1000) == 2 * 8 * 128 * 2 * (16 * 1000 + 16 * 100)
    assert cache_bytes(served(LATENT, tp=4, moe_tp=4), 10) == 32 * 576 * 10 * 2
    assert weight_bytes(one) == pytest.approx(2 * 8.03e9, rel=1e-3)
    half = Linear(dtype=FP8)
    narrow = served(formats=Formats(attention=half, mlp=half))
    assert weight_bytes(narrow) == pytest.approx(6.98e9 + 2 * 2 * 128256 * 4096, rel=1e-3)


def test_pages_of_llama_by_hand() -> None:
    one = served()
    found = paged(one, isl=1000, osl=500)
    room = MEMORY_FRAC * one.device.hbm.capacity_bytes - weight_bytes(one)
    assert (found.page_tokens, found.page_bytes) == (16, 16 * TOKEN)
    assert found.num_pages == int(room / (16 * TOKEN))
    assert found.safe_requests == int(room / (94 * 16 * TOKEN))  # 1500 tokens: 94 pages
    assert found.most_requests == pytest.approx(room / ((1250 + 7.5) * TOKEN))
    assert found.waste_frac == pytest.approx(7.5 / 1257.5)
    assert paged(served(name="sglang"), isl=1000, osl=500).waste_frac == 0  # pages of one token


def test_stages_hold_their_layers_and_one_end() -> None:
    whole, half = served(), served(pp=2)
    assert cache_bytes(half, 100) == cache_bytes(whole, 100) / 2
    ends = 128256 * 4096 * 2
    assert weight_bytes(half) == pytest.approx((weight_bytes(whole) - 2 * ends) / 2 + ends)
    assert cache_bytes(served(pp=5), 100) == 100 * TOKEN * 7 / 32  # the fullest of five has seven


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="weights do not fit"):
        paged(served(replace(LLAMA, num_layers=320)), isl=10, osl=10)


@given(
    length=st.integers(1, 100_000),
    name=st.sampled_from(sorted(ENGINES)),
)
def test_a_request_wastes_less_than_a_page(length: int, name: str) -> None:
    setting = served(name=name)
    page = cache_bytes(setting, setting.engine.page_tokens)
    used, held = cache_bytes(setting, length), held_bytes(setting, length)
    assert used <= held < used + page
