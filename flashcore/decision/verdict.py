"""Decide GO, NO-GO or INCONCLUSIVE from records, by gates and options that are data.

The verdict is never read from a notebook: a gate looks at trials and at nothing else. What is missing, was measured on
other source, on another machine, or has the threshold within the interval of its median settles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from flashcore.decision.advice import flip, recommendation
from flashcore.decision.evidence import Evidence, Recorded, gather, label
from flashcore.decision.gates import Gate, Gates, load_gates
from flashcore.decision.judging import GateResult, Source, clause, judge_gate
from flashcore.decision.options import OptionResult, weigh
from flashcore.decision.seal import State
from flashcore.records import RunFolder, Trial

__all__ = [
    "EXIT_CODES", "Decision", "Evidence", "Gate", "GateResult", "Gates", "OptionResult", "Recorded", "decide", "gather",
    "judge", "load_gates",
]  # fmt: skip

EXIT_CODES = {"GO": 0, "NO-GO": 3, "INCONCLUSIVE": 4}
STATUS_NOTEBOOK = "06_status_report"
"""The notebook that shows the verdict; the verdict does not wait for it."""


@dataclass(frozen=True)
class Decision:
    """The verdict on one run, its reason, every gate's result, and what they make of the options."""

    verdict: Literal["GO", "NO-GO", "INCONCLUSIVE"]
    reason: str
    gates: tuple[GateResult, ...]
    evidence: str = ""
    """Where the GPU figures come from, in words."""
    options: tuple[OptionResult, ...] = ()
    """The file's options, the recommended one first; empty for a file without any."""
    stored: str = ""
    """How the verdict that was recorded differs from this one, in one sentence; empty where it does not."""
    based_on: Evidence | None = field(default=None, compare=False, repr=False)
    """All that it was judged from, the state of the run's seal included; None where no run was judged."""

    @property
    def seal(self) -> str:
        """Whether the run is still what was judged, in one sentence; empty where that was not asked."""
        return self.based_on.seal.sentence if self.based_on else ""

    def with_seal(self, state: State) -> Decision:
        """The decision with another state of the run's seal, which says nothing about the verdict."""
        return replace(self, based_on=replace(self.based_on, seal=state))

    @property
    def recommended(self) -> OptionResult | None:
        """The option to ship; None unless the verdict is GO."""
        return next((o for o in self.options if o.recommended), None)

    @property
    def recommendation(self) -> str:
        """Which option is recommended and why, in one sentence; empty for a file without options."""
        return recommendation(self.options)

    @property
    def flip(self) -> str:
        """What would have to change for the recommended option, or the nearest one, in one sentence."""
        return flip(self.options[0], self.options) if self.options else ""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def blocking(self) -> tuple[GateResult, ...]:
        """The required gates that did not pass."""
        return tuple(g for g in self.gates if g.required and g.state != "PASS")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and for the page."""
        gates = [
            {**asdict(g), "interval": g.interval and list(g.interval), "margin_percent": g.margin_percent}
            for g in self.gates
        ]
        options = [{**o.as_dict(), "flip": flip(o, self.options)} for o in self.options]
        return {
            "verdict": self.verdict, "reason": self.reason, "evidence": self.evidence, "gates": gates,
            "options": options, "recommendation": self.recommendation,
        }  # fmt: skip

    def to_trial(self, *, sealed: bool = False) -> Trial:
        """The decision as a record of kind `verdict`; `sealed` says that a seal over the run follows."""
        return Trial(kind="verdict", data={**self.as_dict(), **({"sealed": True} if sealed else {})})


def judge(run: RunFolder, *, gates: Gates | None = None, recorded_dir: str | Path | None = None) -> Decision:
    """Gather a run's evidence and decide: the one call the command line and the page need."""
    gates = gates or load_gates()
    evidence = gather(run, gates=gates, recorded_dir=recorded_dir)
    decision = decide(
        evidence.trials,
        gates,
        environment=evidence.environment,
        current_hashes=evidence.current_hashes,
        recorded=evidence.recorded,
        problems=evidence.problems,
    )
    stored = _stored(evidence.trials, decision.verdict)
    return replace(decision, based_on=evidence, stored=stored)


def _stored(trials: Sequence[Trial], today: str) -> str:
    """How the newest recorded verdict differs from today's, in one sentence; empty where it does not."""
    last = next((t for t in reversed(trials) if t.kind == "verdict"), None)
    if last is None or last.data.get("verdict") == today:
        return ""
    return f"The verdict recorded on {last.time[:10]} was {last.data.get('verdict')}; judged today it is {today}."


