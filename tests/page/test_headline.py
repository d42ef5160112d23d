"""The four figures that matter: they agree with the gates, and what was not measured is said."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support import synthetic_records as synthetic
from support.decisions import decide, hopper, timing_at, with_timing

from flashcore import page
from flashcore.decision import compare, verdict
from flashcore.decision.gates import load_gates
from flashcore.page.history.runs import Snapshot
from flashcore.page.history.since import since
from flashcore.problem import PRESETS, Problem
from flashcore.records import RunFolder, Trial

TRIALS = synthetic.gpu_trials()
FAST = synthetic.gpu_trials(synthetic.FAST)


def headline(run: RunFolder) -> str:
    return page.headline_html(verdict.judge(run), verdict.gather(run))


def headline_of(trials) -> str:
    evidence = verdict.Evidence(tuple(trials), synthetic.environment(), synthetic.HASHES)
    return page.headline_html(decide(trials), evidence)


def test_the_headline_agrees_with_the_gates():
    html = headline_of(TRIALS)
    assert html.count("<li>") == 3 and "131 " in html and "0.281 " in html and "14.2 " in html
    assert (
        "the best peer, sdpa-cudnn" in html
        and "Target at least 320 TFLOPS" in html
        and "Aim at least 450 TFLOPS" in html
    )


def test_the_speed_names_its_workload_and_the_highest_speed_at_any_other():
    here = next(t for t in FAST if timing_at("wmma", PRESETS["report"])(t))
    other = replace_seqlen(here, 16384)
    slower, faster, for_checks = (
        synthetic.timing(backend, other, other.flops() / (tflops * 1e6), round_="other")
        for backend, tflops in (("wmma", 300.0), ("wmma", 801.5), ("hopper-unsplit", 900.0))
    )
    at = compare.tflops(here)
    base = [t for t in FAST if t is here or not compare.contends(t) or (compare.tflops(t) or 0) < at]
    html = headline_of([*base, slower, for_checks])
    assert "Speed at the workload that decides" in html and "at other problems" not in html
    html = headline_of([*FAST, slower, faster, for_checks])
    assert compare.tflops(faster) == pytest.approx(801.5, rel=0.01)
    assert (
        f"Up to {compare.tflops(faster):.0f} TFLOPS at other problems: wmma, {other.label().replace(',', ', ')}<"
        in html
    )
    assert "hopper-unsplit" not in html and "512 <" in html


def test_the_best_peer_stands_with_the_version_of_what_it_calls():
    def said(trials, **before) -> str:
        environment = synthetic.environment(before=before)
        html = page.headline_html(decide(trials), verdict.Evidence(tuple(trials), environment, synthetic.HASHES))
        return re.search(r"the best peer, ([^<]*)<", html)[1]

    assert said(FAST) == "sdpa-cudnn" and said(FAST, cudnn="unclear") == "sdpa-cudnn (cuDNN unclear)"
    assert said(FAST, cudnn=91900) == "sdpa-cudnn (cuDNN 9.19.0)", "a run from before timings named it"
    named = [
        t.model_copy(update={"data": {**t.data, "version": "cuDNN 9.21.1"}}) if t.backend == "sdpa-cudnn" else t
        for t in FAST
    ]
    assert said(named, cudnn=91900) == "sdpa-cudnn (cuDNN 9.21.1)"


def replace_seqlen(trial: Trial, seqlen: int) -> Problem:
    return trial.problem.model_copy(update={"seqlen_q": seqlen, "seqlen_k": seqlen})


def test_nothing_measured_is_said_in_words():
    html = headline_of([])
    assert html.count("not measured") == 3 and "inconclusive" in html


# --- memory saved ----------------------------------------------------------------------------------------------------


def test_the_memory_saved_comes_from_the_last_record_that_holds_it(gpu_run):
    assert "70.3" in headline(gpu_run)
    gpu_run.append(synthetic.memory_saved(74.2))
    assert "74.2" in headline(gpu_run) and "70.3" not in headline(gpu_run)


def test_memory_is_a_figure_of_the_first_screen_only_where_paging_is_what_ships():
    assert "Memory saved" in headline_of(FAST) and decide(FAST).recommended.id == "B"
    assert "Memory saved" not in headline_of(TRIALS), "nothing ships"
    ahead = [*FAST, *hopper(700.0)]
    assert decide(ahead).recommended.id == "C" and "Memory saved" not in headline_of(ahead)


def test_the_memory_saved_says_which_part_of_a_prompt_is_shared():
    counts = {"what": "memory", "case": "shared_prefix", "pages_shared": 48, "pages_used": 304, "sequences": 16}
    known = synthetic.memory_saved(70.3, data={**counts, "saved_percent": 70.31})
    assert "if 75 % of each prompt is shared" in headline_of([*FAST, known])
    assert "if a part of each prompt is shared" in headline_of([*FAST, synthetic.memory_saved(71.0)])


def test_planted_bugs_stand_where_memory_does_not():
    planted = [
        Trial(kind="fault", backend="wmma", environment=synthetic.ENV_ID, data={"outcome": outcome})
        for outcome in ("found", "crashed", "missed", "not applicable")
    ]
    html = headline_of([*TRIALS, *planted])
    assert "Planted bugs found" in html and "of 3</span>" in html and ">2 <" in html
    assert "put into 1 part of ours to try the checker; found at the stage where each was put, 1 by a crash" in html
    assert 'Target all of them: <strong class="fail">missed</strong>' in html


# --- what the figures are --------------------------------------------------------------------------------------------


def test_a_latency_says_how_it_was_taken_and_what_else_a_call_takes():
    html = headline_of(FAST)
    assert "in a CUDA graph, back to back" in html and "the host takes 21.4 µs to launch it" in html
    assert "One call alone" not in html and "not measured" not in html, (
        "what nobody took is no line on the first screen"
    )
    alone = with_timing(FAST, timing_at("wmma", PRESETS["latency"]), single_us=9.25, eager_us=7.5)
    html = headline_of(alone)
    assert (
        "One call alone takes 9.25 µs until" in html and "Launched one by one, each call takes the GPU 7.50 µs" in html
    )
    assert "not measured" not in html


def test_the_peers_that_readers_ask_for_stand_beside_the_ratio_or_are_said_to_be_missing():
    older = [t for t in FAST if t.backend not in ("fa3", "fa4")]
    assert "FlashAttention" not in headline_of(older), "that run may be older than they are"
    assert "FlashAttention-3 was not installed." in headline_of(FAST)
    gone = Trial(kind="correctness", backend="fa4", status="unavailable", reason="gone", environment=synthetic.ENV_ID)
    assert "FlashAttention-3 and -4 were not installed." in headline_of([*FAST, gone])
    like = next(t for t in FAST if timing_at("wmma", PRESETS["report"])(t))
    third = synthetic.timing("fa3", PRESETS["report"], 2 * like.timing.latency_us, round_=like.timing.round)
    html = headline_of([*FAST, gone, third])
    assert "2.00 × FlashAttention-3; FlashAttention-4 was not installed." in html
    elsewhere = synthetic.timing("fa3", PRESETS["report"], 1.0, round_="another")
    assert "FlashAttention-3 was not timed beside it." in headline_of([*FAST, elsewhere])


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"what": "memory", "case": "shared_prefix", "saved_percent": "nan"}},
        {"data": {"what": "memory", "case": "shared_prefix", "saved_percent": float("nan")}},
        {"data": {"what": "memory", "case": "shared_prefix"}},
        {"status": "error", "reason": "it broke"},
        {"environment": "env-of-another-machine"},
        {"data": {"what": "memory", "case": "mixed_lengths", "saved_percent": 47.0}},
    ],
)
def test_a_memory_figure_that_cannot_be_used_is_not_measured(changes):
    trials = [t for t in synthetic.gpu_trials() if t.kind != "paging"]
    record = synthetic.memory_saved(70.3, **changes)
    evidence = verdict.Evidence((*trials, record), synthetic.environment(), synthetic.HASHES)
    html = page.headline_html(decide(FAST), evidence)  # as if it had been decided on another record
    assert "Memory saved" in html and "run &#39;flashcore paging&#39; to measure it" in html and "70.3" not in html


def test_without_any_record_every_figure_is_not_measured(tmp_path):
    run = synthetic.write_run(tmp_path / "run", [], synthetic.environment())
    assert headline(run).count("not measured") == 3  # speed, its ratio, latency
    assert ">0 <" in headline(run)


# --- the verdict, and what changed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "css"), [("GO", "go"), ("NO-GO", "nogo"), ("INCONCLUSIVE", "inconclusive")])
def test_the_banner_says_the_verdict_in_words_and_escapes_its_reason(word, css):
    html = page.banner_html(verdict.Decision(word, "<b> & more.", (), "Measured <i>."))
    assert f'class="fc-banner {css}"' in html and f"</span> {word}</p>" in html
    assert "&lt;b&gt; &amp; more." in html and "Measured &lt;i&gt;." in html


def test_the_banner_says_risk_and_next_step_with_its_command():
    good = page.banner_html(decide(FAST), run="the-run")
    assert "<strong>Risk:</strong> If " in good and "<code>flashcore verify the-run</code>" in good
    assert "flashcore.attention(q, k, v, backend=&#34;wmma&#34;)" in good
    bad = page.banner_html(decide(TRIALS))
    assert "<strong>To change it:</strong> " in bad and "Risk" not in bad
    assert "<code>make report # on an H100 or H200</code> measures" in bad and "once the kernel is changed" in bad
    incomplete = page.banner_html(decide([t for t in FAST if t.kind != "notebook"]))
    assert "<code>flashcore report</code> makes the report again." in incomplete


def test_a_run_without_a_seal_is_not_sent_to_verify_it():
    decision = decide(FAST)
    evidence = verdict.Evidence(tuple(FAST), synthetic.environment(), synthetic.HASHES)
    unsealed = replace(decision, based_on=evidence)
    assert "verify" not in page.banner_html(unsealed, run="old")
    assert "read the verdict again by <code>flashcore verdict old</code>; then ship" in page.banner_html(
        unsealed, run="old"
    )
    kept = page.banner_html(unsealed.with_seal(replace(evidence.seal, digest="0" * 64, date="2001-02-03")), run="new")
    assert (
        "check the evidence by <code>flashcore verify new</code>; then ship" in kept
        and "The seal of this run holds." in kept
    )


def test_each_figure_says_how_it_changed_since_the_run_before():
    then = Snapshot("before", tuple(synthetic.gpu_trials()), synthetic.environment())
    fast = [*(t for t in synthetic.gpu_trials(synthetic.FAST) if t.kind != "paging"), synthetic.memory_saved(76.2)]
    now = Snapshot("now", tuple(fast), synthetic.environment())
    evidence = verdict.Evidence(now.trials, now.environment, synthetic.HASHES)
    html = page.headline_html(decide(fast), evidence, since(now, then, gates=load_gates()))
    deltas = re.findall(r'<span class="fc-delta">(.*?)</span>', html)
    assert len(deltas) == 4 and all("since 2001-02-03" in d or "right on 2001-02-03" in d for d in deltas)
    assert "faster, relative to sdpa-cudnn" in deltas[0] and deltas[3] == "+5.9 points since 2001-02-03"
    assert "fc-delta" not in headline_of(fast)


def test_where_speed_and_ratio_went_different_ways_both_are_told():
    snapshot = Snapshot("x", tuple(TRIALS), synthetic.environment())
    found = since(snapshot, snapshot, gates=load_gates())
    apart = {**found.deltas, "tflops": replace(found.deltas["tflops"], word="faster")}
    evidence = verdict.Evidence(tuple(TRIALS), synthetic.environment(), synthetic.HASHES)
    both = page.headline_html(decide(TRIALS), evidence, replace(found, deltas=apart))
    assert both.count("Against the peer ") == 1
    assert "Against the peer " not in page.headline_html(decide(TRIALS), evidence, found)


def test_the_widest_gate_on_checks_is_counted_and_not_their_sum():
    html = headline_of(TRIALS)
    checks = [t for t in TRIALS if t.kind == "correctness" and t.backend in ("cpu", "scalar", "wmma")]
    assert f">{len(checks)} <" in html and f"of {len(checks)}</span>" in html
    wrong = headline_of([*TRIALS, synthetic.correctness("wmma", PRESETS["report"], status="failed")])
    assert f">{len(checks)} <" in wrong and f"of {len(checks) + 1}</span>" in wrong
    assert 'Target all of them: <strong class="fail">missed</strong>' in wrong
