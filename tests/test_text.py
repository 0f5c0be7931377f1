"""Text: tables for people."""

from mtprune.text import columns


def test_columns_stand_below_each_other():
    rows = [["layer", "shape", "kept"], ["up", "8x16", "1,024"], ["down.weight", "4x8", "7"]]
    assert columns(rows, left=2) == [
        "layer        shape   kept",
        "up           8x16   1,024",
        "down.weight  4x8        7",
    ]


def test_short_rows_end_early_and_no_line_ends_in_spaces():
    rows = [["", "before", "after"], ["bytes", "20"], ["ms", "10", "", "x"], ["total", "", ""]]
    assert columns(rows) == [
        "       before  after",
        "bytes      20",
        "ms         10         x",
        "total",
    ]
