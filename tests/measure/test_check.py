"""The checker passes what is right, and fails every kind of wrong with its first coordinate."""

import math
import re
from dataclasses import replace

import pytest
import torch

from flashcore import backends
from flashcore.backends import Availability
from flashcore.backends.cpu import CpuBackend
from flashcore.errors import UnknownName
from flashcore.measure import check
from flashcore.measure.check import check_attention, named_problems
from flashcore.numerics import reference
from flashcore.numerics.inputs import PATTERNS, UNUSED_ROWS, lengths_of, make_inputs
from flashcore.numerics.outputs import new_output
from flashcore.problem import PRESETS, Problem, square
from flashcore.records import Trial

SMALL = square(2, 2, 40, 16)
EMPTY_ROWS = Problem(batch=1, num_heads_q=2, num_heads_kv=2, seqlen_q=40, seqlen_k=24, head_dim=8, causal=True)


class Changed(CpuBackend):
    """The cpu backend, with what it returns changed."""

    id = "changed"

    def __init__(self, change):
        self.change = change

    def run(self, q, k, v, problem):
        return self.change(*super().run(q, k, v, problem))


def spoil(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize("problem", check.check_problems("quick", gpu=False), ids=lambda p: p.label())
@pytest.mark.parametrize("backend", ["reference", "cpu", "sdpa-math"])
def test_right_backends_pass(backend, problem):
    trial = check_attention(backend, problem, device="cpu")
    assert trial.status == "ok", trial.reason
    c = trial.correctness
    outputs = problem.batch * problem.num_heads_q * problem.seqlen_q
    lse = outputs if trial.data["returns_lse"] else 0
    assert c.checked == outputs * problem.head_dim + lse, "every element is compared"
    assert c.max_abs_error <= c.bound and c.num_bad == 0


@pytest.mark.parametrize("problem", check.masked_problems("quick", gpu=False), ids=lambda p: p.label())
def test_right_backends_pass_under_masks(problem):
    able = [b for b in backends.all_backends() if b.device != "cuda" and b.why_not(problem) is None]
    assert {"cpu", "reference"} <= {b.id for b in able}
    for backend in able:
        trial = check_attention(backend, problem, device="cpu", pattern="rising", layout="apart")
        assert trial.status == "ok", (backend.id, trial.reason)
        assert trial.problem.label() == problem.label() and trial.correctness.checked > 0


@pytest.mark.parametrize("problem", check.invariant_problems("quick", gpu=False), ids=lambda p: p.label())
def test_the_batch_invariant_mode_is_right_too(problem):
    trial = check_attention(backends.get("cpu"), problem, device="cpu", pattern="rising", layout="apart")
    assert trial.status == "ok", trial.reason
    assert trial.problem.batch_invariant and trial.correctness.checked > 0


def test_the_plain_matrix_has_each_kind_of_shape_once_and_grows():
    quick, full = (check.check_problems(profile, gpu=True) for profile in ("quick", "full"))
    assert full[: len(quick)] == quick and len({p.label() for p in full}) == len(full) == len(quick) + 16
    assert not any(p.masks or p.batch_invariant for p in full)
    for problems in (quick, full):
        kinds = {(p.dtype, p.head_dim, p.causal) for p in problems}
        assert len(kinds) == (8 if problems is full else len(kinds)) and {p.head_dim for p in problems} == {64, 128}
    decode = [p for p in quick if p.seqlen_q <= 8]
    assert {p.page_size for p in decode} >= {16, 64, 256} and {p.seqlen_q for p in decode} >= {1, 7, 8}
    assert any(p.seqlen_q > p.seqlen_k for p in decode) and any(p.seqlen_q > p.seqlen_k > 8 for p in quick)
    assert any(p.scale < 0 for p in quick) and any(p.scale > 1 for p in quick)
    assert any(p.num_heads_q > p.num_heads_kv > 1 for p in quick) and any(p.seqlen_q % 64 for p in quick)
    for matrix, few, many in ((check.check_problems, 512, 2048), (check.masked_problems, 300, 2048)):
        longest = [max(p.seqlen_q for p in matrix("full", gpu=gpu)) for gpu in (False, True)]
        heads = [
            max(p.num_heads_q for p in matrix("full", gpu=gpu) if p.seqlen_q == p.seqlen_k) for gpu in (False, True)
        ]
        assert longest == [few, many] and heads == [2, 8], "lengths and heads that fill a GPU, on one alone"


def test_the_invariant_matrix_is_for_backends_that_promise_it():
    quick, full = (check.invariant_problems(profile, gpu=True) for profile in ("quick", "full"))
    assert full[: len(quick)] == quick and len({p.label() for p in full}) == len(full) > 20
    assert all(p.batch_invariant for p in full) and {m for p in full for m in p.masks} >= {
        "window",
        "softcap",
        "ragged",
    }
    assert max(p.seqlen_k for p in quick) > 2 * 2048, "sequences of several chunks"
    math_, cpu = backends.get("sdpa-math"), backends.get("cpu")
    named = SMALL.with_(batch_invariant=True)
    assert check.pairs([quick[0], named], [math_, cpu]) == [(quick[0], cpu), (named, math_), (named, cpu)]
    assert set(quick) <= set(named_problems("default", "quick", gpu=False)[0])


def test_the_masked_matrix_has_every_mask_and_is_for_backends_that_take_it():
    quick, full = (check.masked_problems(profile, gpu=True) for profile in ("quick", "full"))
    assert {name for p in quick for name in p.masks} == {"window", "softcap", "sink", "lengths", "ragged"}
    assert full[: len(quick)] == quick and len({p.label() for p in full}) == len(full) > 30
    window, ragged, named = quick[0], quick[-2], SMALL.with_(lengths="ragged")
    math_, cpu, flash = (backends.get(name) for name in ("sdpa-math", "cpu", "sdpa-flash"))
    (fa4,) = backends.select("fa4")
    taken = [problem for problem, _ in check.pairs(check.masked_problems("full", gpu=False), [fa4])]
    assert "sink" in {m for p in taken for m in p.masks} and not any(p.lengths for p in taken), (
        "a peer promises nothing of empty sequences"
    )
    assert check.pairs([window, ragged, SMALL, named], [math_, cpu, flash]) == [
        (window, math_), (window, cpu), (ragged, cpu), (SMALL, math_), (SMALL, cpu), (SMALL, flash), (named, math_),
        (named, cpu), (named, flash),
    ]  # fmt: skip
    refused = check_attention(math_, named, device="cpu")
    assert refused.status == "unsupported" and refused.reason == "it does not take ragged batches"


class ChangedMasked(Changed):
    """The same, where masks need tensors."""

    def run(self, q, k, v, problem, masks=None):
        return self.change(*CpuBackend.run(self, q, k, v, problem, masks), masks)


@pytest.mark.parametrize("lengths", ["right", "left", "ragged"])
def test_what_is_left_in_rows_that_are_not_real_is_wrong(lengths):
    """Seed 0 leaves queries unused in sequence 1, and three rows behind a ragged batch."""
    problem = SMALL.with_(lengths=lengths, sink=True)
    assert check_attention(ChangedMasked(lambda out, lse, masks: (out, lse)), problem).status == "ok"
    row = {"right": (1, 0, -1), "left": (1, 0, 0), "ragged": (0, 0, -1)}[lengths]
    for change in (
        lambda out, lse, masks: (spoil(out, (*row, 3), 1e-3), lse),
        lambda out, lse, masks: (out, spoil(lse, row, 0.0)),
        lambda out, lse, masks: (out.nan_to_num(), lse.nan_to_num(neginf=-1e30)),
    ):
        assert check_attention(ChangedMasked(change), problem).status == "failed"


def test_a_backend_may_not_write_into_what_its_masks_are_given():
    def shorten(out, lse, masks):
        masks.seqlens_k.sub_(1)
        return out, lse

    trial = check_attention(ChangedMasked(shorten), SMALL.with_(lengths="right"))
    assert trial.status == "failed" and "it changed its inputs (seqlens_k)" in trial.reason
    assert check_attention("cpu", SMALL.with_(lengths="right")).status == "ok"


def test_a_softcap_bounds_by_the_tanh_that_a_backend_says_it_has(monkeypatch):
    """A tanh off by up to 2^-11, as a GPU's instruction makes it, is wrong unless that is by design."""

    class Coarse(CpuBackend):
        id = "coarse"

        def scores(self, q, k, problem, page, *more):
            scores = super().scores(q, k, problem, page, *more)
            return scores + problem.softcap * 2.0**-11 * torch.sin(1e4 * scores).where(scores.isfinite(), 0.0)

    problem = SMALL.with_(softcap=30.0)
    assert check_attention(Coarse(), problem).status == "failed" and check_attention("cpu", problem).status == "ok"
    Coarse.tanh_error = 2.0**-11
    assert check_attention(Coarse(), problem).status == "ok"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_right_backends_pass_on_every_pattern(pattern, dtype, layout):
    problem = Problem(batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=65, seqlen_k=130, head_dim=64, dtype=dtype,
                      causal=True)  # fmt: skip
    for backend in ("cpu", "sdpa-math"):
        trial = check_attention(backend, problem, pattern=pattern, layout=layout, seed=1, device="cpu")
        assert trial.status == "ok", (backend, trial.reason)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 100.0])
