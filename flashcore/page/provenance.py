"""Where the figures come from and how to make them again: the run, the sources, the commands, the machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

from flashcore.decision.verdict import Decision, Evidence
from flashcore.page.drawing import html_tables
from flashcore.page.drawing.html_tables import fold
from flashcore.page.headline import sealed
from flashcore.page.proof import machine_html
from flashcore.paths import data_dir

VARIABLES = (("PROFILE", "profile"), ("BACKEND", "backends"), ("PROBLEM", "problems"))
"""Variables of `make report`, and the parameter of the run that each one sets."""


def provenance_html(name: str, decision: Decision, evidence: Evidence) -> str:
    """The commands that make the report again, what was run, and on what; `name` is the run's."""
    steps = _sources(evidence.environment)
    there = (data_dir("reports") / "recorded" / name).is_dir()  # and recorded runs are never written to
    steps.append((command(evidence.environment), "measures, judges and renders"))
    if sealed(decision):
        steps.append((f"flashcore verify {name}", "says whether the run is still what was judged, and names what was "
                      "changed"))  # fmt: skip
    steps += [
        (f"flashcore verdict {name}", "reads the verdict from this run's records: exit code 0 GO, 3 NO-GO, "
         "4 INCONCLUSIVE"),
        (f"flashcore render {name}{' --to page' if there else ''}", "makes this page from them again"),
    ]  # fmt: skip
    items = "".join(f"<li><code>{escape(line)}</code> {escape(what)}</li>" for line, what in steps)
    sources = [
        {"Kernel": kernel, "Source hash": Markup("<code>{}</code>").format(digest)}
        for kernel, digest in _mapping(evidence.environment.get("kernels")).items()
    ]
    hashes = html_tables.table_html(sources, "Kernel sources of this run") if sources else ""
    facts = html_tables.table_html(
        [{"Fact": fact, "Value": value} for fact, value in _facts(name, decision, evidence)],
        "What was run",
        stack=True,
        css="fc-facts",
    )
    folded = fold("Hash of every kernel's source", hashes) if hashes else ""
    machine = machine_html(evidence).replace("<h3>", "<h4>").replace("</h3>", "</h4>")
    return (
        f'<h3>How to make it again</h3><ol class="fc-steps">{items}</ol>{facts}{folded}'
        f"<h3>Kernels as compiled, and the machine</h3>{machine}"
    )


def _sources(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The commands that get the sources of a run: from its repository, or as a file from whoever made it."""
    git = _mapping(environment.get("git"))
    commit, url = git.get("commit"), git.get("url")
    if not commit:
        return []
    if url:
        return [(f"git clone {url} flashcore && cd flashcore", "gets the repository"),
                (f"git checkout {commit}", "the sources of this run")]  # fmt: skip
    asked = (
        "is what to ask of whoever sent this page, since the run names no repository: it packs the sources into a file"
    )
    return [(f"git archive --format=tar.gz --output=flashcore.tar.gz {commit}", asked)]


def command(environment: Mapping[str, Any]) -> str:
    """The command with the parameters of a run that are not the defaults: of `make`, or with the workers of the run."""
    parameters = _mapping(environment.get("parameters"))
    if workers := _workers(environment):
        options = [
            f"--{variable.lower()} {shlex.quote(str(parameters[key]))}"
            for variable, key in VARIABLES
            if parameters.get(key) not in (None, "all", "default")
        ]
        return " ".join(["flashcore report", workers, *options])
    chosen = [
        f"{variable}={shlex.quote(str(parameters[key]))}"
        for variable, key in VARIABLES
        if parameters.get(key) not in (None, "all", "default")
    ]
    return " ".join(["make report", *chosen])


def _workers(environment: Mapping[str, Any]) -> str:
    """The option that spreads a report over as many workers as this one had; empty for one process."""
    stated = environment.get("cards")
    cards = [_mapping(one) for one in stated] if isinstance(stated, list) else []
    if len({str(one.get("node")) for one in cards}) > 1:
        return "--scheduler tcp://ADDRESS"
    return f"--{'gpus' if cards[0].get('card') else 'workers'} {len(cards)}" if cards else ""


def _facts(name: str, decision: Decision, evidence: Evidence) -> list[tuple[str, Any]]:
    environment = evidence.environment
    code, git = Markup("<code>{}</code>").format, _mapping(environment.get("git"))
    before = _mapping(environment.get("before"))
    machine = ", ".join(str(x) for x in (environment.get("gpu") or "no GPU", before.get("cpu")) if x)
    commit = code(git.get("commit") or "not known")
    if git.get("dirty"):
        commit += ", with changes not committed"
    facts = [
        ("Run", code(name)), ("Machine of this run", machine), ("GPU evidence", decision.evidence),
        ("Seal", decision.seal or "not looked at"),
        ("Environment", code(environment.get("id") or "not recorded")),
        ("FlashCore", str(environment.get("flashcore") or "not known")), ("Git commit", commit),
    ]  # fmt: skip
    if evidence.recorded is not None:
        other = _mapping(evidence.recorded.environment.get("git")).get("commit")
        facts.append(("Git commit of the recorded run", code(other or "not known")))
    for redone in environment.get("redone") or ():
        when = str(_mapping(redone).get("date") or "date not known")[:16].replace("T", " ")
        facts.append(("Measured again", f"{', '.join(map(str, _mapping(redone).get('parts') or ()))}, {when} UTC"))
    for key, value in _mapping(environment.get("parameters")).items():
        facts.append((f"Parameter {key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return facts


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
