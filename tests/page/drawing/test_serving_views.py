"""What leads paging's section: its figures against invented records whose answer is known, and what is said of gaps."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from support import synthetic_paging as synthetic

from flashcore.page.drawing import serving_views
from flashcore.surveys.paging import serving_facts

SERVING, SHAPES = synthetic.serving(), synthetic.shapes()
GONE = [
    synthetic.trial(what, "flashinfer", status="unavailable", reason="FlashInfer is not installed <b>")
    for what in ("serving", "shapes")
]  # fmt: skip


def without_flashinfer(trials):
    """As a machine without it records them."""
    kept = [t for t in trials if t.backend != "flashinfer"]
    return [t.model_copy(update={"data": {k: v for k, v in t.data.items() if "flashinfer" not in k}}) for t in kept]


def row(html: str, heading: str) -> list[str]:
    """The cells of the row with this heading, as text."""
    found = re.search(rf'<th scope="row"[^>]*>{re.escape(heading)}</th>(.*?)</tr>', html, flags=re.S)
    return re.findall(r"<td[^>]*>(.*?)</td>", found[1], flags=re.S)


@pytest.fixture(scope="module")
def html() -> str:
    return serving_views.serving_html([*SERVING, *SHAPES])


@pytest.mark.parametrize("view", [serving_views.serving_html, serving_views.shapes_html])
def test_without_records_the_command_is_named_and_no_figure(view):
    html = view([])
    assert "fc-none" in html and "Run &#39;flashcore paging&#39; on an H100 or H200." in html and "<svg" not in html


def test_the_sentence_says_rate_share_peers_and_cost(html):
    one = next(s for s in serving_facts.served(SERVING) if (s.model, s.batch) == ("Llama-3.1-8B", 64))
    lead = re.search(r'<p class="fc-lead">(.*?)</p>', html)[1]
    assert lead.startswith(
        f"Attention alone leaves room for {serving_facts.rate(one.ours):,.0f} tokens/s of Llama-3.1-8B"
    )
    for said in ("at batch 64 with 4,096 tokens in each sequence", "% of what the memory reads by its data sheet",
                 "1.03 times as fast as dense cuDNN", "1.05 times as fast as FlashInfer",
                 "batch_invariant=True takes 10.0 % longer."):  # fmt: skip
        assert said in lead, said


def test_a_row_holds_rate_shares_ratios_and_the_cost(html):
    one = next(s for s in serving_facts.served(SERVING) if (s.model, s.batch) == ("Qwen3-30B-A3B", 16))
    cells = row(html, "Qwen3-30B-A3B, batch 16")
    best = serving_facts.best_read([*SERVING, *SHAPES]).data["tbs"]
    tbs = one.ours.data["tbs"]
    assert cells[0] == f"{16 / (48 * one.ours.timing.latency_us) * 1e6:,.0f}"
    assert cells[2:4] == [f"{100 * tbs / 4.8:.0f} %", f"{100 * tbs / best:.0f} %"]
    assert cells[4:] == ["1.03 ×", "1.05 ×", "+10.0 %"]
    for said in ("meta-llama/Llama-3.1-8B", "Qwen3-30B-A3B 48 layers, 32 query heads on 4, head_dim 128",
                 "Attention alone", "pages of 128 tokens"):  # fmt: skip
        assert said in html, said


def test_every_way_stands_in_the_fold_with_its_time(html):
    cells = row(html.split("<caption>Served models, every way")[1], "Llama-3.1-8B, batch 64")
    ours = next(t for t in SERVING if t.data["shape"] == "Llama-3.1-8B" and t.data["batch"] == 64).timing.latency_us
    assert cells == [f"{ours * f:.0f}" for f in (1, 1.1, 1.03, 1.05, 1.09)]


def test_the_figure_says_its_message_and_every_mark_has_words(html):
    (svg,) = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    ElementTree.fromstring(svg)
    assert 'role="img"' in svg and "TB/s of K and V that a decode step reads" in svg
    assert svg.count("<title>") == 12 * 4, "ours, the invariant mode, cuDNN and FlashInfer at 12 places"
    assert "SmolLM2-1.7B, batch 256, FlashInfer: " in svg


def test_a_peer_that_is_not_here_and_a_mode_that_is_refused_stand_in_their_rows():
    refusal = {"status": "unsupported", "reason": "it does not promise bits", "timing": None}
    trials = [
        t.model_copy(update=refusal) if t.variant == "batch-invariant" else t for t in without_flashinfer(SERVING)
    ]
    html = serving_views.serving_html([*trials, *GONE])
    assert row(html, "SmolLM2-1.7B, batch 1")[4:] == ["1.03 ×", "not here", "refused"]
    assert "Not here: flashinfer (FlashInfer is not installed &lt;b&gt;)." in html and "<b>" not in html
    assert "batch-invariant, refused: it does not promise bits." in html
    lead = re.search(r'<p class="fc-lead">(.*?)</p>', html)[1]
    assert "FlashInfer" not in lead and "batch_invariant" not in lead


def test_a_wrong_peer_is_called_so_and_a_wrong_step_of_ours_has_no_row():
    wrong = {"status": "failed", "reason": "its result is wrong"}
    trials = [t.model_copy(update=wrong) if t.variant == "batch-invariant" else t for t in SERVING]
    assert row(serving_views.serving_html(trials), "Llama-3.1-8B, batch 1")[-1] == "WRONG"
    trials = [t.model_copy(update=wrong) if t.variant == "all pages" else t for t in SERVING]
    assert "fc-none" in serving_views.serving_html(trials)


def test_every_shape_dtype_and_page_size_has_its_ratios():
    html = serving_views.shapes_html([*SERVING, *SHAPES])
    assert "at least as fast as dense cuDNN in 20 of 30 cells (0.980 to 1.02 times its speed)" in html
    assert "at least as fast as FlashInfer in 30 of 30 cells (1.04 to 1.08 times its speed)" in html
    cells = row(html, "B=256, H=64, Hkv=8, Sq=1, Sk=512, D=128, bfloat16")
    assert cells[1:] == ["0.980 ×", "1.02 ×", "1.02 ×", "1.04 ×", "1.08 ×", "1.08 ×"]
    every = row(html, "B=16, H=16, Sq=1, Sk=8192, D=64, page 64")
    ours = next(t for t in SHAPES if t.variant == "page 64" and t.problem.head_dim == 64)
    assert every[0] == f"{ours.timing.latency_us:.0f}" and every[2] == f"{ours.data['tbs']:.2f}"
    assert every[-2:] == ["1.02 × (1.01 to 1.03)", "1.08 × (1.07 to 1.09)"]


def test_cells_without_a_figure_say_why():
    broken = {"status": "error", "reason": "it broke", "timing": None}
    trials = [t.model_copy(update=broken) if t.variant == "page 64" else t for t in without_flashinfer(SHAPES)]
    html = serving_views.shapes_html([*trials, *GONE])
    assert row(html, "B=16, H=16, Sq=1, Sk=8192, D=64")[1:] == ["0.980 ×", "did not finish", "1.02 ×", "not here",
                                                              "did not finish", "not here"]  # fmt: skip
    assert row(serving_views.further_html([*trials, *GONE]), "64 sequences of 112 to 15,987 tokens")[2] == "not here"


def test_what_serving_has_beside_plain_steps_is_told_and_what_other_parts_measured_is_not_measured_again():
    every = synthetic.everything()
    html = serving_views.further_html(every)
    assert row(html, "64 sequences of 112 to 15,987 tokens")[-1] == "500,000 tokens in all"
    assert row(html, "64 sequences that share 3,584 of 4,096 tokens")[-1] == "4.00 × as fast as with nothing shared"
    two = row(html, "2 query tokens a sequence, B=64, H=32, Hkv=8, Sq=2, Sk=4096, D=128, causal")
    assert two[-1] == "1.05 of the time of one query token, 1.11 of what dense cuDNN takes for one"
    assert "0.346 of dense cuDNN&#39;s time, choice included" in html
    assert row(html, "append of one token to each of 64 sequences")[0] == "4.20"
    assert serving_views.further_html([t for t in every if t.data["what"] != "shapes"]) == ""