def test_one_bad_element_anywhere_fails_and_is_named(value):
    trial = check_attention(Changed(lambda out, lse: (spoil(out, (1, 0, 39, 15), value), lse)), SMALL)
    assert trial.status == "failed" and trial.correctness.num_bad == 1
    first = trial.correctness.first_bad
    assert (first["tensor"], first["batch"], first["head"], first["row"], first["column"]) == ("out", 1, 0, 39, 15)
    assert "row 39" in trial.reason and "expected" in trial.reason
    assert trial.correctness.num_nan == math.isnan(value) and trial.correctness.num_inf == math.isinf(value)
    again = Trial.model_validate_json(trial.model_dump_json())
    assert not again.correctness.passed and not (again.correctness.max_abs_error <= again.correctness.bound)


def test_an_element_never_written_is_seen():
    def forget(out, lse):
        fresh = new_output(out.shape, out.dtype, out.device)
        fresh[:, :, :-1] = out[:, :, :-1]
        return fresh, lse

    trial = check_attention(Changed(forget), SMALL)
    assert trial.status == "failed" and trial.correctness.num_nan == 2 * 2 * 16


@pytest.mark.parametrize(("change", "words"), [
    (lambda out, lse: (out, spoil(lse, (0, 1, 3), 9.0)), "lse: 1 of"),
    (lambda out, lse: (out, lse / math.log(2)), "lse: 160 of"),
    (lambda out, lse: (out.float(), lse), "out is torch.float32"),
    (lambda out, lse: (out[:, :, :-1], lse), r"out is torch.float16 \(2, 2, 39, 16\)"),
    (lambda out, lse: (out, lse.half()), "lse is torch.float16"),
    (lambda out, lse: (torch.zeros_like(out), lse), "out: "),
    (lambda out, lse: (out * 1.02, lse), "out: "),
])  # fmt: skip
def test_wrong_results_fail(change, words):
    trial = check_attention(Changed(change), SMALL)
    assert trial.status == "failed"
    assert re.search(words, trial.reason), trial.reason


