"""Strict TOML tables: every key is known, every figure is a positive finite number in SI units.

Whatever is wrong becomes one `SpecError`: the file, the key, the problem, the mend.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, NoReturn, final

from hwmodels.errors import SpecError

SCHEMA: Final = 1

# Words people use for a quantity, and the key that carries it here.
_SI_KEYS: Final = (
    (re.compile(r"bandwidth|bw$|[kmgt]i?b(ps|_?s|_per_s)|bytes_per_sec"), "bytes_per_s"),
    (re.compile(r"[kmg]hz|clock|freq"), "clock_hz"),
    (re.compile(r"latency|_(m|u|n|p)s$"), "latency_s"),
    (re.compile(r"watt|power|tdp"), "tdp_w"),
    (re.compile(r"capacity|(^|_)[kmgt]i?b$|(^|_)(size|bytes)$"), "capacity_bytes"),
    (re.compile(r"[gtp]flop|flops|tops$"), "tensor_flops_per_s"),
)

# What a figure of that unit can plausibly be; outside, it was given in another unit.
_PLAUSIBLE: Final = (
    ("bytes_per_s", 1e6, 1e17, "bytes per second: 3.35 TB/s is 3.35e12"),
    ("flops_per_s", 1e9, 1e19, "operations per second: 989 TFLOP/s is 989e12"),
    ("clock_hz", 1e6, 1e11, "hertz: 1410 MHz is 1.41e9"),
    ("latency_s", 1e-12, 1.0, "seconds: 300 ns is 300e-9"),
    ("capacity_bytes", 1024, 1e16, "bytes: 80 GB is 80e9"),
    ("tdp_w", 0.1, 1e5, "watts"),
)


def one_line(value: object, limit: int = 60) -> str:
    """A value as it stands in an error: on one line, not longer than `limit` characters."""
    text = " ".join(str(value).split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def parse(path: Path) -> dict[str, object]:
    """The contents of a TOML file; a `SpecError` when it cannot be read as one."""
    file = one_line(path, 300)
    try:
        if not path.is_file():
            missing = "is not a regular file" if path.exists() else "does not exist"
            raise SpecError(file, "file", missing, "check the path")
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start})"
        raise SpecError(file, "file", problem, "save it as UTF-8") from None
    except RecursionError:
        raise SpecError(file, "file", "nests too deeply", "use the flat layout") from None
    except SpecError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            problem, mend = f"cannot be read: {error.strerror}", "check the path and its rights"
        else:
            problem, mend = f"is not valid TOML: {one_line(error, 120)}", "mend that line"
        raise SpecError(file, "file", problem, mend) from None


@final
class Table:
    """One table of a specification file.

    `figures` collects the path of every number that was read, in this table and in those below,
    so that each can be asked for its source.
    """

    __slots__ = ("figures", "file", "path", "values")

    def __init__(
        self,
        file: str,
        path: str,
        values: Mapping[str, object],
        allowed: Collection[str] | None,
        figures: list[str],
    ) -> None:
        self.file, self.path, self.values, self.figures = file, path, values, figures
        for key in values:
            if allowed is not None and key not in allowed:
                self.fail(key, "unknown key", _suggest(key, allowed))

    @classmethod
    def root(cls, path: Path, allowed: Collection[str]) -> Table:
        """The top of the file at `path`, its `schema` checked."""
        values = parse(path)
        file = one_line(path, 300)
        schema = values.get("schema")
        if schema is None:
            raise SpecError(file, "schema", "missing", f"start the file with schema = {SCHEMA}")
        if type(schema) is not int or schema != SCHEMA:
            problem = f"is {one_line(schema)}, this version reads {SCHEMA}"
            raise SpecError(file, "schema", problem, f"write the file for schema = {SCHEMA}")
        return cls(file, "", values, {"schema", *allowed}, [])

    def at(self, key: str) -> str:
        """The full path of a key: 'memory.hbm.bytes_per_s'."""
        return f"{self.path}.{key}" if self.path else key

    def fail(self, key: str, problem: str, mend: str) -> NoReturn:
        """Raise the `SpecError` of that key."""
        raise SpecError(self.file, one_line(self.at(key), 100), problem, mend)

    def text(self, key: str) -> str:
        """A required, non-empty text."""
        value = self.optional_text(key)
        if value is None:
            self.fail(key, "missing", f'add {key} = "..."')
        return value

    def optional_text(self, key: str) -> str | None:
        """A text, or None where the key is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            self.fail(key, f"is {one_line(value) or 'empty'}", f'give a text: {key} = "..."')
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, empty where the key is absent."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, "is not a list of texts", f'give {key} = ["...", "..."]')
        return tuple(value)

    def flag(self, key: str) -> bool:
        """A truth value, false where the key is absent."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            self.fail(key, f"is {one_line(value)}", "give true or false")
        return value

    def number(self, key: str) -> float:
        """A required figure: positive, finite, of plausible size for the unit in its name."""
        value = self.optional_number(key)
        if value is None:
            self.fail(key, "missing", f"add {key} in SI base units, with its line in [sources]")
        return value

    def optional_number(self, key: str) -> float | None:
        """A figure as `number` gives it, or None where the key is absent."""
        if key not in self.values:
            return None
        value = self._checked(key, self.values[key])
        self.figures.append(self.at(key))
        return value

    def whole(self, key: str) -> int:
        """A required count."""
        value = self.optional_whole(key)
        if value is None:
            self.fail(key, "missing", f"add {key} as a whole number, with its line in [sources]")
        return value

    def optional_whole(self, key: str) -> int | None:
        """A count, or None where the key is absent."""
        value = self.optional_number(key)
        if value is None:
            return None
        if value != int(value):
            self.fail(key, f"is {value:g}", "give a whole number")
        return int(value)

    def numbers(self) -> dict[str, float]:
        """Every key of this table as a figure."""
        return {key: self.number(key) for key in self.values}

    def scalars(self) -> dict[str, float | str | bool]:
        """Every key of this table as a figure, a text or a truth value."""
        return {key: self._scalar(key, value) for key, value in self.values.items()}

    def table(self, key: str, allowed: Collection[str] | None = None) -> Table:
        """The table under `key`; an empty one where the key is absent."""
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            self.fail(key, f"is {one_line(value)}", f"write it as a table [{self.at(key)}]")
        return Table(self.file, self.at(key), value, allowed, self.figures)

    def tables(self, key: str, allowed: Collection[str]) -> Iterator[Table]:
        """The tables [[key]] in file order, each under the path of its own `name`."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.fail(key, "is not a list of tables", f"write each as [[{self.at(key)}]]")
        seen: set[str] = set()
        for position, item in enumerate(value):
            name = item.get("name")
            if not isinstance(name, str) or not name:
                self.fail(f"{key}[{position}].name", "missing", 'add name = "..."')
            if name in seen:
                self.fail(f"{key}.{name}", "stands twice", "give each its own name")
            seen.add(name)
            yield Table(self.file, self.at(f"{key}.{name}"), item, allowed, self.figures)

    def _scalar(self, key: str, value: object) -> float | str | bool:
        return value if isinstance(value, bool | str) else self.number(key)

    def _checked(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            kind = "text" if isinstance(value, str) else type(value).__name__
            problem = f"is {one_line(value)} ({kind}), not a number"
            self.fail(key, problem, "give a bare number in SI base units")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.fail(key, f"is {one_line(value)}", "give a finite number")
        if number <= 0:
            hint = "give a positive number, or leave the key out where nothing is published"
            self.fail(key, f"is {number:g}", hint)
        for suffix, low, high, unit in _PLAUSIBLE:
            if any(part.endswith(suffix) for part in self.at(key).split(".")):
                if not low <= number <= high:
                    self.fail(key, f"{number:g} looks like another unit", f"give it in {unit}")
                break
        return number


def _suggest(key: str, allowed: Collection[str]) -> str:
    folded = key.casefold()
    target = next((name for pattern, name in _SI_KEYS if pattern.search(folded)), None)
    if target in allowed:
        return f"give it as {target} in SI base units"
    near = difflib.get_close_matches(folded, allowed, 1, 0.6)
    if near:
        return f"did you mean {near[0]}?"
    if target is not None:
        return f"give it as {target} in SI base units, in the table it belongs to"
    return "known keys here: " + ", ".join(sorted(allowed))
