"""Bugs of the cuBLASLt backends: planted beside small pages, and found at their stages on a GPU."""

from __future__ import annotations

import pytest
from support.planted_bugs import assert_clean_where_bugs_are_planted, run_and_find_all

from flashcore import backends
from flashcore.bisection.faults import catalogue, planting
from flashcore.bisection.faults.catalogue import FAULTS
from flashcore.bisection.faults.planting import Override
from flashcore.bisection.faults.plants import cublaslt

IN_CUBLASLT = [(f.id, b) for f in FAULTS for b in f.plants if b in ("cublaslt", "cublaslt-batched")]


def test_a_patch_and_a_wrong_method_are_planted_together():
    planted = catalogue.get("F6").plant("cublaslt")
    assert planted.alpha(planting.PLAIN) == 1.0 != backends.get("cublaslt").alpha(planting.PLAIN)
    assert "* params.softmax_scale" in planted.source and backends.get("cublaslt").source is None
    assert planted.page_size(planting.PLAIN) == 60, "small pages, so that a small problem has several and a tail"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_bug_of_cublaslt_is_found_at_its_stage():
    trials = run_and_find_all("cublaslt,cublaslt-batched", IN_CUBLASLT)
    said = {t.variant: t.data["finding"] for t in trials if t.data.get("error")}
    assert "F5" in said and "8 bytes (int64) for STRIDED_BATCH_OFFSET" in said["F5"]
    if "F4" in said:  # a cuBLASLt that took the layouts would have given wrong scores, found there as well
        assert "CUBLAS_STATUS_" in said["F4"] and "n=20" in said["F4"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cublaslt", "cublaslt-batched"])
def test_cublaslt_is_clean_where_its_bugs_are_planted(backend):
    """In the small pages of the plants."""
    small = Override({"pages_of": cublaslt.LT_PAGE}).apply(backends.get(backend))
    assert_clean_where_bugs_are_planted(small)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cublaslt", "cublaslt-batched", "cublaslt-loop"])
def test_every_algorithm_that_a_backend_names_is_the_one_that_runs(backend):
    from flashcore.surveys.cublaslt.labels import wrong_labels

    assert wrong_labels(backends.get(backend), catalogue.get("F14").problem) == []


def test_strides_are_wrong_in_the_type_and_the_step_that_is_named():
    import numpy as np
    import torch

    k = torch.empty(2, 2, 200, 64)
    given = {
        name: cublaslt.CUBLASLT[name].apply(backends.get("cublaslt")).strides("k", k) for name in ("F5", "F11", "F12")
    }
    assert type(given["F5"][1]) is np.int32 and given["F5"][1] == 12800
    assert given["F11"] == [51200, 25600, 64] and given["F12"] == [25600, 0, 64]


def test_pages_are_small_and_the_last_one_is_left_out_where_that_is_the_bug():
    planted = cublaslt.CUBLASLT["G16"].apply(backends.get("cublaslt"))
    assert planted.pages_of == cublaslt.LT_PAGE and planting.PLAIN.seqlen_k % cublaslt.LT_PAGE == 20
    assert planted.num_pages(planting.PLAIN, 60) == 3 and cublaslt.LT_PAGE % 8


def test_a_tail_in_columns_is_told_the_wrong_way_round():
    right, wrong = (
        kind(100, 20, 64, transpose_b=True).matrices() for kind in (cublaslt.cublaslt.Product, cublaslt._TailInColumns)
    )
    assert (wrong[1].rows, wrong[1].columns) == (right[1].columns, right[1].rows) != (right[1].rows, right[1].columns)
    assert wrong[0] == right[0] and wrong[2] == right[2]