def test_empty_rows_must_be_zero_and_minus_infinity():
    assert check_attention("cpu", EMPTY_ROWS).status == "ok"
    nan_rows = check_attention(Changed(lambda out, lse: (spoil(out, (0, 0, 0), math.nan), lse)), EMPTY_ROWS)
    assert nan_rows.correctness.num_nan == 8 and nan_rows.status == "failed"
    finite = check_attention(Changed(lambda out, lse: (out, spoil(lse, (0, 0, 0), -1e30))), EMPTY_ROWS)
    assert finite.status == "failed" and finite.correctness.first_bad["expected"] == -math.inf


def test_a_backend_that_raises_becomes_an_error_with_its_reason():
    def raises(out, lse):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\n second line")

    trial = check_attention(Changed(raises), SMALL)
    assert trial.status == "error" and "illegal memory access" in trial.reason and "\n" not in trial.reason


def test_unsupported_unavailable_and_unknown():
    class Gone(CpuBackend):
        id = "gone"

        def availability(self):
            return Availability(False, "there is no such device", "buy one")

    class Narrow(CpuBackend):
        id = "narrow"
        head_dims = (64,)

    gone, narrow = check_attention(Gone(), SMALL), check_attention(Narrow(), SMALL)
    assert (gone.status, narrow.status) == ("unavailable", "unsupported")
    assert "buy one" in gone.reason and "head_dim 16" in narrow.reason
    with pytest.raises(UnknownName):
        check_attention("no-such", SMALL)


