"""`ridgeplan kernels list`: the shipped kernels and their compiled binaries."""

from __future__ import annotations

from cli.options import AsJson


def kernels_list(as_json: AsJson = False) -> None:
    """The shipped kernels and their binaries, registers and spills.

    \b
    Examples:
      ridgeplan kernels list
      ridgeplan kernels list --json
    """
    from cli import kernel_tables, show
    from validate.inspection import ledger

    entries = list(ledger.read().values())
    if as_json:
        show.print_json({"kernels": kernel_tables.list_records(entries)})
        return
    kernel_tables.show_list(entries)
