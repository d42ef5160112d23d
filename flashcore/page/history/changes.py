"""List what else changed between two runs, in words: checks, gates, kernels, coverage, machine and software."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flashcore.decision import compare
from flashcore.decision.evidence import spoken
from flashcore.page.history.runs import Snapshot
from flashcore.page.history.timings import Pair
from flashcore.records import Trial

Topic = Literal["newly failing", "mended", "coverage lost", "coverage gained", "verdict", "gate", "kernel", "setting"]
TOPICS: tuple[Topic, ...] = (
    "newly failing", "verdict", "gate", "coverage lost", "kernel", "setting", "mended", "coverage gained",
)  # fmt: skip
"""In the order in which a reader wants them."""
SOFTWARE = ("driver", "cuda_driver", "cuda_runtime", "torch", "cudnn", "cublaslt", "cupy", "nvrtc", "python")
NAMES = {
    "attention_timing": "timing", "correctness": "check", "fault": "planted bug", "sanitizer": "compute-sanitizer run",
    "invariance": "bit comparison",
}  # fmt: skip
"""What a reader calls a kind of record; the others go by their own name."""
NO_OUTCOME = ("ceiling", "gemm_candidate", "claim", "verdict", "paging", "fleet", "worker")
"""Kinds that measure or state, and neither pass nor fail."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was."""

    topic: Topic
    sentence: str
    regression: bool = False
    """Whether it fails `flashcore compare --strict`: what passed, and now fails, does not finish or is gone."""


def differences(pair: Pair) -> list[Difference]:
    """Everything that changed except speed, the gravest first."""
    found = [*_checks(pair), *_verdicts(pair), *_kernels(pair), *_settings(pair)]
    return sorted(found, key=lambda d: TOPICS.index(d.topic))


# ------------------------------------------------------------------------------------------------------- checks


def _checks(pair: Pair) -> list[Difference]:
    before, now = _outcomes(pair.before.trials), _outcomes(pair.now.trials)
    found, lost, gained = [], defaultdict(list), defaultdict(list)
    for key, (old, _) in before.items():
        new, trial = now.get(key, (None, None))
        if new is None:
            lost[key[:2]].append(key)
        elif old == "passed" and new != "passed":
            reason = compare.first_line(trial.reason, "")
            why = f": {reason}" if reason else ""
            found.append(Difference("newly failing", f"{_name(key)} passed and now {_verb(new)}{why}.", True))
        elif old != "passed" and new == "passed":
            found.append(Difference("mended", f"{_name(key)} {_verb(old, then=True)} and now passes."))
    for key in now:
        if key not in before:
            gained[key[:2]].append(key)
    for (kind, backend), keys in lost.items():
        total = sum(k[:2] == (kind, backend) for k in before)
        kept = f"{total - len(keys)} of" if len(keys) < total else "none of"
        who = f" of {backend}" if backend else ""
        sentence = f"This run made {kept} the {total} {_many(kind, total)}{who} that were made then; missing: "
        passed = [key for key in keys if before[key][0] == "passed"]
        vanished = bool(passed) and _asked_for(pair.now, backend, before[keys[0]][1]) and not _asked_for_less(pair)
        found.append(Difference("coverage lost", f"{sentence}{_name(keys[0], inside=True)}{_more(keys)}.", vanished))
    for kind in dict.fromkeys(kind for kind, _ in gained):
        counts = [f"{b or 'the run'} {len(keys)}" for (k, b), keys in gained.items() if k == kind]
        found.append(Difference("coverage gained", f"New {_many(kind, 2)}: {', '.join(counts)}."))
    return found


def _asked_for(run: Snapshot, backend: str, then: Trial) -> bool:
    """Whether what was measured of a backend of ours then was to be measured in this run too."""
    if backend and compare.role(then) != "ours":
        return False
    asked = run.environment.get("parameters")
    names = asked.get("backends") if isinstance(asked, Mapping) else None
    return not backend or not isinstance(names, str) or names.strip() == "all" or backend in _split(names)


def _asked_for_less(pair: Pair) -> bool:
    """Whether the newer run was to measure less, or had no GPU for it: a quick profile, chosen problems."""
    then, now = (run.environment.get("parameters") for run in (pair.before, pair.now))
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return False
    order = {"quick": 0, "full": 1}
    shorter = order.get(str(now.get("profile")), 1) < order.get(str(then.get("profile")), 1)
    fewer = now.get("problems") not in (None, then.get("problems"))
    return shorter or fewer or bool(pair.before.gpu and not pair.now.gpu)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def _outcomes(trials: Sequence[Trial]) -> dict[tuple, tuple[str, Trial]]:
    """Everything that can pass or fail, by what was asked; asked twice, the worse outcome counts."""
    worst = ("failed", "did not finish", "passed")
    found: dict[tuple, tuple[str, Trial]] = {}
    for trial in trials:
        outcome = _outcome(trial)
        if outcome is None:
            continue
        where = trial.problem.label() if trial.problem else ""
        asked = [str(trial.data[n]) for n in ("kernel", "head_dim", "dtype", "pattern", "layout", "name", "fault")
                 if trial.data.get(n) is not None]  # fmt: skip
        traced = "traced" if trial.data.get("trace") else ""
        key = (trial.kind, trial.backend or "", trial.variant or "", where, *asked, traced)
        if key not in found or worst.index(outcome) < worst.index(found[key][0]):
            found[key] = (outcome, trial)
    return found


