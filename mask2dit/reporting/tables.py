"""Tables as text, for the terminal and for Markdown."""

from collections.abc import Sequence


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in aligned columns, two spaces apart."""
    lines = [[_one_line(cell) for cell in line] for line in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, in which a `|` of a cell is escaped."""
    cells = [[_one_line(cell).replace("|", "\\|") for cell in line] for line in (heads, *rows)]
    cells.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _one_line(cell: str) -> str:
    return " ".join(cell.splitlines())
