"""Whole formulas are named where they predict every wrong call, and never what some other bug did."""

from __future__ import annotations

import pytest
from support import wrong_attention as zoo
from support.inquiries import PROBLEM, inquiry_of

from flashcore.bisection.diagnosis.hypotheses import Hypothesis
from flashcore.bisection.diagnosis.probes import formulas
from flashcore.numerics.reference import STAGES

SQUARE = PROBLEM.with_(batch=1, num_heads_q=2, num_heads_kv=1, seqlen_q=80, seqlen_k=80)
LARGE = PROBLEM.with_(seqlen_q=70, seqlen_k=70, head_dim=128)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (zoo.sigmoid, "a sigmoid of each score stands where softmax is meant"),
        (zoo.softmax_over_rows, "softmax is taken over the rows of each key"),
        (zoo.softmax_over_heads, "softmax is taken over the heads"),
        (zoo.softmax_twice, "softmax is taken twice"),
        (zoo.mean_of_v, "Q and K have no influence"),
        (zoo.scaled_twice, "the scale is applied twice"),
        (zoo.no_softmax, "there is no softmax"),
        (zoo.relu_over_the_number_of_keys, "relu of the scores stands where softmax is meant; and the output is "
                                           "divided by the number of keys"),
        (zoo.log_softmax, "logarithms of the weights are taken for the weights"),
        (zoo.linear_attention, "weights are products of elu(q) + 1 and elu(k) + 1"),
        (zoo.keys_and_values_exchanged, "K and V are exchanged"),
        (zoo.keys_for_values, "K is taken for V"),
        (zoo.with_a_residual, "Q is added to the output"),
        (zoo.normed, "rows of Q and K are divided by their root mean square"),
        (zoo.rotated_in_pairs, "a rotary embedding of neighbouring pairs"),
        (zoo.k_in_8_bits, "K is rounded to float8_e4m3fn before the products"),
        (zoo.whole_numbers_of_8_bits, "K and V are rounded to whole numbers of 8 bits, by one scale a row"),
    ],
)  # fmt: skip
def test_a_formula_is_named(function, words):
    inquiry = inquiry_of(function, SQUARE, ("normal", "rising"))
    said = formulas.formulas(inquiry)
    assert said and said.startswith(words), said
    explained, wrong, spoiled = inquiry.verify()
    assert explained > 0.98 * wrong > 0 and spoiled < 0.02 * wrong


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (zoo.offsets_of_16_bits, "offsets into Q wrap: element 65,536 is taken for element 0 (offsets of 16 bits)"),
        (zoo.offsets_of_15_bits, "offsets into V wrap: element 32,768 is taken for element 0"),
        (zoo.written_at_16_bits, "offsets into the output wrap: element 65,536"),
    ],
)
def test_offsets_that_wrap_show_where_there_are_as_many_elements(function, words):
    assert formulas.formulas(inquiry_of(function, LARGE)).startswith(words)
    assert inquiry_of(function, SQUARE).failing == [], "a small problem does not show it"


@pytest.mark.parametrize(
    "function",
    [
        zoo.few_digits, zoo.heads_of_v_shifted, zoo.accum_not_rescaled, zoo.tail_dropped,
        zoo.k_pages_swapped, zoo.not_divided, zoo.nothing_but_zeros, zoo.row_sum_in_bfloat16, zoo.swizzled,
    ],
)  # fmt: skip
def test_what_another_bug_did_is_no_formula(function):
    assert formulas.formulas(inquiry_of(function, SQUARE, ("normal", "rising"))) is None


def test_rows_that_vanish_fit_many_formulas_and_a_right_call_refutes_these():
    inquiry = inquiry_of(zoo.maximum_from_zero, SQUARE, ("sunken",))
    assert inquiry.failing and formulas.formulas(inquiry) is None and inquiry.found == []


def test_every_formula_has_a_sentence_and_its_stages():
    for problem in (SQUARE, LARGE, PROBLEM.with_(num_heads_q=1, num_heads_kv=1, dtype="float32")):
        each = [one for together in formulas._of(problem, rounded=True) for one in together]
        assert all(set(one.stages) <= set(STAGES) and one.changes and not one.by_rounding for one in each)
        sentences = {one.sentence for one in each}
        assert len(each) - len(sentences) == 6, "two epsilons for Q, for K and for both are left unsaid"
    few, all_of_them = (sum(len(group) for group in formulas._of(SQUARE, rounded=rounded)) for rounded in (False, True))
    assert few + 36 == all_of_them
    assert not any(one.changes.get("weighing") == "over heads" for one in each), "there is but one head"
    assert not any(one.changes.get("taken") == "kqv" for one in each), "rows and keys differ in number"


def test_a_formula_and_a_wrong_scale_that_hide_each_other():
    inquiry = inquiry_of(zoo.exchanged_and_not_scaled, SQUARE)
    assert formulas.formulas(inquiry) is None
    inquiry.suspect(("scores",), "a piece of it")
    words = formulas.with_a_wrong_scale(inquiry)
    assert words.startswith("K and V are exchanged; the scale is missing") and inquiry.suspicions == []
    assert [h.name for h in inquiry.found] == ["another tensor taken", "scale missing"] and not inquiry.unexplained()
    assert formulas.with_a_wrong_scale(inquiry_of(zoo.accum_not_rescaled, SQUARE)) is None


def test_an_output_that_is_cut_off_and_one_that_is_divided_along_its_columns():
    inquiry = inquiry_of(zoo.out_cut_off, SQUARE)
    assert formulas.formulas(inquiry) == "the output is cut off at -0.5 and 0.5"
    assert "laid along the columns of the output" in formulas.formulas(
        inquiry_of(zoo.divided_along_the_columns, SQUARE)
    )


def test_formulas_are_tried_again_only_beside_something_that_was_found_since(monkeypatch):
    inquiry, tried = inquiry_of(zoo.roots_of_scores, SQUARE), []
    best = formulas._best
    monkeypatch.setattr(formulas, "_best", lambda *given: tried.append(given) or best(*given))
    assert [formulas.formulas(inquiry), formulas.formulas(inquiry)] == [None, None] and len(tried) == 1
    inquiry.add(Hypothesis("epsilon", "a number is added to row_sum", ("row_sum",), {"epsilon": 1e-9}))
    assert formulas.formulas(inquiry) is None and len(tried) == 2
