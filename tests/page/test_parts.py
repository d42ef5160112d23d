"""Small pieces that the page's modules share."""

from __future__ import annotations

from flashcore.page.parts import frame_html


def test_backends_keep_their_names_and_counts_have_thousands():
    from pandas import DataFrame

    html = frame_html(DataFrame([{"bug": "x", "cpu": "found", "values judged": 1234567}]), "t", ids={"cpu"})
    assert ">cpu<" in html and ">Bug<" in html and "1,234,567" in html and 'class="num"' in html
