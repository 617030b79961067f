"""One binary on request: a user's own kernel from a file, or one that is shipped."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hwmodels.errors import InputError, UnknownNameError
from validate.inspection import ledger
from validate.inspection.binary import check_arch, compiled, first_line, require_triton

ALIGNED: Final = ":16"
"""Ends the type of an argument that is divisible by 16."""
_TYPE: Final = re.compile(
    r"^\*{0,2}(?:i1|[iu](?:8|16|32|64)|fp16|bf16|fp32|f32|fp64|fp8e4nv|fp8e4b8|fp8e4b15|fp8e5"
    r"|fp8e5b16)(?::16)?$|^tensordesc<\w+\[[\d, ]+\]>$"
)


def own(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A user's own kernel: {path, function, arch, signature, constants, num_warps, num_stages}."""
    version = require_triton()
    check_arch(asked["arch"])
    function = _function(Path(asked["path"]), asked["function"])
    signature, aligned = _signature(function, asked["signature"], asked["constants"])
    found = compiled(
        function, signature=signature, constants=asked["constants"], aligned=aligned,
        num_warps=asked["num_warps"], num_stages=asked["num_stages"], arch=asked["arch"],
    )  # fmt: skip
    return {"triton": version, "found": _with_lines(found)}


def shipped(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Binaries that are shipped, compiled afresh: {kernel, arch, config}."""
    version = require_triton()
    check_arch(asked["arch"])
    from validate.inspection import pool
    from validate.inspection.digest import digest
    from validate.kernels import registry

    registry.spec(asked["kernel"])
    made = []
    for (kernel, name), one in pool.shipped().items():
        if kernel != asked["kernel"] or not one.launch.suits(asked["arch"]):
            continue
        if asked["config"] and asked["config"] not in name:
            continue
        found = pool.compile_shipped(one, asked["arch"])
        made.append(
            {
                "kernel": kernel, "name": name, "arch": asked["arch"], "digest": digest(one),
                "triton": version, "found": _with_lines(found),
            }
        )  # fmt: skip
    return {"entries": made}


def _with_lines(found: Any) -> dict[str, Any]:
    """Figures, and the source lines that the record leaves out."""
    made = ledger.plain(found)
    made["source"] = [x | {"line": loop.line} for x, loop in zip(
        made["source"], found.source, strict=True)]  # fmt: skip
    return made


def _function(path: Path, name: str) -> Any:
    """The jitted function of that name in a Python file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give path/to/kernel.py:function")
    _must_define(path, name)
    spec = importlib.util.spec_from_file_location("ridgeplan_own_kernel", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: is no Python file; give path/to/kernel.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            f"{path}: does not import: {type(error).__name__}: {first_line(error)}"
        ) from None
    found = getattr(module, name, None)
    while found is not None and not hasattr(found, "arg_names"):
        found = getattr(found, "fn", None)
    inner = getattr(found, "fn", None)
    while inner is not None and hasattr(inner, "arg_names"):  # autotune and heuristics wrap it
        found, inner = inner, getattr(inner, "fn", None)
    if found is None or not hasattr(found, "params"):
        raise InputError(f"{path}: {name} is no Triton kernel; decorate it with @triton.jit")
    return found


def _must_define(path: Path, name: str) -> None:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path}: is no Python: {first_line(error)}") from None
    defined = [x.name for x in tree.body if isinstance(x, ast.FunctionDef)]
    if name not in defined:
        raise UnknownNameError(
            f"function of {path}", name, defined, f"it defines {', '.join(defined) or 'none'}"
        )


def _signature(
    function: Any, given: Mapping[str, str], constants: Mapping[str, Any]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Every argument's type in order, and the aligned ones: pointers, and types ending in :16."""
    names = list(function.arg_names)
    for name in (*given, *constants):
        if name not in names:
            raise UnknownNameError("argument", name, names, f"it takes {', '.join(names)}")
    both = sorted(set(given) & set(constants))
    lacking = [n for n in names if n not in given and n not in constants]
    for name, kind in given.items():
        if not _TYPE.match(kind):
            raise InputError(
                f"{name} = '{kind}' is no type of Triton's; give *bf16, *fp32, i32, i64 or i32:16"
            )
    if both:
        raise InputError(f"{both[0]} is in the signature and among the constants; give it once")
    if lacking:
        constant = {p.name for p in function.params if p.is_constexpr}
        where = "--constants" if lacking[0] in constant else "--signature"
        raise InputError(f"{function.__name__} lacks {', '.join(lacking)}; add to {where}")
    signature = {n: "constexpr" if n in constants else given[n].removesuffix(ALIGNED)
                 for n in names}  # fmt: skip
    aligned = tuple(n for n in given if given[n].startswith("*") or given[n].endswith(ALIGNED))
    return signature, tuple(n for n in names if n in aligned)
