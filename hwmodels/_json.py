"""Strict reading of our own JSON documents: every fault names the file, the key and the mend."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import NoReturn

from hwmodels._toml import one_line
from hwmodels.errors import SpecError


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise SpecError(path, "file", problem, "check the path and its rights") from None
    except (ValueError, RecursionError) as error:
        problem = f"is not valid JSON: {one_line(error, 120)}"
        raise SpecError(path, "file", problem, "fit the file again") from None


class JsonObject:
    """One JSON object of the file, with typed access to its keys."""

    __slots__ = ("path", "prefix", "values")

    def __init__(self, path: Path, prefix: str, value: object) -> None:
        self.path, self.prefix = path, prefix
        self.values: dict[str, object] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            self.fail("", "is not an object", "fit the file again")

    def fail(self, key: str, problem: str, mend: str) -> NoReturn:
        where = ".".join(part for part in (self.prefix, key) if part) or "file"
        raise SpecError(self.path, one_line(where, 100), problem, mend)

    def expect(self, keys: frozenset[str]) -> None:
        for key in sorted(keys ^ self.values.keys()):
            self.fail(key, "missing" if key in keys else "unknown key", "fit the file again")

    def child(self, key: str) -> JsonObject:
        prefix = f"{self.prefix}.{key}" if self.prefix else key
        return JsonObject(self.path, prefix, self.values[key])

    def text(self, key: str) -> str:
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            self.fail(key, "is not a text", "write it in quotes")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.values[key]
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            self.fail(key, "is not a list of texts", 'write it as ["..."]')
        return tuple(value)

    def digests(self, key: str) -> tuple[str, ...]:
        found = self.texts(key)
        if len(set(found)) != len(found) or not all(is_sha256(text) for text in found):
            self.fail(key, "is not a list of different sha256 digests", "fit the file again")
        return found

    def sha256(self, key: str) -> str:
        value = self.text(key)
        if not is_sha256(value):
            self.fail(key, "is not a sha256 digest", "fit the file again")
        return value

    def date(self, key: str) -> datetime.date:
        text = self.text(key)
        try:
            return datetime.date.fromisoformat(text)
        except ValueError:
            self.fail(key, f"is {one_line(text)}, not a date", "write it as 2026-11-21")

    def count(self, key: str) -> int:
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(key, f"is {one_line(value)}", "give a whole number from 1")
        return value

    def positive(self, key: str) -> float:
        value = self.values[key]
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not plain or not 0 < float(str(value)) < math.inf:
            self.fail(key, f"is {one_line(value)}", "give a positive finite number")
        return float(str(value))

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.values[key]
        plain = isinstance(value, list) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
            for v in value
        )
        if not plain or not isinstance(value, list):
            self.fail(key, "is not a list of finite numbers", "fit the file again")
        return tuple(float(v) for v in value)


def is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
