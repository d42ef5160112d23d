"""What is known so far: what it predicts of the wrong elements, and what of it can be done without."""

from __future__ import annotations

import torch
from support import wrong_attention as zoo
from support.inquiries import PROBLEM, inquiry_of

from flashcore.bisection.diagnosis.hypotheses import Hypothesis
from flashcore.bisection.diagnosis.probes.inquiry import Suspicion

TWICE = Hypothesis("scale twice", "", ("scores",), {"scale_factor": PROBLEM.scale})
SHIFTED = Hypothesis("K of another head", "", ("scores",), {"k_heads": torch.tensor([1, 1, 0, 0, 3, 3, 2, 2])})


def test_what_was_found_is_judged_by_the_wrong_elements():
    inquiry = inquiry_of(zoo.scaled_twice)
    explained, wrong, spoiled = inquiry.verify()
    assert explained < 0.1 * wrong and spoiled == 0 and inquiry.unexplained() == inquiry.failing
    assert inquiry.explains_most(TWICE) and not inquiry.explains_most(SHIFTED)
    assert inquiry.found == [] and inquiry.state.scale_factor == 1.0, "to ask is not to add"
    inquiry.add(TWICE)
    assert inquiry.verify() == (wrong, wrong, 0) and inquiry.unexplained() == []


def test_what_explains_nothing_more_is_dropped():
    inquiry = inquiry_of(zoo.scaled_twice)
    inquiry.add(TWICE)
    inquiry.add(Hypothesis("a bend", "", ("scores",), {"bend": ("clip", 500.0)}))
    inquiry.prune()
    assert inquiry.found == [TWICE] and inquiry.state.bend is None


def test_tables_say_nothing_of_other_shapes():
    inquiry = inquiry_of(zoo.scaled_twice)
    longer = PROBLEM.with_(seqlen_k=101)
    assert inquiry.fits_shape(longer)
    inquiry.add(SHIFTED)
    assert inquiry.fits_shape(PROBLEM) and not inquiry.fits_shape(longer)


def test_a_suspicion_has_a_sentence_and_may_have_a_place():
    inquiry = inquiry_of(zoo.two_pass)
    assert inquiry.suspect(("accum",), "odd", {"row": 1}) == "odd"
    inquiry.suspect((), "broken")
    assert inquiry.suspicions == [Suspicion(("accum",), "odd", {"row": 1}), Suspicion((), "broken", {})]


def test_lse_tells_where_an_output_is_wrong():
    def spoiled(of):
        def function(q, k, v, return_lse=True):
            out, lse = zoo.with_lse(q, k, v, return_lse=True)
            return (out * 1.5, lse) if of == "out" else (out * 1.5, lse + 1)

        return inquiry_of(function, lse="natural").lse_tells()

    assert spoiled("out") and not spoiled("both") and not inquiry_of(zoo.scaled_twice).lse_tells()
