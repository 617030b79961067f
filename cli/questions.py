"""From the words of the command line to ops, devices and swept values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cli.quantity import parse, parse_count, parse_flag, shown
from hwmodels.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from workloads.op import Op
    from workloads.registry import Param

MAX_POINTS: Final = 1_000_000
"""Points in one sweep; more would only fill memory."""

PARAM_HELP: Final = (
    "Size or setting of the op, e.g. seq=8k, heads=32, dtype=fp16, causal=true; may repeat. "
    "k, M, G are 1024, 1024^2, 1024^3. OP.key=value is for that op alone."
)
OVER_HELP: Final = (
    "Values to sweep: seq=1k:1M:x2 (geometric), m=128:4k:+128 (even steps) or seq=1k,4k,64k."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """One swept parameter: the word the user wrote and its values in the order given."""

    key: str
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One word with the way to its value for a field, given the field's name for errors."""

    key: str
    value: Callable[[Param, str], object]


def pairs(
    items: Iterable[str], option: str = "-p", example: str = "seq=8192"
) -> list[tuple[str, str]]:
    """Every `key=value` split in two; a key may stand once."""
    found: list[tuple[str, str]] = []
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise InputError(f"{option} '{shown(item)}' is not key=value; write {option} {example}")
        if any(key.strip() == known for known, _ in found):
            raise InputError(f"{option} {shown(key)} is given twice; keep one")
        found.append((key.strip(), value.strip()))
    return found


def ops_asked(
    names: Sequence[str], params: Iterable[str], over: Over | None = None
) -> dict[str, Op]:
    """The ops by name with their parameters set, and the swept one as an array.

    A parameter goes to every op that has it; one that no op has is an error.
    """
    from workloads import registry

    resolved = list(dict.fromkeys(registry.resolve(name) for name in names))
    values: dict[str, dict[str, object]] = {name: {} for name in resolved}
    entries = [
        _Entry(key, lambda p, what, t=text: _value(p, t, what)) for key, text in pairs(params)
    ]
    if over is not None:
        for name in resolved:
            registry.fields_meant(name, over.key)  # every op must have what is swept
        entries.append(_Entry(over.key, lambda p, what: _swept(over)))
    _assign_all(values, entries)
    return {name: registry.build(name, fields) for name, fields in values.items()}


def require_choice(field: str, ops: Iterable[Op], params: Iterable[str], over: Over | None) -> None:
    """Raise where no op leaves that size to its implementer, or where it is given or swept."""
    asked = tuple(ops)
    known = list(dict.fromkeys(name for op in asked for name in op.tunable))
    if field not in known:
        names = ", ".join(dict.fromkeys(op.name for op in asked))
        hint = f"to be chosen in {names}: {', '.join(known) or 'nothing'}"
        raise UnknownNameError("choice for --best", field, known, hint)
    given = [key.rpartition(".")[2] for key, _ in pairs(params)]
    if field in (*given, over.key if over else ""):
        raise InputError(f"--best {field}: {field} is given too; drop one of the two")


def family_members(
    family: str | None, params: Iterable[str], over: Over | None
) -> tuple[list[str], list[str]]:
    """The modelled systems of a family that the parameters suffice for, and the others.

    A system takes part that has the swept parameter, needs no other than those given, and is
    possible with them.
    """
    from workloads import registry

    if family is None:
        return [], []
    known = list(dict.fromkeys(s.family for s in registry.systems()))
    if family not in known:
        raise UnknownNameError("family", family, known, "see `ridgeplan systems`")
    names = [registry.resolve(s.id) for s in registry.systems() if s.family == family and s.op]
    chosen = [name for name in dict.fromkeys(names) if _can_be_asked(name, list(params), over)]
    return chosen, [name for name in dict.fromkeys(names) if name not in chosen]


def left_out_text(left_out: Sequence[str], family: str | None) -> str:
    """Which systems of a family the parameters do not suffice for; nothing where they all do."""
    if not left_out:
        return ""
    return f"{len(left_out)} systems of {family} need other parameters: {', '.join(left_out)}."


def _can_be_asked(name: str, params: Sequence[str], over: Over | None) -> bool:
    """Does the op have what is swept, and is it possible with those of the parameters it has?"""
    own = [p for p in params if "." not in p.partition("=")[0]]
    own = [p for p in own if _fields_or_nothing(name, p.partition("=")[0])]
    if over is not None and not _fields_or_nothing(name, over.key):
        return False
    try:
        ops_asked([name], [*own, *_addressed_to(name, params)], over)
    except InputError:
        return False
    return True


def _addressed_to(name: str, params: Sequence[str]) -> list[str]:
    """The parameters that are for that op alone."""
    from workloads import registry

    owners = ((p, p.partition("=")[0].rpartition(".")[0]) for p in params)
    return [p for p, owner in owners if owner and registry.resolve(owner) == name]


