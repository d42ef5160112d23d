"""The proof on the page: checks, planted bugs and the machine, live and recorded apart."""

from __future__ import annotations

import re

from support import synthetic_records as synthetic
from support.html_tools import row

from flashcore import page
from flashcore.decision import verdict
from flashcore.problem import PRESETS
from flashcore.records import Trial

TRIALS = synthetic.gpu_trials()


def test_recorded_evidence_stands_beside_the_live_one_under_its_own_heading():
    other = verdict.Recorded(tuple(TRIALS), synthetic.environment(), "synthetic")
    evidence = verdict.Evidence(
        tuple(synthetic.cpu_trials()), synthetic.environment(None), synthetic.HASHES, recorded=other
    )
    for html in (page.correctness_html(evidence), page.machine_html(evidence)):
        assert html.index("Live, on this machine") < html.index("Recorded on SYNTHETIC H200, 2001-02-03")
    live, recorded = page.correctness_html(evidence).split("Recorded on")
    assert re.search(r"Not checked: [^()]*\bwmma\b[^()]* \(no CUDA GPU", live) and "all right" in live
    assert row(recorded, "wmma")["Result"] == "all right"
    assert "SYNTHETIC H200" in page.machine_html(evidence).split("Recorded on")[1]


def test_many_checks_are_folded_behind_what_they_came_to():
    few = [synthetic.correctness(name, PRESETS["tiny"]) for name in ("cpu", "wmma")]
    html = page.correctness_html(evidence(*few))
    assert "<details" not in html and "<p>All 2 checks of 2 implementations are right. The error nearest" in html
    many = [synthetic.correctness(f"b{n}", PRESETS["tiny"]) for n in range(9)]
    wrong = synthetic.correctness("b3", PRESETS["report"], status="failed")
    html = page.correctness_html(evidence(*many, wrong))
    said, folded = html.split("<summary>Every implementation, and its error nearest the bound<")
    assert "1 of 10 checks of 9 implementations are WRONG: b3 in 1. The error nearest" in said
    assert (
        row(folded, "b3")["Result"] == "WRONG in 1 of 2" and "did not finish</caption>" in folded.split("</details>")[1]
    )


def evidence(*trials: Trial, recorded=None) -> verdict.Evidence:
    return verdict.Evidence(tuple(trials), synthetic.environment(), synthetic.HASHES, recorded=recorded)


def planted(name: str, outcome: str, backend: str = "wmma") -> Trial:
    data = {"fault": name, "title": f"bug <{name}>", "expected_stage": "scores", "outcome": outcome}
    return Trial(kind="fault", backend=backend, variant=name, data=data)


def test_without_planted_bugs_the_notebook_that_plants_them_is_named():
    assert page.proof_html(evidence(*TRIALS)).startswith('<p class="fc-none">No planted bug')


def test_planted_bugs_are_counted_and_each_is_folded_below():
    silent = Trial(kind="bisection", backend="wmma", variant="clean-runs",
                   data={"runs": 40, "alarms": 0, "values": 1234567, "seeds": [0, 9]})  # fmt: skip
    html = page.proof_html(evidence(planted("F1", "found"), planted("F2", "missed"), silent))
    assert "wmma: 1 of 2 found at their stage, 1 missed" in html and "<h3>" not in html
    assert row(html, "wmma")["Values judged"] == "1,234,567" and "seeds" not in html.lower()
    folded = html[html.index("<summary>Every planted bug") :]
    assert "bug &lt;F1&gt;" in folded and "<F1>" not in html and ">wmma<" in folded
    assert "compute-sanitizer: no record." in folded


def test_exploits_are_counted_and_folded_and_left_out_where_none_was_planted():
    assert "Exploits" not in page.proof_html(evidence(planted("F1", "found")))
    data = {"exploit": "X1", "title": "a <trick>", "how": "cheats", "place": "cpu", "outcome": "caught", "by": "check",
            "said": "Seen."}  # fmt: skip
    html = page.proof_html(evidence(planted("F1", "found"), Trial(kind="exploit", variant="X1", data=data)))
    assert "1 of 1 were caught by what should catch them" in html
    assert "a &lt;trick&gt;: it cheats" in html[html.index("<summary>Every exploit") :]


