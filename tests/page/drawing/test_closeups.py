"""Grids, maps and numbers around an element: what fails is said in words, and the element that is meant is marked."""

from __future__ import annotations

import math
import re

from flashcore.page.drawing import closeups

WINDOW = {
    "stage": "scores", "batch": 0, "head": 1, "page": 2, "down": "row", "across": "column", "first_down": 4,
    "first_across": 16, "at": [1, 0], "got": [[1.0, math.inf], [math.nan, 0.5]],
    "expected": [[1.0, math.inf], [2.0, 0.25]],
}  # fmt: skip
TILE = {**WINDOW, "shares": [[0.0, 0.4, 0.0], [math.inf, 1.5, 0.2], [0.0, 3.0, 0.0]]}
del TILE["got"], TILE["expected"]


def cells_of(html: str) -> list[str]:
    return re.findall(r"<td[^>]*>(?:<u><b>)?([^<]*)", html)


def test_a_grid_says_fail_in_a_word_and_leaves_what_is_not_judged_empty():
    html = closeups.grid_html({"scores": [0.5, 1.0, None], "out": [None, None, 7.0]}, ["0", "1", "<end>"], "Errors")
    assert cells_of(html) == ["0.50", "1.00", "", "", "", "FAIL"]
    assert "&lt;end&gt;" in html and html.count("font-weight:bold") == 1


def test_a_share_that_is_no_number_fails():
    assert [closeups.words_of(x) for x in (1.0, 1.0001, math.inf, math.nan)] == ["1.00", "FAIL", "FAIL", "FAIL"]
    assert closeups.grid_html({"a": [math.nan]}, ["0"], "Errors").count("FAIL") == 1


def test_equal_infinities_do_not_differ_and_a_nan_does():
    (same, infinite), (lost, half) = closeups.differences(WINDOW)
    assert (same, infinite, half) == (0.0, 0.0, 0.25) and math.isnan(lost)


def test_the_numbers_mark_the_element_in_html_and_in_text():
    html, text = closeups.numbers_html(WINDOW), closeups.numbers_text(WINDOW)
    assert re.findall(r"<u><b>([^<]*)</b></u>", html) == ["NaN", "2", "NaN"]
    assert [line.split() for line in text.splitlines()] == [
        ["got", "(row", "down,", "column", "across)"], ["16", "17"], ["4", "1", "Inf"], ["5", "[NaN]", "0.5"],
        ["expected", "(row", "down,", "column", "across)"], ["16", "17"], ["4", "1", "Inf"], ["5", "[2]", "0.25"],
        ["difference", "(row", "down,", "column", "across)"], ["16", "17"], ["4", "0", "0"], ["5", "[NaN]", "0.25"],
    ]  # fmt: skip


def test_a_tile_counts_what_is_wrong_and_where():
    words = closeups.tile_words(TILE)
    assert words == (
        "scores, batch 0, head 1, page 2: 3 of 9 elements of this tile are beyond their bounds, in row 5 to 6 and "
        "column 16 to 17."
    )
    html = closeups.tile_html(TILE)
    assert f'aria-label="{words}"' in html and html.count("<rect") == 5 + 2, "five errors, the edge and the frame"
    assert "all 2 elements of this tile are within" in closeups.tile_words({**TILE, "shares": [[0.1, 1.0]]})
    assert "row 4 to 6 (2 of these)" in closeups.tile_words({**TILE, "shares": [[2.0], [0.0], [2.0]]})
