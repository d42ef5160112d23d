"""Elements that are taken for those at other places, and strides that are ignored."""

from __future__ import annotations

import pytest
from support import wrong_attention as zoo
from support.inquiries import PROBLEM, inquiry_of

from flashcore.bisection.diagnosis.probes import layouts


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (zoo.k_reshaped, "K is reshaped where it should be transposed"),
        (zoo.tiles_of_v_transposed, "whole tiles of V (32 rows and 32 columns) are read transposed"),
        (zoo.written_as_bshd, "the output is written as [B, S, H, D] into memory that is read as [B, H, S, D]"),
        (zoo.mean_of_v, None),
        (zoo.two_pass, None),
    ],
)
def test_elements_at_other_places(function, words):
    said = layouts.elsewhere(inquiry_of(function))
    assert (said is None) if words is None else said.startswith(words)


def test_inputs_that_are_not_contiguous():
    inquiry = inquiry_of(zoo.contiguous_taken_for_granted, strided=True)
    assert layouts.strides(inquiry).startswith("strides are ignored") and inquiry.state.strides_ignored

    def v_as_it_lies(q, k, v):
        return zoo.two_pass(q, k, v if v.is_contiguous() else v.flip(2))

    inquiry = inquiry_of(v_as_it_lies, strided=True)
    assert layouts.strides(inquiry).endswith("give a wrong result; V alone is enough")
    assert inquiry.suspicions[0].stages == ("accum",)
    assert layouts.strides(inquiry_of(zoo.scaled_twice, PROBLEM)) is None
