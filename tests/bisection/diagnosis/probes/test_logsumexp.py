"""An lse that is wrong by itself is named by what it holds instead."""

from __future__ import annotations

import math

import pytest
import torch
from support import wrong_attention as zoo

from flashcore.bisection.diagnosis import diagnose
from flashcore.bisection.diagnosis.behaviour import RIGHT, simulate
from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.probes import logsumexp
from flashcore.bisection.diagnosis.screening import Inputs
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=150, head_dim=32, causal=True)
CASE = Inputs(PROBLEM, seed=3).case(candidate_of(zoo.two_pass, device="cpu"))


def scores(causal=True):
    a, b, _, scale = zoo.parts(CASE.q, CASE.k, CASE.v)
    found = (a @ b.mT * scale).double()
    return zoo.masked(found, PROBLEM.seqlen_k - PROBLEM.seqlen_q) if causal else found


def sum_not_rescaled():
    top, total = torch.full(CASE.lse.shape, -math.inf, dtype=torch.float64), 0.0
    for page in scores().split(64, dim=-1):
        top = torch.maximum(top, page.amax(-1))
        total = total + (page - top[..., None]).exp().sum(-1)
    return top + total.log()


TOP = scores().amax(-1)
LOG = CASE.lse - TOP
LSES = {
    "a logarithm of base 2": CASE.lse / math.log(2),
    "the logarithm in lse is of base 2": TOP + LOG / math.log(2),
    "the logarithm is missing": TOP + LOG.exp(),
    "the maximum in lse lacks the scale": TOP / PROBLEM.scale + LOG,
    "log(1 + sum)": TOP + LOG.exp().log1p(),
    "scores without the scale": torch.logsumexp(scores() / PROBLEM.scale, -1),
    "keys that the mask hides": torch.logsumexp(scores(causal=False), -1),
    "the row 1 before it": CASE.lse.roll(1, 2),
    "written as [B, S, H]": CASE.lse.transpose(1, 2).contiguous().view(CASE.lse.shape),
    "not rescaled when the maximum moves, on every page of 64": sum_not_rescaled(),
    "lse is rounded to bfloat16": CASE.lse.bfloat16().double(),
    "0.6931 times what it should be: ln 2": CASE.lse * math.log(2),
    "3 is added to lse": CASE.lse + 3.0,
    "0.5 times the maximum plus 2 times the logarithm": 0.5 * TOP + 2.0 * LOG,
    "lse of batch 1, head 3 stands at batch 0, head 0": CASE.lse.flip(0, 1),
}


@pytest.mark.parametrize("words", LSES)
def test_it_is_named(words):
    found = logsumexp.name_lse(LSES[words], CASE, PROBLEM, RIGHT)
    assert words in found.sentence and found.stages == ("lse",)


def test_of_the_last_page_alone():
    whole = PROBLEM.with_(causal=False)
    case = Inputs(whole, seed=3).case(candidate_of(zoo.two_pass, device="cpu"))
    found = logsumexp.name_lse(torch.logsumexp(scores(causal=False)[..., 128:], -1), case, whole, RIGHT)
    assert "the last page of 64 keys alone" in found.sentence


def test_what_nothing_explains_has_no_name():
    noise = torch.randn(CASE.lse.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert logsumexp.name_lse(noise, CASE, PROBLEM, RIGHT) is None
    assert logsumexp.name_lse(CASE.lse * math.nan, CASE, PROBLEM, RIGHT) is None


def test_an_lse_that_follows_the_wrong_output_needs_no_name():
    doubled = RIGHT.with_(scale_factor=2.0)
    got = simulate(CASE.q, CASE.k, CASE.v, PROBLEM, doubled)[1]
    assert logsumexp.follows(got, CASE, PROBLEM, doubled) and not logsumexp.follows(got, CASE, PROBLEM, RIGHT)


@pytest.mark.slow
def test_an_lse_that_is_never_written_is_told_from_a_wrong_one_and_two_bugs_are_both_named():
    def last_rows_not_written(q, k, v, return_lse=True):
        out, lse = zoo.with_lse(q, k, v, return_lse=True)
        room = torch.empty_like(lse)
        room[:, :, :-3] = lse[:, :, :-3]
        return out, room

    def lucky(q, k, v, return_lse=True):
        """Memory holds what the call before left there, which is right, until somebody fills it."""
        out, lse = zoo.with_lse(q, k, v, return_lse=True)
        room = torch.empty_like(lse)
        return (out, last_rows_not_written(q, k, v)[1]) if room.isnan().all() else (out, lse)

    for function in (last_rows_not_written, lucky):
        found = diagnose(function, "B=2,H=2,S=40,D=32", device="cpu", lse="natural")
        assert "elements of lse come from memory that was never written: rows 37 to 39" in str(found)

    def in_base_2_and_unscaled(q, k, v, return_lse=True):
        return zoo.with_lse(q * math.sqrt(q.shape[-1]), k, v, return_lse=True, base=2.0)

    found = diagnose(in_base_2_and_unscaled, "B=2,H=2,S=40,D=64", device="cpu", lse="natural")
    assert [h.name for h in found.hypotheses] == ["scale missing", "lse of another kind: log2"]
