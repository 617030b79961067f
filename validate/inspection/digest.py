"""What a binary is made from, as one hash: the same in every process, whatever comments say.

The functions a kernel reaches through its module's names (without decorators and docstrings, as
`ast.unparse` writes them), the constants among those names, the signature, the constants, warps
and stages. Triton's own functions are left out: its version stands beside the digest.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Final

from validate.kernels.spec import Compilation

DIGITS: Final = 16
_PLAIN: Final = (int, float, str, bool, type(None))


def digest(shipped: Compilation) -> str:
    """Hex digits that change when the binary might."""
    made_from = {
        "functions": functions(shipped.function),
        "signature": dict(shipped.signature),
        "constants": {name: _value(v) for name, v in shipped.constants.items()},
        "aligned": list(shipped.aligned),
        "warps": shipped.launch.num_warps,
        "stages": shipped.launch.num_stages,
    }
    text = json.dumps(made_from, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def functions(function: Any) -> dict[str, Any]:
    """Source of a jitted function and of all that it reaches, and the values it reads."""
    found: dict[str, Any] = {}
    waiting = [_python(function)]
    while waiting:
        python = waiting.pop()
        name = f"{python.__module__}.{python.__qualname__}"
        if name in found:
            continue
        tree = _bare(python)
        found[name] = ast.unparse(tree)
        for label, value in _reached(tree, python):
            inner = _python(value)
            if inner is not None:
                if not inner.__module__.startswith("triton"):
                    waiting.append(inner)
            elif isinstance(_unwrapped(value), _PLAIN):
                found[f"{name}:{label}"] = _value(value)
    return found


def _python(value: Any) -> Any:
    """The Python function under a jitted or interpreted one; None where there is none."""
    inner = getattr(value, "fn", None)
    return inner if inspect.isfunction(inner) else None


def _unwrapped(value: Any) -> Any:
    """The value inside a `tl.constexpr`."""
    return value.value if type(value).__name__ == "constexpr" else value


def _value(value: Any) -> Any:
    bare = _unwrapped(value)
    if _python(bare) is not None:
        return functions(bare)
    return repr(bare)


def _bare(python: Any) -> ast.FunctionDef:
    """The function's tree without decorators and docstring."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(python))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:] or [ast.Pass()]
    return tree


def _reached(tree: ast.AST, python: Any) -> Iterator[tuple[str, Any]]:
    """Values of the module's names, and of one attribute of its modules, that a function reads."""
    closed = inspect.getclosurevars(python)
    names: Mapping[str, Any] = {**python.__globals__, **closed.nonlocals}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names:
            yield node.id, names[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = names.get(node.value.id)
            if inspect.ismodule(owner) and not owner.__name__.startswith("triton"):
                yield f"{node.value.id}.{node.attr}", getattr(owner, node.attr, None)
