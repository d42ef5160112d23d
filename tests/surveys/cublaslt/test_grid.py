"""The survey's grid: which products it covers, and how they are written into records and read back."""

from __future__ import annotations

import pytest
from support import synthetic_survey as synthetic

from flashcore.errors import InvalidProblem, UnknownName
from flashcore.gpu.cublaslt import Product
from flashcore.surveys.cublaslt import facts
from flashcore.surveys.cublaslt.grid import (
    GROUPS,
    USUAL,
    candidates_of,
    lean,
    read_product,
    survey_grid,
    whole,
    write_product,
)  # fmt: skip

QK = Product(2048, 128, 64, transpose_b=True)


def test_the_grid_begins_with_the_reports_products_and_covers_every_question():
    for profile in ("quick", "full"):
        cases = survey_grid(profile)
        assert [c.id for c in cases[:2]] == ["report-qk", "report-pv"]
        assert cases[0].product == QK and cases[1].product == Product(2048, 64, 128)
        assert len({c.id for c in cases}) == len(cases)
        assert {c.group for c in cases} == set(GROUPS)
        assert all(c.limit_mb <= 256 for c in cases)
    full = survey_grid("full")
    assert {c.product.batch for c in full} >= {1, 256} and {c.limit_mb for c in full} >= {0, 256}
    assert {c.product.order for c in full} == {"row", "column"}
    assert {c.product.out_dtype for c in full} == {"float16", "bfloat16", "float32"}
    odd = {c.product.row_b - 64 for c in full if c.group == "alignment"}
    assert odd == {1, 2, 4, 8}, "rows of K and V that start at 2, 4, 8 and 16 bytes"
    assert len(survey_grid("quick")) < len(full) / 2


def test_an_unknown_profile_is_an_error():
    with pytest.raises(UnknownName, match="quick, full"):
        survey_grid("fast")


def test_a_product_is_read_back_from_its_text():
    for case in survey_grid("full"):
        assert read_product(write_product(case.product)) == case.product
    assert write_product(QK) == "2048x128x64 T f16>f16"
    with pytest.raises(InvalidProblem, match="no matrix product"):
        read_product("2048x128 f16")


@pytest.mark.slow
def test_what_most_candidates_have_is_left_out_of_a_record_and_put_back_by_readers():
    trials = synthetic.survey_trials("full")
    small = [t for t in trials if t.backend == "cublaslt" and t.data.get("rank") is not None]
    assert not any(t.data.get(k) == v for t in small for k, v in USUAL.items())
    old = [whole(t) for t in trials]  # as records were before: every attribute in each line
    assert all(set(USUAL) <= set(t.data) for t in old if t in candidates_of(old))
    assert candidates_of(trials) == candidates_of(old)
    assert facts.small_grid(trials) == facts.small_grid(old)
    assert facts.regrets(trials) == facts.regrets(old)
    assert lean({"split_k": 1, "workspace_bytes": 64, "tensor_core": None, "cta_swizzling": False}) == {
        "workspace_bytes": 64, "tensor_core": None, "cta_swizzling": False,
    }  # fmt: skip
    peer = next(t for t in trials if t.backend == "cublas")
    assert whole(peer) is peer
