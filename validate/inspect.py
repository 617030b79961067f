"""`python -m validate.inspect`: compile kernels ahead of time and keep the record of them.

    --all            compile what the record lacks or holds of older sources, with 2 processes
    --check          is the record whole, of the current sources, and free of spills? exit code 1
    --sample N       with --check: compile N binaries afresh, chosen by hash, and compare
    --kernel NAME    with --all or --check: of this kernel alone (may be repeated)

Runs without a GPU, in a process that does not interpret. Exit codes: 0 done, 1 something is
missing, stale, spilling or does not compile, 2 bad usage or bad input, one line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence

from hwmodels.errors import InputError

BAD, DONE, WANTING = 2, 0, 1


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m validate.inspect", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="bring the record up to date")
    what.add_argument("--check", action="store_true", help="hold the record against the sources")
    what.add_argument("--own", metavar="JSON", help=argparse.SUPPRESS)
    what.add_argument("--shipped", metavar="JSON", help=argparse.SUPPRESS)
    what.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sample", type=int, default=0, metavar="N")
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run; the exit code."""
    given = _arguments(argv)
    try:
        if given.worker:
            from validate.inspection import pool

            with contextlib.redirect_stdout(sys.stderr):
                pool.serve(sys.stdin, os.fdopen(os.dup(1), "w"))
            return DONE
        if given.own or given.shipped:
            return _one(given)
        from validate.inspection import upkeep

        if given.all:
            return upkeep.renew(given.kernel, processes=given.processes)
        return upkeep.check(given.kernel, sample=given.sample)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD


def _one(given: argparse.Namespace) -> int:
    """One binary, its figures as JSON on stdout: what the command line asks for."""
    from validate.inspection import one

    with contextlib.redirect_stdout(sys.stderr):
        made = one.own(json.loads(given.own)) if given.own else one.shipped(
            json.loads(given.shipped)
        )  # fmt: skip
    print(json.dumps(made))
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
