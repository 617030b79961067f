"""Claims on Lightning Attention, on settings of our own."""

from __future__ import annotations

import pytest

from validate.claims.claim import Claim, Value
from validate.claims.evaluate import NOT_MODELLED, evaluate
from validate.claims.lightning import ASSUMED, FLASH, LEFT, RIGHT, Run
from validate.claims.lightning_models import FAMILIES, LLAMA, TRANSNORMER, Map, parameters, sized

STEP = {"gpu": "A100-80GB", "n_gpus": 2, "dtype": "bf16 (metaseq/FSDP)", "model": "1B"}
SHAPE = {"gpu": "A100-80GB", "batch": 1, "heads": 16, "head_dim": 128}


def verdict(system: str, quantity: str, unit: str, setting: dict[str, object]) -> Value:
    found = evaluate(
        Claim(
            id=f"lightning_attention_{system}", family="linear_attention", quantity=quantity,
            unit=unit, kind="latency", published=1.0, setting=setting,
        )
    )  # fmt: skip
    assert found.status != NOT_MODELLED, found.reason
    return found.predicted


def step(**setting: object) -> Value:
    return verdict("2", "training throughput", "tokens/GPU/s", STEP | setting)


def rate(**setting: object) -> float:
    found = step(**setting)
    assert isinstance(found, float)
    return found


@pytest.mark.parametrize("model", ["0.4B", "1B", "3B"])
def test_lightning_2_is_as_fast_at_any_length(model: str) -> None:
    rates = [rate(model=model, seq=seq, impl=RIGHT) for seq in (1024, 3072, 12288, 32768)]
    assert max(rates) < 1.12 * min(rates)


@pytest.mark.parametrize("impl", [FLASH, LEFT])
def test_the_left_products_slow_down(impl: str) -> None:
    rates = [rate(seq=seq, impl=impl) for seq in (1024, 4096, 16384, 65536)]
    assert rates[0] > rates[1] > rates[2] > 2 * rates[3]


def test_time_a_token_grows_by_the_scores_alone() -> None:
    """Twice the length, twice what attention adds a token: 2 h flops a key, layer and product."""
    a, b, c = (1 / rate(seq=seq, impl=FLASH) for seq in (8192, 16384, 32768))
    assert (c - b) / (b - a) == pytest.approx(2, rel=0.03)
    flops = 16 * 2 * 2048 * 2 * (1 + 1 + 2.5)  # a token and key: all keys, masked or not
    assert flops * 16384 / (c - b) == pytest.approx(190e12 / ASSUMED["run"].value, rel=0.1)


def test_memory_ends_the_table() -> None:
    assert step(seq=94208, impl=RIGHT) == "OOM"
    assert isinstance(step(seq=94208, impl=RIGHT, n_gpus=8), float)
    assert isinstance(step(seq=90112, impl=RIGHT, model="0.4B"), float)
    assert step(seq=61440, impl=LEFT, model="3B") == step(seq=131072, impl=FLASH) == "OOM"


def test_what_a_step_holds_by_hand() -> None:
    model = sized("1B")
    assert model is not None
    on = Claim(
        id="", family="", quantity="", unit="", kind="", published=None, setting={"gpu": "A100"}
    ).device()
    run = Run(model=model, kind=RIGHT, batch=1, seq=1000, ranks=4, on=on)
    layer = 5 * 2048**2 + 3 * 2048 * 5632
    states = 18 * (16 * layer + 50272 * 2048) / 4
    assert run.held_bytes() == states + 1000 * (16 * 2048 * 2 + 14 * 50272)


def test_sizes_give_the_parameters_that_the_names_say() -> None:
    for name, least, most in (("0.4B", 0.38e9, 0.39e9), ("3B", 2.8e9, 3e9), ("7B", 6.7e9, 7e9)):
        model = sized(name)
        assert model is not None
        assert least < parameters(model, TRANSNORMER) < most
        assert parameters(model, LLAMA) < parameters(model, TRANSNORMER)
    assert sized("2B") is None


def test_maps_move_the_bytes_they_state() -> None:
    model = sized("1B")
    assert model is not None
    for given in (Map(8, 4), Map(4, 0), Map(0, 4), Map(2, 0), Map(4, 2, ffn=True)):
        width = 5632 if given.ffn else 2048
        moved = given.op(model, 10).work(2**20).bytes
        assert moved == 10 * width * (given.read + given.written)
    # To fp32, square, mean, product, to bf16, times the weight: 36 bytes a norm, forward.
    assert sum(m.read + m.written for m in FAMILIES[LLAMA].forward[:6]) == 36


def test_every_assumption_has_a_unit_and_a_source() -> None:
    assert all(a.unit and a.source and a.value > 0 for a in ASSUMED.values())


def test_work_a_token_is_constant() -> None:
    setting: dict[str, object] = {"model": "1B/3B", "seq": "2K-64K"}
    assert verdict("tnl", "constant training speed", "tokens/GPU/s", setting) == "see setting"
    # Below a block the work a token still grows: the claim does not hold there.
    setting = {"model": "1B", "seq": "16-1024"}
    assert "times the flops" in str(verdict("tnl", "constant speed", "tokens/GPU/s", setting))


def test_gains_over_scores_in_memory_by_hand() -> None:
    for seq, kept in ((1024, 5.0), (4096, 17.0)):
        found = verdict("tnl", "lightning-1 gain", "x", {**SHAPE, "seq": seq})
        assert isinstance(found, tuple)
        assert found[1] == kept  # 1 + n / (2 d)
        assert 1 < found[0] < 6


@pytest.mark.parametrize(
    ("system", "quantity", "setting", "says"),
    [
        ("2", "training throughput", {"seq": 1024}, "no impl"),
        ("2", "training throughput", {"impl": RIGHT}, "no seq"),
        ("2", "training throughput", {"seq": 1024, "impl": "RetNet"}, "no implementation"),
        ("2", "training throughput", {"seq": 1024, "impl": LEFT, "model": "13B"}, "no sizes"),
        ("2", "training throughput", {"seq": 64, "impl": LEFT, "n_gpus": 64}, "several nodes"),
        ("2", "training throughput", {"seq": 64, "impl": LEFT, "dtype": "fp32"}, "16-bit"),
        ("2", "perplexity", {"seq": 1024, "impl": RIGHT}, "no rule"),
        ("tnl", "lightning-1 gain", {}, "no seq"),
        ("tnl", "7B inference throughput", {}, "no batch"),
        ("tnl", "perplexity", {}, "no rule"),
        ("tnl", "constant speed", {"seq": "long"}, "is not a length"),
    ],
)
def test_what_is_not_modelled_says_why(
    system: str, quantity: str, setting: dict[str, object], says: str
) -> None:
    found = evaluate(
        Claim(
            id=f"lightning_attention_{system}", family="linear_attention", quantity=quantity,
            unit="", kind="latency", published=1.0, setting=STEP | setting,
        )
    )  # fmt: skip
    assert found.status == NOT_MODELLED and says in found.reason
