"""Quantities as people write them, both ways: `3.35TB/s` to 3.35e12 and back.

Prefixes. Counts and sizes have binary ones, in either case: 4k is 4096 and 1M is 1048576, since
sizes on a GPU are powers of two; a round decimal is written out, 100000 or 1e5. In bytes, rates,
hertz and watts k, M, G, T, P are powers of 1000, and Ki, Mi, Gi, Ti, Pi of 1024.
"""

from __future__ import annotations

import math
import re
from typing import Final

from hwmodels.errors import InputError
from hwmodels.units import GB, GIB, KB, KIB, MB, MIB, TB, TIB

PB: Final = 10**15
PIB: Final = 2**50

_DECIMAL: Final = {"k": KB, "M": MB, "G": GB, "T": TB, "P": PB}
_BINARY: Final = {"Ki": KIB, "Mi": MIB, "Gi": GIB, "Ti": TIB, "Pi": PIB}
_COUNTS: Final = {"": 1} | {p.casefold()[:n]: f for p, f in _BINARY.items() for n in (1, 2)}
_SMALL: Final = {"m": 1e-3, "u": 1e-6, "µ": 1e-6, "μ": 1e-6, "n": 1e-9, "p": 1e-12}
_NUMBER: Final = re.compile(r"([+-]?(?:\d[\d_]*\.?[\d_]*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*)", re.S)

_MINUTES: Final = {"min": 60.0, "h": 3600.0}
_BYTE_UNITS: Final = {"B": 1.0, "bytes": 1.0, "b": 1 / 8, "bit": 1 / 8, "bits": 1 / 8}
_RATE_UNITS: Final = {"B/s": 1.0, "Bps": 1.0, "b/s": 1 / 8, "bps": 1 / 8, "bit/s": 1 / 8}
_FLOP_UNITS: Final = dict.fromkeys(
    ("FLOP/s", "FLOPS", "FLOPs", "flop/s", "flops", "OP/s", "OPS"), 1.0
)

# kind -> (units with their factors, what a plain number means, an example for the error)
_KINDS: Final = {
    "bytes": (_BYTE_UNITS, "bytes", "80GB or 80GiB"),
    "bytes_per_s": (_RATE_UNITS, "bytes per second", "3.35TB/s or 400Gb/s"),
    "flops_per_s": (_FLOP_UNITS, "FLOP/s", "989TFLOP/s"),
    "s": ({"s": 1.0}, "seconds", "1.5us or 20ms"),
    "hz": ({"Hz": 1.0, "hz": 1.0}, "hertz", "1.98GHz"),
    "w": ({"W": 1.0}, "watts", "700W"),
}


