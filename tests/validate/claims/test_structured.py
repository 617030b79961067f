"""Claims on cascades and structures: formulas confirmed by counts, or refuted."""

from __future__ import annotations

import pytest

from validate.claims import structured
from validate.claims.claim import Claim, NotModelledError
from validate.claims.evaluate import NOT_MODELLED, evaluate

FORMULAS = {
    "longheads": "O(N k l d)", "routing_transformer": "nkd+n^2 d/k, k*=sqrt(n)",
    "combiner": "O(L log L) or O(L sqrt L)", "fit": "O(L^(4/3))",
    "seqboat_sma": "O(rL w d) linear inference",
}  # fmt: skip

WRONG = {
    "longheads": ("O(N k d)", "attention does not grow as N k d"),
    "routing_transformer": ("nkd+n^2 d/k, k=n^(1/3)", "least at k = n^0.500"),
    "combiner": ("O(L sqrt L)", "logsparse grow otherwise"),
    "fit": ("O(L^(5/4))", "O(L^1.33)"),
    "seqboat_sma": ("O(L w d)", "attention does not grow as L w d"),
}  # fmt: skip


def claim(system: str, published: object = None, **setting: object) -> Claim:
    return Claim(
        id=system, family="sparse_attention", quantity="complexity", unit="formula",
        kind="complexity", published=published, setting=setting,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(("system", "formula"), FORMULAS.items())
def test_formulas_are_confirmed_by_the_counts(system: str, formula: str) -> None:
    assert evaluate(claim(system, formula=formula)).predicted == formula


@pytest.mark.parametrize(("system", "wrong"), WRONG.items())
def test_formulas_of_another_order_are_not(system: str, wrong: tuple[str, str]) -> None:
    formula, found = wrong
    assert evaluate(claim(system, formula, formula=formula)).predicted == found


def test_a_class_is_told_from_its_neighbours() -> None:
    lengths = [4**n for n in range(6, 13)]
    assert structured.grows_as("L^(4/3)", lambda n: 2 * n ** (4 / 3) + 9 * n, lengths)
    for other in ("L log L", "L sqrt L", "L^2"):
        assert not structured.grows_as(other, lambda n: 2 * n ** (4 / 3) + 9 * n, lengths)


def test_a_formula_that_names_no_size_is_given_up() -> None:
    with pytest.raises(NotModelledError, match="formula 'N z'"):
        structured.formula_at("N z", {"N": 4})
    with pytest.raises(NotModelledError, match="names no class"):
        structured.classes("linear")


def ask(quantity: str, **setting: object) -> object:
    one = Claim(id="fusemax", family="attention", quantity=quantity, unit="", kind="mfu",
                published=None, setting=setting)  # fmt: skip
    return structured.evaluate_fusemax(one)


def test_fusemax_tells_passes_steps_and_utilisation() -> None:
    assert ask("passes over M rank") == (1.0, 3.0)
    assert ask("passes over M rank", two_pass=0, flash2=0) == (1.0, 2.0)
    assert ask("artifact op costs per einsum") == (1.0, 7.0)
    assert ask("2D array utilisation", seq="long") == 1.0
    assert 0 < ask("2D array utilisation", seq=128) < 0.6  # type: ignore[operator]


@pytest.mark.parametrize(
    ("system", "setting", "reason"),
    [
        ("fusemax", {}, "no device of the catalogue"),
        ("routing_transformer", {"layers": 22}, "states a setting and no figure"),
        ("combiner", {}, "setting incomplete: no formula"),
        ("xl3m", {"hw": "8x Ascend 910B"}, "no length follows from it"),
        ("infllm", {}, "setting incomplete"),
    ],
)
def test_the_rest_says_why_not(system: str, setting: dict[str, object], reason: str) -> None:
    verdict = evaluate(claim(system, 1.0, **setting))
    assert verdict.status == NOT_MODELLED and reason in verdict.reason
