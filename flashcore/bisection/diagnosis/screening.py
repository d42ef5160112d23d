"""Compare a function with float64 on ordinary problems and on inputs that attention kernels break on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from flashcore.bisection.diagnosis.calling import Answer, Broken, Candidate, Refusal
from flashcore.measure import check
from flashcore.numerics import ambient
from flashcore.numerics.inputs import PATTERNS, make_inputs
from flashcore.numerics.tolerance import Comparison, compare
from flashcore.problem import Problem

HOME = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=200, seqlen_k=200, head_dim=64)
"""Where an unknown function is looked at: several batches and heads, grouped heads, lengths that no tile divides."""
KEPT_CASES = 48
"""Cases that a process keeps for diagnoses to come; planted bugs are asked about the same few problems."""
KEPT_BYTES = 8 << 20
"""The largest of them: one that holds more takes longer to copy than to make."""
_EASIER = (
    {}, {"num_heads_kv": 4}, {"seqlen_q": 256, "seqlen_k": 256}, {"num_heads_kv": 4, "seqlen_q": 256, "seqlen_k": 256},
)  # fmt: skip
_DTYPES = ("float16", "bfloat16", "float32")
_HEAD_DIMS = (64, 128, 32)


@dataclass(frozen=True)
class Inputs:
    """How the inputs of one call are made."""

    problem: Problem
    pattern: str = "normal"
    strided: bool = False
    """Q, K and V each lie in an order of their own, so that one's strides are neither the shape's nor another's."""
    default_scale: bool = False
    seed: int = 0

    @property
    def _layout(self) -> str:
        return "apart" if self.strided else "bhsd"

    def make(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return make_inputs(self.problem, seed=self.seed, device=device, pattern=self.pattern,
                           layout=self._layout)  # fmt: skip

    def case(self, candidate: Candidate, *, again: bool = False) -> check.Case:
        """The inputs with what is expected of the candidate, and how far off it may be.

        With `again` it will be asked for more than once: it is kept, where it is small.
        """
        return _cases.case((self.problem, self.seed, self.pattern, self._layout, candidate.device,
                            candidate.rounds_scores), again)  # fmt: skip

    def label(self) -> str:
        """In words, as a finding names it."""
        words = [self.problem.label()]
        if self.pattern != "normal":
            words.append(f"inputs '{self.pattern}'")
        if self.strided:
            words.append("strided inputs")
        if self.default_scale:
            words.append("its own default scale")
        return ", ".join(words)


class _Cases:
    """Cases that were asked for again, in memory of the host.

    A function under diagnosis may write where it should not. It is handed copies on its device, so that what is kept
    stays as it was made.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, check.Case] = OrderedDict()
        self._last: tuple[tuple | None, check.Case | None] = (None, None)
        self._turn = threading.RLock()

    def case(self, asked: tuple, again: bool) -> check.Case:
        """That of these arguments of `check.make_case`; kept if it is asked for `again`."""
        with self._turn:
            return self._found(asked, again)

    def _found(self, asked: tuple, again: bool) -> check.Case:
        if again and asked not in self._kept and _may_be_kept(asked):
            made = check.make_case.__wrapped__(*asked)  # not the last one made: a function has had that in hand
            if sum(tensor.nbytes for tensor in _tensors(made).values()) <= KEPT_BYTES:
                self._kept[asked] = _copied(made, "cpu")
                if len(self._kept) > KEPT_CASES:
                    self._kept.popitem(last=False)
        if asked not in self._kept:
            return check.make_case(*asked)
        self._kept.move_to_end(asked)
        if not again:
            return _copied(self._kept[asked], asked[4])
        if self._last[0] != asked:
            self._last = asked, _copied(self._kept[asked], asked[4])
        return self._last[1]


def _may_be_kept(asked: tuple) -> bool:
    """Whether copies are laid out as the tensors were: only where these have no room between their rows."""
    return asked[3] == "bhsd"


def _tensors(case: check.Case) -> dict[str, torch.Tensor]:
    return {name: getattr(case, name) for name in ("q", "k", "v", "out", "lse")}


def _copied(case: check.Case, device: str) -> check.Case:
    return replace(case, **{name: tensor.to(device, copy=True) for name, tensor in _tensors(case).items()})


_cases = _Cases()


@dataclass(frozen=True)
class Screened:
    """One call, judged."""

    inputs: Inputs
    answer: Answer | None
    """None where the call was refused or gave no answer."""
    out: Comparison | None = None
    lse: Comparison | None = None
    refused: str | None = None
    """What the function raised."""
    broken: Broken | None = None
    repeats: bool = True
    """Whether a second call gave the same bits."""
    shares_memory: bool = False
    """Whether a second call wrote over the result of the first."""

    @property
    def wrong(self) -> bool:
        judged = [c for c in (self.out, self.lse) if c is not None]
        return self.broken is not None or any(not c.passed for c in judged)

    @property
    def out_wrong(self) -> bool:
        return self.out is not None and not self.out.passed

    @property
    def lse_alone(self) -> bool:
        return self.lse is not None and not self.lse.passed and not self.out_wrong


@ambient.judging
def screen_one(candidate: Candidate, inputs: Inputs, *, again: bool = False) -> Screened:
    """Call it once (with `again` twice) and compare every element with float64."""
    problem = inputs.problem
    case = inputs.case(candidate)
    try:
        answer = candidate(case.q, case.k, case.v, problem, default_scale=inputs.default_scale)
        given = answer.out
        answer = Answer(given.clone(), answer.lse)  # a function may write its next result over this one
        second = candidate(case.q, case.k, case.v, problem, default_scale=inputs.default_scale) if again else answer
    except Refusal as refusal:
        return Screened(inputs, None, refused=str(refusal))
    except Broken as broken:
        return Screened(inputs, None, broken=broken)
    out = compare(answer.out, case.out, atol=case.out_atol, rtol=case.out_rtol)
    lse = None
    if answer.lse is not None:
        lse = compare(answer.lse, case.lse, atol=case.lse_atol, rtol=case.lse_rtol)
    same = not again or bool(((answer.out == second.out) | (answer.out.isnan() & second.out.isnan())).all())
    return Screened(inputs, answer, out, lse, repeats=same, shares_memory=second.out.data_ptr() == given.data_ptr())


@ambient.judging
def find_home(candidate: Candidate, start: Problem = HOME) -> tuple[Problem | None, list[Screened]]:
    """The richest ordinary problem that the function takes, and what it said to those before it.

    Parameters
    ----------
    start
        What is tried first; those after it have other dtypes, head_dims, lengths, and K/V heads for each query head.
    """
    tried: list[Screened] = []
    for head_dim in _HEAD_DIMS:
        for dtype in _DTYPES:
            for change in _EASIER:
                problem = start.with_(head_dim=head_dim, dtype=dtype, **change)
                found = screen_one(candidate, Inputs(problem))
                tried.append(found)
                if found.refused is None:
                    return problem, tried
                if found.broken is not None and found.broken.kind == "hang":
                    return None, tried
    return None, tried


def ordinary(candidate: Candidate, home: Problem) -> Iterator[Inputs]:
    """What an unknown function is asked, the plainest first."""
    yield Inputs(home)
    whole = home.with_(seqlen_q=256, seqlen_k=256)
    masks = [False, True] if "causal" in candidate.takes else [home.causal]
    for causal in masks:
        one = home.with_(causal=causal)
        for pattern in PATTERNS:
            yield Inputs(one, pattern)
        yield Inputs(one, strided=True)
        yield Inputs(whole.with_(causal=causal))
        yield Inputs(one.with_(seqlen_q=77))
        yield Inputs(one.with_(seqlen_q=1))
        yield Inputs(one.with_(seqlen_q=130, seqlen_k=1100))
        yield Inputs(one.with_(seqlen_q=130, seqlen_k=1100), "rising")
        yield Inputs(one.with_(seqlen_q=77, seqlen_k=130))  # a tile of rows that was asked about with other keys
        if causal:  # whoever begins with the last tile finds it empty for some rows, and may keep a maximum of 0
            yield Inputs(one.with_(seqlen_q=77, seqlen_k=130), "sunken")
        yield Inputs(one.with_(seqlen_k=77))
        if home.num_heads_kv != home.num_heads_q:
            yield Inputs(one.with_(num_heads_kv=home.num_heads_q))
            yield Inputs(one.with_(num_heads_kv=1))
    yield Inputs(home.with_(batch=1, num_heads_q=1, num_heads_kv=1))
    yield Inputs(home.with_(batch=3))
    yield from (Inputs(home.with_(**many)) for many in _many_of_one(home))
    for dtype in _DTYPES:
        if dtype != home.dtype:
            yield Inputs(home.with_(dtype=dtype))
    for head_dim in (64, 128, 96):  # the last is no power of 2
        if head_dim != home.head_dim:
            yield Inputs(home.with_(head_dim=head_dim))
    if "softmax_scale" in candidate.takes:
        yield Inputs(home.with_(softmax_scale=0.3))
        yield Inputs(home.with_(softmax_scale=-0.125))
        yield Inputs(home.with_(softmax_scale=-0.125), "large")
        if candidate.default_scale:
            yield Inputs(home, default_scale=True)
            yield Inputs(home.with_(head_dim=128), default_scale=True)


def _many_of_one(home: Problem) -> Iterator[dict[str, int]]:
    """Much of one thing and little of the rest: where an index, a grid or a buffer is made for less, it shows."""
    group = home.num_heads_q // home.num_heads_kv
    few = {"batch": 1, "num_heads_q": group, "num_heads_kv": 1}
    yield {"batch": 17, "num_heads_q": group, "num_heads_kv": 1, "seqlen_q": 40, "seqlen_k": 40}
    yield {"batch": 1, "num_heads_q": 18 * group, "num_heads_kv": 18, "seqlen_q": 40, "seqlen_k": 40}
    yield {**few, "seqlen_q": 1100, "seqlen_k": 150}
    yield {**few, "seqlen_q": 20, "seqlen_k": 8300}


def of_problem(candidate: Candidate, problem: Problem, pattern: str | None, seed: int) -> Iterator[Inputs]:
    """What a function is asked about one problem: every pattern of inputs, or the one that was named."""
    if pattern is not None:
        yield Inputs(problem, pattern, seed=seed)
        return
    for one in PATTERNS:
        yield Inputs(problem, one, seed=seed)
    yield Inputs(problem, strided=True, seed=seed)
    if problem.softmax_scale is None and "softmax_scale" in candidate.takes and candidate.default_scale:
        yield Inputs(problem, default_scale=True, seed=seed)
