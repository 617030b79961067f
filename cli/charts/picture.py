"""The common look of every figure, and figures as the bytes of a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cli.quantity import seconds_text, shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from hwmodels.device import Device

WIDTH, HEIGHT = 1280, 720
MARGIN: Final = {"l": 92, "r": 36, "t": 96, "b": 98}
FONT: Final = "Inter, Helvetica Neue, Helvetica, Arial, sans-serif"
INK, QUIET, GRID, FAINT = "#1f2933", "#616e7c", "#e8ecf1", "#9aa5b1"

# Okabe and Ito's palette without its yellow (too light on white): told apart by every
# colour-blind reader.
PALETTE: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d4e8c")

PAGES: Final = (".html", ".htm")
FORMATS: Final = (".html", ".png", ".svg", ".pdf")


def asked_for(html: Path | None, out: Path | None) -> list[Path]:
    """The picture files asked for; refused where their format cannot be drawn here."""
    if html is not None and html.suffix.lower() not in PAGES:
        raise InputError(f"--html {shown(html, 200)} does not end in .html; use --out for others")
    if out is not None and out.suffix.lower() not in (*FORMATS, *PAGES):
        raise InputError(
            f"--out {shown(out, 200)} has no known format; end it in {', '.join(FORMATS)}"
        )
    asked = [path for path in (html, out) if path is not None]
    _check_drawable(asked)
    return asked


def rendered(figure: go.Figure, suffix: str) -> bytes:
    """The figure as a file: a self-contained page, or an image drawn by a browser."""
    kind = suffix.lower().lstrip(".")
    if suffix.lower() in PAGES:
        page: str = figure.to_html(
            include_plotlyjs=True,
            full_html=True,
            div_id="ridgeplan",
            config={"displaylogo": False, "responsive": False},
        )
        return page.encode("utf-8")
    return _image(figure, kind)


def _check_drawable(paths: Iterable[Path]) -> None:
    """Refuse, before any work is done, an image where the package that draws it is missing."""
    for path in paths:
        if path.suffix.lower() not in PAGES and find_spec("kaleido") is None:
            raise InputError(
                f"drawing {path.suffix} needs kaleido; pip install 'ridgeplan[image]', "
                "or write .html"
            )


def _image(figure: go.Figure, kind: str) -> bytes:
    import kaleido
    from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError

    try:
        image: bytes = kaleido.calc_fig_sync(
            figure.to_dict(),
            opts={"format": kind, "width": WIDTH, "height": HEIGHT, "scale": 2},
            kopts={"mathjax": False},
        )
    except (BrowserClosedError, BrowserFailedError, ChromeNotFoundError):
        raise InputError(
            f"drawing .{kind} needs a Chrome or Chromium browser that starts; "
            "install one, or write .html"
        ) from None
    return image


def style(figure: go.Figure, *, title: str, subtitle: str, footnote: str) -> None:
    """White ground, quiet axes, title and subtitle at the left, a footnote with the sources."""
    subtitle, size = _fitted(subtitle)
    figure.update_layout(
        template="none",
        width=WIDTH,
        height=HEIGHT,
        margin=MARGIN,
        paper_bgcolor="white",
        plot_bgcolor="white",
        font={"family": FONT, "size": 14, "color": INK},
        title={
            "text": f"<b>{title}</b><br>"
            f"<span style='font-size:{size}px;color:{QUIET}'>{subtitle}</span>",
            "x": MARGIN["l"] / WIDTH,
            "xanchor": "left",
            "y": 0.955,
            "yanchor": "top",
            "font": {"size": 23},
        },
        hoverlabel={"bgcolor": "white", "bordercolor": FAINT, "font": {"family": FONT, "size": 13}},
    )
    figure.add_annotation(
        name="footnote",
        text=footnote,
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        yshift=-MARGIN["b"] + 4,
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
        align="left",
        borderpad=0,
        font={"size": 12, "color": QUIET},
    )


def _fitted(subtitle: str) -> tuple[str, int]:
    """The subtitle with a size at which it fits the picture's width, cut where none does."""
    room = WIDTH - MARGIN["l"] - MARGIN["r"]
    letter = 0.5  # of the size: running text is narrower than labels, which keep a margin
    for size in (15, 14, 13, 12):
        if letter * size * len(subtitle) <= room:
            return subtitle, size
    return shortened(subtitle, int(room / (letter * 12))), 12