def _outcome(trial: Trial) -> str | None:
    if trial.kind in NO_OUTCOME:
        return None
    if trial.status == "error":
        return "did not finish"
    if trial.kind == "correctness":
        right = compare.passed(trial)
        return None if right is None else "passed" if right else "failed"
    return {"ok": "passed", "failed": "failed"}.get(trial.status)


def _name(key: tuple, *, inside: bool = False) -> str:
    kind, backend, variant, where, *asked = key
    what = f"{NAMES.get(kind, kind)} {variant}".strip()
    who = f" of {backend}" if backend else ""
    at = f" at {where.replace(',', ', ')}" if where else ""
    detail = ", ".join(a for a in asked if a and a != variant)
    text = f"{what}{who}{at}{f' ({detail})' if detail else ''}"
    return text if inside else text[0].upper() + text[1:]


def _many(kind: str, count: int) -> str:
    name = NAMES.get(kind, kind)
    return name if count == 1 else f"{name}s"


def _more(keys: list) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def _verb(outcome: str, *, then: bool = False) -> str:
    if outcome == "failed":
        return "failed" if then else "fails"
    return "did not finish" if then else "does not finish"


# ------------------------------------------------------------------------------------- verdict, kernels, settings


def _verdicts(pair: Pair) -> list[Difference]:
    """The verdict and the gates as each run recorded them; judging again would hold old records against new sources."""
    then, now = _decision(pair.before.trials), _decision(pair.now.trials)
    if then is None or now is None:
        return []
    found = []
    if then.get("verdict") != now.get("verdict"):
        found.append(Difference("verdict", f"The verdict was {then.get('verdict')} and is {now.get('verdict')}."))
    before, after = _gates(then), _gates(now)
    for name, gate in after.items():
        title, old = gate.get("title", name), before.get(name)
        if old is None:
            found.append(Difference("gate", f"Gate '{title}' is new: {gate.get('state')}."))
        elif old.get("state") != gate.get("state"):
            found.append(Difference("gate", f"Gate '{title}' was {old.get('state')} and is {gate.get('state')}."))
        if old and old.get("threshold") != gate.get("threshold"):
            moved = f"{old.get('threshold')} to {gate.get('threshold')} {gate.get('unit', '')}".strip()
            found.append(Difference("gate", f"The threshold of gate '{title}' moved from {moved}."))
    for name, gate in before.items():
        if name not in after:
            found.append(Difference("gate", f"Gate '{gate.get('title', name)}' was {gate.get('state')} and is gone."))
    return found


def _decision(trials: Sequence[Trial]) -> Mapping[str, Any] | None:
    return next((t.data for t in reversed(trials) if t.kind == "verdict"), None)


def _gates(decision: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    gates = decision.get("gates")
    gates = gates if isinstance(gates, list) else []
    return {str(g.get("id")): g for g in gates if isinstance(g, Mapping)}


def _kernels(pair: Pair) -> list[Difference]:
    then, now = (_hashes(run) for run in (pair.before, pair.now))
    found = []
    for name in sorted(then.keys() | now.keys()):
        words = spoken([name])
        subject, be, have = (
            (f"Kernel {name}", "is", "has") if words == name else (words[:1].upper() + words[1:], "are", "have")
        )
        if name not in then:
            sentence = f"{subject} {be} new ({now[name]})."
        elif name not in now:
            sentence = f"{subject} {be} gone ({then[name]})."
        elif then[name] != now[name]:
            sentence = f"{subject} {have} other source ({then[name]} → {now[name]}): this compares two kernels."
        else:
            continue
        found.append(Difference("kernel", sentence))
    return found if then and now else []


def _hashes(run: Snapshot) -> dict[str, str]:
    kernels = run.environment.get("kernels")
    return {str(k): str(v)[:16] for k, v in kernels.items()} if isinstance(kernels, Mapping) else {}


def _settings(pair: Pair) -> list[Difference]:
    a, b = pair.before, pair.now
    changed = [(n, a.facts.get(n), b.facts.get(n)) for n in SOFTWARE]
    changed.append(("flashcore", a.environment.get("flashcore"), b.environment.get("flashcore")))
    asked = [run.environment.get("parameters") for run in (a, b)]
    if all(isinstance(p, Mapping) for p in asked):
        changed += [(n, asked[0].get(n), asked[1].get(n)) for n in ("profile", "backends", "problems", "seed")]
    return [
        Difference("setting", f"{name.replace('_', ' ')} was {then} and is {now}.")
        for name, then, now in changed
        if then is not None and now is not None and then != now
    ]
