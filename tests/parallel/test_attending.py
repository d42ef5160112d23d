"""`parallel.attention`: what one card gives, on two and three ranks, the same bits twice; bad calls end everywhere."""

from __future__ import annotations

import pytest
import torch
from support.ranks import CASES, Case, put_together, results

from flashcore.measure.check import expected
from flashcore.numerics.tolerance import compare
from flashcore.parallel.plan import PLANS

REFUSED = {
    "lengths of q": "The ranks hold 8, 6 rows of q, and 14 rows cut for 2 ranks are 7, 7; cut the whole with",
    "lengths of k": "The ranks hold 6, 8 rows of k, and 14 rows cut for 2 ranks are 7, 7; cut the whole with",
    "too short": "The length of q is 2, which gives no 4 chunks, two for each of 2 ranks; use fewer ranks",
    "causal": "Ranks 0 and 1 were called with different values of causal; all ranks have to make the same call.",
    "scale": "Ranks 0 and 1 were called with different values of softmax_scale;",
    "plan differs": "Ranks 0 and 1 were called with different values of plan;",
    "DTensor": "q is a DTensor; pass q.to_local(), the part that this rank holds.",
    "gradients": "Gradients are asked for, and plan 'ring' has none; choose 'gather', or call it under",
    "gradients differ": "Ranks 0 and 1 were called with different values of requires_grad;",
    "mapped": "q, k or v is mapped by torch.vmap",
    "alone": "seqlen_q and seqlen_k are given together, or neither of them;",
    "given": "holds 10 rows of a sequence of seqlen_k=20, and k has 8; cut the whole with flashcore.parallel.shard",
    "given too short": "seqlen_q is 3, which gives no 4 chunks",
    "a list": "mesh is [0, 1]; pass a DeviceMesh of one dimension",
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_all_rows_are_those_of_one_card_and_the_same_on_a_second_run(ranks, name, plan):
    case = CASES[name]
    q, k, v = case.inputs()
    truth = expected(q, k, v, case.problem(*case.seqlens), round_scores=False)
    got = [ranks[rank]["cases"][name, plan] for rank in range(case.ranks)]
    for kind in ("out", "alone"):
        whole = put_together([one[kind] for one in got], case.seqlens[0])
        assert whole.dtype == q.dtype
        found = compare(whole, truth.out, atol=truth.out_atol, rtol=truth.out_rtol)
        assert found.passed, found.sentence()
    lse = put_together([one["lse"] for one in got], case.seqlens[0])
    found = compare(lse, truth.lse, atol=truth.lse_atol, rtol=truth.lse_rtol)
    assert lse.dtype == torch.float32 and found.passed, found.sentence()
    assert all(one["same"] and one["strides"] for one in got)
    if name == "rows without keys":
        assert int((lse == -torch.inf).sum()) == 25 * case.heads[0]


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_call_is_refused_on_every_rank_in_one_sentence(ranks, what):
    for got in ranks[:2]:
        kind, words = got["refused"][what]
        assert kind == "InvalidProblem" and REFUSED[what] in words


@pytest.mark.slow
def test_names_that_nobody_has_are_told_with_what_was_meant(ranks):
    for got in ranks[:2]:
        assert got["refused"]["plan"] == ("UnknownName", "There is no plan 'gathr'; choose one of: gather, ring. "
                                          "Did you mean 'gather'?")  # fmt: skip
        assert got["refused"]["backend"][0] == "UnknownName"


@pytest.mark.slow
@pytest.mark.parametrize(("what", "own"), [("one refuses", "convert them to one"), ("no tensor", "have to be torch"),
                                           ("one backend", "There is no backend 'no-such'"),
                                           ("elsewhere", "q lies on 'meta', and the mesh is one of cpu")])  # fmt: skip
def test_where_one_rank_refuses_its_arguments_the_other_does_not_wait(ranks, what, own):
    words = [got["refused"][what] for got in ranks[:2]]
    refuses = 1 if what == "elsewhere" else 0
    assert words[refuses][0] == ("UnknownName" if what == "one backend" else "InvalidProblem")
    assert own in words[refuses][1]
    other = f"Rank {refuses} refused what it was called with, and says why; so no rank goes on."
    assert words[1 - refuses] == ("InvalidProblem", other)


@pytest.mark.slow
def test_after_all_that_was_refused_a_call_still_works(ranks):
    assert all(got["refused"]["after all"] for got in ranks[:2])


# --------------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_on_gpus_rows_are_within_the_kernels_bound_of_float64_and_of_one_card(tmp_path, count):
    """With 4 GPUs the first sequence has 128k keys."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"this machine has fewer than {count} GPUs")
    for got in results(tmp_path / "nccl", "gpu", count):
        for (case, plan), found in got.items():
            assert isinstance(case, Case) and found["wrong"] == [], (case, plan, found["wrong"])
            assert found["same"], (case, plan, "two runs gave different bits")
            assert found["off one card"] < 0.05 and found["lse off one card"] < 2e-3, (case, plan, found)
            # Of 16 bits, of which bfloat16 keeps 8: a rounding is 4e-3 at most, and the sums have a few of them.
            assert all(share < 0.01 for share in found.get("gradients off one card", ())), (case, plan, found)
