"""Claims on state spaces: orders that hold and orders that do not, ratios, incomplete settings."""

from __future__ import annotations

from typing import Any

import pytest

from validate.claims.claim import Claim, Value
from validate.claims.evaluate import NOT_MODELLED, OFF, REPRODUCED, evaluate
from validate.claims.state_space import (
    SEE_SETTING,
    ast_flops,
    evaluate_lmuformer,
    evaluate_lssl,
    evaluate_s4,
    evaluate_spacetime,
    follows,
)
from workloads.ops.legendre_memory import LmuFormer


def claim(system: str, quantity: str, published: Value = None, **fields: Any) -> Claim:
    kind, setting = fields.pop("kind", "speedup"), fields.pop("setting", {})
    return Claim(
        id=system, family="scan_ssm", quantity=quantity, unit="x", kind=kind,
        published=published, setting=setting, **fields,
    )  # fmt: skip


def cost(**setting: str) -> Claim:
    return claim("lssl", "cost", SEE_SETTING, kind="complexity", setting=setting)


# ---- orders --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [("kernel_flops", "O(N^2 L) naive"), ("kernel_flops", "O~(N+L) structured"),
     ("memory", "O(N L)"), ("recurrent_step", "O(N^2)")],
)  # fmt: skip
def test_orders_that_the_counts_have(name: str, text: str) -> None:
    assert evaluate_lssl(cost(**{name: text})) == SEE_SETTING


@pytest.mark.parametrize(
    ("name", "text"),
    [("kernel_flops", "O(N L) naive"), ("kernel_flops", "O(N^3 L) naive"),
     ("kernel_flops", "O(N^2 L^2) naive"), ("kernel_flops", "O(N L) structured"),
     ("memory", "O(N^2 L)"), ("memory", "O(N+L)"), ("recurrent_step", "O(N)")],
)  # fmt: skip
def test_orders_that_the_counts_do_not_have(name: str, text: str) -> None:
    verdict = evaluate(cost(**{name: text}))
    assert verdict.status == OFF
    assert verdict.predicted == f"{name} is not {text}"


def test_a_cost_without_orders_or_with_unknown_ones() -> None:
    assert evaluate(cost(kernel_flops="O of N (some)")).status == NOT_MODELLED
    assert "no count is called" in evaluate(cost(latency="O(N)")).reason


def companion(formula: str) -> Claim:
    setting = {"formula": formula}
    return claim("spacetime", "memory", formula, kind="complexity", setting=setting)


def test_a_companions_orders_by_any_names() -> None:
    for text in ("O(d+l) vs O(d l)", "O(N + L)", "O(N L)"):
        assert evaluate(companion(text)).status == REPRODUCED
    assert evaluate_spacetime(companion("O(d^2 l)")) == "counts are not O(d^2 l)"
    assert "does not name" in evaluate(companion("O(d)")).reason


def test_an_order_that_is_drowned_is_not_seen() -> None:
    assert not follows("N", lambda at: at["N"] + 1e9, "N", {}, (64, 128, 256))


# ---- ratios --------------------------------------------------------------------------------

SHAPE = {"seq": 2048, "batch": 4, "hidden_dims": [64, 256]}


def test_a_naive_kernel_costs_more_the_wider_it_is() -> None:
    setting = SHAPE | {"gpu": "A100"}
    low, high = evaluate_s4(claim("s4", "S4 vs LSSL training step", setting=setting))  # type: ignore[misc]
    assert 1 < low < high
    one = claim("s4", "S4 vs LSSL training step", setting=setting | {"hidden_dims": 256})
    assert evaluate_s4(one) == pytest.approx(high)
    memory = evaluate_s4(claim("s4", "S4 vs LSSL memory", setting=SHAPE))
    assert isinstance(memory, tuple)
    assert 1 < memory[0] < memory[1]


def test_a_transformer_loses_with_the_length() -> None:
    setting = {"gpu": "A100", "batch": 8, "hidden": 256, "heads": 4, "seq": [512, 8192]}
    found = evaluate_s4(claim("s4", "speed vs Transformer", setting=setting))
    assert isinstance(found, tuple)
    assert found[1] > 2 * found[0]
    new = {"gpu": "A100", "batch": 64, "hidden": 512, "heads": 8, "new_tokens": 4096}
    longer = evaluate_s4(claim("s4", "generation speedup", setting=new | {"new_tokens": 16384}))
    shorter = evaluate_s4(claim("s4", "generation speedup", setting=new))
    assert isinstance(longer, float)
    assert isinstance(shorter, float)
    assert longer > 2 * shorter > 2


def test_a_speech_transformer_over_lmuformer() -> None:
    both = evaluate_lmuformer(claim("lmuformer", "params/FLOPs", kind="ratio"))
    assert isinstance(both, tuple)
    assert both[0] == pytest.approx(85395491 / LmuFormer().num_parameters())
    assert evaluate_lmuformer(claim("lmuformer", "FLOPs", kind="ratio")) == both[1]
    assert evaluate_lmuformer(claim("lmuformer", "parameters", kind="ratio")) == both[0]
    tokens, d = 146, 768
    products = 12 * 2 * tokens * 12 * d * d
    assert products < ast_flops(128, 128, 35) < 1.05 * products
    longer = claim("lmuformer", "FLOPs", setting={"frames": 1024})
    assert evaluate_lmuformer(longer) != both[1]


# ---- incomplete ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "quantity", "setting", "why"),
    [("s4", "S4 vs LSSL training step", {"hidden_dims": [128]}, "no seq, batch"),
     ("s4", "S4 vs LSSL training step", SHAPE, "no gpu"),
     ("s4", "S4 vs LSSL memory", {"seq": 64, "batch": 1}, "no hidden"),
     ("s4", "S4 vs LSSL memory", SHAPE | {"hidden_dims": ["x"]}, "is not a size"),
     ("s4", "speed vs Transformer", {"seq": [1024]}, "no batch"),
     ("s4", "generation speedup", {"task": "images"}, "no batch"),
     ("s4", "accuracy", {}, "no rule"),
     ("lssl", "accuracy", {}, "no rule"),
     ("spacetime", "training time reduction", {"lstm": 1}, "no gpu"),
     ("lmuformer", "accuracy", {}, "no rule"),
     ("lmuformer", "flops", {"frames": 8}, "hold no patch")],
)  # fmt: skip
def test_settings_that_fix_nothing(
    system: str, quantity: str, setting: dict[str, Any], why: str
) -> None:
    verdict = evaluate(claim(system, quantity, 2.0, setting=setting))
    assert verdict.status == NOT_MODELLED
    assert why in verdict.reason
