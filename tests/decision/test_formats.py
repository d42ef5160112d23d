"""A decision in each format: it reads back, and nothing in records gets out of its place."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import pytest
from support import synthetic_records as synthetic
from support.decisions import GOOD, decide

from flashcore.decision import formats, verdict
from flashcore.decision.evidence import Evidence, Recorded
from flashcore.decision.judging import GateResult
from flashcore.decision.seal import Change, State
from flashcore.errors import InvalidLink

NASTY = "a\n::error::owned\r\n##[error]b %0A `x` [y](http://z) <img> & ]]> \x00\x1b[31m\u2028 @all \ud800 \u202e |*_$"
"""Line ends, workflow commands, Markdown, HTML, control characters, half a letter, reversed writing."""
HOLDS = State("abc", "2001-02-03")
TEXTS = ("title", "reason", "fix", "backend", "versus", "why")


def gate(state="PASS", *, required=True, **changes) -> GateResult:
    fields = dict(
        id="x", title="X", state=state, threshold=1.0, measured=1.5, margin=0.5, unit="×", n=30, interval=(1.4, 1.6),
        evidence="live", reason="Because.", fix=None if state == "PASS" else "make report", required=required,
        comparison="at least", metric="ratio_to_best_peer", problem="report", backend="hopper", versus="sdpa-cudnn",
    )  # fmt: skip
    return GateResult(**{**fields, **changes})


def decision(word="GO", *gates: GateResult, reason="Because.", state=HOLDS, **more):
    evidence = Evidence((), synthetic.environment(), {}, seal=state)
    return verdict.Decision(word, reason, tuple(gates), evidence="Measured.", based_on=evidence, **more)


def nasty(word="NO-GO"):
    text = dict.fromkeys(TEXTS, NASTY)
    return decision(
        word, gate("FAIL", **text), gate("INCONCLUSIVE", required=False, **text), reason=NASTY, stored=NASTY,
        state=State(NASTY, NASTY, (Change("records", NASTY),)),
    )  # fmt: skip


def text(name, found, **more):
    return formats.FORMATS[name](found, run="run-1", **more)


@pytest.mark.parametrize("name", formats.FORMATS)
@pytest.mark.parametrize(("word", "code"), [("GO", 0), ("NO-GO", 3), ("INCONCLUSIVE", 4)])
def test_every_format_says_verdict_reason_ratio_seal_run_and_link(name, word, code):
    found = text(name, decision(word, gate()), link="https://example.org/r.html")
    for said in (word, "Because.", "1.5", "sdpa-cudnn", "run-1", "abc", "https://example.org/r.html"):
        assert said in found, said
    if name == "json":
        assert json.loads(found)["exit_code"] == code


def test_the_json_is_strict_and_holds_what_was_judged():
    one = gate("INCONCLUSIVE", measured=math.nan, interval=(-math.inf, math.inf), margin=math.nan)
    found = json.loads(text("json", decision("INCONCLUSIVE", one)), parse_constant=lambda word: pytest.fail(word))
    assert found["gates"][0]["value"] is None and found["gates"][0]["low"] is None
    assert found["gates"][0]["threshold"] == 1.0 and found["gates"][0]["comparison"] == "at least"
    assert found["gates"][0]["evidence"] == "live" and found["ratio_to_best_peer"]["versus"] == "sdpa-cudnn"
    assert found["run"] == {"id": "run-1", "gpu": "SYNTHETIC H200", "commit": "0" * 40, "dirty": False,
                            "date": synthetic.environment()["date"]}  # fmt: skip
    assert found["seal"] == {"state": "holds", "digest": "abc", "date": "2001-02-03", "changes": []}


@pytest.mark.parametrize(
    ("state", "word"),
    [(State(None), "none"), (State("a", "", (Change("records", "Edited."),)), "broken"),
     (State(None, "", (Change("seal", "Gone."),)), "broken")],
)  # fmt: skip
def test_the_state_of_the_seal(state, word):
    found = json.loads(text("json", decision(state=state)))["seal"]
    assert found["state"] == word and len(found["changes"]) == len(state.changes)


def test_recorded_evidence_names_its_own_machine():
    recorded = Recorded((), synthetic.environment(gpu="SYNTHETIC H100", git={"commit": "f" * 40}), "h100")
    evidence = Evidence((), synthetic.environment(gpu=None), {}, recorded)
    found = formats.facts(verdict.Decision("GO", "Because.", (), based_on=evidence), run="r")
    assert found["run"]["gpu"] is None and found["evidence"]["gpu"] == "SYNTHETIC H100"
    assert found["evidence"]["recorded"] and found["evidence"]["commit"] == "f" * 40
    assert "f" * 12 in formats.markdown(verdict.Decision("GO", "", (), based_on=evidence), run="r")


def test_a_decision_that_no_run_stands_behind_is_written_too():
    bare = verdict.Decision("INCONCLUSIVE", "Because.", ())
    assert json.loads(text("json", bare))["seal"]["state"] == "not looked at"
    for name in formats.FORMATS:
        assert "INCONCLUSIVE" in text(name, bare)
    assert "INCONCLUSIVE" in formats.badge(bare, run="r")


def test_the_recommended_option_answers_for_the_ratio():
    good = decide(GOOD)
    assert good.verdict == "GO" and good.recommended.backend == "wmma"
    found = formats.facts(good, run="r")
    assert found["recommended"]["backend"] == "wmma" == found["ratio_to_best_peer"]["backend"]
    assert found["ratio_to_best_peer"]["value"] > 1


def test_without_a_link_the_page_is_told_by_its_path_and_without_a_page_what_draws_it():
    found = text("markdown", decision(), page="runs/a_b/report.html").splitlines()
    assert found[-1] == r"- Page: runs/a\_b/report.html" and len(found) == 10
    assert "'flashcore render' draws it" in text("markdown", decision())
    assert json.loads(text("json", decision(), page="p"))["page"] == "p"
    assert "Page: p" in text("github", decision(), page="p") and 'value="p"' in text("junit", decision(), page="p")


def test_markdown_is_ten_lines_and_nothing_in_it_formats_calls_or_opens():
    found = text("markdown", nasty(), link="a/b_c.html")
    assert len(found.split("\n")) == 11 and found.endswith("\n")
    assert found.splitlines() == found.rstrip("\n").split("\n"), "no other mark ends a line"
    assert "<img" not in found and "@all" not in found and r"\[y\](http" in found and r"\`x\`" in found
    assert "](a/b_c.html)" in found and "\x1b" not in found and "\u202e" not in found
    assert formats.markdown(decision(reason="# 1. not a heading"), run="r").splitlines()[2] == r"\# 1. not a heading"
    assert formats.markdown(decision(reason="1. no list"), run="r").splitlines()[2] == r"1\. no list"


def parsed(line: str) -> tuple[str, str, str]:
    """A workflow command as GitHub's runner reads it: level, title, message."""
    level, title, message = re.fullmatch(r"::(\w+) title=([^,:]*)::(.*)", line).groups()
    back = {"%0D": "\r", "%0A": "\n", "%3A": ":", "%2C": ",", "%25": "%"}
    title, message = (re.sub("%0D|%0A|%3A|%2C|%25", lambda m: back[m[0]], part) for part in (title, message))
    return level, title, message