def test_what_outputs_alone_told_of_planted_bugs_is_counted_and_what_they_did_not_tell_is_listed():
    assert "outputs alone" not in page.proof_html(evidence(planted("F1", "found")))

    def told(fault: str, outcome: str, **data) -> Trial:
        known = {"expected": "probs", "outcome": outcome, "finding": f"<said> of {fault}"}
        return Trial(kind="diagnosis", backend="wmma", variant=fault, data=known | data)

    silent = Trial(kind="diagnosis", backend="fa3", variant="clean", data={"cases": 25, "alarms": 1}, status="failed")
    trials = [told("F1", "stage"), told("F2", "class", looks_alike="a <weight> is one"), told("F3", "missed"), silent]
    for html in (page.proof_html(evidence(*trials)), page.proof_html(evidence(planted("F1", "found"), *trials))):
        assert "2 of 3 planted bugs were diagnosed from outputs alone" in html and "25 clean cases over 1" in html
        counts = html[html.index("Told from outputs alone") : html.index("Bugs that outputs did not tell")]
        assert row(counts, "wmma")["At one that looks alike"] == "1" and row(counts, "fa3")["False alarms"] == "1"
        assert (
            "&lt;said&gt; of F3" in html and "of F1" not in html and "<li>probs: a &lt;weight&gt; is one.</li>" in html
        )
        assert "Diagnosis." not in html, "no function of a user's was diagnosed"


def test_promises_are_counted_and_folded_also_where_no_bug_was_planted():
    assert "Promises" not in page.proof_html(evidence(planted("F1", "found")))
    data = {"promise_id": "P2", "promise_name": "empty rows", "promise": "A <row>.", "result": "broken",
            "sentence": "row 0 is <bad>", "smallest": "B=1,H=1,Sq=2,Sk=1,D=64,causal"}  # fmt: skip
    broken = Trial(kind="diagnosis", backend="fa3", variant="conform:P2", status="failed", data=data)
    for html in (page.proof_html(evidence(broken)), page.proof_html(evidence(planted("F1", "found"), broken))):
        assert "0 of 1 promises that apply are kept, 1 broken; broken: fa3 P2" in html
        folded = html[html.index("<summary>Every promise") :]
        assert ">fa3<" in folded and "A &lt;row&gt;." in folded and "row 0 is &lt;bad&gt;" in folded
        assert "Sq=2,Sk=1" in folded and "<bad>" not in html
    assert "No planted bug" not in page.proof_html(evidence(broken))


def test_equal_bits_are_counted_with_what_was_promised_and_compared():
    assert "bits in every batch" not in page.proof_html(evidence(planted("F1", "found")))
    data = {"mode": "invariant", "cases": 10_000, "kept": 9_999, "broken": 1, "subjects": 70, "role": "ours",
            "pairs": {"alone, pages": [9_999, 10_000]}, "stopped": "all were asked",
            "breaks": [{"pair": "alone, pages", "said": "broken: <1> row", "line": "print(compare('x'))"}]}  # fmt: skip
    one = Trial(
        kind="invariance", backend="hopper", variant="invariant", status="failed", reason="It breaks.", data=data
    )
    for html in (page.proof_html(evidence(one)), page.proof_html(evidence(planted("F1", "found"), one))):
        assert "hopper keeps 9,999 of 10,000 cases in the batch-invariant mode" in html
        folded = html[html.index("<summary>Every pair of ways") :]
        said = html.removesuffix(folded)[html.index("<strong>The same bits") :]
        assert "the bits of a row do not depend on who shares the call" in said and len(said) < 400
        assert "A case is one sequence computed in two ways" in folded and "A case is" not in said
        assert "9,999 of 10,000" in folded and "BROKEN: It breaks." in folded
        assert "broken: &lt;1&gt; row" in folded and "print(compare(&#39;x&#39;))" in folded
    assert "No planted bug" not in page.proof_html(evidence(one))


def test_each_machine_has_its_own_proof_and_one_without_bugs_none():
    other = verdict.Recorded((planted("F1", "found"),), synthetic.environment(), "synthetic")
    html = page.proof_html(evidence(*TRIALS, recorded=other))
    assert "Live, on this machine" not in html and "<h3>Recorded on SYNTHETIC H200, 2001-02-03</h3>" in html
    both = page.proof_html(evidence(planted("F2", "missed"), recorded=other))
    assert both.index("Live, on this machine") < both.index("0 of 1") < both.index("Recorded on") < both.index("1 of 1")


def test_a_wrong_check_is_listed_below_the_count():
    html = page.correctness_html(evidence(synthetic.correctness("wmma", PRESETS["report"], status="failed")))
    assert row(html, "wmma")["Result"] == "WRONG in 1 of 1" and "head 3, row 17, column 5" in html


def test_the_machine_stands_with_its_builds_and_ceilings():
    html = page.machine_html(evidence(*TRIALS))
    assert "Compiled kernels" in html and "758" in html and "The machine before and after the run" in html
    assert html.count("<h3>") == 0
