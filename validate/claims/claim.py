"""A published claim: what a paper says of its system, in which setting, and how sure that is.

Schema (one JSON list of systems, each with `id`, `family` and `claims`):

    quantity, unit, kind      what is claimed; kind 'latency', 'speedup', 'memory', ...
    value | low, high         the figure; two figures where the paper gives a range or two names
    setting                   device, shape, implementation, as far as the paper fixes them
    source, confidence, note  where it stands, how sure it is ('high', 'medium', 'low')
    range_is                  whether low and high bound an interval or are two named values
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

from hwmodels import catalog
from hwmodels.device import Device
from hwmodels.dtypes import FP16, DType, dtype
from hwmodels.errors import InputError, UnknownNameError

Value: TypeAlias = float | tuple[float, float] | str | None

EXACT_KINDS: Final = frozenset({"memory", "complexity", "ratio"})
"""Kinds that follow from shapes."""
EXACT_TOLERANCE, TIME_TOLERANCE = 0.02, 0.15
NAMED: Final = "min/max of the named values"


class NotModelledError(Exception):
    """This claim has no prediction; the text says why."""


def not_modelled(reason: str) -> NoReturn:
    """Give up a claim with its reason."""
    raise NotModelledError(reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim. `published` is a number, two numbers, a word ('OOM') or None (a formula alone)."""

    id: str
    family: str
    quantity: str
    unit: str
    kind: str
    published: Value
    setting: Mapping[str, Any] = field(default_factory=dict)
    confidence: str = "high"
    source: str = ""
    note: str = ""
    range_is: str = ""

    def need(self, *names: str) -> list[Any]:
        """The values of those settings; the claim is given up where one is missing."""
        missing = [name for name in names if self.setting.get(name) in (None, "")]
        if missing:
            not_modelled(f"setting incomplete: no {', '.join(missing)}")
        return [self.setting[name] for name in names]

    def sizes(self, *names: str) -> list[int]:
        """Settings that must be whole numbers of at least 1."""
        found = []
        for name, value in zip(names, self.need(*names), strict=True):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
                not_modelled(f"setting unclear: {name} = {value!r} is not a size")
            if value != int(value):
                not_modelled(f"setting unclear: {name} = {value!r} is not a whole number")
            found.append(int(value))
        return found

    def device(self, default: str | None = None) -> Device:
        """The device that setting.gpu names."""
        named = self.setting.get("gpu", default)
        if not named:
            not_modelled("setting incomplete: no gpu")
        return device_named(str(named))

    def dtype(self, default: DType = FP16) -> DType:
        """The number format of the setting."""
        text = re.split(r"[/ (,+]", str(self.setting.get("dtype", default.name)).strip())[0]
        try:
            return dtype(text)
        except UnknownNameError:
            not_modelled(f"setting unclear: dtype '{text}'")


_LOOSE: Final[Mapping[str, str]] = {
    "a100": "a100-sxm4-80gb", "a100-40gb": "a100-sxm4-40gb", "a100-80gb": "a100-sxm4-80gb",
    "a100-80gb-sxm": "a100-sxm4-80gb", "t4-16gb": "t4", "a6000": "rtx-a6000",
    "h100": "h100-sxm", "v100": "v100-sxm2-16gb", "a10g": "a10",
    "rtx3090": "rtx-3090", "rtx4090": "rtx-4090",
    "a100-80g": "a100-sxm4-80gb", "a100-40g": "a100-sxm4-40gb", "a800": "a800-sxm4-80gb",
    "a100-80gb-pcie": "a100-pcie-80gb", "a100-40gb-pcie": "a100-pcie-40gb",
    "v100-32g": "v100-sxm2-32gb", "v100-32gb": "v100-sxm2-32gb", "p100-16gb": "p100-pcie-16gb",
    "h800": "h800-sxm", "h200": "h200-sxm", "b200": "b200-sxm", "a6000-ada": "rtx-6000-ada",
}  # fmt: skip
"""What papers call a device without its form factor: the usual one is meant."""


def device_named(text: str) -> Device:
    """The device a paper means.

    >>> device_named("A100-40GB").id, device_named("NVIDIA A100-80GB-SXM4 x2").id
    ('a100-sxm4-40gb', 'a100-sxm4-80gb')
    """
    name = re.split(r" x|[,/(]", text)[0].strip().casefold().replace(" ", "-")
    name = re.sub(r"^(?:\d+-?x-?)?(?:nvidia-)?", "", name)
    for candidate in (name, re.sub(r"-sxm\d?$", "", name), re.sub(r"-\d+gb?$", "", name)):
        try:
            return catalog.device(_LOOSE.get(candidate, candidate))
        except InputError:
            continue
    not_modelled(f"setting unclear: no device is called '{text}'")


def read_claims(path: Path) -> list[Claim]:
    """The claims of a file; raises one `InputError` that says what is wrong with it."""
    try:
        systems = json.loads(path.read_text(encoding="utf-8"))
    except OSError as why:
        raise InputError(f"{path}: cannot be read ({why.strerror}); check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as why:
        raise InputError(f"{path}: not JSON ({why})") from None
    if isinstance(systems, dict):
        systems = [systems]
    if not isinstance(systems, list):
        raise InputError(f"{path}: not a list of systems; see `ridgeplan claims --help`")
    return [claim for place, system in enumerate(systems) for claim in _of(path, place, system)]


def _of(path: Path, place: int, system: Any) -> Iterable[Claim]:
    where = f"{path}, system {place + 1}"
    if not isinstance(system, dict) or not isinstance(system.get("id"), str):
        raise InputError(f"{where}: needs an id; see `ridgeplan claims --help`")
    rows = system.get("claims", [])
    if not isinstance(rows, list):
        raise InputError(f"{where} ({system['id']}): claims is not a list")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("quantity"), str):
            raise InputError(f"{where} ({system['id']}), claim {number}: needs a quantity")
        setting = row.get("setting", {})
        if not isinstance(setting, dict):
            raise InputError(f"{where} ({system['id']}), claim {number}: setting is not an object")
        yield Claim(
            id=system["id"], family=str(system.get("family", "")), quantity=row["quantity"],
            unit=str(row.get("unit", "")), kind=str(row.get("kind", "")),
            published=_published(row), setting=setting,
            confidence=str(row.get("confidence", "high")), source=str(row.get("source", "")),
            note=str(row.get("note", "")), range_is=str(row.get("range_is", "")),
        )  # fmt: skip


def _published(row: Mapping[str, Any]) -> Value:
    value = row.get("value")
    if _is_number(value):
        return float(value)
    if isinstance(value, str):
        return value
    low, high = row.get("low"), row.get("high")
    if _is_number(low) and _is_number(high):
        return float(low), float(high)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