def shortened(text: str, limit: int) -> str:
    """The text, cut between two words with an ellipsis where it is too long for its line.

    >>> shortened("num_heads 32, head_dim 128", 20), shortened("short", 20)
    ('num_heads 32...', 'short')
    """
    if len(text) <= limit:
        return text
    cut = text[: limit - 3]
    words = cut.rsplit(" ", 1)[0] if " " in cut[limit // 2 :] else cut
    return words.rstrip(" ,;:(") + "..."


def seconds_tick(value: float) -> str:
    """Seconds on an axis, without idle zeros.

    >>> seconds_tick(0.1), seconds_tick(2.5e-3), seconds_tick(100)
    ('100 ms', '2.5 ms', '100 s')
    """
    number, unit = seconds_text(value).split(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def source_line(devices: Sequence[Device]) -> str:
    """The citation of each device's bandwidth, in a line; one each where they are few."""
    parts = [f"{d.id}: {d.source_of('memory.hbm.bytes_per_s') or 'unsourced'}" for d in devices]
    room = 150 // len(parts)
    return "HBM bandwidth of " + "; ".join(shortened(part, room) for part in parts)


def log_axis(title: str, low: float, high: float, ticks: Sequence[float], texts: Sequence[str],
             **more: Any) -> dict[str, Any]:  # fmt: skip
    """A logarithmic axis from `low` to `high` with its own tick texts."""
    import math

    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "title": {"text": title, "font": {"size": 15, "color": QUIET}, "standoff": 12},
        "tickvals": list(ticks),
        "ticktext": list(texts),
        "tickfont": {"size": 13, "color": QUIET},
        "gridcolor": GRID,
        "linecolor": FAINT,
        "ticks": "outside",
        "tickcolor": FAINT,
        "ticklen": 4,
        "zeroline": False,
        **more,
    }


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels, y upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share any area."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )

    def within(self, other: Box) -> bool:
        """Whether this one lies inside the other."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.bottom >= other.bottom
            and self.top <= other.top
        )


class Placer:
    """Puts labels beside points so that none covers another, a marker, or the frame."""

    def __init__(self, frame: Box) -> None:
        self.frame = frame
        self.taken: list[Box] = []

    def keep_clear(self, x: float, y: float, radius: float) -> None:
        """Reserve the place of a marker."""
        self.taken.append(Box(x - radius, y - radius, x + radius, y + radius))

    def keep_line_clear(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Reserve a line, as a chain of small boxes."""
        steps = max(int(max(abs(x1 - x0), abs(y1 - y0)) / 6), 1)
        for i in range(steps + 1):
            part = i / steps
            self.keep_clear(x0 + part * (x1 - x0), y0 + part * (y1 - y0), 2)

    def free(self, box: Box) -> bool:
        """Whether a label there would cover nothing and stay inside the frame."""
        return box.within(self.frame) and not any(box.overlaps(b) for b in self.taken)

    def place(
        self, x: float, y: float, text: str, size: float = 14, *, near: bool = False
    ) -> tuple[float, float, str, str] | None:
        """Offset and anchors (xshift, yshift, xanchor, yanchor) of a label; None: no room.

        Tried in the order right, left, above, below, then further away; with `near` only right
        beside the point, above and below first.
        """
        wide, high = text_width(text, size), 1.25 * size * (1 + text.count("<br>"))
        for away, direction in _NEAR if near else _ANYWHERE:
            across, up, xanchor, yanchor = direction
            dx, dy = away * across, away * up
            left = x + dx - {"left": 0, "center": wide / 2, "right": wide}[xanchor]
            bottom = y + dy - {"bottom": 0, "middle": high / 2, "top": high}[yanchor]
            box = Box(left - 3, bottom, left + wide + 3, bottom + high)
            if self.free(box):
                self.taken.append(box)
                return dx, dy, xanchor, yanchor
        return None


_RIGHT, _LEFT = (1.0, 0.0, "left", "middle"), (-1.0, 0.0, "right", "middle")
_ABOVE, _BELOW = (0.0, 1.0, "center", "bottom"), (0.0, -1.0, "center", "top")
_DIRECTIONS: Final = (
    _RIGHT, (1.0, 0.8, "left", "bottom"), (1.0, -0.8, "left", "top"), _LEFT, _ABOVE, _BELOW,
    (-1.0, 0.8, "right", "bottom"), (-1.0, -0.8, "right", "top"),
)  # fmt: skip
_ANYWHERE: Final = [(a, d) for a in (12, 18, 28, 42, 60, 84, 120, 160) for d in _DIRECTIONS]
_NEAR: Final = [(9, d) for d in (_ABOVE, _BELOW, _RIGHT, _LEFT, _DIRECTIONS[2])]


def text_width(text: str, size: float) -> float:
    """Pixels that a label needs, from the mean width of a sans-serif letter."""
    return 0.55 * size * max(len(line) for line in text.split("<br>"))
