"""Write a decision for where it travels to: JSON, Markdown, GitHub's annotations, JUnit's XML, a badge.

Each function gives the whole text and prints nothing. What comes from records and file names is escaped as the format
wants it, so that it stays text: it ends no line, begins no command and closes no tag.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any
from xml.etree import ElementTree

from flashcore.decision.compare import number
from flashcore.decision.judging import GateResult
from flashcore.decision.verdict import Decision
from flashcore.errors import InvalidLink
from flashcore.problem import parse_problem

SCHEMA_VERSION = 1
"""Of `facts`. More keys may come under the same number; one that goes away or means something else raises it."""
MOST_NAMED = 3
"""Gates that the Markdown names where they did not pass; the rest is counted."""
COLOURS = {"GO": "#176b33", "NO-GO": "#b3261e", "INCONCLUSIVE": "#6b5200"}
"""Background of the verdict in a badge; white text on each has a contrast above 6 to 1."""
LABEL_COLOUR = "#3d444d"


# ---------------------------------------------------------------------------------------------------- facts


def facts(decision: Decision, *, run: str, link: str | None = None, page: str | None = None) -> dict[str, Any]:
    """A decision as plain data that JSON can hold: the schema that `docs/ci.md` explains.

    Parameters
    ----------
    run
        The run's id.
    link
        Where its page can be read (see `checked_link`); None where nobody said.
    page
        Where the page lies, as a path; None where there is none.
    """
    evidence = decision.based_on
    environment = evidence.environment if evidence else {}
    ratio, first = _ratio(decision), decision.recommended
    return _plain({
        "schema_version": SCHEMA_VERSION,
        "verdict": decision.verdict,
        "exit_code": decision.exit_code,
        "reason": decision.reason,
        "stored": decision.stored or None,
        "recommended": {"id": first.id, "title": first.title, "backend": first.backend} if first else None,
        "run": {"id": run, **_machine(environment)},
        "evidence": {
            "sentence": decision.evidence,
            "recorded": bool(evidence and evidence.recorded),
            **_machine(evidence.gpu_environment if evidence else {}),
        },
        "seal": _seal(decision),
        "ratio_to_best_peer": None if ratio is None else _gate(ratio),
        "gates": [_gate(gate) for gate in decision.gates],
        "link": link,
        "page": page,
    })  # fmt: skip


def _ratio(decision: Decision) -> GateResult | None:
    """The gate on the ratio to the best peer: as the recommended option answers it, or else the best of ours."""
    first = decision.recommended
    asked = [*(first.conditions if first else ()), *decision.gates]
    return next((gate for gate in asked if gate.metric == "ratio_to_best_peer"), None)


def _gate(gate: GateResult) -> dict[str, Any]:
    low, high = gate.interval or (None, None)
    return {
        "id": gate.id, "title": gate.title, "required": gate.required, "state": gate.state, "metric": gate.metric,
        "value": gate.measured, "comparison": gate.comparison, "threshold": gate.threshold, "unit": gate.unit,
        "margin_percent": gate.margin_percent, "low": low, "high": high, "samples": gate.n,
        "evidence": gate.evidence, "source": gate.source, "backend": gate.backend, "versus": gate.versus,
        "problem": gate.problem or None, "reason": gate.reason, "fix": gate.fix,
    }  # fmt: skip


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    git = environment.get("git")
    git = git if isinstance(git, Mapping) else {}
    return {"date": environment.get("date"), "gpu": environment.get("gpu"), "commit": git.get("commit"),
            "dirty": git.get("dirty")}  # fmt: skip


def _seal(decision: Decision) -> dict[str, Any]:
    state = decision.based_on.seal if decision.based_on else None
    if state is None:
        return {"state": "not looked at", "digest": None, "date": None, "changes": []}
    word = "holds" if state.holds else "broken" if state.digest or state.changes else "none"
    changes = [{"part": change.part, "sentence": change.sentence} for change in state.changes]
    return {"state": word, "digest": state.digest, "date": state.date or None, "changes": changes}


def _plain(value: Any) -> Any:
    """Values that strict JSON has: no NaN and no infinity (null stands there), and text that any encoding can hold."""
    if isinstance(value, Mapping):
        return {_text(str(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _text(str(value))


def _text(text: str) -> str:
    """The text with a question mark where half of a letter stands, as a damaged file name may hold it."""
    return text.encode("utf-8", "replace").decode("utf-8") if any("\ud800" <= c <= "\udfff" for c in text) else text


def checked_link(link: str | None) -> str | None:
    """The link if it can stand in each of the formats.

    Raises
    ------
    InvalidLink
        It holds white space, quotes, brackets or control characters, or names another scheme than http and https.
    """
    if link is None:
        return None
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", link)
    if not re.fullmatch(r"[^\s\"'<>()\[\]`\\\x00-\x1f\x7f]+", link) or (
        scheme and scheme[1].lower() not in ("http", "https")
    ):
        raise InvalidLink(
            f"--link {link!r} cannot be used as a link; give an http or https address, or a path without spaces, "
            "quotes and brackets."
        )
    return link


# ---------------------------------------------------------------------------------------------------- words


def _one_line(text: str) -> str:
    """The text on one line, without control characters and without marks that turn the direction of writing."""
    kept = (c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else " " for c in str(text))
    return " ".join("".join(kept).split())


def _where(gate: GateResult) -> str:
    return parse_problem(gate.problem).label().replace(",", ", ") if gate.problem not in ("", "any") else ""


def _ratio_words(decision: Decision) -> str:
    """The ratio to the best peer as a clause: what, against what, where, and how sure."""
    gate = _ratio(decision)
    if gate is None:
        return "no gate asks for it"
    if gate.measured is None:
        return f"not measured ({gate.reason.rstrip('.')})"
    within = f" ({number(gate.interval[0])} to {number(gate.interval[1])}, {gate.n} samples)" if gate.interval else ""
    told = f"{gate.backend or 'ours'} has {number(gate.measured)} times the speed of {gate.versus or 'the best peer'}"
    settled = "" if gate.state == "PASS" else f"; the gate on it says {gate.state}"
    return f"{told} at {_where(gate)}{within}{settled}"


def _counted(decision: Decision) -> str:
    required = [g for g in decision.gates if g.required]
    others = [g for g in decision.gates if not g.required]
    text = f"{sum(g.state == 'PASS' for g in required)} of {len(required)} required gates pass"
    return f"{text}, and {sum(g.state == 'PASS' for g in others)} of {len(others)} others" if others else text


def _not_passed(decision: Decision) -> str:
    found = [g for g in decision.gates if g.state != "PASS"]
    if not found:
        return "none"
    found.sort(key=lambda g: not g.required)
    named = [f"{g.title} ({g.state}{'' if g.required else ', not required'})" for g in found[:MOST_NAMED]]
    more = f", and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return f"{', '.join(named)}{more}"


def _measured_on(decision: Decision) -> str:
    return f"{decision.evidence} {decision.seal}".strip() or "none"


def _run_words(found: Mapping[str, Any]) -> str:
    """The run and the commit that the figures were measured at."""
    of = found["evidence"]
    commit = str(of["commit"])[:12] if of["commit"] else "not known"
    changed = ", with changes that were not committed" if of["dirty"] else ""
    return f"{found['run']['id']}; measured at commit {commit}{changed}"


# ---------------------------------------------------------------------------------------------------- formats


def as_json(decision: Decision, *, run: str, link: str | None = None, page: str | None = None) -> str:
    """The facts as one JSON object; strict JSON, so that every reader takes it."""
    found = facts(decision, run=run, link=link, page=page)
    return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


_MARKS = re.compile(r"([\\`*_\[\]~$])|(?<!\S)([#>+-]|\d+[.)])(?=\s)")
"""What formats text anywhere, and what begins a heading, a quotation or a list where a line begins with it."""


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is: no mark formats it, no tag opens, and no name in it is called."""
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKS.sub(_escaped_mark, text).replace("@", "@\N{WORD JOINER}")


