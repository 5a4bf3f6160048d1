"""Tables as text, for the terminal and for Markdown."""

import re
from collections.abc import Sequence


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in aligned columns, two spaces apart."""
    lines = [[_one_line(cell) for cell in line] for line in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. A `|` within a cell is escaped."""
    cells = [[_one_line(cell).replace("|", "\\|") for cell in line] for line in (heads, *rows)]
    cells.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def replace_part(text: str, name: str, part: str) -> str:
    """Writes a part of a page between its lines `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: if the page does not have these lines.
    """
    pattern = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the page has no place for {name!r}: <!-- begin {name} --> and <!-- end {name} -->")
    return pattern.sub(lambda found: f"{found[1]}{part}\n{found[2]}", text)


def _one_line(cell: str) -> str:
    return " ".join(cell.splitlines())
