"""Ask for values: rows that see no key, keys that a mask hides, infinities and NaN."""

from __future__ import annotations

import math

import torch

from flashcore.bisection.diagnosis.calling import Candidate
from flashcore.bisection.diagnosis.promises.asking import Asked, case_of, inputs, what_is_wrong
from flashcore.numerics import reference

HIDDEN_FROM, HIDDEN_LENGTH = 768, 1024
"""First key that holds NaN where a mask hides it, and all keys; see `masked`."""
WIDEST_TILE = 256
"""Rows or keys of the widest tile that a kernel is expected to have."""


def empty_rows(candidate: Candidate, asked: Asked) -> str | None:
    """Rows before the first key: exactly 0, and lse -inf."""
    problem = asked.problem
    answer, _ = candidate.ask(*inputs(candidate, problem), problem)
    empty = problem.seqlen_q - problem.seqlen_k
    out = answer.out[:, :, :empty]
    bad = (out != 0).nonzero()  # NaN is not 0 either
    if len(bad):
        batch, head, row, column = bad[0].tolist()
        value = float(out[batch, head, row, column])
        return f"row {row} sees no key, and its output is {value:.6g} where 0 is meant (batch {batch}, head {head})"
    if answer.lse is not None:
        lse = answer.lse[:, :, :empty]
        bad = (lse != -math.inf).nonzero()
        if len(bad):
            batch, head, row = bad[0].tolist()
            return f"row {row} sees no key, and its lse is {float(lse[batch, head, row]):.6g} where -inf is meant"
    return None


def masked(candidate: Candidate, asked: Asked) -> str | None:
    """NaN in all keys from `HIDDEN_FROM` on; judged are rows two of the widest tiles before them.

    The tile of rows that such a row lies in ends before the first NaN, and so does every tile of keys that it needs.
    """
    problem = asked.problem
    q, k, v = inputs(candidate, problem)
    case = case_of(candidate, q, k, v, problem)
    given = {"k": k, "v": v}
    given[asked.key] = given[asked.key].clone()
    given[asked.key][:, :, HIDDEN_FROM:] = math.nan
    answer, _ = candidate.ask(q, given["k"], given["v"], problem)
    rows = torch.arange(problem.seqlen_q, device=q.device) < HIDDEN_FROM - 2 * WIDEST_TILE
    return what_is_wrong(answer, case, rows=rows)


def planted(candidate: Candidate, asked: Asked) -> str | None:
    """One infinity or NaN in one tensor, at the middle of the first head; judged by float64 on the same inputs.

    The bounds are twice those of the inputs without it, as one key more or less changes them a little.
    """
    problem = asked.problem
    tensors = dict(zip("qkv", inputs(candidate, problem), strict=True))
    case = case_of(candidate, *tensors.values(), problem)
    name, value = asked.key.split()
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0, tensors[name].shape[2] // 2, 0] = float(value)
    truth = reference.attention(*tensors.values(), problem)
    answer, _ = candidate.ask(*tensors.values(), problem)
    return what_is_wrong(answer, case, truth=truth, slack=2.0)
