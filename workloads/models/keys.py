"""Typed access to the JSON object in a file; whatever is wrong is one line naming file and key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn, final

from hwmodels.errors import SpecError

MAX_SIZE: Final = 10**8
"""The largest size a config may give, unless its reader says otherwise."""


def read_object(file: Path) -> Mapping[str, object]:
    """The JSON object in a file."""
    try:
        if not file.is_file():
            problem = "is not a regular file" if file.exists() else "does not exist"
            raise SpecError(file, "file", problem, "give the path of a config.json")
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start})"
        raise SpecError(file, "file", problem, "save it as UTF-8") from None
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        problem = f"is not valid JSON: {what} at line {error.lineno} column {error.colno}"
        raise SpecError(file, "file", problem, "mend that line or fetch the file again") from None
    except RecursionError:
        raise SpecError(file, "file", "nests too deeply", "fetch the file again") from None
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise SpecError(file, "file", problem, "check the path and its rights") from None
    except SpecError:
        raise
    except ValueError:
        raise SpecError(file, "file", "holds an absurdly long number", "shorten it") from None
    if not isinstance(values, dict):
        problem = f"holds {_kind(values)}, not an object"
        raise SpecError(file, "file", problem, 'start it with { "model_type": ... }')
    return values


def _kind(value: object) -> str:
    """What a JSON value is, in words, cut to a length that fits one line."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


@final
class Keys:
    """Typed access to one JSON object; whatever is wrong becomes one `SpecError`."""

    __slots__ = ("file", "prefix", "values")

    def __init__(self, file: str, values: Mapping[str, object], prefix: str = "") -> None:
        self.file, self.values, self.prefix = file, values, prefix

    def fail(self, key: str, problem: str, mend: str) -> NoReturn:
        """Raise the error of that key."""
        raise SpecError(self.file, self.prefix + key, problem, mend)

    def has(self, key: str) -> bool:
        """Present, and not null."""
        return self.values.get(key) is not None

    def child(self, key: str) -> Keys:
        """The object under a key."""
        inner = self.values[key]
        if not isinstance(inner, dict):
            self.fail(key, f"is {_kind(inner)}, not an object", f'write "{key}": {{ ... }}')
        return Keys(self.file, inner, f"{self.prefix}{key}.")

    def size(
        self, key: str, default: int | None = None, *, most: int = MAX_SIZE, least: int = 1
    ) -> int:
        """A whole number in [least, most]; required unless there is a default."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.fail(key, "missing", f'add "{key}": a whole number')
            return default
        if type(value) is not int:
            self.fail(key, f"is {_kind(value)}, not a whole number", f"write {key} as an integer")
        if not least <= value <= most:
            self.fail(key, f"is {_kind(value)}", f"give a whole number from {least} to {most}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null counts as absent."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, f"is {_kind(value)}, not true or false", "write true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text; required unless there is a default."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.fail(key, "missing", f'add "{key}": "..."')
            return default
        if not isinstance(value, str):
            self.fail(key, f"is {_kind(value)}, not a text", "write it in quotes")
        return value

    def items(self, key: str) -> Sequence[object]:
        """A list; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            self.fail(key, f"is {_kind(value)}, not a list", "write it as [ ... ]")
        return value

    def fraction(self, key: str, default: float) -> float:
        """A number in [0, 1]."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            self.fail(key, f"is {_kind(value)}", "give a number from 0 to 1")
        return float(value)

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(key, f"is {_kind(value)}, not a number", f"write {key} as a number")
        if not 0 < value <= MAX_SIZE:
            self.fail(key, f"is {_kind(value)}", f"give a number above 0, up to {MAX_SIZE}")
        return float(value)

    def choice(self, key: str, default: str, choices: Mapping[str, str]) -> str:
        """One of the `choices` by name, as what it stands for."""
        name = self.text(key, default)
        if name not in choices:
            self.fail(key, f"is '{name[:40]}'", f"use one of {', '.join(choices)}")
        return choices[name]
