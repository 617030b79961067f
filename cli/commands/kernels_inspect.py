"""`ridgeplan kernels inspect`: what a compiled kernel takes of an SM, and what it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli import kernel_asked
from cli.kernel_asked import Constants, Signature, Stages, Warps
from cli.options import AsJson
from cli.quantity import shown
from hwmodels.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from validate.inspection.ledger import Entry


def kernels_inspect(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A kernel of `kernels list`, or FILE.py:FUNCTION.")
    ],
    arch: Annotated[
        str, typer.Option("--arch", metavar="ARCH", help="sm_80, sm_90 or sm_100.")
    ] = "sm_90",
    config: Annotated[
        str, typer.Option("--config", metavar="LABEL", help="Configurations with this in the name.")
    ] = "",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compile now instead of reading the record.")
    ] = False,
    signature: Signature = "",
    constants: Constants = "",
    warps: Warps = 4,
    stages: Stages = 3,
    as_json: AsJson = False,
) -> None:
    """A compiled kernel: registers, memory, spills, instructions, loops.

    The GPU need not be present. One configuration is shown in full, several one a line. A shipped
    kernel is read from the record that tests hold against the sources; your own is compiled now,
    which needs triton.

    \b
    Examples:
      ridgeplan kernels inspect gemm --arch sm_90
      ridgeplan kernels inspect gemm --arch sm_100 --config 'gemm_tma[bf16]' --json
      ridgeplan kernels inspect examples/kernel.py:scale \\
      --signature x=*fp32,n=i32 --constants BLOCK=1024
    """
    from cli import kernel_tables, show

    number = kernel_asked.arch(arch)
    if kernel_asked.is_own(name):
        _refuse_given({"--config": config, "--fresh": fresh}, "your own kernel")
        own = kernel_asked.own_kernel(name, signature, constants, warps, stages)
        found = own.compiled(number)
        if as_json:
            show.print_json({"name": name} | kernel_tables.inspection_record(found, number))
        else:
            kernel_tables.show_one(own.function, number, found)
        return
    _refuse_given({"--signature": signature, "--constants": constants}, "a shipped kernel")
    entries = _shipped(name, number, config, fresh=fresh)
    if as_json:
        show.print_json({"binaries": [kernel_tables.entry_record(e) for e in entries]})
    elif len(entries) == 1:
        kernel_tables.show_one(entries[0].name, number, entries[0].found)
    else:
        kernel_tables.show_entries(entries)


def _refuse_given(options: dict[str, object], what: str) -> None:
    for option, value in options.items():
        if value:
            raise InputError(f"{option} does not go with {what}; leave it out")


def _shipped(name: str, arch: int, config: str, *, fresh: bool) -> list[Entry]:
    """Binaries of a shipped kernel from the record, or compiled now."""
    from validate.inspection import ask, ledger

    record = ledger.read().values()
    kernels = sorted({e.kernel for e in record})
    if name not in kernels:
        raise UnknownNameError(
            "kernel", shown(name), kernels, "`ridgeplan kernels list` has them; FILE.py:FUNCTION "
            "is your own",
        )  # fmt: skip
    if fresh:
        found = list(ask.shipped(name, arch=arch, config=config))
    else:
        found = [e for e in record if e.kernel == name and e.arch == arch and config in e.name]
    exact = [e for e in found if e.name == config]
    if not found:
        where = f" with '{shown(config)}' in its name" if config else ""
        raise InputError(
            f"{name} ships no configuration{where} for sm_{arch}; leave --config out to see all"
        )
    return exact or sorted(found, key=lambda e: e.name)
