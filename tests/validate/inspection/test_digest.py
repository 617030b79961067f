"""What changes a digest, and what does not."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from validate.inspection.digest import digest, functions
from validate.kernels.spec import Compilation, Launch

KERNEL = '''
import triton
import triton.language as tl

SCALE = tl.constexpr(2)
OTHER = 3


@triton.jit
def helper(x):
    return x * SCALE


@triton.jit
def mine(x_ptr, N: tl.constexpr):
    """A docstring."""
    at = tl.arange(0, N)
    tl.store(x_ptr + at, helper(tl.load(x_ptr + at)))
'''


def made(folder: Path, text: str = KERNEL) -> Any:
    path = folder / "kernel.py"
    path.write_text(text)
    spec = spec_from_file_location("digested", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    import linecache

    linecache.checkcache(str(path))
    return module.mine


def compilation(function: Any, warps: int = 4) -> Compilation:
    return Compilation(
        kernel="mine", function=function, signature={"x_ptr": "*fp32", "N": "constexpr"},
        constants={"N": 64}, launch=Launch(num_warps=warps),
    )  # fmt: skip


def test_helpers_and_constants_are_reached(tmp_path: Path) -> None:
    found = functions(made(tmp_path))
    assert list(found) == ["digested.mine", "digested.helper", "digested.helper:SCALE"]
    assert "docstring" not in found["digested.mine"]


def test_only_what_matters_changes_it(tmp_path: Path) -> None:
    before = digest(compilation(made(tmp_path)))
    for words in (("A docstring.", "Other words."), ("OTHER = 3", "OTHER = 4  # and a comment")):
        assert digest(compilation(made(tmp_path, KERNEL.replace(*words)))) == before
    for words in (("constexpr(2)", "constexpr(5)"), ("x * SCALE", "x + SCALE")):
        assert digest(compilation(made(tmp_path, KERNEL.replace(*words)))) != before
    same = made(tmp_path)
    assert digest(compilation(same)) == before
    assert digest(compilation(same, warps=8)) != before
    assert digest(replace(compilation(same), constants={"N": 128})) != before
    assert digest(replace(compilation(same), aligned=("x_ptr",))) != before
