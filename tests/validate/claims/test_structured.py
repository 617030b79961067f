"""Claims on cascades and structures: formulas confirmed by counts, or refuted."""

from __future__ import annotations

import pytest

from validate.claims import structured
from validate.claims.claim import Claim
from validate.claims.evaluate import NOT_MODELLED, OFF, REPRODUCED, evaluate

FORMULAS = {
    "longheads": "O(N k l d)", "routing_transformer": "nkd+n^2 d/k, k*=sqrt(n)",
    "combiner": "O(L log L) or O(L sqrt L)", "fit": "O(L^(4/3))",
    "seqboat_sma": "O(rL w d) linear inference",
}  # fmt: skip


def claim(system: str, published: object = None, **setting: object) -> Claim:
    return Claim(
        id=system, family="sparse_attention", quantity="complexity", unit="formula",
        kind="complexity", published=published, setting=setting,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(("system", "formula"), FORMULAS.items())
def test_formulas_are_confirmed_by_the_counts(system: str, formula: str) -> None:
    assert evaluate(claim(system, formula, formula=formula)).status == REPRODUCED


def test_a_formula_of_another_order_is_not_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "_exponent", lambda flops: 2.0)
    verdict = evaluate(claim("fit", FORMULAS["fit"], formula=FORMULAS["fit"]))
    assert verdict.status == OFF and "exponents" in str(verdict.predicted)
    other = evaluate(claim("fit", "O(L)", formula="O(L)"))
    assert other.status == NOT_MODELLED and "no rule for the formula" in other.reason


def test_fusemax_tells_passes_steps_and_utilisation() -> None:
    def ask(quantity: str, **setting: object) -> object:
        one = Claim(id="fusemax", family="attention", quantity=quantity, unit="", kind="mfu",
                    published=1.0, setting=setting)  # fmt: skip
        return structured.evaluate_fusemax(one)

    assert ask("passes over M rank") == (1.0, 3.0)
    assert ask("artifact op costs per einsum") == (1.0, 7.0)
    assert ask("2D array utilisation", seq="long") == 1.0
    assert 0 < ask("2D array utilisation", seq=128) < 0.6  # type: ignore[operator]


@pytest.mark.parametrize(
    ("system", "setting", "reason"),
    [
        ("fusemax", {}, "no device of the catalogue"),
        ("routing_transformer", {"layers": 22}, "states a setting and no figure"),
        ("xl3m", {"hw": "8x Ascend 910B"}, "in no catalogue"),
        ("infllm", {}, "setting incomplete"),
    ],
)
def test_the_rest_says_why_not(system: str, setting: dict[str, object], reason: str) -> None:
    verdict = evaluate(claim(system, 1.0, **setting))
    assert verdict.status == NOT_MODELLED and reason in verdict.reason
