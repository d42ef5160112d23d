"""Tables for a reader, made from records alone: results in words, the first bad element spelt out. Never torch."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flashcore.records import Trial

if TYPE_CHECKING:
    import pandas
    from pandas.io.formats.style import Styler

WORDS = {"ok": "PASS", "failed": "FAIL", "error": "ERROR", "unsupported": "unsupported", "unavailable": "unavailable"}
"""What a reader sees for the status of a trial."""
CONFORM = "conform:"
"""What the variant of a record of kind `diagnosis` begins with that says whether one promise is kept."""


def correctness_table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row a `correctness` trial: backend, problem, verdict, largest error and its bound, and what went wrong."""
    import pandas

    rows = []
    for trial in trials:
        c = trial.correctness
        rows.append({
            "backend": trial.backend,
            "problem": trial.problem.label() if trial.problem else "",
            "verdict": WORDS[trial.status],
            "values compared": c.checked if c else 0,
            "largest error of out": c.max_abs_error if c else None,
            "bound": c.bound if c else None,
            "largest error of lse": c.lse_max_abs_error if c else None,
            "reason": trial.reason or "",
        })  # fmt: skip
    return pandas.DataFrame(rows)


def verdict_grid(trials: Iterable[Trial]) -> pandas.DataFrame:
    """Problems down, backends across, one word in each cell."""
    table = correctness_table(trials)
    if table.empty:
        return table
    grid = table.pivot_table(index="problem", columns="backend", values="verdict", aggfunc=" / ".join, sort=False)
    return grid.fillna("not run").reset_index().rename_axis(columns=None)


def stage_table(trial: Trial) -> pandas.DataFrame:
    """One row a stage of a `bisection` trial, in dataflow order."""
    import pandas

    rows = []
    for row in trial.data.get("stages", []):
        own, start = row["local"], row["global"]
        rows.append({
            "stage": row["stage"],
            "role": row["role"],
            "from own inputs": _verdict(own),
            "worst error": float(own["worst_error"]),
            "bound": float(own["bound"]),
            "from the start": _verdict(start),
            "worst error from the start": float(start["worst_error"]),
            "bound from the start": float(start["bound"]),
            "first bad": _where(own.get("first_bad") or start.get("first_bad")),
        })  # fmt: skip
    return pandas.DataFrame(rows)


