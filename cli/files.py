"""Output files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from cli.quantity import shown
from hwmodels.errors import InputError


def check_writable(paths: Iterable[Path]) -> None:
    """Refuse, before any work is done, a path that could not be written in the end."""
    seen = set()
    for path in paths:
        folder = path.parent
        if path.is_dir():
            raise InputError(f"cannot write {shown(path, 200)}: it is a folder; name a file in it")
        if not folder.is_dir():
            raise InputError(
                f"cannot write {shown(path, 200)}: no folder {shown(folder, 200)}; make it first"
            )
        if not os.access(folder, os.W_OK):
            raise InputError(
                f"cannot write {shown(path, 200)}: {shown(folder, 200)} is not writable; "
                "choose another folder"
            )
        if path.resolve() in seen:
            raise InputError(f"{shown(path, 200)} is given twice; name two different files")
        seen.add(path.resolve())


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write every file beside its place, then move all into place; nothing is left half-written."""
    staged: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            staged[path] = _stage(path, content)
        for path, temporary in staged.items():
            os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"cannot write {shown(error.filename2 or error.filename or 'output', 200)}: "
            f"{error.strerror}; choose another place"
        ) from None
    finally:
        for temporary in staged.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _stage(path: Path, content: bytes) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files private; give what an ordinary open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
