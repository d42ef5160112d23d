"""What wrong calls have in common that no right call has."""

from __future__ import annotations

import pytest
from support import wrong_attention as zoo

from flashcore.bisection.diagnosis import diagnose
from flashcore.bisection.diagnosis.conditions import condition
from flashcore.bisection.diagnosis.screening import HOME, Inputs, Screened
from flashcore.numerics.tolerance import Comparison

PROBLEMS = [HOME, HOME.with_(causal=True), HOME.with_(causal=True, seqlen_q=77), HOME.with_(seqlen_q=1),
            HOME.with_(seqlen_q=256, seqlen_k=256), HOME.with_(batch=3), HOME.with_(batch=1), HOME.with_(head_dim=128),
            HOME.with_(dtype="bfloat16"), HOME.with_(seqlen_q=130, seqlen_k=1100), HOME.with_(num_heads_kv=4),
            HOME.with_(softmax_scale=-0.125)]  # fmt: skip
CALLS = [Inputs(problem) for problem in PROBLEMS] + [Inputs(HOME, "large"), Inputs(HOME, strided=True)]


def judged(inputs: Inputs, wrong: bool) -> Screened:
    return Screened(inputs, None, Comparison(8, int(wrong), 0, 0, 0.0, 1.0, None))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda p: p.causal, "with a causal mask"),
        (lambda p: p.causal and p.seqlen_q < p.seqlen_k, "with a causal mask and with fewer rows than keys"),
        (lambda p: p.seqlen_q == 1, "with one row"),
        (lambda p: p.seqlen_k % 64, "whose keys are no multiple of 64"),
        (lambda p: p.batch > 2, "with more than 2 sequences"),
        (lambda p: p.batch > 1, "with more than one sequence"),
        (lambda p: p.head_dim == 128, "with head_dim 128"),
        (lambda p: p.dtype == "bfloat16", "in bfloat16"),
        (lambda p: p.seqlen_k > 1024, "with more than 256 keys"),
        (lambda p: p.num_heads_q == p.num_heads_kv, "with a K/V head for each query head"),
        (lambda p: p.softmax_scale is not None, "with a softmax_scale below 0"),
        (lambda p: True, None),
        (lambda p: False, None),
        (lambda p: p.causal and p.seqlen_q < p.seqlen_k or p.batch == 3, None),
    ],
)
def test_the_plainest_condition_is_named(wrong, words):
    assert condition([judged(inputs, bool(wrong(inputs.problem))) for inputs in CALLS]) == words


def test_numbers_and_memory_speak_where_ordinary_inputs_are_all_right():
    assert condition([judged(i, i.pattern == "large") for i in CALLS]) == "with inputs 'large'"
    assert condition([judged(i, i.strided) for i in CALLS]) == "with strided inputs"
    hidden = [judged(i, i.problem.causal and i.pattern == "normal") for i in CALLS]
    assert condition([*hidden, judged(Inputs(HOME.with_(causal=True), "constant"), False)]) == "with a causal mask"


@pytest.mark.slow
def test_a_finding_says_which_calls_are_wrong():
    def of_odd_lengths(q, k, v):
        right = zoo.two_pass(q, k, v)
        return right if k.shape[2] % 64 == 0 else zoo.no_scale(q, k, v)

    found = str(diagnose(of_odd_lengths, device="cpu", smallest=False))
    assert "the scale is missing" in found and "Only calls whose keys are no multiple of 64 are wrong." in found