def fault_matrix(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row a planted bug, one column a backend: where it had to be found, and what came of it, in words."""
    import pandas

    trials = [trial for trial in trials if trial.kind == "fault"]
    backends = list(dict.fromkeys(t.backend for t in trials if t.backend))
    of_no_backend = {t.backend for t in trials if t.data.get("found_by") == "selection"}
    rows: dict[str, dict[str, str]] = {}
    for trial in trials:
        name = trial.data.get("fault")
        if name is None:
            continue
        row = rows.setdefault(name, {
            "fault": name, "bug": "", "to be found at": "",
            **{b: "no bug of it" if trial.backend in of_no_backend or b in of_no_backend else "not run"
               for b in backends}, "a check for finite and nonzero": "",
        })  # fmt: skip
        row["bug"] = row["bug"] or str(trial.data.get("title", ""))  # a record of where it makes no sense may lack both
        row["to be found at"] = row["to be found at"] or str(trial.data.get("expected_stage", ""))
        for backend in [trial.backend] if trial.backend else backends:
            row[backend] = _outcome(trial)
        if trial.data.get("check_passed"):
            row["a check for finite and nonzero"] = "would PASS it"
    return pandas.DataFrame(list(rows.values()))


def diagnosis_table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row a planted bug and backend: its stage, what the outputs alone told, and how long it took."""
    import pandas

    rows = []
    for trial in trials:
        if trial.kind != "diagnosis" or trial.variant in (None, "clean") or _of_a_promise(trial):
            continue
        data = trial.data
        names = ", ".join(h["name"] for h in data.get("hypotheses", [])) or str(data.get("finding", trial.reason or ""))
        rows.append({"fault": trial.variant, "backend": trial.backend, "stage": data.get("expected"),
                     "outcome": data.get("outcome"), "told": ", ".join(data.get("stages", [])),
                     "hypothesis or finding": names[:80], "seconds": f"{data.get('seconds', 0):.1f}"})  # fmt: skip
    columns = ["fault", "backend", "stage", "outcome", "told", "hypothesis or finding", "seconds"]
    return pandas.DataFrame(rows, columns=columns)


TOLD = ("stage", "class", "raised")
"""Outcomes with which a planted bug was diagnosed."""


def proofs_of(trials: Iterable[Trial]) -> list[Trial]:
    """The records that prove the diagnosis: a planted bug each, or right backends that were asked (variant `clean`)."""
    return [t for t in trials if t.kind == "diagnosis" and t.variant is not None and not _of_a_promise(t)]


def diagnosis_counts(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row an implementation: planted bugs by what outputs alone told of them, clean cases and false alarms."""
    import pandas

    columns = {"planted": None, "at its stage": "stage", "at one that looks alike": "class",
               "by an error": "raised", "elsewhere": "elsewhere", "missed": "missed",
               "changes no output": "not visible"}  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for trial in proofs_of(trials):
        empty = {"backend": trial.backend, **dict.fromkeys([*columns, "clean cases", "false alarms"], 0)}
        row = rows.setdefault(str(trial.backend), empty)
        if trial.variant == "clean":
            row["clean cases"] += int(trial.data.get("cases") or 0)
            row["false alarms"] += int(trial.data.get("alarms") or 0)
            continue
        row["planted"] += 1
        for name, outcome in columns.items():
            row[name] += trial.data.get("outcome") == outcome and outcome is not None
    return pandas.DataFrame(list(rows.values()), columns=["backend", *columns, "clean cases", "false alarms"])


def diagnosis_sentence(trials: Iterable[Trial]) -> str:
    """How many planted bugs outputs alone told, and how many alarms right implementations gave, as one line."""
    trials = proofs_of(trials)
    planted = [t for t in trials if t.variant != "clean" and t.data.get("outcome") != "not visible"]
    hidden = sum(t.data.get("outcome") == "not visible" for t in trials)
    clean = [t for t in trials if t.variant == "clean" and t.status in ("ok", "failed")]
    unfinished = sorted({str(t.backend) for t in trials if t.variant == "clean" and t.status == "error"})
    outcomes = [t.data.get("outcome") for t in planted]
    told = sum(outcome in TOLD for outcome in outcomes)
    words = (f"{told} of {len(planted)} planted bugs were diagnosed from outputs alone "
             f"({outcomes.count('stage')} at their stage, {outcomes.count('class')} at one that no output tells apart, "
             f"{outcomes.count('raised')} by an error or the end of their process), {outcomes.count('elsewhere')} "
             f"elsewhere, {outcomes.count('missed')} missed")  # fmt: skip
    if hidden:
        words += f"; {hidden} change no output and cannot be asked about"
    if clean:
        cases, alarms = sum(t.data["cases"] for t in clean), sum(t.data["alarms"] for t in clean)
        words += f"; {cases} clean cases over {len({t.backend for t in clean})} implementations gave {alarms} alarms"
    if unfinished:
        words += f"; clean cases of {', '.join(unfinished)} did not all come to an end"
    return words


def _of_a_promise(trial: Trial) -> bool:
    return trial.kind == "diagnosis" and (trial.variant or "").startswith(CONFORM)


def promises_of(trials: Iterable[Trial]) -> list[Trial]:
    """The records that say whether a promise is kept; of one that was asked for again the last."""
    last = {(t.backend, t.variant): t for t in trials if _of_a_promise(t)}
    return list(last.values())


def conform_table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row a promise, one column an implementation: kept, broken, refused, or why there is no answer."""
    import pandas

    trials = promises_of(trials)
    names = list(dict.fromkeys(str(t.backend) for t in trials))
    rows: dict[str, dict[str, str]] = {}
    for trial in sorted(trials, key=lambda t: _number(t.variant)):
        data = trial.data
        row = rows.setdefault(str(trial.variant), {
            "id": str(data.get("promise_id", "")), "promise": str(data.get("promise", "")),
            **dict.fromkeys(names, "not asked"),
        })  # fmt: skip
        row[str(trial.backend)] = str(data.get("result", WORDS[trial.status]))
    return pandas.DataFrame(list(rows.values()))


def _number(variant: str | None) -> int:
    """The number of a promise, to sort by: P10 comes after P9."""
    digits = "".join(filter(str.isdigit, variant or ""))
    return int(digits or 0)


def conform_breaks_table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row for each promise that was not kept: who, on which smallest case, and what happened; breaks first."""
    import pandas

    order = ("broken", "not judged", "not promised", "refused")
    found = [t for t in promises_of(trials) if t.data.get("result") in order]
    found.sort(key=lambda t: (order.index(t.data["result"]), str(t.backend), _number(t.variant)))
    rows = [{
        "implementation": str(t.backend), "promise": f"{t.data.get('promise_id')}, {t.data.get('promise_name')}",
        "result": str(t.data["result"]), "smallest case": str(t.data.get("smallest") or ""),
        "what happened": str(t.data.get("sentence", "")),
    } for t in found]  # fmt: skip
    return pandas.DataFrame(rows)


def conform_sentence(trials: Iterable[Trial]) -> str:
    """How many promises were kept, broken and refused, and which were broken, as one line."""
    trials = promises_of(trials)
    if not trials:
        return "no promise was asked for"
    results = [str(t.data.get("result")) for t in trials]
    applies = len(results) - results.count("does not apply")
    parts = [f"{results.count('kept')} of {applies} promises that apply are kept"]
    parts += [f"{results.count(one)} {one}" for one in ("broken", "not promised", "refused", "not judged")
              if one in results]  # fmt: skip
    broken = [f"{t.backend} {t.data.get('promise_id')}" for t in trials if t.data.get("result") == "broken"]
    return ", ".join(parts) + (f"; broken: {', '.join(broken)}" if broken else "")


def diagnoses_table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row a function that was diagnosed: the finding, its stage, and the smallest case that fails."""
    import pandas

    rows = []
    for trial in trials:
        if trial.kind != "diagnosis" or trial.variant is not None:
            continue
        data = trial.data
        smallest = data.get("smallest") or {}
        case = ", ".join(str(smallest[k]) for k in ("problem", "pattern") if k in smallest)
        rows.append({"backend": trial.backend, "finding": str(data.get("finding", trial.reason or "")),
                     "stage": ", ".join(map(str, data.get("stages", []))), "smallest case that fails": case,
                     "calls": data.get("calls")})  # fmt: skip
    columns = ["backend", "finding", "stage", "smallest case that fails", "calls"]
    return pandas.DataFrame(rows, columns=columns)


def _outcome(trial: Trial) -> str:
    outcome = str(trial.data.get("outcome", WORDS[trial.status]))
    if outcome == "found elsewhere":
        return f"found elsewhere: {trial.data.get('found_stage')}"
    if outcome == "crashed" and trial.status == "ok":
        return "found: its process died"
    if outcome == "not applicable" and trial.reason:
        return trial.reason.split(":")[0]
    return outcome


def fault_counts(trials: Iterable[Trial]) -> dict[str, dict[str, int]]:
    """For each backend how many planted bugs had each outcome; those with no sense there are not counted."""
    counts: dict[str, dict[str, int]] = {}
    for trial in trials:
        outcome = trial.data.get("outcome")
        if trial.kind == "fault" and trial.backend and outcome not in (None, "not applicable"):
            of_backend = counts.setdefault(trial.backend, {})
            if outcome == "crashed" and trial.status == "ok":
                outcome = "found by its crash"
            of_backend[outcome] = of_backend.get(outcome, 0) + 1
    return counts


def faults_sentence(trials: Iterable[Trial]) -> str:
    """How many planted bugs each backend's bisection found, as one line."""
    trials = list(trials)
    parts = []
    for backend, outcomes in fault_counts(trials).items():
        if set(outcomes) == {"not run"}:
            parts.append(f"{backend}: not run")
            continue
        total = sum(outcomes.values())
        rest = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items() if outcome != "found")
        found = f"{backend}: {outcomes.get('found', 0)} of {total} found at their stage"
        parts.append(f"{found}, {rest}" if rest else found)
    return "; ".join(parts) or "no fault was planted"


def exploits_table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row an exploit and the place where it was played: how it cheats, what caught it, and what the judge said."""
    import pandas

    rows = []
    for trial in trials:
        if trial.kind == "exploit":
            data = trial.data
            rows.append({
                "exploit": str(data.get("exploit", "")), "what it does": f"{data.get('title')}: it {data.get('how')}",
                "played on": str(data.get("place", "")), "outcome": str(data.get("outcome", "")),
                "caught by": str(data.get("by") or "nothing"), "what the judge said": str(data.get("said", "")),
            })  # fmt: skip
    return pandas.DataFrame(rows)


def exploits_sentence(trials: Iterable[Trial]) -> str:
    """How many exploits were planted and caught, and which were not, as one line."""
    tried = [t for t in trials if t.kind == "exploit" and t.status != "unavailable"]
    if not tried:
        return "no exploit was planted"
    missed = [f"{t.data.get('exploit')} on {t.data.get('place')}" for t in tried if t.status != "ok"]
    count = f"{len(tried) - len(missed)} of {len(tried)} were caught by what should catch them"
    return f"{count}; these got through: {', '.join(missed)}" if missed else count


def clean_runs_table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row a backend: runs with nothing planted, and how many of them raised an alarm."""
    import pandas

    rows = []
    for trial in trials:
        if trial.kind == "bisection" and trial.variant == "clean-runs":
            data = trial.data
            seeds = data.get("seeds")
            rows.append({
                "backend": trial.backend, "verdict": WORDS[trial.status], "runs": data.get("runs", 0),
                "false alarms": data.get("alarms", "not run"), "values judged": data.get("values", 0),
                "dtypes": _kinds(data.get("dtypes")), "input patterns": len(data.get("patterns") or ()),
                "seeds": f"{seeds[0]} to {seeds[1]}" if seeds else "", "reason": trial.reason or "",
            })  # fmt: skip
    return pandas.DataFrame(rows)


def _kinds(counts: dict[str, int] | None) -> str:
    return ", ".join(f"{name} ({n})" for name, n in (counts or {}).items())


def determinism_table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row a backend and problem: whether repeats give the same bits, and else where they first differ."""
    import pandas

    rows = []
    for trial in trials:
        if trial.kind == "bisection" and (trial.variant or "").endswith("determinism"):
            same = trial.data.get("identical")
            rows.append({
                "backend": trial.backend, "problem": trial.problem.label() if trial.problem else "",
                "runs": trial.data.get("runs", 0),
                "result": "the same bits" if same else WORDS[trial.status] if same is None else "other bits",
                "first differs in": trial.data.get("first_stage") or "",
                "element": describe(trial.data["element"]) if trial.data.get("element") else "",
                "reason": trial.reason or "",
            })  # fmt: skip
    return pandas.DataFrame(rows)


def sanitizer_table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row a backend and tool of compute-sanitizer; `not available` is a state, with what mends it."""
    import pandas

    rows = []
    for trial in trials:
        if trial.kind == "sanitizer":
            first = next(iter(trial.data.get("findings") or ()), {})
            place = f"{first['file']}:{first['line']}" if first.get("file") else ""
            rows.append({
                "backend": trial.backend, "tool": trial.data.get("tool", trial.variant),
                "result": "not available" if trial.status == "unavailable" else WORDS[trial.status],
                "findings": trial.data.get("num_findings", ""), "first kernel": first.get("kernel", ""),
                "first place": place, "reason": trial.reason or "",
            })  # fmt: skip
    return pandas.DataFrame(rows)


def styled(table: pandas.DataFrame, caption: str) -> Styler:
    """An HTML table with a caption, errors in scientific notation and no row numbers.

    What stands in a cell or a heading is text: a backend's id or an exception's words may hold anything.
    """
    table = table.rename(columns=lambda name: html.escape(str(name)))
    floats = [name for name in table.columns if table[name].dtype.kind == "f"]
    return (
        table.style.hide(axis="index")
        .set_caption(html.escape(caption))
        .format(escape="html")
        .format("{:.2e}", subset=floats, na_rep="none")
    )


def folded(html_of_it: str, summary: str, *, fold: bool = True) -> str:
    """What passed, folded under a line that says so; whatever did not (`fold` is false) stands open, as it is."""
    return f"<details><summary>{html.escape(summary)}</summary>{html_of_it}</details>" if fold else html_of_it


def finding_sentence(trials: Iterable[Trial]) -> str:
    """What checks, bisections and planted bugs found, the worst first: how many are wrong, and which is the first.

    A check that could not run here is counted, and says nothing against its backend.
    """
    trials = list(trials)
    of_checker = [t for t in trials if t.kind in ("fault", "exploit") or t.variant == "clean-runs"]
    judged = [t for t in of_checker if t.status in ("ok", "failed", "error")]
    asked = [t for t in trials if t.kind in ("correctness", "bisection") and not t.data.get("fault")
             and t not in of_checker]  # fmt: skip
    wrong = [t for t in asked if t.status in ("failed", "error")]
    ran = [t for t in asked if t.status in ("ok", "failed", "error")]
    rest = f"; {len(asked) - len(ran)} could not run here" if len(ran) < len(asked) else ""
    missed = [t for t in judged if t.status in ("failed", "error")]
    proof = ""
    if judged:
        proof = f" Of {len(judged)} proofs of the checker itself, " + (
            f"{len(missed)} failed, the first: {missed[0].reason or missed[0].data.get('outcome')}." if missed
            else "none failed.")  # fmt: skip
    if wrong:
        first = wrong[0]
        where = f" on {first.problem.label()}" if first.problem else ""
        why = (first.reason or WORDS[first.status]).rstrip(".")
        return (f"{len(wrong)} of {len(ran)} checks and bisections found something wrong{rest}. "
                f"The first: {first.backend}{where}: {why}.{proof}")  # fmt: skip
    if not ran:
        return f"Nothing was checked{rest}.{proof}"
    return f"Nothing is wrong: all {len(ran)} checks and bisections passed{rest}.{proof}"


def describe(element: dict[str, Any] | None) -> str:
    """An element's coordinates and both its values, in words."""
    if not element:
        return "none"
    where = ", ".join(f"{k} {v}" for k, v in element.items() if k not in ("got", "expected", "tensor", "kind", "stage"))
    return f"at {where}: got {float(element['got']):.6g}, expected {float(element['expected']):.6g}"


def _where(element: dict[str, Any] | None) -> str:
    return "none" if element is None else f"{element['kind']} {describe(element)}"


def _verdict(judgement: dict[str, Any]) -> str:
    return "PASS" if judgement["passed"] else f"FAIL ({judgement['num_bad']} of {judgement['checked']})"
