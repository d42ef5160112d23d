"""Figures as inline SVG: well formed, named, following the page's colours, asking for nothing."""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import pytest
from matplotlib.figure import Figure
from support import synthetic_records as synthetic
from support.html_tools import svgs

from flashcore.page.drawing import plots, svg

TRIALS = synthetic.gpu_trials()


def test_an_svg_is_well_formed_named_and_asks_for_nothing():
    html = plots.tflops_html(TRIALS)
    figures = svgs(html)
    assert len(figures) == 4
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img" and len(root.get("aria-label")) > 40
        assert not re.search(r"(?:href|src)=\"(?!#)|url\((?!#)|<!DOCTYPE|<metadata|<style|<\?xml", figure)
        assert len(figure) < 40_000
        assert "<text" in figure  # words stay words, so that they can be searched and read


@pytest.mark.slow
def test_colours_are_variables_of_the_page():
    figure = svgs(plots.tflops_html(TRIALS))[0]
    bare = re.sub(r"var\(--fc-[a-z0-9]+,\s*#[0-9a-f]{6}\)", "", figure)
    assert not re.search(r"#[0-9a-f]{6}\b", bare), re.findall(r"#[0-9a-f]{6}\b", bare)
    assert "--fc-s1" in figure and "--fc-ink" in figure


def test_every_colour_is_unlike_the_others():
    assert len(set(svg.COLOURS.values())) == len(svg.COLOURS)


@pytest.mark.slow
def test_ids_differ_between_figures_and_every_reference_is_met():
    figures = svgs(plots.tflops_html(TRIALS))
    seen: set[str] = set()
    for figure in figures:
        ids = re.findall(r' id="([^"]+)"', figure)
        used = set(re.findall(r"#(f[0-9a-f]{8}-\d+)", figure))
        assert used and used <= set(ids) and len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)


def test_a_quote_in_the_message_does_not_end_it():
    lines = next(iter(plots.panels(TRIALS).values()))
    html = svg.figure_html(plots.tflops_figure(lines), 'says "a < b" & more', caption="<b>")
    root = ElementTree.fromstring(svgs(html)[0])
    assert root.get("aria-label") == 'says "a < b" & more' and "&lt;b&gt;" in html


def drawn(draw) -> str:
    with svg.style():
        figure = Figure(figsize=(2, 2))
        draw(figure.add_subplot())
        return svg.figure_html(figure, "alt")


def test_black_follows_the_pages_ink_and_numbers_are_short():
    html = drawn(lambda axes: axes.plot([0, 1 / 3], [0, 2 / 3], color="black"))
    assert "currentColor" in html and "#000000" not in html
    bare = re.sub(r'viewBox="[^"]*"', "", html)
    assert not re.search(r"(?<![#\w])-?\d+\.\d{3,}", bare)


def test_text_carries_no_font_of_this_machine():
    html = drawn(lambda axes: axes.set_title("A title"))
    assert ">A title<" in html and "DejaVu" not in html and html.count("font-family") == 1
    assert re.search(r"font-weight: (bold|700)", html), "and keeps its weight"


def test_the_style_is_put_back():
    before = matplotlib.rcParams["svg.fonttype"], matplotlib.rcParams["axes.grid"]
    with svg.style():
        assert matplotlib.rcParams["axes.grid"] is True and matplotlib.rcParams["svg.fonttype"] == "none"
    assert (matplotlib.rcParams["svg.fonttype"], matplotlib.rcParams["axes.grid"]) == before


def test_without_a_caption_there_is_no_figure_around_it():
    with svg.style():
        figure = Figure()
        plain, captioned = svg.figure_html(figure, "a"), svg.figure_html(figure, "a", caption="Words & more")
    assert plain.startswith("<svg") and plain.endswith("</svg>")
    assert captioned.startswith("<figure") and "<figcaption>Words &amp; more</figcaption>" in captioned


def test_every_point_of_a_line_with_words_carries_its_own():
    figure = Figure()
    axes = figure.add_subplot()
    (line,) = axes.plot([1, 2, 3], [3, 1, 2], marker="o")
    words = ['a "quoted" <one>', "zwei µs & more", "third"]
    svg.with_tips(line, words)
    axes.plot([1, 2], [1, 1], marker="s")  # without any
    html = svg.figure_html(figure, "What it says.")
    assert [t.text for t in ElementTree.fromstring(html).iter("{http://www.w3.org/2000/svg}title")] == words
    assert "tips:" not in html


@pytest.mark.slow
def test_every_timing_in_a_plot_says_its_value_and_its_spread():
    titles = re.findall(r"<title>([^<]*)</title>", plots.tflops_html(TRIALS))
    panels = plots.panels([t for t in TRIALS if not plots._is_small(t)])
    assert len(titles) == sum(len(points) for lines in panels.values() for points in lines.values())
    assert all(re.search(r": [\d.,]+ µs, [\d.,]+ TFLOPS, the median within .* to .*; n 30$", t) for t in titles)
    dots = re.findall(r"<title>([^<]*)</title>", plots.latency_html(TRIALS))
    assert len(dots) == len(plots.small_trials(TRIALS))


def test_two_threads_that_draw_at_once_leave_each_other_s_look_and_everybody_else_s():
    """Matplotlib's settings are of the process: who came second would put back what the first had set."""
    before = dict(matplotlib.rcParams)

    def draw(wait):
        with svg.style():
            time.sleep(wait)
            inside = matplotlib.rcParams["axes.grid"], matplotlib.rcParams["axes.edgecolor"]
            time.sleep(0.05)
        return inside

    with ThreadPoolExecutor(2) as pool:
        inside = list(pool.map(draw, (0.05, 0.15)))
    assert inside == [(True, svg.COLOURS["muted"])] * 2
    assert dict(matplotlib.rcParams) == before
