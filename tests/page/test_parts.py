"""Small pieces that the page's modules share."""

from __future__ import annotations

import pytest

from flashcore.page.drawing.html_tables import fold
from flashcore.page.parts import drawn, frame_html, short, signed


def test_backends_keep_their_names_and_counts_have_thousands():
    from pandas import DataFrame

    html = frame_html(DataFrame([{"bug": "x", "cpu": "found", "values judged": 1234567}]), "t", ids={"cpu"})
    assert ">cpu<" in html and ">Bug<" in html and "1,234,567" in html and 'class="num"' in html


def test_what_is_folded_shows_its_summary_as_text_and_its_content_as_html():
    assert fold("<a> & b", "<p>inside</p>") == (
        '<details class="fc-fold inline"><summary>&lt;a&gt; &amp; b</summary><p>inside</p></details>'
    )


def test_a_frame_without_rows_is_a_sentence():
    from pandas import DataFrame

    assert frame_html(DataFrame(), "Repeats") == '<p class="fc-none">Repeats: no record.</p>'


def test_only_whole_numbers_are_counts():
    from pandas import DataFrame

    first = {"name": "a", "n": 1000, "mixed": 5, "flag": True}
    frame = DataFrame([first, {"name": "b", "n": 2, "mixed": "x", "flag": 1}], dtype=object)
    html = frame_html(frame, "t")
    assert '<td class="num" data-label="N">1,000</td>' in html
    assert '<td data-label="Mixed">5</td>' in html and '<td data-label="Flag">True</td>' in html


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(12.345, None, "+12.3"), (-0.5, None, "−0.500"), (0, None, "+0"), (-59.06, 1, "−59.1")],
)
def test_a_difference_has_its_sign(value, digits, text):
    assert signed(value, digits) == text


@pytest.mark.parametrize(("unit", "text"), [("% of checks", "%"), ("%", "%"), ("TFLOPS", "TFLOPS"), ("", "")])
def test_a_share_of_whatever_is_a_percentage(unit, text):
    assert short(unit) == text


def test_a_part_that_cannot_be_drawn_says_why_and_where_and_costs_no_other():
    assert drawn("The table", lambda: "<p>drawn</p>") == "<p>drawn</p>"
    text = drawn("The <table>", lambda: {"a": 1}["<b>\n"])
    assert "The &lt;table&gt; could not be drawn from these records (KeyError: " in text
    assert "&lt;b&gt;" in text and ", test_parts.py, line " in text and "<b>" not in text and "\n" not in text
