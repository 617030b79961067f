"""Signatures of shipped binaries, in the order of the jitted function's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from validate.kernels.spec import Compilation, Launch


def compilation(
    kernel: str,
    function: Any,
    launch: Launch,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    label: str = "",
) -> Compilation:
    """A binary: `pointers` give the formats of some arguments in Triton's words ('bf16'),
    `constants` the constexprs; what is left are 32-bit sizes. Pointers and sizes are taken as
    divisible by 16, as a launch finds them on whole tiles."""
    kinds = {name: f"*{kind}" for name, kind in pointers.items()}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in function.arg_names}
    params = getattr(function, "params", ())  # an interpreted function has none
    plain = {*constants, *(p.name for p in params if p.do_not_specialize)}
    aligned = tuple(name for name in signature if name not in plain)
    unknown = sorted(set(kinds) - set(signature))
    if unknown:
        raise ValueError(f"{function.__name__} has no arguments {unknown}")
    return Compilation(
        kernel=kernel, function=function, signature=signature, constants=dict(constants),
        launch=launch, aligned=aligned, label=label,
    )  # fmt: skip
