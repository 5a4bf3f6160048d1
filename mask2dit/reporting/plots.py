"""Plots as SVG text, drawn by matplotlib without pyplot. The same data give the same text."""

import io
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from matplotlib import colormaps, rc_context, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mask2dit.reporting.bootstrap import Interval

INK, SOFT, RULE = "#202124", "#5f6368", "#dadce0"
SERIES = (  # marker, colour: dark and light alternate, so that neighbours differ in greyscale
    ("o", "#174a94"),
    ("D", "#e07b1a"),
    ("s", "#1f7a5c"),
    ("^", "#b78ad6"),
    ("v", "#7d2b3a"),
    ("P", "#8d9196"),
)
BAR, MARK, GUIDE = "#9dbfe8", "#a3160d", "#3c4043"
NUM_BINS = 40
MAX_NAME = 60  # characters of a run's name in a legend
LINE_HEIGHT = 16  # px
STYLE = {
    "figure.dpi": 72,  # one point is one px of the SVG
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout on every machine
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,  # names may contain dollar signs
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.labelpad": 6,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": RULE,
    "xtick.labelcolor": SOFT,
    "xtick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.color": RULE,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
    "ytick.major.pad": 6,
    "figure.constrained_layout.w_pad": 8 / 72,
    "figure.constrained_layout.h_pad": 6 / 72,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "svg.fonttype": "none",  # text stays text
}
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

in_style = style.context(["default", STYLE])  # artists take their style when they are made


class Plot:
    """A figure with one pair of axes, which becomes SVG with a tooltip for each marked artist.

    Args:
        label: what the plot shows, for those who cannot see it. Unique within a page.
        width, height: in px.
    """

    def __init__(self, label: str, width: float, height: float):
        self.label, self.width, self.height = label, width, height
        self.figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self.tips: dict[str, str] = {}

    def tip(self, artist, text: str) -> None:
        """Shows the text while the pointer is over the artist."""
        artist.set_gid(f"tip{len(self.tips)}")
        self.tips[artist.get_gid()] = text

    def legend(self, handles: Sequence, names: Sequence[str]) -> None:
        """Names the series above the axes, in as few rows as fit."""
        names = [textwrap.shorten(name, MAX_NAME, placeholder="…") for name in names]
        columns = max(1, int(self.width / (8 * max(map(len, names)) + 44)))
        self.figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=1.4)

    def svg(self) -> str:
        """The plot as one `svg` element, which can stand in a page or alone in a file."""
        file = io.StringIO()
        with rc_context({"svg.hashsalt": self.label}), warnings.catch_warnings():
            # Text is drawn by the browser, which has glyphs that the font of the layout lacks.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        root = ElementTree.fromstring(re.sub(r"font-family: [^;\"]*;? ?", "", file.getvalue()))
        return _clean(root, self.label, self.width, self.height, self.tips)


@in_style
def interval_plot(rows: Sequence[tuple[str, Sequence[Interval | None]]], names: Sequence[str]) -> str:
    """Means and their intervals on one axis: one row per measure, one marker per run.

    Args:
        rows: a label and one interval per run, None where the run has no value.
        names: of the runs.

    Returns:
        SVG; "" without intervals.
    """
    if not any(interval for _, intervals in rows for interval in intervals):
        return ""
    legend_rows = len(names) if len(names) > 1 else 0
    height = 64 + (14 + LINE_HEIGHT * len(names)) * len(rows) + LINE_HEIGHT * legend_rows
    plot = Plot(f"Means with 95% intervals of {', '.join(names)}", 720, height)
    axes, handles = plot.axes, {}
    for row, (_, intervals) in enumerate(rows):
        for run, interval in enumerate(intervals):
            if interval is None:
                continue
            marker, colour = SERIES[run % len(SERIES)]
            place = row + 0.7 * ((run + 0.5) / len(names) - 0.5)
            (line,) = axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2)
            (handles[run],) = axes.plot(
                interval.value, place, marker, color=colour, markersize=7, markeredgecolor="white"
            )
            text = f"{names[run]}: {interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f}), {interval.count} stories"
            plot.tip(line, text)
            plot.tip(handles[run], text)
    axes.margins(x=0.02)
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], color=INK)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("mean over stories, with its 95% interval")
    if len(names) > 1:
        plot.legend([handles[run] for run in sorted(handles)], [names[run] for run in sorted(handles)])
    return plot.svg()


@in_style
def scatter_plot(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str) -> str:
    """One dot per story, with its name as a tooltip.

    Args:
        points: name, x and y of each story.

    Returns:
        SVG; "" without points.
    """
    if not points:
        return ""
    plot = Plot(f"{y_label} over {x_label}, one dot per story", 370, 320)
    _, colour = SERIES[0]
    for name, x, y in points:
        (dot,) = plot.axes.plot(x, y, "o", color=colour, alpha=0.65, markersize=9, markeredgecolor="white")
        plot.tip(dot, f"{name}: {x:.2f}, {y:.2f}")
    plot.axes.margins(0.06)
    plot.axes.set(xlabel=x_label, ylabel=y_label)
    return plot.svg()


