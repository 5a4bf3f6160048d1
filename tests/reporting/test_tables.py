import pytest

from mask2dit.reporting.tables import markdown_table, replace_part, text_table

HEADS, ROWS = ["row", "problem"], [["1", "too short"], ["12", "a | b\nc"]]


def test_text_tables_have_aligned_columns():
    assert text_table(HEADS, ROWS).splitlines() == ["row  problem", "1    too short", "12   a | b c"]


def test_markdown_tables_have_one_line_per_row_with_escaped_bars():
    assert markdown_table(HEADS, ROWS).splitlines() == [
        "| row | problem |",
        "| --- | --- |",
        "| 1 | too short |",
        "| 12 | a \\| b c |",
    ]


def test_tables_without_rows_are_their_heads():
    assert text_table(HEADS, []) == "row  problem"
    assert markdown_table(HEADS, []).count("\n") == 1


def test_a_part_of_a_page_is_replaced_between_its_marks_alone():
    page = "before\n<!-- begin a -->\nold\n<!-- end a -->\nafter\n"
    assert replace_part(page, "a", r"\1 new") == "before\n<!-- begin a -->\n\\1 new\n<!-- end a -->\nafter\n"
    with pytest.raises(ValueError, match="'b'"):
        replace_part(page, "b", "new")
