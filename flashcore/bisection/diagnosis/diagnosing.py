"""Diagnose any attention function from its inputs and outputs: right or wrong, at which stage, where, and why."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from flashcore import backends
from flashcore.bisection.diagnosis import shrinking
from flashcore.bisection.diagnosis.behaviour import RIGHT, Behaviour
from flashcore.bisection.diagnosis.calling import TIME_LIMIT_S, Candidate, Layout, Lse, candidate_of, refuse_masks
from flashcore.bisection.diagnosis.conditions import condition
from flashcore.bisection.diagnosis.hypotheses import Hypothesis
from flashcore.bisection.diagnosis.peeling import Peeled, look_closer, peel
from flashcore.bisection.diagnosis.predicting import EXPLAINED, explains
from flashcore.bisection.diagnosis.screening import Screened, find_home, of_problem, ordinary, screen_one
from flashcore.errors import InvalidProblem, UnknownName
from flashcore.numerics import ambient
from flashcore.numerics.inputs import PATTERNS, refuse_seed
from flashcore.numerics.reference import STAGES
from flashcore.problem import Problem, parse_problem
from flashcore.records import Trial
from flashcore.tables import describe

if TYPE_CHECKING:
    import pandas

STANDS = 0.9
"""Share of the wrong elements below which the hypotheses are called the nearest, and not the explanation."""
READABLE = {"cpu": 3 << 20, "cuda": 1 << 26}
"""Scores of the largest problem that is probed whole; a larger one is made smaller first, while it still fails."""


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with an attention function, or that nothing is. `print` says it in sentences."""

    name: str
    """The function's."""
    right: bool
    screened: tuple[Screened, ...]
    """Every call that was compared with float64."""
    home: Problem | None
    """The problem that was probed."""
    peeled: Peeled | None = None
    """What the probes found; None where nothing is wrong, or where there is no answer to probe."""
    smallest: Screened | None = None
    """The least call that still fails."""
    notes: tuple[str, ...] = ()
    """What it was not asked, and what is no fault but worth knowing."""
    seconds: float = 0.0
    calls: int = 0
    context: dict[str, Any] = field(default_factory=dict)
    """`layout`, `lse`, `device`, `seed`."""

    @property
    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """The bugs that explain what was seen, in the order in which they were found."""
        return self.peeled.hypotheses if self.peeled else ()

    @property
    def stages(self) -> tuple[str, ...]:
        """Where it goes wrong, in dataflow order; more than one where outputs cannot tell them apart, or two bugs."""
        found = [s for h in self.hypotheses for s in h.stages]
        if not found and self.peeled and self.peeled.suspicions:
            found = list(self.peeled.suspicions[0].stages)
        return tuple(sorted(set(found), key=STAGES.index))

    @property
    def stage(self) -> str | None:
        """The first stage that goes wrong; None for a right function, or one that gave no answer."""
        first = self.hypotheses[0].stages if self.hypotheses else self.stages
        return min(first, key=STAGES.index) if first else None

    @property
    def place(self) -> dict[str, Any]:
        """Coordinates of what was seen first: batch, head, row, column (a key)."""
        for one in (*self.hypotheses, *(self.peeled.suspicions if self.peeled else ())):
            if one.place:
                return dict(one.place)
        first = next((s.out.first_bad for s in self.screened if s.out_wrong), None)
        return dict(first or {})

    @property
    def explained(self) -> float | None:
        """Share of the wrong elements that the hypotheses predict within bounds; None where there are none."""
        if not self.peeled or not self.peeled.wrong:
            return None
        return self.peeled.explained / self.peeled.wrong

    @property
    def _unpredicted(self) -> bool:
        """Whether a bug of precision, of what calls leave behind, or of a lot was found: no model predicts it."""
        return any(h.by_rounding or h.of_calls or h.by_lot for h in self.hypotheses)

    def __str__(self) -> str:
        return "\n".join(self.sentences())

    def __repr__(self) -> str:
        return f"<Diagnosis of {self.name}: {'right' if self.right else self.headline()}>"

    def headline(self) -> str:
        """The finding in one sentence, without a full stop."""
        if self.right:
            judged = sum(s.out.checked for s in self.screened if s.out)
            calls = sum(s.out is not None for s in self.screened)
            return f"{self.name} is right: {judged:,} elements of {calls} calls are within their bounds"
        broken = next((s.broken for s in self.screened if s.broken), None)
        if broken:
            return f"{self.name} gives no answer: {broken.sentence.rstrip('.')}"
        if self.home is None:
            refused = next(s for s in self.screened if s.refused)
            return f"{self.name} takes none of the ordinary problems; it raised {refused.refused}"
        if self.hypotheses:
            words = "; and ".join(h.sentence for h in self.hypotheses)
            if self.explained is not None and self.explained < STANDS and not self._unpredicted:
                return f"{self.name} is wrong, and no hypothesis explains it all; the nearest: {words}"
            return f"{self.name} is wrong: {words}"
        if self.peeled and self.peeled.suspicions:
            return f"{self.name} is wrong, and no hypothesis explains it: {self.peeled.suspicions[0].sentence}"
        return f"{self.name} is wrong, and no hypothesis explains it"

    def sentences(self) -> list[str]:
        """The finding, its stage and place, how much it explains, the smallest case, and what was not asked."""
        said = [self.headline() + "."]
        if not self.right and self.peeled:
            said.append(f"Stage: {_stages_words(self.stages)}.")
            if self.place:
                said.append(f"First seen {_place_words(self.place)}.")
            said.extend(self._explained_words())
        if not self.right:
            wrong = [s for s in self.screened if s.wrong]
            asked = [s for s in self.screened if not s.refused]
            if wrong and self.home is not None:
                said.append(f"{len(wrong)} of {len(asked)} calls are wrong, the first with {wrong[0].inputs.label()}.")
                only = condition(asked)
                if only:
                    said.append(f"Only calls {only} are wrong.")
        if self.smallest:
            said.append(f"The smallest case that still fails: {self.smallest.inputs.label()}.")
            said.append(f"  {self.reproduce()}")
        said.extend(self.notes)
        said.append(f"{self.calls} calls, {self.seconds:.1f} s.")
        return said

    def _explained_words(self) -> list[str]:
        peeled = self.peeled
        if not self.hypotheses:
            return []
        if any(h.of_calls for h in self.hypotheses):
            return ["What it computes depends on the calls before, so no call is predicted to the element."]
        if any(h.by_lot for h in self.hypotheses):
            return ["What it computes is drawn by lot, so no call is predicted to the element."]
        if not peeled.wrong:
            blunt = [s for s in self.screened if s.out_wrong]
            words = (
                "The bounds of the wrong calls are as wide as their outputs: nobody can tell how much this explains."
            )
            return [words] if blunt and peeled.problem == self.home else []
        if peeled.explained >= EXPLAINED * peeled.wrong and peeled.spoiled == 0:
            how = "all" if peeled.explained == peeled.wrong else f"{peeled.explained:,} of"
            return [f"This explains {how} {peeled.wrong:,} wrong elements."]
        share = peeled.explained / peeled.wrong
        rest = "; ".join(s.sentence for s in peeled.suspicions)
        if peeled.explained == peeled.wrong:
            return [f"This explains all {peeled.wrong:,} wrong elements, and would make {peeled.spoiled:,} more wrong"
                    + (f"; besides, {rest}" if rest else "") + "."]  # fmt: skip
        return [f"This explains {peeled.explained:,} of {peeled.wrong:,} wrong elements to the element ({share:.0%})"
                + (f"; besides, {rest}" if rest else "") + "."]  # fmt: skip

    def reproduce(self) -> str:
        """One line of Python that asks about the smallest case; ``fn`` is the function."""
        inputs = (self.smallest or self.screened[0]).inputs
        more = "" if inputs.pattern == "normal" else f", pattern={inputs.pattern!r}"
        if inputs.seed:
            more += f", seed={inputs.seed}"
        for name, usual in (("layout", "bhsd"), ("lse", "none")):
            if self.context.get(name) not in (None, usual) and not self.context.get("backend"):
                more += f", {name}={self.context[name]!r}"
        what = repr(self.context["backend"]) if self.context.get("backend") else "fn"
        return f"flashcore.diagnose({what}, {inputs.problem.label()!r}{more})"

    def table(self) -> pandas.DataFrame:
        """One row a probe: what it looks at, what it showed, and what it cost."""
        import pandas

        rows = [{"Probe": p.name, "Looks at": p.looks_at, "Showed": p.showed, "Calls": p.calls,
                 "Seconds": round(p.seconds, 3)} for p in (self.peeled.probes if self.peeled else ())]  # fmt: skip
        return pandas.DataFrame(rows, columns=["Probe", "Looks at", "Showed", "Calls", "Seconds"])

    def to_trial(self, *, probes: bool = False) -> Trial:
        """The record of it: kind ``diagnosis``; status `failed` when the function is wrong. `probes` adds probes."""
        data: dict[str, Any] = {
            "finding": self.headline(), "right": self.right, "stages": list(self.stages),
            "hypotheses": [{"name": h.name, "sentence": h.sentence, "stages": list(h.stages)} for h in self.hypotheses],
            "place": self.place, "calls": self.calls, "seconds": round(self.seconds, 3),
            "screened": len(self.screened), "wrong_calls": sum(s.wrong for s in self.screened),
            "notes": list(self.notes), **self.context,
        }  # fmt: skip
        if self.peeled:
            data |= {"explained": self.peeled.explained, "wrong_elements": self.peeled.wrong}
        if probes:
            data["probes"] = self.table().to_dict("records")
        if self.smallest:
            data["smallest"] = {
                "problem": self.smallest.inputs.problem.label(),
                "pattern": self.smallest.inputs.pattern,
            }
        problem = self.home or self.screened[0].inputs.problem
        status, reason = ("ok", None) if self.right else ("failed", self.headline())
        return Trial(kind="diagnosis", backend=self.name[:64], problem=problem, data=data, status=status, reason=reason)

    def without_tensors(self) -> Diagnosis:
        """The same without what the function gave: small enough to be sent to another process."""
        bare = [replace(s, answer=None) for s in self.screened]
        peeled = self.peeled and replace(self.peeled, behaviour=RIGHT, hypotheses=tuple(
            replace(h, changes={}) for h in self.peeled.hypotheses))  # fmt: skip
        smallest = self.smallest and replace(self.smallest, answer=None)
        return replace(self, screened=tuple(bare), peeled=peeled, smallest=smallest)


