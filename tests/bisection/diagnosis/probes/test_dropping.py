"""Dropout is told from a race, with its p, and what it was applied to."""

from __future__ import annotations

import pytest
import torch
from support import wrong_attention as zoo
from support.inquiries import CAUSAL, PROBLEM, inquiry_of

from flashcore.bisection.diagnosis.probes import dropping, memory


def said(function, problem=PROBLEM):
    torch.manual_seed(3)
    inquiry = inquiry_of(function, problem)
    memory.repeats(inquiry)
    return dropping.dropped(inquiry), inquiry


@pytest.mark.parametrize(
    ("function", "p", "what", "stage"),
    [
        (zoo.dropout_of_weights, "0.1", "weights", "probs"),
        (zoo.dropout_of_the_output, "0.2", "elements of the output", "out"),
    ],
)
def test_dropout_is_named_with_its_p(function, p, what, stage):
    words, inquiry = said(function)
    assert words.startswith(f"dropout is left on, with p = {p}: ") and f"of the {what} are 0" in words
    assert [h.stages for h in inquiry.found] == [(stage,)] and inquiry.found[0].by_lot and inquiry.suspicions == []


def test_zeros_without_the_factor_are_dropout_too():
    def unscaled(q, k, v):
        return zoo.two_pass(q, k, v) * (torch.rand(q.shape) > 0.3)

    words = said(unscaled)[0]
    assert words.startswith("dropout is left on, with p = 0.3") and "without the factor 1 / (1 - p)" in words


def test_a_race_is_no_dropout():
    words, inquiry = said(zoo.a_race)
    assert words is None and "a race" in inquiry.suspicions[0].sentence

    def noisy(q, k, v):
        return zoo.two_pass(q, k, v) * (1 + 0.5 * torch.rand(q.shape))

    assert said(noisy)[0] is None


def test_dropout_under_a_causal_mask():
    def under_a_mask(q, k, v, causal=False):
        a, b, c, scale = zoo.parts(q, k, v)
        scores = zoo.masked(a @ b.mT * scale, k.shape[2] - q.shape[2]) if causal else a @ b.mT * scale
        return (torch.nn.functional.dropout(torch.softmax(scores, -1), 0.5) @ c).to(q.dtype)

    assert said(under_a_mask, CAUSAL)[0].startswith("dropout is left on, with p = 0.5: ")


def test_what_repeats_itself_is_not_asked():
    inquiry = inquiry_of(zoo.scaled_twice)
    before = len(inquiry.candidate.calls)
    assert dropping.dropped(inquiry) is None and len(inquiry.candidate.calls) == before