def test_nan_in_the_inputs_is_not_laid_at_the_backend(monkeypatch):
    def spoilt(problem, **options):
        q, k, v = make(problem, **options)
        return q, spoil(k, (0, 0, 0, 0), math.nan), v

    make = check.make_inputs
    monkeypatch.setattr(check, "make_inputs", spoilt)
    check.make_case.cache_clear()
    trial = check_attention("cpu", SMALL)
    check.make_case.cache_clear()
    assert trial.status == "error" and "inputs" in trial.reason and "(in k)" in trial.reason
    assert trial.correctness is None


@pytest.mark.parametrize("scale", [0.125, -0.5])
def test_the_bounds_are_those_of_the_precision_and_of_rounded_scores(scale):
    """Large inputs, so that what rounding the scores does is not lost beside the error of the same maths."""
    problem = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=9, seqlen_k=13, head_dim=8,
                      softmax_scale=scale)  # fmt: skip
    q, k, v = make_inputs(problem, pattern="large")
    q[1, 2, 4], k[0, 1, 7] = 300.0, -400.0  # the longest row of either, whose length nothing else has
    case = check.expected(q, k, v, problem, round_scores=False)
    near_out, near_lse = reference.attention_same_precision(q, k, v, problem, None, round_scores=False)
    delta = 2.0**-24 * abs(scale) * (300 * math.sqrt(8)) * (400 * math.sqrt(8))
    out_error, lse_error = float((near_out - case.out).abs().max()), float((near_lse - case.lse).abs().max())
    assert case.out_atol - 2 * out_error == pytest.approx(2 * delta * float(v.abs().max()), rel=1e-5)
    assert case.lse_atol - 2 * lse_error == pytest.approx(check.LSE_BOUND + delta, rel=1e-5) and delta > 1e-3
    assert (case.out_rtol, case.lse_rtol) == (2.0**-10, 2.0**-22)
    capped = check.expected(q, k, v, problem.with_(softcap=20.0), round_scores=False, tanh_error=0.125)
    assert capped.lse_atol > 20 * 0.125 > case.lse_atol


def test_a_peer_is_not_asked_for_rows_that_belong_to_no_sequence():
    problem = square(6, 2, 20, 8, lengths="ragged")

    def rows(role: str, lengths: str = "mixed") -> float:
        backend = ChangedMasked(lambda out, lse, masks: (out, lse))
        backend.role = role
        trial = check_attention(backend, problem, lengths=lengths)
        assert trial.status == "ok" and trial.data["lengths"] == lengths and trial.data["role"] == role
        return trial.correctness.checked / (2 * (8 + 1))

    real = sum(lengths_of(problem, 0)[0])
    assert (rows("ours"), rows("peer"), rows("ours", "equal")) == (real + UNUSED_ROWS, real, 6 * 20)


def test_the_bound_is_tight_enough_to_see_one_dropped_key():
    """Leaving out one key of 256 moves `out` by about |v| / 256, eight times the bound of float16."""

    class Drops(CpuBackend):
        id = "drops"

        def scores(self, q, k, problem, page):
            scores = super().scores(q, k, problem, page)
            if page.start == 0:
                scores[..., 5] = -math.inf
            return scores

    assert check_attention(Drops(), square(1, 2, 256, 64)).status == "failed"


def test_the_case_of_one_problem_is_made_once_for_all_backends(monkeypatch):
    check.make_case.cache_clear()
    for backend in ("reference", "cpu", "sdpa-math"):
        assert check_attention(backend, SMALL, device="cpu").status == "ok"
    assert check_attention("cpu", SMALL.with_(batch_invariant=True)).status == "ok", "which says nothing of the numbers"
    assert check.make_case.cache_info().misses == 1