@pytest.mark.parametrize(("word", "level"), [("GO", "notice"), ("NO-GO", "error"), ("INCONCLUSIVE", "warning")])
def test_annotations_are_commands_and_no_record_adds_one(word, level):
    found = text("github", nasty(word))
    lines = found.removesuffix("\n").split("\n")
    assert len(lines) == 3 and lines == found.splitlines()
    (first, title, message), failed, aside = map(parsed, lines)
    assert (first, title) == (level, f"FlashCore: {word}") and "%0A `x`" in message and "::error::owned" in message
    assert failed[0] == "error" and aside[0] == "notice" and "not required" in aside[1]
    assert "\x1b" not in found and "\r" not in found


def test_a_gate_that_passed_is_no_annotation():
    assert len(text("github", decision("GO", gate())).splitlines()) == 1


def test_junit_reads_back_with_a_case_for_the_verdict_and_each_gate():
    gates = (gate(), gate("FAIL"), gate("INCONCLUSIVE"), gate("FAIL", required=False))
    root = ElementTree.fromstring(text("junit", decision("NO-GO", *gates)))
    suite = root[0]
    for element in (root, suite):
        assert {k: element.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
            "tests": "5", "failures": "2", "errors": "1", "skipped": "1"}  # fmt: skip
    kinds = [[child.tag for child in case] for case in suite.iter("testcase")]
    assert kinds == [["failure"], ["system-out"], ["failure"], ["error"], ["skipped"]]
    assert {p.get("name") for p in suite.iter("property")} >= {"run", "commit", "gpu", "ratio_to_best_peer"}


@pytest.mark.parametrize("word", ["GO", "NO-GO", "INCONCLUSIVE"])
def test_xml_takes_any_text(word):
    for made in (text("junit", nasty(word), link="a?b&c"), formats.badge(nasty(word), run=NASTY)):
        made.encode("ascii")
        root = ElementTree.fromstring(made)
        assert "\x00" not in "".join(root.itertext()) and "::error::owned" in "".join(root.itertext())


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return sum(w * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4)
               for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))  # fmt: skip


@pytest.mark.parametrize(("word", "state"), [("GO", "PASS"), ("NO-GO", "FAIL"), ("INCONCLUSIVE", "INCONCLUSIVE")])
def test_the_badge_says_the_verdict_in_words_has_a_title_and_contrast(word, state):
    root = ElementTree.fromstring(formats.badge(decision(word, gate(state)), run="run-1"))
    svg = "{http://www.w3.org/2000/svg}"
    said = f"{word}, 1.50 × sdpa-cudnn" if word == "GO" else word
    assert [t.text for t in root.iter(f"{svg}text")] == ["FlashCore", said]
    assert root.get("role") == "img" and root.find(f"{svg}title").text == f"FlashCore: {said}"
    assert root.get("aria-labelledby").split() == [root.find(f"{svg}{n}").get("id") for n in ("title", "desc")]
    boxes = list(root.iter(f"{svg}rect"))
    assert sum(int(box.get("width")) for box in boxes) == int(root.get("width"))
    for box in boxes:
        assert 1.05 / (luminance(box.get("fill")) + 0.05) > 6
    for box, words in zip(boxes, root.iter(f"{svg}text"), strict=True):
        ends = int(words.get("x")) + int(words.get("textLength"))
        assert int(box.get("x")) < int(words.get("x")) and ends < int(box.get("x")) + int(box.get("width"))


@pytest.mark.parametrize("link", ["https://a.b/c?d=e&f=%20#g", "HTTP://a", "reports/recorded/h100/report.html", None])
def test_links_that_can_stand_anywhere(link):
    assert formats.checked_link(link) == link


@pytest.mark.parametrize("link", ["", "a b", "a)b", "javascript:alert(1)", "data:text/html,x", "a\nb", "a<b", 'a"b'])
def test_a_link_that_cannot_is_refused(link):
    with pytest.raises(InvalidLink, match="--link"):
        formats.checked_link(link)