@in_style
def line_plot(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """One line per name through its points, with 0 and 1 in view.

    Args:
        lines: (x, y) of each point, by the name of the line.
    """
    plot = Plot(f"{', '.join(lines)} by {x_label}", 560, 320 + LINE_HEIGHT * len(lines))
    handles = []
    for i, (name, line) in enumerate(lines.items()):
        marker, colour = SERIES[i % len(SERIES)]
        handles += plot.axes.plot(*zip(*line), color=colour, linewidth=2)
        for x, y in line:
            (dot,) = plot.axes.plot(x, y, marker, color=colour, markersize=7, markeredgecolor="white")
            plot.tip(dot, f"{name}: {y:.2f} at {x:g}")
        handles[-1] = (handles[-1], dot)
    values = [value for line in lines.values() for _, value in line]
    plot.axes.set_ylim(min(-0.04, *values), max(1.04, *values))
    whole = all(float(x).is_integer() for line in lines.values() for x, _ in line)
    plot.axes.xaxis.set_major_locator(MaxNLocator(integer=whole))
    plot.axes.set(xlabel=x_label, ylabel=y_label)
    plot.legend(handles, list(lines))
    return plot.svg()


@in_style
def heat_map(matrix: Sequence[Sequence[float]], label: str) -> str:
    """A similarity matrix of scenes in 0 … 100, light to dark, with its numbers.

    Args:
        label: what the plot shows, for those who cannot see it.
    """
    size = len(matrix)
    side = 52 + max(30, min(46, 420 // size)) * size
    plot = Plot(label, side, side)
    axes = plot.axes
    axes.pcolormesh(matrix, cmap=colormaps["Blues"], vmin=0, vmax=100, edgecolor="white", linewidth=2)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            colour = "white" if value > 55 else INK
            axes.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center_baseline", color=colour)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    places, numbers = [i + 0.5 for i in range(size)], range(1, size + 1)
    axes.set_xticks(places, numbers)
    axes.set_yticks(places, numbers)
    axes.set(xlabel="scene", ylabel="scene")
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    return plot.svg()


@in_style
def histogram(
    values: Sequence[float], label: str, marks: Mapping[str, float], guides: Mapping[str, float] | None = None
) -> str:
    """A histogram with labelled vertical lines.

    Args:
        values: what is counted, at least one.
        label: of the x axis.
        marks: values to draw as solid lines, by their labels.
        guides: values to draw as dashed lines, by their labels.
    """
    lines = [(value, text, MARK, "-") for text, value in marks.items()]
    lines += [(value, text, GUIDE, (0, (4, 3))) for text, value in (guides or {}).items()]
    height = 280 + LINE_HEIGHT * len(lines)
    plot = Plot(f"Histogram: {label}", 760, height)
    axes = plot.axes
    places = [*values, *(value for value, *_ in lines)]
    counts, edges, bars = axes.hist(values, NUM_BINS, range=(min(places), max(places)), color=BAR, edgecolor="white")
    for count, low, high, bar in zip(counts, edges, edges[1:], bars):
        bar.set_visible(count > 0)
        plot.tip(bar, f"{low:.3f} to {high:.3f}: {count:.0f}")
    # The labels stand above the bars, each in a line of its own, and to the left of their lines. The rightmost is on top, so
    # that no label is crossed by the line of another.
    line = LINE_HEIGHT / (height - 60)
    top = 1 - line * len(lines)
    for i, (value, text, colour, dashes) in enumerate(sorted(lines)):
        level = top + line * (i + 1)
        in_axes = axes.get_xaxis_transform()
        axes.plot([value, value], [0, level], color=colour, linestyle=dashes, linewidth=1.4, transform=in_axes)
        axes.annotate(text, (value, level), (-5, 0), in_axes, "offset points", color=colour, ha="right", va="top")
    tallest = max(counts)
    axes.margins(x=0.02)
    axes.set_ylim(0, tallest / (0.98 * top))
    axes.set_yticks([tick for tick in MaxNLocator(4, integer=True).tick_values(0, tallest) if tick <= tallest])
    axes.grid(False, axis="x")
    axes.spines["left"].set_visible(False)
    axes.set(xlabel=f"{label} (n = {len(values)})", ylabel="count")
    return plot.svg()


def _clean(root: ElementTree.Element, label: str, width: float, height: float, tips: Mapping[str, str]) -> str:
    """Makes what matplotlib wrote fit for a page: a label, tooltips, px for pt, and no style or id that reaches outside."""
    for prefix, space in (("", SVG), ("xlink", XLINK)):
        ElementTree.register_namespace(prefix, space)
    for child in root.findall(f"{{{SVG}}}metadata") + root.findall(f"{{{SVG}}}defs[{{{SVG}}}style]"):
        root.remove(child)
    root.attrib |= {"width": f"{width:g}", "height": f"{height:g}", "role": "img", "aria-label": label}
    root.attrib |= {"font-family": "system-ui, sans-serif", "stroke-linejoin": "round"}
    for element in root.iter(f"{{{SVG}}}g"):
        if text := tips.get(element.attrib.pop("id", "")):
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = text
            element.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")
