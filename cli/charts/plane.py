"""Logarithmic axes as pixels, so that labels can be turned and placed before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cli.charts.picture import HEIGHT, MARGIN, WIDTH, Box
from cli.quantity import count_text

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """A log-log panel: data ranges, and its share of the figure as fractions of the plot area."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    x_domain: tuple[float, float] = (0.0, 1.0)
    y_domain: tuple[float, float] = (0.0, 1.0)
    right_margin: float = MARGIN["r"]

    @property
    def frame(self) -> Box:
        """The panel in pixels from the plot area's lower left corner, y upwards."""
        wide = WIDTH - MARGIN["l"] - self.right_margin
        high = HEIGHT - MARGIN["t"] - MARGIN["b"]
        return Box(
            self.x_domain[0] * wide,
            self.y_domain[0] * high,
            self.x_domain[1] * wide,
            self.y_domain[1] * high,
        )

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a data point."""
        f = self.frame
        across = math.log(x / self.x_low) / math.log(self.x_high / self.x_low)
        up = math.log(y / self.y_low) / math.log(self.y_high / self.y_low)
        return f.left + across * (f.right - f.left), f.bottom + up * (f.top - f.bottom)

    def slope_degrees(self) -> float:
        """The screen angle of a line y = c x."""
        x0, y0 = self.pixel(self.x_low, self.y_low)
        x1, y1 = self.pixel(10 * self.x_low, 10 * self.y_low)
        return math.degrees(math.atan2(y1 - y0, x1 - x0))


def spread(values: Iterable[float], below: float, above: float) -> tuple[float, float]:
    """The range of the values with room: `below` and `above` are factors."""
    found = [v for v in values if v > 0 and math.isfinite(v)]
    return min(found) / below, max(found) * above


def decades(low: float, high: float, most: int = 9) -> list[float]:
    """Powers of ten inside the range, thinned to at most `most`."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(math.ceil((last - first + 1) / most), 1)
    return [10.0**n for n in range(first, last + 1, step)]


def plain_decade(value: float) -> str:
    """A power of ten as its digits where short, else with an exponent.

    >>> plain_decade(0.01), plain_decade(1000.0), plain_decade(1e7)
    ('0.01', '1000', '10⁷')
    """
    exponent = round(math.log10(value))
    if -3 <= exponent <= 4:
        return f"{10.0**exponent:.{max(-exponent, 0)}f}"
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def count_ticks(low: float, high: float, *, powers_of_two: bool) -> tuple[list[float], list[str]]:
    """Tick values and texts for a count: powers of two as 4k, or 1-2-5 steps in all digits."""
    if powers_of_two:
        first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
        step = max(math.ceil((last - first + 1) / 12), 1)
        values = [2.0**n for n in range(first, last + 1, step)]
    else:
        steps = [part * ten for ten in decades(low / 10, high) for part in (1, 2, 5)]
        values = [v for v in steps if low <= v <= high]
        values = values if len(values) <= 12 else decades(low, high)
    return values, [count_text(v) for v in values]