def shown(text: object, limit: int = 40) -> str:
    """A user's text as it may stand in a one-line message."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def parse(text: str, kind: str, what: str = "quantity") -> float:
    """A quantity in SI base units; `kind` is a unit suffix: bytes, bytes_per_s, s, hz, w, frac.

    >>> parse("3.35TB/s", "bytes_per_s"), parse("400Gb/s", "bytes_per_s"), parse("80GiB", "bytes")
    (3350000000000.0, 50000000000.0, 85899345920.0)
    >>> parse("1.5us", "s"), parse("90%", "frac")
    (1.5e-06, 0.9)
    """
    if kind == "frac":
        return _fraction(text, what)
    units, plain, example = _KINDS[kind]
    number, rest = _split(text, what, f"give {example}")
    if not rest:
        return number
    factor = _MINUTES.get(rest) if kind == "s" else None
    for unit, value in units.items():
        if factor is None and rest.endswith(unit):
            prefix = _prefix(rest[: -len(unit)].strip(), allow_small=kind == "s")
            factor = None if prefix is None else prefix * value
    if factor is None:
        raise InputError(
            f"{what} = '{shown(text)}' has an unknown unit '{shown(rest)}'; "
            f"give {example} (a plain number is {plain})"
        )
    return _scaled(number, factor)


def parse_count(text: str, what: str = "count") -> float:
    """A count, an int where it is whole; k, M, G are powers of 1024 and so are Ki, Mi, Gi.

    >>> parse_count("128k"), parse_count("1M"), parse_count("1e5"), parse_count("1.5")
    (131072, 1048576, 100000, 1.5)
    """
    number, rest = _split(text, what, "give a number such as 8192 or 128k")
    factor = _COUNTS.get(rest.casefold())
    if factor is None:
        raise InputError(
            f"{what} = '{shown(text)}' has an unknown suffix '{shown(rest)}'; "
            "give a number such as 8192, 128k or 1M (k = 1024)"
        )
    value = number * factor
    return int(value) if value == int(value) else value


def parse_flag(text: str, what: str = "flag") -> bool:
    """A truth value: true/false, yes/no, on/off, 1/0."""
    value = text.strip().casefold()
    if value in ("true", "yes", "on", "1"):
        return True
    if value in ("false", "no", "off", "0"):
        return False
    raise InputError(f"{what} = '{shown(text)}' is not a truth value; give true or false")


def _fraction(text: str, what: str) -> float:
    number, rest = _split(text, what, "give 90% or 0.9")
    if rest not in ("", "%"):
        raise InputError(f"{what} = '{shown(text)}' is not a fraction; give 90% or 0.9")
    value = number / 100 if rest else number
    if not 0 <= value <= 1:
        raise InputError(f"{what} = '{shown(text)}' is outside 0..1; give 90% or 0.9")
    return value


def _split(text: str, what: str, mend: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{what} = '{shown(text)}' is not a number; {mend}")
    try:
        number: float = int(match[1])
    except ValueError:
        try:
            number = float(match[1])
        except ValueError:
            raise InputError(f"{what} = '{shown(text)}' is not a number; {mend}") from None
    if abs(number) > 1e300:
        raise InputError(f"{what} = '{shown(text)}' is too large; {mend}")
    return number, match[2].strip()


def _prefix(prefix: str, *, allow_small: bool) -> float | None:
    if not prefix:
        return 1.0
    large = None if allow_small else (_DECIMAL | _BINARY | {"K": KB}).get(prefix)
    return _SMALL.get(prefix) if allow_small else large


def _scaled(number: float, factor: float) -> float:
    # Division keeps decimal fractions exact to the last bit: 1.5us is 1.5 / 1e6, not 1.5 * 1e-6.
    return number / round(1 / factor) if factor < 1 else number * factor


# ---- for people ----------------------------------------------------------------------------------


def digits(value: float, places: int = 3) -> str:
    """A number with `places` significant digits, without an exponent where it stays short.

    >>> digits(0.012345), digits(1234.5), digits(99.96), digits(0)
    ('0.0123', '1234', '100', '0')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{places - 1}e}") if abs(value) < 10**places else value
    magnitude = math.floor(math.log10(abs(rounded)))
    if magnitude < -4:
        return f"{value:.{places - 1}e}"
    return f"{rounded:.{max(places - 1 - magnitude, 0)}f}"


def count_text(value: float) -> str:
    """A count as it may be typed: 131072 is '128k', what k = 1024 does not divide in all digits.

    >>> count_text(131072), count_text(2**20), count_text(100), count_text(2000)
    ('128k', '1M', '100', '2,000')
    """
    for factor, letter in ((GIB, "G"), (MIB, "M"), (KIB, "k")):
        if value >= factor and value % factor == 0:
            return f"{value / factor:.0f}{letter}"
    return f"{value:,.0f}"


def scaled_text(value: float, unit: str, places: int = 3) -> str:
    """A number with a decimal prefix: 3.35e12 bytes per second is '3.35 TB/s'.

    >>> scaled_text(3.352e12, "B/s"), scaled_text(999_960, "FLOP"), scaled_text(12, "B")
    ('3.35 TB/s', '1.00 MFLOP', '12 B')
    """
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    step = 0
    while step < len(prefixes) - 1 and abs(float(f"{value:.{places - 1}e}")) >= 1000:
        value, step = value / 1000, step + 1
    number = f"{value:.0f}" if step == 0 and value == int(value) else digits(value, places)
    return f"{number} {prefixes[step]}{unit}".rstrip()


def seconds_text(value: float) -> str:
    """Seconds with the prefix that reads best.

    >>> seconds_text(1.111e-3), seconds_text(2.5e-7), seconds_text(90)
    ('1.11 ms', '250 ns', '90.0 s')
    """
    if value == 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
        if float(f"{value:.2e}") >= factor:
            return f"{digits(value / factor)} {unit}"
    return f"{value:.2e} s"


def capacity_text(value: float) -> str:
    """A capacity in binary units where it is a whole number of them, else in decimal ones.

    >>> capacity_text(85_899_345_920), capacity_text(80e9), capacity_text(233472)
    ('80 GiB', '80.0 GB', '228 KiB')
    """
    for factor, unit in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if value % factor == 0 and 1 <= value / factor < 10_000:
            return f"{value / factor:.0f} {unit}"
    return scaled_text(value, "B")


def percent_text(value: float) -> str:
    """A fraction as a percentage: 0.123 is '12.3 %'; nothing above zero is shown as zero.

    >>> percent_text(1.0), percent_text(0.0123), percent_text(1e-6)
    ('100 %', '1.23 %', '<0.01 %')
    """
    if 0 < value < 1e-4:
        return "<0.01 %"
    return f"{digits(100 * value)} %"
