"""Claims on scans: orders confirmed or refuted by counts, speedups where a setting is whole."""

from __future__ import annotations

from typing import Any

import pytest

from validate.claims import scans
from validate.claims.claim import Claim, NotModelledError
from validate.claims.evaluate import NOT_MODELLED, OFF, REPRODUCED, evaluate
from validate.claims.structured import formula_at


def claim(system: str, quantity: str, kind: str = "complexity", **setting: Any) -> Claim:
    published = setting.pop("published", None)
    return Claim(
        id=system, family="scan_ssm", quantity=quantity, unit=setting.pop("unit", "x"),
        kind=kind, published=published, setting=setting,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("quantity", "setting"),
    [
        ("inference memory", {"aaren": "O(1)", "transformer": "O(N) KV"}),
        ("cumulative time", {"aaren": "O(N)", "transformer_kv": "O(N^2)"}),
        ("inference memory", {"aaren": "O(1)"}),
    ],
)
def test_orders_of_a_stream_are_confirmed(quantity: str, setting: dict[str, str]) -> None:
    assert scans.evaluate_aaren(claim("aaren", quantity, **setting)) == "see setting"


@pytest.mark.parametrize(
    ("quantity", "setting", "said"),
    [
        ("inference memory", {"aaren": "O(N)"}, "grows 1 times"),
        ("inference memory", {"transformer": "O(N^2)"}, "grows 4 times"),
        ("cumulative time", {"aaren": "O(N log N)"}, "not O(N log N)"),
        ("cumulative time", {"transformer_kv": "O(N)"}, "grows 16 times"),
    ],
)
def test_other_orders_are_refuted(quantity: str, setting: dict[str, str], said: str) -> None:
    one = claim("aaren", quantity, published="see setting", **setting)
    verdict = evaluate(one)
    assert verdict.status == OFF and said in str(verdict.predicted)


@pytest.mark.parametrize("order", ["log L", "L", "L log L", "L^2", "sqrt(L)"])
def test_an_order_is_told_from_the_others(order: str) -> None:
    orders = ["1", "log L", "sqrt(L)", "L", "L log L", "L^2"]
    count = lambda n: 3 * formula_at(order, {"L": n}) + 2  # noqa: E731
    assert [o for o in orders if scans.has_order(o, count)] == [order]


def test_a_query_token_adds_its_width() -> None:
    one = claim("aaren", "parameter overhead", "ratio", unit="%", aaren=1_000_512,
                transformer=1_000_000)  # fmt: skip
    assert scans.evaluate_aaren(one) == pytest.approx(0.0512)


@pytest.mark.parametrize("text", ["O(log L) on grids", "O(log max(W,H))"])
def test_depth_of_grids_is_confirmed(text: str) -> None:
    verdict = evaluate(claim("plstm", "parallel depth", published=text, formula=text))
    assert verdict.status == REPRODUCED


@pytest.mark.parametrize("text", ["O(L)", "O(sqrt(L))", "O(1)"])
def test_other_depths_are_refuted(text: str) -> None:
    verdict = evaluate(claim("plstm", "parallel depth", published=text, formula=text))
    assert verdict.status == OFF and "depth of a grid is not" in str(verdict.predicted)


def test_depth_of_one_grid_is_a_number() -> None:
    assert scans.evaluate_plstm(claim("plstm", "parallel depth", width=14, height=14)) == 8
    assert scans.evaluate_plstm(claim("plstm", "parallel depth", width=4096)) == 12


@pytest.mark.parametrize(
    ("system", "quantity", "setting", "missing"),
    [
        ("convs5", "training speed vs ConvLSTM", {"gpu": "A100"}, "no batch, frames"),
        ("convs5", "sampling speed vs Transformer", {}, "transformer"),
        ("s5_rl", "wall-clock speed", {"hw": "TPU"}, "no batch, seq, hidden"),
        ("s5_rl", "wall-clock speed", {"batch": 8, "seq": 64, "hidden": 64}, "no gpu"),
        ("plstm", "parallel depth", {}, "no formula"),
        ("aaren", "inference memory", {}, "no order"),
    ],
)
def test_incomplete_settings_are_given_up(
    system: str, quantity: str, setting: dict[str, Any], missing: str
) -> None:
    kind = "complexity" if system in ("plstm", "aaren") else "speedup"
    verdict = evaluate(claim(system, quantity, kind, **setting))
    assert verdict.status == NOT_MODELLED
    assert "setting incomplete" in verdict.reason and missing in verdict.reason


def test_what_no_rule_knows_is_given_up() -> None:
    with pytest.raises(NotModelledError, match="no rule for 'accuracy'"):
        scans.evaluate_aaren(claim("aaren", "accuracy"))


def test_whole_settings_give_speedups_that_grow_with_the_length() -> None:
    video = {"gpu": "A100", "batch": 8, "height": 16, "width": 16, "channels": 64, "state": 64}
    agent = {"gpu": "A100", "batch": 16, "hidden": 256}
    for system, setting, length in (("convs5", video, "frames"), ("s5_rl", agent, "seq")):
        run = getattr(scans, f"evaluate_{system}")
        few, many = (
            run(claim(system, "speed vs a loop", "speedup", **setting, **{length: n}))
            for n in (32, 512)
        )
        assert 1 < few < many