def _escaped_mark(found: re.Match) -> str:
    if found[1]:
        return f"\\{found[1]}"
    if found.start():
        return found[0]
    return f"{found[0][:-1]}\\{found[0][-1]}"  # 1. is escaped at its point


def markdown(decision: Decision, *, run: str, link: str | None = None, page: str | None = None) -> str:
    """Ten lines for a chat, a mail or a pull request: verdict, reason, ratio, gates, evidence, run and link."""
    found = facts(decision, run=run, link=link, page=page)
    where = f"[{_markdown(link)}]({link})" if link else _markdown(page or "none yet; 'flashcore render' draws it")
    would = decision.stored or decision.flip or decision.recommendation or "not known"
    lines = [
        f"**FlashCore: {decision.verdict}**",
        "",
        _markdown(decision.reason),
        "",
        f"- Against the best peer: {_markdown(_ratio_words(decision))}",
        f"- Gates: {_markdown(_counted(decision))}; not passed: {_markdown(_not_passed(decision))}",
        f"- What would change it: {_markdown(would)}",
        f"- Evidence: {_markdown(_measured_on(decision))}",
        f"- Run: {_markdown(_run_words(found))}",
        f"- Page: {where}",
    ]
    return "\n".join(lines) + "\n"


def _data(text: str) -> str:
    """The message of a workflow command: GitHub reads %25, %0D and %0A back."""
    text = "\n".join(_one_line(line) for line in str(text).splitlines())
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """A property of a workflow command: a colon or a comma in it would begin the next part."""
    return _data(_one_line(text)).replace(":", "%3A").replace(",", "%2C")


