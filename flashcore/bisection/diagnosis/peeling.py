"""Find the bugs of one function one after another: each probe shows some steps of attention and hides the others.

What a probe showed is put into a `Behaviour`, and the next probe is judged against that. So two bugs at once are both
named, as long as each has a probe that shows it alone. In the end the behaviour has to predict the wrong outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashcore.bisection.diagnosis.behaviour import RIGHT, Behaviour
from flashcore.bisection.diagnosis.calling import Broken, Candidate, Refusal
from flashcore.bisection.diagnosis.hypotheses import Hypothesis
from flashcore.bisection.diagnosis.probes import (
    bends,
    columns,
    dropping,
    extremes,
    formulas,
    heads,
    keeping,
    keys,
    layouts,
    logsumexp,
    loops,
    memory,
    rounding,
    scores,
)  # fmt: skip
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry, Suspicion
from flashcore.bisection.diagnosis.screening import Screened
from flashcore.numerics import ambient
from flashcore.problem import Problem


@dataclass(frozen=True)
class Probe:
    """What a probe is called, what it looks at, and the function that asks it."""

    name: str
    looks_at: str
    ask: Callable[[Inquiry], str | None]
    """Gives what it showed; None where nothing is wrong."""


REPEATS = Probe("the same again", "races", memory.repeats)
UNWRITTEN = Probe("memory full of NaN", "elements that are never written", memory.unwritten)
EARLIER = Probe("other calls before", "what is kept between calls", keeping.earlier)
DROPPED = Probe("results that vary", "dropout", dropping.dropped)
FORMULAS = Probe("whole formulas", "what stands in place of softmax, and which tensors", formulas.formulas)
LSE = Probe("lse", "the log-sum-exp", logsumexp.lse)
EQUAL_KEYS = Probe("equal keys", "mask and list of keys", keys.equal_keys)
PHANTOMS = Probe("keys that do not exist", "padding", keys.phantoms)
LIFTED = Probe("lifted scores", "subtraction of the maximum", extremes.lifted)
FAR = Probe("products past float16", "the range of scores", extremes.far)
PRECISION = Probe("a small number beside a large one", "precision of scores and sums", rounding.precision)
ONE_BY_ONE = (
    Probe("strides", "layout of memory", layouts.strides),
    FORMULAS,
    Probe("marks", "heads of Q, K and V", heads.marks),
    Probe("equal values", "columns, rows that are left out", columns.equal_values),
    EQUAL_KEYS,
    PHANTOMS,
    Probe("scores far below 0", "what the mask sets", keys.hidden),
    Probe("anchored scores", "scale, products, order of keys", scores.anchored),
    Probe("a ladder of scores", "caps and other bends", bends.ladder),
    Probe("layouts", "order of elements in memory", layouts.elsewhere),
    LIFTED,
    FAR,
    PRECISION,
    Probe("moving maximum", "rescaling from page to page", loops.moving_maximum),
    Probe("formulas once more", "the same, with what was found since", formulas.formulas),
    Probe("formulas and scales", "the same, with a scale that is wrong too", formulas.with_a_wrong_scale),
    Probe("V by itself", "P V", columns.linear),
)
"""What a function that repeats itself is asked, until what was found predicts every wrong element."""
CLOSER = (UNWRITTEN, EARLIER, EQUAL_KEYS, PHANTOMS, LIFTED, FAR, PRECISION)
"""What may be wrong though all outputs are within their bounds. What was never written may hold the right values of a
call before, so that comes first."""
MOST = len(ONE_BY_ONE) + 5
"""Probes that one function is asked at most."""


@dataclass(frozen=True)
class ProbeResult:
    """One probe: what it looked at, what it showed, what it cost."""

    name: str
    looks_at: str
    showed: str
    right: bool
    calls: int
    seconds: float


@dataclass(frozen=True)
class Peeled:
    """What came of the probes."""

    problem: Problem
    """At whose shapes the probes were made."""
    hypotheses: tuple[Hypothesis, ...]
    behaviour: Behaviour
    suspicions: tuple[Suspicion, ...]
    probes: tuple[ProbeResult, ...]
    explained: int
    wrong: int
    """Wrong elements of the failing calls, and how many of them the behaviour predicts."""
    spoiled: int
    """Right elements that it predicts wrongly."""


Told = Callable[[str, int, int], None]
"""Hears the name of each probe before it, how many there were, and how many there are at most."""


@ambient.judging
def peel(
    candidate: Candidate, problem: Problem, failing: list[Screened], known: Behaviour = RIGHT,
    *, told: Told | None = None,
) -> Peeled:  # fmt: skip
    """Probe a function that is wrong on `failing`, at the shapes of `problem`; `known` was found at other shapes."""
    inquiry, results = Inquiry(candidate, problem, failing, known), []

    def ask(probe: Probe) -> None:
        results.append(_asked(probe, inquiry, told, len(results)))

    ask(REPEATS)
    if inquiry.varies:
        ask(DROPPED)
    ask(UNWRITTEN)
    if not inquiry.varies and not inquiry.found:  # memory that nobody wrote changes from call to call
        ask(EARLIER)
    for probe in () if inquiry.varies else ONE_BY_ONE:
        if inquiry.found and not inquiry.suspicions and not inquiry.unexplained():
            break  # what was found predicts every wrong element: no other bug shows
        ask(probe)
    if not any(h.stages == ("lse",) for h in inquiry.found):
        ask(LSE)
    inquiry.prune()
    return _peeled(inquiry, results, *inquiry.verify())


@ambient.judging
def look_closer(candidate: Candidate, problem: Problem, told: Told | None = None) -> Peeled:
    """Probe a function whose outputs are all within their bounds: for what bounds of ordinary inputs let pass."""
    inquiry = Inquiry(candidate, problem, [], RIGHT)
    return _peeled(inquiry, [_asked(probe, inquiry, told, number) for number, probe in enumerate(CLOSER)], 0, 0, 0)


def _asked(probe: Probe, inquiry: Inquiry, told: Told | None, number: int) -> ProbeResult:
    """Ask one probe: what it showed, also where it got no answer."""
    before = len(inquiry.candidate.calls)
    if told:
        told(f"probe '{probe.name}', which shows {probe.looks_at}", number, MOST)
    try:
        showed = probe.ask(inquiry)
    except Refusal as refusal:
        showed = f"refused: {refusal}"
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # outputs that no reading makes sense of
        showed = f"nothing that could be read: {error}"
    except Broken as broken:
        showed = inquiry.suspect((), broken.sentence)
    calls = inquiry.candidate.calls[before:]
    return ProbeResult(probe.name, probe.looks_at, showed or "nothing wrong", showed is None, len(calls), sum(calls))


def _peeled(inquiry: Inquiry, results: list[ProbeResult], explained: int, wrong: int, spoiled: int) -> Peeled:
    return Peeled(inquiry.problem, tuple(inquiry.found), inquiry.state, tuple(inquiry.suspicions), tuple(results),
                  explained, wrong, spoiled)  # fmt: skip
