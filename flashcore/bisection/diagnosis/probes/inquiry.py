"""What is known so far of a function that is probed: its behaviour, what was found, and what is suspected."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from flashcore.bisection.diagnosis import reading
from flashcore.bisection.diagnosis.behaviour import RIGHT, Behaviour, simulate
from flashcore.bisection.diagnosis.calling import Candidate
from flashcore.bisection.diagnosis.hypotheses import Hypothesis, under
from flashcore.bisection.diagnosis.predicting import EXPLAINED, given_to, is_blunt, share_of
from flashcore.bisection.diagnosis.screening import Screened
from flashcore.problem import Problem


@dataclass(frozen=True)
class Suspicion:
    """Where something is wrong that no hypothesis explains."""

    stages: tuple[str, ...]
    sentence: str
    place: dict[str, Any] = field(default_factory=dict)


class Inquiry:
    """A function that is wrong on `failing`, and what is known of it: each probe adds to this and is judged by it."""

    def __init__(self, candidate: Candidate, problem: Problem, failing: list[Screened], known: Behaviour):
        self.candidate, self.problem, self.failing = candidate, problem, failing
        self.state = known
        """How it behaves, as far as that is known."""
        self.found: list[Hypothesis] = []
        self.suspicions: list[Suspicion] = []
        self.varies = False
        """Whether the same call gives other results."""
        self.alternatives: list[Hypothesis] = []
        """What else the weights of equal keys may mean; the first of them is in `found`."""
        self.scores: reading.Scores | None = None
        """The scores that anchored keys told."""
        self.formulas_under: Behaviour | None = None
        """The behaviour beside which whole formulas were tried last."""
        self.bendable: Suspicion | None = None
        """What is left of wrong scores that a bend may explain."""

    def add(self, hypothesis: Hypothesis) -> str:
        self.state = under(self.state, [hypothesis], self.candidate.device)
        self.found.append(hypothesis)
        return hypothesis.sentence

    def verify(self) -> tuple[int, int, int]:
        """Wrong elements that the state predicts, all wrong ones, and right ones that it predicts wrongly."""
        explained = wrong = spoiled = 0
        for one in self._wrong_ones():
            if is_blunt(one, self.candidate):
                continue
            _, (_, mine, all_wrong, bad) = self.predict(self.state, one)
            explained, wrong, spoiled = explained + mine, wrong + all_wrong, spoiled + bad
        return explained, wrong, spoiled

    def predict(self, state: Behaviour, call: Screened) -> tuple[torch.Tensor, tuple[float, int, int, int]]:
        """The output that a behaviour predicts of a call, and how much that explains of the real one (`share_of`)."""
        predicted = simulate(*given_to(call, self.candidate), call.inputs.problem, state)[0]
        return predicted, share_of(call.answer.out, predicted, call, self.candidate, self.state.unwritten)

    def _wrong_ones(self) -> list[Screened]:
        """Calls whose output is there and wrong, of which what was read at the probed shapes says something."""
        return [one for one in self.failing
                if one.answer is not None and one.out_wrong and self.fits_shape(one.inputs.problem)]  # fmt: skip

    def prune(self) -> None:
        """Drop hypotheses without which the wrong outputs are predicted as well."""
        if len(self.found) < 2:
            return
        for hypothesis in list(self.found):
            rest = {name: getattr(RIGHT, name) for name in hypothesis.changes}
            if (
                not rest
                or hypothesis.by_rounding
                or hypothesis.stages == ("lse",)  # what it explains is not in the output
                or any(name in other.changes for other in self.found if other is not hypothesis for name in rest)
            ):
                continue
            before, state = self.verify(), self.state
            self.state = state.with_(**rest)
            now = self.verify()
            if now[0] - now[2] >= before[0] - before[2] and now[0] > 0:
                self.found.remove(hypothesis)
            else:
                self.state = state

    def unexplained(self) -> list[Screened]:
        left = []
        for one in self._wrong_ones():
            if is_blunt(one, self.candidate):
                is_left = not self.found
            else:
                _, (share, *_) = self.predict(self.state, one)
                is_left = share < EXPLAINED
            if is_left:
                left.append(one)
        return left

    def explains_most(self, hypothesis: Hypothesis) -> bool:
        """Whether it predicts most of the wrong elements, where there are calls to judge by."""
        explained, wrong, _ = self._verified_with(hypothesis)
        return explained > 0.5 * wrong

    def explained_now(self) -> int:
        """Wrong elements that the state predicts, less right ones that it predicts wrongly."""
        explained, _, spoiled = self.verify()
        return explained - spoiled

    def explained_with(self, hypothesis: Hypothesis) -> int:
        """The same of the state with a hypothesis more."""
        explained, _, spoiled = self._verified_with(hypothesis)
        return explained - spoiled

    def _verified_with(self, hypothesis: Hypothesis) -> tuple[int, int, int]:
        before, self.state = self.state, self.state.with_(**hypothesis.changes)
        verified = self.verify()
        self.state = before
        return verified

    def fits_shape(self, problem: Problem) -> bool:
        """Whether what was read at the probed shapes says something of this problem."""
        same = all(getattr(problem, name) == getattr(self.problem, name)
                   for name in ("batch", "num_heads_q", "num_heads_kv", "seqlen_q", "seqlen_k", "head_dim",
                                "causal"))  # fmt: skip
        return same or not self.state.is_of_one_shape

    def lse_tells(self) -> bool:
        """Whether lse is right in every call whose output is wrong: then scores and row_sum are right too."""
        wrong = [s for s in self.failing if s.out_wrong and s.lse is not None]
        return bool(wrong) and all(s.lse.passed for s in wrong)

    def suspect(self, stages: tuple[str, ...], sentence: str, place: dict[str, Any] | None = None) -> str:
        self.suspicions.append(Suspicion(stages, sentence, place or {}))
        return sentence