LEVELS = {"GO": "notice", "NO-GO": "error", "INCONCLUSIVE": "warning", "PASS": "notice", "FAIL": "error"}


def github(decision: Decision, *, run: str, link: str | None = None, page: str | None = None) -> str:
    """Workflow commands that GitHub shows as annotations: the verdict, then each gate that did not pass.

    GitHub takes a line that begins with ``::`` as a command, so each line here is one, and what is in it is escaped.
    """
    said = f"{decision.reason}\nAgainst the best peer: {_ratio_words(decision)}.\n{_measured_on(decision)}\nRun: {run}"
    said += f"\nPage: {link or page}" if link or page else ""
    lines = [f"::{LEVELS[decision.verdict]} title={_property(f'FlashCore: {decision.verdict}')}::{_data(said)}"]
    for gate in sorted((g for g in decision.gates if g.state != "PASS"), key=lambda g: not g.required):
        level = LEVELS[gate.state] if gate.required else "notice"
        title = f"{gate.title}: {gate.state}{'' if gate.required else ' (not required)'}"
        more = f"\nWhat settles it: {gate.fix}" if gate.fix else ""
        lines.append(f"::{level} title={_property(title)}::{_data(gate.reason + more)}")
    return "\n".join(lines) + "\n"


def _xml(text: str) -> str:
    """Text with U+FFFD for what XML 1.0 cannot hold, not even escaped."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(text))


def junit(decision: Decision, *, run: str, link: str | None = None, page: str | None = None) -> str:
    """JUnit's XML: a test case for the verdict and one for each gate.

    FAIL is a `failure` and INCONCLUSIVE an `error`. A gate that is not required is `skipped` where it did not pass, so
    that what decides nothing turns nothing red. Letters beyond ASCII are written as references, which holds in whatever
    encoding the output is.
    """
    found = facts(decision, run=run, link=link, page=page)
    cases = [("flashcore.verdict", f"the verdict is {decision.verdict}", True,
              {"GO": "PASS", "NO-GO": "FAIL"}.get(decision.verdict, "INCONCLUSIVE"), decision.reason)]  # fmt: skip
    cases += [("flashcore.gates", f"{g.id}: {g.title}", g.required, g.state, g.reason) for g in decision.gates]
    kinds = [_outcome(state, required) for _, _, required, state, _ in cases]
    totals = {"tests": len(cases), "failures": kinds.count("failure"), "errors": kinds.count("error"),
              "skipped": kinds.count("skipped")}  # fmt: skip
    counts = {name: str(count) for name, count in totals.items()}
    root = ElementTree.Element("testsuites", name="FlashCore", **counts)
    suite = ElementTree.SubElement(root, "testsuite", name="FlashCore verdict", time="0", **counts)
    properties = ElementTree.SubElement(suite, "properties")
    told = {"run": run, "commit": found["evidence"]["commit"], "gpu": found["evidence"]["gpu"],
            "evidence": _measured_on(decision), "ratio_to_best_peer": _ratio_words(decision),
            "page": link or page}  # fmt: skip
    for name, value in told.items():
        if value:
            ElementTree.SubElement(properties, "property", name=name, value=_xml(value))
    for (group, name, _, state, reason), kind in zip(cases, kinds, strict=True):
        case = ElementTree.SubElement(suite, "testcase", classname=group, name=_xml(name), time="0")
        if kind == "skipped":
            ElementTree.SubElement(case, kind, message=_xml(f"{state}, and not required: {reason}"))
        elif kind:
            ElementTree.SubElement(case, kind, type=state, message=_xml(reason)).text = _xml(reason)
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(reason)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="us-ascii", xml_declaration=True).decode("ascii") + "\n"


def _outcome(state: str, required: bool) -> str:
    if state == "PASS":
        return ""
    return {"FAIL": "failure"}.get(state, "error") if required else "skipped"


# ---------------------------------------------------------------------------------------------------- badge

_NARROW, _WIDE = "fijlrtI.,:;'|!()[] ", "mwMWGOQ%"
PADDING = 8


def _width(text: str) -> int:
    """Pixels of a text in a plain font of 11 px, by whether its letters are narrow or wide."""
    return round(sum(4 if c in _NARROW else 9.5 if c in _WIDE else 7.4 if c.isupper() else 6.4 for c in text))


def badge(decision: Decision, *, run: str) -> str:
    """An SVG that says the verdict in words, with the ratio to the best peer where that gate passed."""
    gate = _ratio(decision)
    passed = gate is not None and gate.state == "PASS" and gate.versus
    ratio = f", {number(gate.measured)} × {gate.versus}" if passed else ""
    label, said = "FlashCore", f"{decision.verdict}{ratio}"
    left, right = (_width(text) + 2 * PADDING for text in (label, said))
    root = ElementTree.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", width=str(left + right), height="20", role="img",
        viewBox=f"0 0 {left + right} 20",
    )  # fmt: skip
    root.set("aria-labelledby", "fc-badge-title fc-badge-desc")
    ElementTree.SubElement(root, "title", id="fc-badge-title").text = _xml(f"FlashCore: {said}")
    ElementTree.SubElement(root, "desc", id="fc-badge-desc").text = _xml(f"{decision.reason} Run {_one_line(run)}.")
    for x, width, colour in ((0, left, LABEL_COLOUR), (left, right, COLOURS[decision.verdict])):
        ElementTree.SubElement(root, "rect", x=str(x), width=str(width), height="20", fill=colour)
    words = ElementTree.SubElement(root, "g", fill="#ffffff")
    words.set("font-family", "Verdana, DejaVu Sans, Geneva, sans-serif")
    words.set("font-size", "11")
    for x, text, width in ((PADDING, label, left), (left + PADDING, said, right)):
        # textLength: whatever font a reader has, the words end inside their box.
        ElementTree.SubElement(words, "text", x=str(x), y="14", textLength=str(width - 2 * PADDING)).text = _xml(text)
    return ElementTree.tostring(root, encoding="us-ascii", xml_declaration=True).decode("ascii") + "\n"


Writer = Callable[..., str]
FORMATS: dict[str, Writer] = {"json": as_json, "markdown": markdown, "github": github, "junit": junit}
"""What writes a decision in each format; each takes the decision, `run`, `link` and `page`."""
