"""What a plan holds: the shapes that are asked for on a GPU, small ones without."""

from __future__ import annotations

import pytest

from flashcore.errors import UnknownName
from flashcore.surveys.paging.plan import ModelShape, decode_problem, plan_for, report_shape


def test_a_plan_on_a_gpu_holds_the_shapes_that_are_asked_for():
    full, quick = plan_for("full", True), plan_for("quick", True)
    assert [p.label() for p in full.decode] == [
        "B=64,H=32,Hkv=8,Sq=1,Sk=4096,D=128", "B=16,H=16,Sq=1,Sk=8192,D=64", "B=1,H=32,Hkv=8,Sq=1,Sk=32768,D=128",
    ]  # fmt: skip
    assert full.shares == (1.0, 0.5, 0.3, 0.1) and full.append.batch == 64
    assert full.batches == (1, 2, 4, 8, 16, 32, 64, 128, 256) and set(quick.batches) < set(full.batches)
    model, report = full.models
    assert (model.layers, model.stated_batch, model.context) == (32, 64, 8192) and report.layers == 1
    assert plan_for("quick", True, report_layers=24).models[1].words().startswith("24 layers, 16 query heads")
    with pytest.raises(UnknownName, match="quick, full"):
        plan_for("fast", True)


def test_the_served_models_differ_in_group_and_head_dim_and_name_their_cards():
    full, quick = plan_for("full", True), plan_for("quick", True)
    assert full.served_batches == (1, 16, 64, 256) and len(full.served) == 3
    assert len({model.num_heads_q // model.num_heads_kv for model in full.served}) == 3
    assert {model.head_dim for model in full.served} == {64, 128} and all("/" in model.card for model in full.served)
    assert [p.label() for p in full.shapes] == [
        "B=64,H=32,Hkv=8,Sq=1,Sk=4096,D=128", "B=16,H=16,Sq=1,Sk=8192,D=64", "B=1,H=32,Hkv=8,Sq=1,Sk=32768,D=128",
        "B=128,H=32,Hkv=8,Sq=1,Sk=1024,D=128", "B=256,H=64,Hkv=8,Sq=1,Sk=512,D=128",
    ]  # fmt: skip
    assert full.pages == (16, 64, 128) and full.dtypes == ("float16", "bfloat16")
    assert full.further.lengths == (100, 16_000) and full.further.tokens == (2, 4)
    assert full.further.prefix % full.page_size == 0 and full.further.prefix < full.further.problem.seqlen_k
    assert len(quick.served) * len(quick.served_batches) == 2 and len(quick.shapes) == 2 and quick.further is None


def test_a_plan_without_a_gpu_times_the_reference_alone_and_is_small():
    quick, full = plan_for("quick", False), plan_for("full", False)
    for plan in (quick, full):
        assert plan.device == "cpu" and {plan.decode_backend, plan.prefill_backend, plan.dense_backend} == {"reference"}
        assert plan.peer == "sdpa-math" and plan.models[0].stated_batch in plan.batches
        assert max(p.batch * p.num_heads_kv * p.seqlen_k for p in (*plan.decode, *plan.prefill, plan.append)) < 10_000
    assert (quick.accuracy.seqlen_k, full.accuracy.seqlen_k) == (4096, 8192)
    assert plan_for("quick", True).device == "cuda"


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_every_stated_batch_is_measured(profile):
    plan = plan_for(profile, True)
    assert all(model.stated_batch in plan.batches for model in plan.models)
    assert plan.sparse_share in plan.shares and plan.shares[0] == 1.0


def test_a_model_in_words_and_as_one_layers_step():
    model = ModelShape("model", 32, 32, 8, 128, 8192, stated_batch=64)
    assert model.words() == "32 layers, 32 query heads, 8 KV heads, head_dim 128, context 8192"
    assert report_shape().words().startswith("1 layer, 16 query heads")
    problem = model.problem(7)
    assert problem == decode_problem(7, 32, 8, 8192, 128)
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k, problem.causal) == (7, 1, 8192, False)
