"""The decode step: what is timed is checked first, and a wrong result has no speed."""

from __future__ import annotations

import pytest
import torch
from support.paging_surveys import PLAN

from flashcore import backends
from flashcore.paging import TopK
from flashcore.paging_survey import correctness as checking
from flashcore.paging_survey import decode as decoding
from flashcore.paging_survey.caches import random_cache
from flashcore.paging_survey.measuring import measure


def test_a_wrong_step_is_timed_and_counts_for_nothing(run, monkeypatch):
    real = decoding.Inputs.call

    def call(self, step, i):
        out, lse = real(self, step, i)
        return (out + 1, lse) if step.name == "all pages" else (out, lse)

    monkeypatch.setattr(decoding.Inputs, "call", call)
    trials = {t.variant: t for t in measure(run, PLAN, what="decode")}
    assert trials["all pages"].status == "failed" and "counts for nothing" in trials["all pages"].reason
    assert trials["top_k 50 %"].status == "ok" and "of_dense" not in trials["top_k 50 %"].data


@pytest.mark.gpu
def test_a_selection_can_be_captured_with_the_step_that_uses_it():
    cache = random_cache(2, 512, 2, 64, page_size=64, dtype=torch.float16, device="cuda")
    q = torch.randn(2, 4, 1, 64, device="cuda", dtype=torch.float16)
    selection = TopK(share=0.5).select(q, cache)
    out, _ = backends.get("reference").run_paged(q, cache, checking.paged_problem_of(q, cache), selection)
    assert bool(out.isfinite().all())
