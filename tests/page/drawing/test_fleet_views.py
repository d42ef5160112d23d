"""A fleet on a page: the finding, a plot with each card, and tables; SYNTHETIC records."""

from __future__ import annotations

import re

from support import synthetic_fleet as synthetic

from flashcore.decision import fleet
from flashcore.page.drawing import fleet_views
from flashcore.records import Trial


def page_of(trials, environment=None) -> str:
    return fleet_views.section_html(trials, environment or {})


def test_the_finding_stands_first_and_the_card_that_is_off_is_named_with_its_reason():
    page = page_of(synthetic.cards(factors={"attention": 0.8}, load={"temperature_c": 90.0}))
    assert page.startswith("<p><strong>1 of 8 cards are off (8 × NVIDIA H200).</strong></p>")
    assert "since it was hotter, 90 °C beside 58." in page
    assert page.count(">OFF<") == 1 and page.count("as the others") == 7
    assert page.count('data-label="hopper">aa11</td>') == page.count('data-label="wmma">bb22</td>') == 8


def test_the_plot_has_a_point_for_each_card_and_says_what_it_shows():
    found = fleet.judge(synthetic.cards(factors={"attention": 0.8}))
    page = fleet_views.whole_html(found)
    assert page.count("<title>GPU-") == 8 * len(found.kinds[0].spreads)
    assert "Attention, D=64 510 to 642 TFLOPS, median 640" in page and "off are GPU-00000007" in page
    assert re.search(r"<title>GPU-00000007 on box: 510 TFLOPS, -20\.\d %</title>", page)


def test_a_run_without_a_fleet_has_no_section_and_one_card_has_no_plot():
    assert page_of([Trial(kind="correctness")]) == page_of([], {"cards": 3}) == ""
    page = page_of(synthetic.cards(1))
    assert "<svg" not in page and "1 × NVIDIA H200" in page


def test_where_too_few_cards_are_judged_none_is_called_well():
    page = page_of(synthetic.cards(2))
    assert page.startswith("<p><strong>2 cards were measured (2 × NVIDIA H200).</strong></p>")
    assert page.count(">not judged<") == 2 and "as the others" not in page and "Off beyond" not in page
    assert "Off beyond" in page_of(synthetic.cards(3)) and ">Memory copy, TB/s<" in page


def test_workers_of_a_cpu_are_labelled_and_what_is_not_known_is_said():
    trials = synthetic.cards(3)
    for trial in trials:
        trial.data.update(cpu=True, kind="AMD <EPYC>", load={})
    trials[0].data["figures"].pop("attention")
    page = page_of(trials)
    assert "nothing here is about a GPU" in page and "AMD &lt;EPYC&gt;" in page and "<EPYC>" not in page
    assert "not measured" in page


def test_the_workers_of_a_run_are_counted_and_those_lost_are_told():
    cards = [{"gpu": "NVIDIA H200", "node": "box"}, {"gpu": "NVIDIA H200", "node": "box"}, {"node": "<b>"}, "nonsense"]
    lost = Trial(kind="worker", status="error", reason="The worker GPU-1 on box was lost: it hung.")
    page = page_of([lost], {"cards": cards})
    assert "measured by 3 workers: 2 × NVIDIA H200 on box, 1 × a CPU worker on &lt;b&gt;." in page
    assert "Workers lost or refused: 1." in page and "The worker GPU-1 on box was lost: it hung." in page
