"""The one family of errors a user can mend; every other exception is a defect of ours.

The command line turns an `InputError` into one line on stderr and exit code 2, and an
`InfeasibleError` into one line and exit code 3.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, and how to mend it."""


class SpecError(InputError):
    """A specification file is wrong: names the file, the key and the mend."""

    def __init__(self, file: object, key: str, problem: str, mend: str) -> None:
        super().__init__(f"{file}: {key}: {problem}; {mend}")
        self.file, self.key, self.problem, self.mend = str(file), key, problem, mend


class UnknownNameError(InputError):
    """A name that no catalogue holds; suggests the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = list(known)
        folded = {k.casefold(): k for k in known}
        near = [folded[m] for m in difflib.get_close_matches(name.casefold(), folded, 3, 0.5)]
        mend = f"did you mean {' or '.join(near)}?" if near else hint or "see the catalogue"
        super().__init__(f"unknown {kind} '{name}'; {mend}")
        self.kind, self.name, self.near = kind, name, near


class UnsupportedError(InputError):
    """The hardware or the model has no figure for what was asked (a dtype, a link, a level)."""


class InfeasibleError(Exception):
    """A well-posed question that has no feasible answer; the message gives the reason."""
