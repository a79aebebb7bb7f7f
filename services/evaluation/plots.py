"""Plots of a report as SVG text. Colours come from the page's style sheet, so both themes fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

WIDTH = 640
HEIGHT = 320
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 26, 44
LEGEND = 170  # width of a legend on the right
SHAPES = {  # a ring is wide: where it meets a mark of another curve, both are seen
    "circle": '<circle class="c{number}" cx="{x}" cy="{y}" r="4.5"',
    "ring": '<circle class="ring i{number}" cx="{x}" cy="{y}" r="7.5"',
    "square": '<path class="c{number}" d="M{x} {y}m-4-4h8v8h-8z"',
    "frame": '<path class="ring i{number}" d="M{x} {y}m-7-7h14v14h-14z"',
}


@dataclass(frozen=True)
class Point:
    """A mark with an interval. note: stands beside it."""

    x: float
    y: float
    low: float
    high: float
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Points of one name, joined by a line. number: of its colour. shape: of SHAPES."""

    name: str
    points: Sequence[Point]
    number: int
    shape: str = "circle"


@dataclass(frozen=True)
class Mark:
    """A value with its interval."""

    y: float
    low: float
    high: float


def style() -> str:
    """The style sheet that plots need, for light and dark."""
    sheet = files("services.evaluation").joinpath("page", "plot.css")
    return sheet.read_text(encoding="utf-8")


def standalone(plot: str) -> str:
    """A plot as a file of its own, which brings its style sheet and ground."""
    head, _, rest = plot.partition(">")
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    ground = '<rect class="ground" width="100%" height="100%"/>'
    return f"{head}>\n<style>\n{style()}</style>\n{ground}{rest}\n"


class _Frame:
    """Maps data to pixels, and draws the axes."""

    def __init__(
        self, x_range: tuple[float, float], y_range: tuple[float, float], right: int = RIGHT
    ) -> None:
        self._x = x_range
        self._y = y_range
        self._end = WIDTH - right

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / (high - low) * (self._end - LEFT)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_title: str, y_title: str, x_ticks: Sequence[float]) -> list[str]:
        parts = [_text(LEFT - 6, TOP - 13, y_title, "end")]
        low, high = (round(10 * value) for value in self._y)
        for tenth in range(high, low - 1, -1 if high - low <= 5 else -2):
            value = tenth / 10
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{self._end}" y1="{y}" y2="{y}"/>')
            parts.append(_text(LEFT - 6, y + 4, f"{value:.0%}", "end"))
        for tick in x_ticks:
            parts.append(_text(self.x(tick), HEIGHT - BOTTOM + 16, f"{tick:g}", "middle"))
        parts.append(_text((LEFT + self._end) / 2, HEIGHT - 8, x_title, "middle"))
        return parts


def scatter(curves: Sequence[Curve], x_title: str, y_title: str, caption: str) -> str:
    """Curves with vertical intervals and a legend. x is from 0 to 1, y a rate."""
    points = [point for curve in curves for point in curve.points]
    y_range = _rates([p.low for p in points], [p.high for p in points])
    frame = _Frame((-0.03, 1.06), y_range, right=LEGEND)
    parts = frame.axes(x_title, y_title, [0.0, 0.25, 0.5, 0.75, 1.0])
    notes: list[tuple[float, float, str]] = []
    for place, curve in enumerate(curves):
        number = curve.number % 8
        line = [f"{frame.x(p.x):.1f},{frame.y(p.y):.1f}" for p in curve.points]
        parts.append(f'<polyline class="i{number}" points="{" ".join(line)}"/>')
        for point in curve.points:
            x, y = frame.x(point.x), frame.y(point.y)
            name = f"{curve.name} {point.note}".strip()
            parts.append(_interval(x, frame.y(point.low), frame.y(point.high), number))
            parts.append(_mark(curve.shape, x, y, number, f"{name}: {point.y:.3f}"))
            if point.note:
                _note(notes, x + 8, y + 15, point.note)
        legend_y = TOP + 8 + 20 * place
        parts.append(_mark(curve.shape, WIDTH - LEGEND + 22, legend_y, number, curve.name))
        parts.append(_text(WIDTH - LEGEND + 36, legend_y + 4, curve.name, "start"))
    texts = [_text(x, y, note, "start") for x, y, note in notes]
    return _svg([*parts, *texts], caption)