def test_a_backend_gets_inputs_of_its_own_with_the_strides_of_the_case_away_from_the_start_of_their_memory():
    case = check.make_case(SMALL, 0, "normal", "bshd", "cpu")
    for mine, theirs in zip(check._given(case), check._inputs(case), strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()
        assert mine.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()
        assert mine.storage_offset() * mine.element_size() == check.OFFSET_BYTES
    shared = replace(case, k=case.k[:1].expand_as(case.k))
    given = check._given(shared)[1]
    assert torch.equal(given, shared.k) and given.stride() == shared.k.stride() and given.stride(0) == 0


def test_what_a_backend_does_to_its_inputs_reaches_nobody_else():
    class Erases(CpuBackend):
        id = "erases"

        def run(self, q, k, v, problem):
            results = super().run(q, k, v, problem)
            v.zero_()
            return results

    trial = check_attention(Erases(), SMALL)
    assert trial.status == "failed" and "it changed its inputs (v)" in trial.reason
    assert check_attention("cpu", SMALL).status == "ok"


@pytest.mark.parametrize("results", [None, (), (1,), torch.zeros(2), (torch.zeros(1),) * 3, ("out", None)])
def test_what_is_no_pair_of_tensors_is_a_wrong_form(results):
    class Odd(CpuBackend):
        id = "odd"

        def run(self, q, k, v, problem):
            return results

    trial = check_attention(Odd(), SMALL)
    assert trial.status == "failed" and ("expected out and lse" in trial.reason or "plain tensor" in trial.reason)


def test_a_backend_that_changes_what_judges_it_gets_an_error_and_the_next_one_is_judged_as_ever():
    class Sly(CpuBackend):
        id = "sly"

        def run(self, q, k, v, problem):
            torch.Tensor.abs = lambda self: self * 0
            return super().run(q, k, v, problem)

    trial = check_attention(Sly(), SMALL)
    assert trial.status == "error" and "torch.Tensor.abs was changed while 'sly' ran" in trial.reason
    assert check_attention("cpu", SMALL).status == "ok"


def test_named_problems_join_the_matrix_and_large_ones_need_a_gpu():
    usual, left_out = named_problems("default", "quick", gpu=False)
    assert left_out == [] and len(usual) >= 6
    more, left_out = named_problems("report; B=1,H=1,S=64,D=64", "quick", gpu=False)
    assert left_out == [PRESETS["report"]] and len(more) == len(usual) + 1
    assert PRESETS["report"] in named_problems("report", "quick", gpu=True)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("problem", check.check_problems("quick", gpu=True), ids=lambda p: p.label())
def test_peers_on_the_gpu_are_right_or_say_why_not(problem):
    for backend in ("sdpa-math", "sdpa-flash", "sdpa-cudnn", "reference"):
        trial = check_attention(backend, problem)
        assert trial.status in ("ok", "unsupported"), (backend, trial.reason)
        if trial.status == "unsupported":
            assert backends.get(backend).why_not(problem) or "no such kernel" in trial.reason


def test_a_package_of_somebody_elses_is_checked_in_a_task_of_its_own():
    problem = square(1, 2, 16, 64)
    ours, fa4 = backends.get("cpu"), backends.get("fa4")
    both, alone = check.tasks([(problem, ours), (problem, fa4), (problem, backends.get("sdpa-math"))])
    assert [fields["backend"] for fields in both.owed] == ["cpu", "sdpa-math"]
    assert [fields["backend"] for fields in alone.owed] == ["fa4"] and "fa4" in alone.name
    assert alone.limit_s < both.limit_s and alone.cost_s > both.cost_s, "it begins first, and may not hold up the rest"


def test_what_the_cpu_checks_is_a_task_that_leaves_the_card_to_others():
    problem, other = square(1, 2, 16, 64), square(1, 2, 32, 64)
    some = [backends.get(name) for name in ("cpu", "hopper", "wmma", "fa4")]
    found = check.tasks([(problem, one) for one in some] + [(other, some[0]), (other, some[1])])
    told = [([fields["backend"] for fields in task.owed], task.host) for task in found]
    assert told == [
        (["cpu"], True),
        (["hopper", "wmma"], False),
        (["fa4"], False),
        (["cpu"], True),
        (["hopper"], False),
    ]
    assert len({task.name for task in found}) == 5
