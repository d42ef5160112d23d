"""Probe what the memory of a call holds: results that vary, and elements that nobody wrote."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from flashcore.bisection.diagnosis.hypotheses import Hypothesis, first_of, ranges
from flashcore.bisection.diagnosis.probes.inquiry import Inquiry
from flashcore.bisection.diagnosis.screening import Inputs
from flashcore.numerics import ambient


def repeats(inquiry: Inquiry) -> str | None:
    if all(s.repeats for s in inquiry.failing) and not _varies(inquiry):
        return None
    if _varies_when_zeroed(inquiry):
        words = "the same call gives other results each time: a race, or memory that is read before it is written"
    else:
        return None  # memory that nobody wrote: the next probe names it
    inquiry.varies = True
    return inquiry.suspect(("scores", "probs", "accum", "out"), words, _where_it_varies(inquiry))


def _varies_when_zeroed(inquiry: Inquiry) -> bool:
    """Whether results still vary when no memory is handed out uninitialised."""
    with full_of_nan():
        return _varies(inquiry)


def _where_it_varies(inquiry: Inquiry) -> dict[str, int]:
    one = inquiry.failing[0]
    q, k, v = one.inputs.make(inquiry.candidate.device)
    for _ in range(5):
        now = inquiry.candidate(q, k, v, one.inputs.problem, default_scale=one.inputs.default_scale).out
        other = (now != one.answer.out) & ~(now.isnan() & one.answer.out.isnan())
        if bool(other.any()):
            return first_of(other)
    return {}


def _varies(inquiry: Inquiry) -> bool:
    if not inquiry.failing or inquiry.failing[0].answer is None:
        return False
    inputs = inquiry.failing[0].inputs
    q, k, v = inputs.make(inquiry.candidate.device)
    first = inquiry.candidate(q, k, v, inputs.problem, default_scale=inputs.default_scale).out
    scale = max(float(first.nan_to_num(0).abs().max()), 1e-6)
    for _ in range(3):
        now = inquiry.candidate(q, k, v, inputs.problem, default_scale=inputs.default_scale).out
        if bool(((now - first).abs().nan_to_num(0) > 0.01 * scale).any()):
            return True
    return False


def unwritten(inquiry: Inquiry) -> str | None:
    inputs = inquiry.failing[0].inputs if inquiry.failing else Inputs(inquiry.problem)
    q, k, v = inputs.make(inquiry.candidate.device)
    filled, plain, lse_of = [], [], []
    for _ in range(2):
        with full_of_nan():
            answer = inquiry.candidate(q, k, v, inputs.problem)
        filled.append(answer.out.isnan())
        lse_of.append(None if answer.lse is None else answer.lse.isnan())
        for _ in range(3):  # what lies in memory that is handed out next is no NaN then
            primed = [torch.full_like(q, 0.5) for _ in range(4)]
            primed += [q.new_full((q.numel() * n,), 0.5, dtype=torch.float32) for n in (1, 2, 3, 4, 8)]  # workspaces
            del primed
        answer = inquiry.candidate(q, k, v, inputs.problem)
        plain.append(answer.out.isnan())
        lse_of.append(None if answer.lse is None else answer.lse.isnan())
    fresh = filled[0] & ~(plain[0] & plain[1])  # what lay in memory by chance may be a NaN once
    if bool((filled[0] != filled[1]).any()):  # a race, not this
        return None
    if not bool(fresh.any()):
        return _unwritten_lse(inquiry, lse_of)
    rows = fresh.any(dim=-1).flatten(0, 1).any(dim=0).nonzero().flatten().tolist()
    place = first_of(fresh)
    words = (f"{int(fresh.sum())} elements of the output come from memory that was never written: rows "
             f"{ranges(rows)}")  # fmt: skip
    columns = fresh.flatten(0, 2).any(dim=0).nonzero().flatten().tolist()
    heads = fresh.flatten(0, 1).flatten(1).any(dim=-1)
    if len(columns) < fresh.shape[-1]:
        words += f", columns {ranges(columns)}"
    if not bool(heads.all()):
        words += f", of {int(heads.sum())} of {len(heads)} heads"
    changes = {"unwritten": fresh.flatten(0, 1)}
    return inquiry.add(Hypothesis("uninitialised memory", words, ("out",), changes, place))


def _unwritten_lse(inquiry: Inquiry, seen: list[torch.Tensor | None]) -> str | None:
    """The same of lse: NaN where memory is full of it, each time, and no NaN otherwise."""
    if any(one is None for one in seen):
        return None
    fresh = seen[0] & seen[2] & ~(seen[1] & seen[3])
    if not bool(fresh.any()):
        return None
    rows = fresh.flatten(0, 1).any(dim=0).nonzero().flatten().tolist()
    place = first_of(fresh)
    words = (f"{int(fresh.sum())} elements of lse come from memory that was never written: rows "
             f"{ranges(rows)}")  # fmt: skip
    return inquiry.add(Hypothesis("uninitialised memory", words, ("lse",), {}, place))


@contextlib.contextmanager
def full_of_nan(value: bool = True) -> Iterator[None]:
    """Inside, memory that torch hands out uninitialised is full of NaN; with `value` False it is as it comes.

    One thread at a time is inside.
    """
    memory = torch.utils.deterministic
    with ambient.alone, warnings.catch_warnings():  # which belong to the process, too
        warnings.simplefilter("ignore")
        filled = memory.fill_uninitialized_memory
        with ambient.deterministic("warn" if value else "default"):
            memory.fill_uninitialized_memory = value
            try:
                yield
            finally:
                memory.fill_uninitialized_memory = filled
