"""Plots as SVG text, which a page carries without another file. Pure."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from mask2dit.reporting.bootstrap import Interval

INK, SOFT, RULE = "#202124", "#5f6368", "#dadce0"
SERIES = ("#1a66c2", "#c2571a", "#2a8c5a", "#8a4fb3", "#b08a00", "#5f6368")  # told apart in greyscale and by most eyes
BAR, LINE = "#1a66c2", "#b3261e"
BAR_COUNT = 40
FONT = "font-family='system-ui, sans-serif' font-size='12'"


def interval_plot(
    rows: Sequence[tuple[str, Sequence[Interval | None]]], names: Sequence[str], width: int = 760
) -> str:
    """Means with their intervals, a row a column of results and a dot a run, on one axis.

    Args:
        rows: a label with one interval a run, None where a run lacks it.
        names: of the runs.
    """
    found = [interval for _, intervals in rows for interval in intervals if interval]
    if not found:
        return ""
    low, high = min(0.0, *(i.low for i in found)), max(i.high for i in found)
    span = (high - low) or 1.0
    left, right, step = 230, 30, 16
    height_of = 14 + step * len(names)
    top = 10 + 18 * (len(names) > 1)
    bottom = top + height_of * len(rows)

    def x(value: float) -> float:
        return left + (value - low) / span * (width - left - right)

    parts = []
    if len(names) > 1:
        position = left
        for name, colour in zip(names, _colours(len(names))):
            parts.append(f"<circle cx='{position + 5}' cy='12' r='4' fill='{colour}'/>")
            parts.append(f"<text x='{position + 14}' y='16' {FONT} fill='{INK}'>{escape(name)}</text>")
            position += 34 + 7 * len(name)
    for value in _ticks(low, high):
        parts.append(f"<line x1='{x(value):.1f}' x2='{x(value):.1f}' y1='{top}' y2='{bottom}' stroke='{RULE}'/>")
        parts.append(
            f"<text x='{x(value):.1f}' y='{bottom + 16}' text-anchor='middle' {FONT} fill='{SOFT}'>{value:g}</text>"
        )
    for row, (label, intervals) in enumerate(rows):
        y = top + height_of * row + height_of / 2
        parts.append(
            f"<text x='{left - 12}' y='{y + 4:.1f}' text-anchor='end' {FONT} fill='{INK}'>{escape(label)}</text>"
        )
        for i, (interval, colour) in enumerate(zip(intervals, _colours(len(names)))):
            if interval is None:
                continue
            line = y + step * (i - (len(names) - 1) / 2)
            tip = f"{names[i]}: {interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f}), {interval.count} stories"
            parts.append(
                f"<g><title>{escape(tip)}</title><line x1='{x(interval.low):.1f}' x2='{x(interval.high):.1f}' "
                f"y1='{line:.1f}' y2='{line:.1f}' stroke='{colour}' stroke-width='2'/>"
                f"<circle cx='{x(interval.value):.1f}' cy='{line:.1f}' r='4.5' fill='{colour}'/></g>"
            )
    return _svg(width, bottom + 26, parts)


def scatter_plot(
    points: Sequence[tuple[str, float, float]], x_label: str, y_label: str, width: int = 420, height: int = 340
) -> str:
    """One dot a story with its name on hovering."""
    if not points:
        return ""
    ranges = [_range([point[axis] for point in points]) for axis in (1, 2)]
    x, y, parts = _axes(*ranges, x_label, y_label, width, height)
    for name, at_x, at_y in points:
        tip = f"{name}: {at_x:.2f}, {at_y:.2f}"
        parts.append(
            f"<circle cx='{x(at_x):.1f}' cy='{y(at_y):.1f}' r='5' fill='{SERIES[0]}' fill-opacity='0.6'>"
            f"<title>{escape(tip)}</title></circle>"
        )
    return _svg(width, height, parts)


def line_plot(
    lines: dict[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, width: int = 560, height: int = 320
) -> str:
    """A line a name, through its points, with 0 and 1 in view."""
    points = [point for line in lines.values() for point in line]
    x_range = (min(at for at, _ in points), max(at for at, _ in points))
    x, y, parts = _axes(x_range, _range([0.0, 1.0, *(value for _, value in points)]), x_label, y_label, width, height)
    for i, ((name, line), colour) in enumerate(zip(lines.items(), _colours(len(lines)))):
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in line)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts += [f"<circle cx='{x(at):.1f}' cy='{y(value):.1f}' r='3.5' fill='{colour}'/>" for at, value in line]
        place = height - 54 - 18 * (len(lines) - 1 - i)
        parts.append(f"<circle cx='72' cy='{place - 4}' r='4' fill='{colour}'/>")
        parts.append(f"<text x='82' y='{place}' {FONT} fill='{INK}'>{escape(name)}</text>")
    return _svg(width, height, parts)


def heat_map(matrix: Sequence[Sequence[float]], cell: int = 46) -> str:
    """A similarity matrix in 0 … 100, white to blue, with its numbers."""
    size, margin = len(matrix), 24
    parts = []
    for i in range(size):
        for x, y in ((margin + cell * (i + 0.5), margin - 8), (margin - 10, margin + cell * (i + 0.5) + 4)):
            parts.append(f"<text x='{x}' y='{y}' text-anchor='middle' {FONT} fill='{SOFT}'>{i + 1}</text>")
        for j in range(size):
            strength = min(max(matrix[i][j] / 100, 0), 1)
            fill = "#" + "".join(f"{round(255 + (c - 255) * strength):02x}" for c in (26, 82, 160))
            x, y = margin + cell * j, margin + cell * i
            parts.append(f"<rect x='{x}' y='{y}' width='{cell - 2}' height='{cell - 2}' fill='{fill}'/>")
            parts.append(
                f"<text x='{x + cell / 2 - 1}' y='{y + cell / 2 + 4}' text-anchor='middle' {FONT} "
                f"fill='{'#ffffff' if strength > 0.55 else INK}'>{matrix[i][j]:.0f}</text>"
            )
    side = margin + cell * size
    return _svg(side, side, parts)


def histogram(
    values: Sequence[float], title: str, marks: Mapping[str, float], guides: Mapping[str, float] | None = None
) -> str:
    """A histogram as SVG.

    Args:
        values: what is counted, at least one.
        title: of the axis.
        marks: values to draw as lines, by their labels.
        guides: the same, less strongly: dashed.
    """
    width, height = 760, 300
    lines = [(value, label, LINE, "") for label, value in marks.items()]
    lines += [(value, label, SOFT, " stroke-dasharray='4 3'") for label, value in (guides or {}).items()]
    places = [*values, *(value for value, *_ in lines)]
    low, high = min(places), max(places)
    span = (high - low) or 1.0
    low, high = low - 0.02 * span, high + 0.02 * span
    step = (high - low) / BAR_COUNT
    counts = [0] * BAR_COUNT
    for value in values:
        counts[min(int((value - low) / step), BAR_COUNT - 1)] += 1
    left, right, top, bottom = 50, 20, 20 + 15 * len(lines), 46
    tallest = max(counts) or 1

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    def y(count: float) -> float:
        return height - bottom - count / tallest * (height - top - bottom)

    parts = [
        f"<line x1='{left}' x2='{width - right}' y1='{y(0)}' y2='{y(0)}' stroke='{RULE}'/>",
        f"<text x='{left - 8}' y='{y(tallest) + 4:.1f}' text-anchor='end' fill='{SOFT}'>{tallest}</text>",
        f"<text x='{left - 8}' y='{y(0) + 4:.1f}' text-anchor='end' fill='{SOFT}'>0</text>",
        f"<text x='{width / 2}' y='{height - 6}' text-anchor='middle' fill='{INK}'>{title}, {len(values)} values</text>",
    ]
    for i, count in enumerate(counts):
        if count:
            begin, end = low + i * step, low + (i + 1) * step
            parts.append(
                f"<rect x='{x(begin):.1f}' y='{y(count):.1f}' width='{x(end) - x(begin) - 1:.1f}' "
                f"height='{y(0) - y(count):.1f}' fill='{BAR}'><title>{begin:.3f} to {end:.3f}: {count}</title></rect>"
            )
    for value in _histogram_ticks(low, high):
        parts.append(
            f"<text x='{x(value):.1f}' y='{y(0) + 16:.1f}' text-anchor='middle' fill='{SOFT}'>{value:g}</text>"
        )
    # Each label in a line of its own, the rightmost value's on top, so that no label is crossed by the line of another.
    for i, (value, label, colour, dashes) in enumerate(sorted(lines, reverse=True)):
        side, shift = ("end", -5) if x(value) > 150 else ("start", 5)
        parts.append(
            f"<line x1='{x(value):.1f}' x2='{x(value):.1f}' y1='{8 + 15 * i}' y2='{y(0)}' stroke='{colour}'{dashes}/>"
            f"<text x='{x(value) + shift:.1f}' y='{18 + 15 * i}' text-anchor='{side}' fill='{colour}'>{label}</text>"
        )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}' font-family='system-ui, sans-serif' font-size='12'>"
        f"<rect width='{width}' height='{height}' fill='#ffffff'/>{''.join(parts)}</svg>\n"
    )


def _axes(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_label: str,
    y_label: str,
    width: float,
    height: float,
) -> tuple[Callable[[float], float], Callable[[float], float], list[str]]:
    """Where values lie, and the grid with its labels."""
    left, right, top, bottom = 56, 16, 12, 44

    def x(value: float) -> float:
        return left + (value - x_range[0]) / (x_range[1] - x_range[0]) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (value - y_range[0]) / (y_range[1] - y_range[0]) * (height - top - bottom)

    parts = []
    for value in _ticks(*x_range):
        parts.append(
            f"<line x1='{x(value):.1f}' x2='{x(value):.1f}' y1='{top}' y2='{height - bottom}' stroke='{RULE}'/>"
        )
        parts.append(
            f"<text x='{x(value):.1f}' y='{height - bottom + 16}' text-anchor='middle' {FONT} fill='{SOFT}'>{value:g}</text>"
        )
    for value in _ticks(*y_range):
        parts.append(
            f"<line x1='{left}' x2='{width - right}' y1='{y(value):.1f}' y2='{y(value):.1f}' stroke='{RULE}'/>"
        )
        parts.append(
            f"<text x='{left - 8}' y='{y(value) + 4:.1f}' text-anchor='end' {FONT} fill='{SOFT}'>{value:g}</text>"
        )
    middle = (top + height - bottom) / 2
    parts.append(
        f"<text x='{(left + width - right) / 2}' y='{height - 8}' text-anchor='middle' {FONT} fill='{INK}'>"
        f"{escape(x_label)}</text>"
    )
    parts.append(
        f"<text x='14' y='{middle}' text-anchor='middle' transform='rotate(-90 14 {middle})' {FONT} fill='{INK}'>"
        f"{escape(y_label)}</text>"
    )
    return x, y, parts


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}'>{''.join(parts)}</svg>"
    )


def _colours(count: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers."""
    rough = (high - low) / 6
    power = 10.0 ** int(f"{rough:e}".split("e")[1])
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = -(-low // step) * step
    return [round(first + step * i, 10) for i in range(int((high - first) // step) + 1)]


def _histogram_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, four to eight of them."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= max(factor for factor in (1, 2, 5) if factor * step <= (high - low) / 4)
    return [round(step * i, 9) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