def parse_over(text: str, names: Sequence[str]) -> Over:
    """The values of `--over`, in the order given.

    >>> parse_over("m=1k:8k:x2", ["matmul"]).values
    (1024, 2048, 4096, 8192)
    >>> parse_over("m=64:256:+64", ["matmul"]).values
    (64, 128, 192, 256)
    """
    from workloads import registry

    ((key, spec),) = pairs([text], "--over", "seq=1k:64k:x2")
    kinds = {
        registry.params(name)[field].kind
        for name in names
        for field in registry.fields_meant(name, key)
    }
    if not kinds <= {"length", "size"}:
        raise InputError(f"--over {shown(key)} is not a size; sweep a length or a count")
    bounds = spec.split(":")
    if len(bounds) == 1:
        raw = [parse_count(v, f"--over {key}") for v in spec.split(",")]
    elif len(bounds) == 3:
        raw = _stepped(bounds, f"--over {key}")
    else:
        raise InputError(
            f"--over '{shown(text)}' is not a range; write {shown(key)}=1k:1M:x2, "
            f"{shown(key)}=128:4096:+128 or {shown(key)}=1k,4k,64k"
        )
    if any(value != int(value) or value < 1 for value in raw):
        raise InputError(f"--over {shown(text)} has values that are not whole and positive")
    values = tuple(dict.fromkeys(int(value) for value in raw))
    return Over(key=key, values=values)


def _stepped(bounds: Sequence[str], what: str) -> list[float]:
    start, stop = (parse_count(text, what) for text in bounds[:2])
    match = re.fullmatch(r"\s*([x*+])(.+)", bounds[2])
    if match is None:
        raise InputError(f"{what}: step '{shown(bounds[2])}' is neither a factor x2 nor a sum +128")
    step = parse_count(match[2], f"{what} step")
    if start < 1 or stop < start:
        raise InputError(f"{what} runs from {start:g} to {stop:g}; give 1 <= start <= stop")
    if match[1] == "+":
        if step < 1 or step != int(step):
            raise InputError(f"{what}: step +{step:g} must be a whole number of at least 1")
        _check_number(what, (stop - start) // step + 1)
        return [start + i * step for i in range(int((stop - start) // step) + 1)]
    if step <= 1:
        raise InputError(f"{what}: factor x{step:g} must be above 1")
    values, value = [], float(start)
    while value <= stop * (1 + 1e-9):
        values.append(float(round(value)))
        value *= step
        _check_number(what, len(values))
    return values


def _check_number(what: str, number: float) -> None:
    if number > MAX_POINTS:
        raise InputError(f"{what} has more than {MAX_POINTS:,} points; take a larger step")


def _addressed(names: Iterable[str], key: str) -> list[tuple[str, str]]:
    """The ops a key speaks to, with its word: all of them, or the one named before a dot."""
    from workloads import registry

    owner, dot, word = key.rpartition(".")
    if not dot:
        return [(name, key) for name in names]
    wanted = registry.resolve(owner)
    if wanted not in names:
        raise InputError(f"-p {shown(key)}: {wanted} is not asked for; name it or drop the prefix")
    return [(wanted, word)]


def _fields_or_nothing(name: str, word: str) -> tuple[str, ...]:
    from workloads import registry

    try:
        return registry.fields_meant(name, word)
    except UnknownNameError:
        return ()


def _assign_all(values: Mapping[str, dict[str, object]], entries: Sequence[_Entry]) -> None:
    """Give each field the most specific value: `OP.key` before `key`, one field before two."""
    from workloads import registry

    set_by: dict[tuple[str, str], tuple[tuple[bool, bool], str]] = {}
    for entry in entries:
        targets = _addressed(values, entry.key)
        taken = [(n, fields) for n, word in targets if (fields := _fields_or_nothing(n, word))]
        if not taken:
            registry.fields_meant(*targets[0])  # raises, with the nearest names
        for name, fields in taken:
            rank = ("." in entry.key, len(fields) == 1)
            for field in fields:
                known_rank, known_key = set_by.get((name, field), (None, ""))
                if known_rank == rank:
                    raise InputError(
                        f"{name}: {field} is given twice, by {known_key} and {entry.key}; keep one"
                    )
                if known_rank is None or known_rank < rank:
                    set_by[name, field] = rank, entry.key
                    param = registry.params(name)[field]
                    values[name][field] = entry.value(param, f"{name}: {field}")


def _swept(over: Over) -> object:
    import numpy as np

    return np.asarray(over.values, dtype=np.float64)


def _value(param: Param, text: str, what: str) -> object:
    from hwmodels.dtypes import dtype

    if param.kind == "dtype":
        return dtype(text)
    if param.kind == "flag":
        return parse_flag(text, what)
    if param.kind == "fraction":
        return parse(text, "frac", what)
    if param.kind == "text":
        return text
    return parse_count(text, what)