def decide(
    trials: Sequence[Trial],
    gates: Gates,
    *,
    environment: Mapping[str, Any],
    current_hashes: Mapping[str, str],
    recorded: Recorded | None = None,
    problems: Sequence[str] = (),
) -> Decision:
    """Judge a run by its gates.

    Parameters
    ----------
    trials
        The run's own records.
    environment
        The run's `environment.json`; its ``id`` is the only machine whose trials count, and
        ``parameters["notebooks"]`` are the notebooks that must have finished.
    current_hashes
        Kernel name to hash of its source now; a trial with another hash is stale.
    recorded
        A run from a machine with a GPU, used only if this run had none: for a gate on which it has nothing, and for one
        on a group of backends, of which it could check the CPU's alone.
    problems
        What is already known to be wrong with the records.

    Returns
    -------
    Decision
        INCONCLUSIVE whenever the run is incomplete, whatever its gates say; else NO-GO when a required gate fails, or
        every option does; GO when every required gate passes and, if the file has options, one of them may ship; else
        INCONCLUSIVE. Never raises for what the trials contain.
    """
    has_gpu = bool(environment.get("gpu"))
    live = Source("live", tuple(trials), environment, current_hashes)
    other = None
    if recorded is not None and not has_gpu:
        other = Source("recorded", recorded.trials, recorded.environment, current_hashes)
    results = tuple(judge_gate(gate, live, other, has_gpu) for gate in gates)
    judged = {o.id: tuple(judge_gate(g, live, other, has_gpu) for g in o.asked(gates)) for o in gates.options}

    incomplete = [*problems, *unfinished(trials, environment, "The run")]
    if recorded is not None and any(r.evidence == "recorded" for r in chain(results, *judged.values())):
        incomplete += [*recorded.problems, *unfinished(recorded.trials, recorded.environment, "The recorded run")]
    required = [r for r in results if r.required]
    options = weigh(gates, judged, required, complete=not incomplete)
    verdict, reason = _decide(incomplete, required, options)
    return Decision(verdict, reason, results, label(recorded, environment, current_hashes), options)


def _decide(
    incomplete: Sequence[str], required: Sequence[GateResult], options: Sequence[OptionResult]
) -> tuple[str, str]:
    """The verdict and its reason, from what is missing, the required gates and the weighed options."""
    failing = [r for r in required if r.state == "FAIL"]
    open_ = [r for r in required if r.state == "INCONCLUSIVE"]
    if incomplete:
        more = f" ({len(incomplete) - 1} more such finding{'s' if len(incomplete) > 2 else ''})" * (len(incomplete) > 1)
        return "INCONCLUSIVE", (f"The evidence is not complete, so nothing is decided: {clause(incomplete[0])}{more}.")
    if failing:
        first = failing[0]
        n = f"{len(failing)} of {len(required)} required gates {_verb(failing, 'fail')}"
        reason = f"{n}, foremost '{first.title}': {clause(first.reason)}."
        if open_:
            reason += f" {len(open_)} more {'is' if len(open_) == 1 else 'are'} inconclusive."
        return "NO-GO", reason
    if options and all(o.result == "DO NOT SHIP" for o in options):
        near = options[0]
        none = f"None of the {len(options)} options holds" if len(options) > 1 else "The only option does not hold"
        return "NO-GO", f"{none}, and the nearest is {near.id} ({near.title}): {clause(near.reason)}."
    if not required:
        return "INCONCLUSIVE", "No gate is required, so nothing can be decided."
    if open_:
        first = open_[0]
        n = f"{len(open_)} of {len(required)} required gates {_verb(open_, 'lack')} usable evidence"
        return "INCONCLUSIVE", f"{n}, foremost '{first.title}': {clause(first.reason)}."
    passing = f"all {len(required)} required gates pass" if len(required) > 1 else "the only required gate passes"
    if not options:
        timed = [r for r in required if r.interval is not None and r.margin_percent is not None]
        tight = min(timed, key=lambda r: r.margin_percent, default=None)
        narrowest = f"; the narrowest is '{tight.title}', by {abs(tight.margin_percent):.1f} %" if tight else ""
        return "GO", f"{passing.capitalize()}{narrowest}."
    first = options[0]
    if first.recommended:  # `flip` says which figure is nearest to ending that
        return "GO", f"Ship option {first.id} ({first.title}): {passing}."
    return "INCONCLUSIVE", (
        f"{passing.capitalize()}, but no option is known to hold; option {first.id} ({first.title}): "
        f"{clause(first.reason)}."
    )


def unfinished(trials: Sequence[Trial], environment: Mapping[str, Any], whose: str) -> list[str]:
    """Sentences on every planned notebook that is not known to have finished."""
    parameters = environment.get("parameters")
    planned = parameters.get("notebooks") if isinstance(parameters, Mapping) else None
    if isinstance(planned, str):
        planned = [name.strip() for name in planned.split(",")]
    if not isinstance(planned, (list, tuple)) or not planned:
        return [f"{whose} does not say which notebooks it planned."]
    last = {str(t.data.get("name")).removesuffix(".ipynb"): t for t in trials if t.kind == "notebook"}
    found = []
    for name in (str(n).removesuffix(".ipynb") for n in planned):
        if name == STATUS_NOTEBOOK:
            continue
        trial = last.get(name)
        if trial is None:
            found.append(f"{whose} has no record that notebook {name} finished.")
        elif trial.status != "ok":
            found.append(
                f"{whose}'s notebook {name} did not finish: {clause(trial.reason or 'no reason was recorded')}."
            )
    return found


def _verb(items: list, verb: str) -> str:
    return verb + "s" if len(items) == 1 else verb
