"""Reads what `kernels` commands are asked: an architecture, a kernel, its types and constants."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from cli.quantity import parse, parse_count, shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from validate.inspection.binary import Inspection

Signature: TypeAlias = Annotated[
    str,
    typer.Option(
        "--signature", metavar="NAME=TYPE,...",
        help="Own kernel: argument types, e.g. 'x=*bf16,n=i32' ('i32:16': divisible by 16).",
    ),
]  # fmt: skip
Constants: TypeAlias = Annotated[
    str,
    typer.Option(
        "--constants", metavar="NAME=VALUE,...", help="Own kernel: constexprs, e.g. 'BLOCK=1024'."
    ),
]
Warps: TypeAlias = Annotated[int, typer.Option("--warps", metavar="N", help="Own kernel: warps.")]
Stages: TypeAlias = Annotated[
    int, typer.Option("--stages", metavar="N", help="Own kernel: stages of its pipelines.")
]

_COMMA: Final = re.compile(r",(?![^\[<]*[\]>])")
_ARCH: Final = re.compile(r"^(?:sm_?)?(\d{1,2})\.?(\d)a?$")
_WORDS: Final = {"true": True, "false": False, "none": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnKernel:
    """A user's own Triton kernel as the command line names it."""

    path: Path
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    def compiled(self, arch: int) -> Inspection:
        """Its binary for an architecture."""
        from validate.inspection import ask

        return ask.own(
            self.path, self.function, arch=arch, signature=self.signature,
            constants=self.constants, num_warps=self.num_warps, num_stages=self.num_stages,
        )  # fmt: skip


def must_point(kernel: OwnKernel, name: str) -> None:
    """Raises where --bytes names no pointer of the signature."""
    pointers = [n for n, kind in kernel.signature.items() if not kind.startswith(("i", "u", "f"))]
    if name not in pointers:
        raise InputError(
            f"--bytes: {name} is no pointer of the signature; it has "
            f"{', '.join(pointers) or 'none'}"
        )


def is_own(name: str) -> bool:
    """Does a name mean a file and a function in it?"""
    return ".py:" in name or name.endswith(".py")


def own_kernel(
    name: str, signature: str, constants: str, num_warps: int, num_stages: int
) -> OwnKernel:
    """A kernel named 'path/to/kernel.py:function'."""
    path, _, function = name.rpartition(":")
    if not path or not function.isidentifier():
        raise InputError(f"'{shown(name, 200)}' names no function; give path/to/kernel.py:function")
    if num_warps not in (1, 2, 4, 8, 16, 32):
        raise InputError(f"--warps {num_warps} is no power of two up to 32; give 4")
    if not 1 <= num_stages <= 16:
        raise InputError(f"--stages {num_stages} must lie between 1 and 16; give 3")
    return OwnKernel(
        path=Path(path), function=function, signature=pairs(signature, "--signature"),
        constants={k: _constant(v) for k, v in pairs(constants, "--constants").items()},
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def pairs(text: str, option: str) -> dict[str, str]:
    """NAME=VALUE, separated by commas; commas inside brackets belong to a value.

    >>> pairs("a=tensordesc<bf16[64, 64]>, n=i32", "--signature")
    {'a': 'tensordesc<bf16[64, 64]>', 'n': 'i32'}
    """
    found: dict[str, str] = {}
    for part in filter(None, (x.strip() for x in _COMMA.split(text))):
        name, sign, value = (x.strip() for x in part.partition("="))
        if not sign or not value or not name.isidentifier():
            raise InputError(f"{option}: '{shown(part)}' is not NAME=VALUE")
        if name in found:
            raise InputError(f"{option}: {name} is given twice")
        found[name] = value
    return found


def _constant(text: str) -> Any:
    """An integer, a number, true, false or none; else the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")


def arch(text: str) -> int:
    """A compute capability times ten, from 'sm_90', '90', '9.0' or 'sm_100a'.

    >>> arch("sm_90"), arch("10.0"), arch("80")
    (90, 100, 80)
    """
    found = _ARCH.match(text.strip().lower())
    if found is None:
        raise InputError(f"--arch '{shown(text)}' is no architecture; give sm_80, sm_90 or sm_100")
    from validate.inspection.binary import check_arch

    number = int(found[1]) * 10 + int(found[2])
    check_arch(number)
    return number


def grid(text: str) -> int:
    """Blocks of a grid, from '4096', '64x32' or '64,32,2'.

    >>> grid("64x32"), grid("4k")
    (2048, 4096)
    """
    blocks = 1.0
    for part in re.split(r"[x,]", text):
        blocks *= _positive(part.strip(), "--grid")
    return int(blocks)


def trips(given: Sequence[str]) -> list[float]:
    """Passes of each loop, in the order given."""
    return [_count(x, "--trip") for text in given for x in text.split(",")]


def sizes(text: str) -> float | None:
    """Bytes of all pointer arguments together, from 'a=32MB,b=64KiB'; None where none is given."""
    named = pairs(text, "--bytes")
    return sum(parse(v, "bytes", f"--bytes {k}") for k, v in named.items()) if named else None


def _count(text: str, option: str) -> float:
    found = parse_count(text, option)
    if found < 0 or found != int(found):
        raise InputError(f"{option} '{shown(text)}' must be a whole number, not negative")
    return found


def _positive(text: str, option: str) -> float:
    found = _count(text, option)
    if found < 1:
        raise InputError(f"{option} '{shown(text)}' must be at least 1")
    return found
