"""Plots of speed and latency: the numbers are the records', and junk does not break them."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import synthetic_records as synthetic
from support.html_tools import label, svgs

from flashcore.decision import compare
from flashcore.page.drawing import html_tables, plots
from flashcore.problem import PRESETS, square

TRIALS = synthetic.gpu_trials()
LATENCY = PRESETS["latency"]


@pytest.mark.slow
def test_the_alternative_text_carries_the_computed_numbers():
    text = label(svgs(plots.tflops_html(TRIALS))[0])
    lines = plots.panels(TRIALS)[64, False, "float16"]
    ours, peer = compare.tflops(lines["wmma"][16384]), compare.tflops(lines["sdpa-cudnn"][16384])
    assert f"At 16K, wmma reaches {compare.number(ours)} TFLOPS" in text
    assert f"sdpa-cudnn, {compare.number(peer)}" in text and "a plain matrix product, 758" in text


def test_panels_keep_one_problem_a_length_for_all_backends():
    for lines in plots.panels(TRIALS).values():
        for length in (512, 2048, 16384):
            assert len({points[length].problem for points in lines.values()}) == 1
    assert plots.panels(TRIALS)[64, False, "float16"]["wmma"][512].problem.batch == 16  # not the small one


def test_panels_leave_masked_problems_to_the_table():
    plain = square(1, 8, 512, 64, causal=True)
    masked = [plain.with_(batch=4, **more) for more in ({"window_left": 64}, {"softcap": 30.0}, {"sink": True})]
    trials = [synthetic.timing("wmma", problem, 10.0, round_="m") for problem in (plain, *masked)]
    (lines,) = plots.panels(trials).values()
    assert lines == {"wmma": {512: trials[0]}}


def test_what_lies_beside_a_line_is_left_to_the_table():
    beside = [(square(32, 12, 197, 64), "odd"), (square(16, 16, 2048, 64, dtype="bfloat16"), "of another dtype")]
    more = [synthetic.timing("wmma", problem, 100.0, round_=name) for problem, name in beside]
    assert plots.panels([*TRIALS, *more]) == plots.panels(TRIALS)
    alone = plots.panels(more)
    assert {key: list(lines["wmma"]) for key, lines in alone.items()} == {
        (64, False, "float16"): [197], (64, False, "bfloat16"): [2048],
    }, "where nothing makes a line, each point is shown"  # fmt: skip


def test_plain_kernels_are_the_lower_of_compute_and_memory():
    """Causal, S=512: 0.5 · 4·S²·D FLOPs over 4·S·D·2 bytes is 128 FLOPs a byte, times 4.28 TB/s is 548 TFLOPS."""
    ceilings = [t for t in TRIALS if t.kind == "ceiling"]
    roof = plots._plain(plots.panels(TRIALS)[64, True, "float16"], ceilings)
    assert roof[512] == pytest.approx(128 * 4.28) and roof[16384] == 758
    assert plots._plain(plots.panels(TRIALS)[64, True, "float16"], []) == {}
    odd = [t.model_copy(update={"data": {**t.data, "name": ["a list"]}}) for t in ceilings]
    huge = [t.model_copy(update={"data": {**t.data, "value": 10**400}}) for t in ceilings]
    assert plots._plain(plots.panels(TRIALS)[64, True, "float16"], [*odd, *huge]) == {}


def test_ours_and_peers_differ_by_more_than_colour():
    lines = plots.panels(TRIALS)[64, False, "float16"]
    looks = plots._looks(lines)
    assert looks["wmma"][0] and not looks["sdpa-cudnn"][0]
    assert looks["wmma"][3] == "-" and looks["sdpa-cudnn"][3] != "-"
    assert len({(marker, str(dashes)) for _, _, marker, dashes in looks.values()}) == len(looks)


@pytest.mark.slow
def test_a_backend_nobody_knew_gets_a_line():
    toy = [t.model_copy(update={"backend": "toy"}) for t in TRIALS if t.backend == "wmma"]
    assert ">toy " in svgs(plots.tflops_html([*TRIALS, *toy]))[0]


def test_the_latency_plot_names_the_target_only_where_it_was_set():
    html = plots.latency_html(TRIALS, target_us=5.0, target_problem=LATENCY)
    first, second = svgs(html)
    assert "none within the target of 5 µs" in label(first) and "target 5 µs" in first
    assert "target" not in label(second) and "target" not in second

    def said(trials) -> str:
        fastest = min(compare.latency_us(t) for t in trials if t.problem == LATENCY and compare.latency_us(t))
        return label(svgs(plots.latency_html(trials, target_us=fastest, target_problem=LATENCY))[0])

    assert re.search(
        r"sdpa-cudnn is fastest with .*; of ours wmma takes .*; sdpa-cudnn within the target", said(TRIALS)
    )
    ours = said(synthetic.gpu_trials(synthetic.FAST))
    assert re.search(r"wmma is fastest with \S+ µs, within the target of", ours), "and it is named once"


@pytest.mark.slow
@settings(max_examples=200)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_labels_never_overlap_and_stay_below_the_top(wanted):
    places = plots._apart(wanted, 10.0, 100.0)
    ordered = sorted(places)
    assert all(b - a >= 10 - 1e-6 for a, b in zip(ordered, ordered[1:], strict=False))
    assert max(places) <= 100 + 1e-6


@pytest.mark.slow
def test_a_nan_timing_is_left_out():
    def broken(t):
        return t.kind == "attention_timing" and t.backend == "wmma"

    trials = [
        t.model_copy(update={"timing": t.timing.model_copy(update={"latency_us": math.nan})}) if broken(t) else t
        for t in TRIALS
    ]
    html = plots.tflops_html(trials) + plots.latency_html(trials) + html_tables.times_table(trials)
    assert "wmma" not in html and "nan" not in html.lower() and "scalar" in html
