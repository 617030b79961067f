"""Formulas as papers print them, evaluated at sizes: one-letter names, products without a sign."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Final

from validate.claims.claim import not_modelled

_OPERATORS: Final[Mapping[type[ast.operator], Callable[[float, float], float]]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.Pow: operator.pow,
}  # fmt: skip


def formula_value(text: str, sizes: Mapping[str, float]) -> float:
    """A formula as papers print it: one-letter sizes, products without a sign, ^ for powers.

    >>> formula_value("[P^2/2 + G(RP + R^2/2)] / [G (P+R)^2/2]", {"P": 2, "R": 1, "G": 2})
    0.7777777777777778
    """
    plain = text.replace("[", "(").replace("]", ")").replace("^", "**").replace(" ", "")
    signed = re.sub(r"(?<=[A-Za-z0-9)])(?=[A-Za-z(])", "*", plain)
    try:
        return _value(ast.parse(signed, mode="eval").body, sizes)
    except (SyntaxError, KeyError):
        not_modelled(f"setting unclear: formula '{text}'")


def _value(node: ast.expr, sizes: Mapping[str, float]) -> float:
    if isinstance(node, ast.Name):
        return float(sizes[node.id])
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    raise SyntaxError
