"""What a plan holds: the shapes that are asked for on a GPU, small ones without."""

from __future__ import annotations

import pytest

from flashcore.errors import UnknownName
from flashcore.paging_survey.plan import plan_for


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