def _note(notes: list[tuple[float, float, str]], x: float, y: float, text: str) -> None:
    """Place a note below its mark, else beside or above it; where curves meet, it stands once."""
    for shift in (0, -11, -22):
        near = [note for a, b, note in notes if abs(x - a) < 30 and abs(y + shift - b) < 11]
        if text in near:
            return
        if not near:
            notes.append((x, y + shift, text))
            return


def _mark(shape: str, x: float, y: float, number: int, title: str) -> str:
    body = SHAPES[shape].format(x=round(x, 1), y=round(y, 1), number=number)
    name = body[1:].partition(" ")[0]
    return f"{body}><title>{escape(title)}</title></{name}>"


def bars(
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    y_title: str,
    caption: str,
) -> str:
    """Bars of rates, by group and series, with a legend."""
    frame = _Frame((0.0, float(len(groups))), (0.0, 1.0))
    parts = frame.axes("", y_title, [])
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series):
        for place, value in enumerate(values):
            x = frame.x(place + 0.1 + number * width)
            top = frame.y(value)
            parts.append(
                f'<rect class="c{number % 8}" x="{x:.1f}" y="{top:.1f}" '
                f'width="{frame.x(width) - frame.x(0) - 2:.1f}" '
                f'height="{frame.y(0) - top:.1f}"><title>{escape(name)}, '
                f"{escape(groups[place])}: {value:.3f}</title></rect>"
            )
        legend_x = LEFT + 8 + number * 150
        parts.append(
            f'<rect class="c{number % 8}" x="{legend_x}" y="{HEIGHT - 16}" width="10" height="10"/>'
        )
        parts.append(_text(legend_x + 15, HEIGHT - 7, name, "start"))
    for place, group in enumerate(groups):
        parts.append(_text(frame.x(place + 0.5), HEIGHT - BOTTOM + 16, group, "middle"))
    return _svg(parts, caption)


def lines(
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[Mark | None]]],
    x_title: str,
    y_title: str,
    caption: str,
) -> str:
    """Lines with intervals, one mark per group; None where there is none. With a legend above."""
    marks = [mark for _, of in series for mark in of if mark is not None]
    y_range = _rates([mark.low for mark in marks], [mark.high for mark in marks])
    frame = _Frame((0.0, float(len(groups))), y_range)
    parts = frame.axes(x_title, y_title, [])
    for number, (name, of) in enumerate(series):
        shift = 0.5 + 0.06 * (number - (len(series) - 1) / 2)  # intervals side by side
        points = []
        for place, mark in enumerate(of):
            if mark is None:
                continue
            x, y = frame.x(place + shift), frame.y(mark.y)
            points.append(f"{x:.1f},{y:.1f}")
            parts.append(_interval(x, frame.y(mark.low), frame.y(mark.high), number))
            parts.append(
                f'<circle class="c{number % 8}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
                f"<title>{escape(name)}, {escape(groups[place])}: {mark.y:.3f}</title></circle>"
            )
        parts.append(f'<polyline class="i{number % 8}" points="{" ".join(points)}"/>')
        legend_x = LEFT + 60 + number * 140
        parts.append(f'<rect class="c{number % 8}" x="{legend_x}" y="5" width="10" height="10"/>')
        parts.append(_text(legend_x + 15, 14, name, "start"))
    for place, group in enumerate(groups):
        parts.append(_text(frame.x(place + 0.5), HEIGHT - BOTTOM + 16, group, "middle"))
    return _svg(parts, caption)


def _rates(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """A range of whole tenths around all intervals."""
    low = max(0.0, int(min(lows) * 10) / 10)
    high = min(1.0, int(max(highs) * 10 + 1) / 10)
    return low, max(high, low + 0.1)


def _interval(x: float, low: float, high: float, number: int) -> str:
    return f'<line class="i{number % 8}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], caption: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">'
    return head + "".join(parts) + "</svg>"