def _stages_words(stages: tuple[str, ...]) -> str:
    if not stages:
        return "not told by the outputs"
    if len(stages) == 1:
        return stages[0]
    return f"{', '.join(stages[:-1])} or {stages[-1]}, which the outputs do not tell apart"


def _place_words(place: dict[str, Any]) -> str:
    coordinates = {k: v for k, v in place.items() if k not in ("got", "expected", "kind")}
    words = ", ".join(f"{'key' if k == 'column' and 'got' not in place else k} {v}" for k, v in coordinates.items())
    return describe(place) if "got" in place else f"at {words}"


def diagnose(
    fn: Callable | str | backends.Backend,
    problem: Problem | str | None = None,
    *,
    layout: Layout = "bhsd",
    lse: Lse | None = None,
    device: str | None = None,
    pattern: str | None = None,
    seed: int = 0,
    time_limit_s: float = TIME_LIMIT_S,
    smallest: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Diagnosis:
    """Say whether an attention function is right, and if not, at which stage, where and why it goes wrong.

    One diagnosis runs at a time in a process: others wait. Torch computes with one thread on a CPU meanwhile.

    Parameters
    ----------
    fn
        Any callable on tensors: ``fn(q, k, v)``, given those of ``causal``, ``softmax_scale`` and ``return_lse`` that
        its signature takes. Also the id of a backend, a `Backend`, ``"FILE.py:function"`` or ``"MODULE:function"``.
    problem
        A `Problem` or its label, to ask about that alone; None for ordinary problems of many kinds. ``causal`` and
        ``softmax_scale`` of a problem say what the function is meant to compute, also where it does not take them.
        Windows, softcaps, sinks and lengths are not asked about.
    layout
        How the function wants its tensors: ``bhsd`` for ``[batch, num_heads, seqlen, head_dim]``, ``bshd`` for
        ``[batch, seqlen, num_heads, head_dim]``.
    lse
        What it returns beside its output: ``none``, the ``natural`` logarithm of the softmax denominator,
        ``[batch, num_heads, seqlen]``, or that of base 2 (``log2``). None for ``none``, and for what a backend says.
    device
        Where the tensors are made; None for the GPU where there is one.
    pattern, seed
        Of the inputs, together with `problem`; None for all patterns (`flashcore.numerics.inputs`).
    time_limit_s
        Seconds that one call may take; a call that takes longer is a finding.
    smallest
        Whether to look for the smallest case that still fails, which takes up to two seconds and many calls.
    progress
        Called before each step with what is done, how many such steps are done, and how many there are at most.

    Returns
    -------
    Diagnosis
        ``print`` it. A function that raises, hangs, or returns no answer is a finding, and no error.

    Raises
    ------
    InvalidProblem, UnknownName, BackendUnavailable
        The question itself makes no sense: no function, a problem or an option that does not exist.
    """
    started = time.perf_counter()
    if isinstance(problem, str):
        problem = parse_problem(problem)
    if problem is not None and not isinstance(problem, Problem):
        raise InvalidProblem(f"problem: {type(problem).__name__} is no problem; give a Problem or its label.")
    if problem is not None:
        refuse_masks(problem)
    if pattern is not None and pattern not in PATTERNS:
        raise UnknownName("input pattern", pattern, list(PATTERNS))
    if pattern is not None and problem is None:
        raise InvalidProblem("pattern: it says how the inputs of one problem look; name the problem too.")
    refuse_seed(seed)
    candidate = candidate_of(fn, layout=layout, lse=lse, device=device, time_limit_s=time_limit_s)
    # Functions differ in what they hold in rows that see no key. Whoever asks about such a problem by name means them.
    candidate = replace(candidate, forgiven=problem is None, empty_rows=set())
    context = {"layout": layout, "lse": candidate.lse, "device": torch.device(candidate.device).type, "seed": seed}
    if isinstance(fn, backends.Backend) or (isinstance(fn, str) and ":" not in fn):
        context["backend"] = candidate.name
    with ambient.alone, ambient.shield(), _one_thread(candidate.device):
        return _diagnose(candidate, problem, pattern, seed, context, started, smallest, progress or _silent)


@contextlib.contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """On a CPU one thread: the tensors are small, and on a busy machine threads wait for each other.

    Torch counts them by thread, and gives one that computes for the first time what was set last anywhere. So one
    diagnosis runs at a time, and a thread that has one thread of torch's anyhow sets nothing.
    """
    before = torch.get_num_threads()
    if torch.device(device).type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _silent(what: str, done: int, total: int) -> None:
    """Nobody wants to know how far it is."""


def _diagnose(candidate: Candidate, problem, pattern, seed, context, started, smallest, told) -> Diagnosis:
    home, screened = (problem, []) if problem is not None else find_home(candidate)
    notes = _refusals(screened) if problem is None else []

    def done(right: bool, **more: Any) -> Diagnosis:
        return Diagnosis(candidate.name, right, tuple(screened), home, notes=tuple(notes), context=context,
                         seconds=time.perf_counter() - started, calls=len(candidate.calls), **more)  # fmt: skip

    def shrunk(one: Screened) -> Screened | None:
        if not smallest:
            return None
        told("making the failing case smaller", 0, 1)
        return shrinking.shrink(candidate, one)

    if home is None:
        return done(False)
    asked = list(ordinary(candidate, home) if problem is None else of_problem(candidate, problem, pattern, seed))
    screened = [] if problem is not None else screened[-1:]
    for number, inputs in enumerate(asked if not any(s.broken for s in screened) else ()):
        told(f"comparing {candidate.name} with float64", number, len(asked))
        if any(s.inputs == inputs for s in screened):
            continue
        found = screen_one(candidate, inputs, again=inputs.pattern == "normal")
        screened.append(found)
        if found.broken:
            break
        if problem is not None and found.refused and len(screened) == 1:
            home = None
            return done(False)
    if problem is None:
        notes += _refusals([s for s in screened if s.refused])
    notes += _habits(candidate, screened)
    failing = [s for s in screened if s.wrong]
    if not failing:
        if any(not s.repeats for s in screened):
            notes.append("Repeated calls give other bits, within the bounds.")
        if home is None or all(s.refused for s in screened):
            return done(False)
        closer = look_closer(candidate, home, told) if pattern is None and _size(home) <= _limit(candidate) else None
        return done(not closer or not (closer.hypotheses or closer.suspicions), peeled=closer)
    broken = next((s for s in failing if s.broken), None)
    if broken:
        return done(False, smallest=shrunk(broken))
    focus = _readable(candidate, _focus(failing, home))
    home = focus.inputs.problem
    peeled = peel(candidate, home, _alike(failing, focus), told=told)
    for _ in range(2):  # what is left may be another bug, which shows on other problems alone
        known = peeled.behaviour.without_tables()
        left = [s for s in failing if not s.inputs.problem == home and not _told(candidate, peeled, known, s)]
        if not left or peeled.suspicions or any(h.by_rounding or h.of_calls or h.by_lot for h in peeled.hypotheses):
            break
        focus = _readable(candidate, max(left, key=_telling))
        home = focus.inputs.problem
        peeled = _together(peeled, peel(candidate, home, _alike(failing, focus), known, told=told))
    plainest = min(failing, key=lambda s: (s.inputs.pattern != "normal", s.inputs.strided))
    return done(False, peeled=peeled, smallest=shrunk(plainest))


def _alike(failing: list[Screened], focus: Screened) -> list[Screened]:
    """The failing calls that ask for the same numbers as `focus`, from whatever inputs."""
    wanted = focus.inputs.problem
    same = [s for s in failing if s.inputs.problem.mathematics == wanted.mathematics
            and s.inputs.problem.softmax_scale == wanted.softmax_scale]  # fmt: skip
    return same or [focus]


def _telling(one: Screened) -> tuple:
    """What shows most that the first problem could not: a mask, and lengths that differ."""
    problem = one.inputs.problem
    unequal = problem.seqlen_q != problem.seqlen_k
    many = problem.seqlen_q > 64 and problem.seqlen_k > 64
    return problem.causal and unequal and many, unequal and many, problem.causal, -problem.seqlen_q * problem.seqlen_k


def _told(candidate: Candidate, peeled: Peeled, known: Behaviour, one: Screened) -> bool:
    """Whether what was found predicts this call, or is of a kind that cannot be carried to its shapes."""
    if one.answer is None or explains(candidate, known, one):
        return True
    return known != peeled.behaviour and one.inputs.problem.causal == peeled.problem.causal


def _together(first: Peeled, second: Peeled) -> Peeled:
    names = {h.name for h in first.hypotheses}
    return replace(
        second, hypotheses=(*first.hypotheses, *(h for h in second.hypotheses if h.name not in names)),
        suspicions=(*first.suspicions, *second.suspicions), probes=(*first.probes, *second.probes),
        explained=first.explained + second.explained, wrong=first.wrong + second.wrong,
        spoiled=first.spoiled + second.spoiled,
    )  # fmt: skip


def _focus(failing: list[Screened], home: Problem) -> Screened:
    """The failing call whose problem is probed: that of the home where it fails, else the richest."""

    def ways(one: Screened) -> int:
        return sum(s.inputs.problem == one.inputs.problem for s in failing)

    def key(one: Screened) -> tuple:
        problem = one.inputs.problem
        many = problem.seqlen_q > 64 and problem.seqlen_k > 64
        return problem == home, many, ways(one) > 3, -problem.seqlen_q * problem.seqlen_k, -failing.index(one)

    return max(failing, key=key)


def _readable(candidate: Candidate, focus: Screened) -> Screened:
    """A call that still fails at a size that can be probed whole."""
    while _size(focus.inputs.problem) > _limit(candidate):
        for inputs in shrinking.halved(focus.inputs):
            found = screen_one(candidate, inputs)
            if found.wrong:
                focus = found
                break
        else:
            return focus
    return focus


def _size(problem: Problem) -> int:
    return problem.batch * problem.num_heads_q * problem.seqlen_q * problem.seqlen_k


def _limit(candidate: Candidate) -> int:
    return READABLE.get(torch.device(candidate.device).type, READABLE["cpu"])


def _habits(candidate: Candidate, screened: list[Screened]) -> list[str]:
    """What is no wrong result, and bites whoever does not know of it."""
    said = []
    if any(s.shares_memory for s in screened):
        said.append("A second call writes over the result of the first: both are the same memory.")
    for held in sorted(candidate.empty_rows):
        words = "NaN" if held == "NaN" else "numbers other than 0"
        said.append(f"Rows that see no key (causal, more queries than keys) hold {words}; most kernels give 0 there.")
    return said


def _refusals(screened: list[Screened]) -> list[str]:
    """What the function does not take, said once each."""
    said: dict[str, str] = {}
    for one in screened:
        if one.refused:
            said.setdefault(one.refused, one.inputs.label())
    return [f"Not asked, since it refuses {label}: {text}." for text, label in list(said.items())[:3]]
