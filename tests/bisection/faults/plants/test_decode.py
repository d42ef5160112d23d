"""Bugs of the backends over pages: what makes them show is no bug, and they are found on a GPU."""

from __future__ import annotations

import pytest
from support.planted_bugs import assert_clean_where_bugs_are_planted, run_and_find_all

from flashcore import backends
from flashcore.bisection.bisecting import bisect
from flashcore.bisection.faults.catalogue import FAULTS
from flashcore.bisection.faults.planting import Override
from flashcore.bisection.faults.plants import decode, hopper

OVER_PAGES = ("decode", "decode-paired", "hopper-paged", "cublaslt-paged")
IN_PAGED = [(f.id, b) for f in FAULTS for b in f.plants if b in OVER_PAGES]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_bug_over_pages_is_found_at_its_stage():
    trials = run_and_find_all(",".join(OVER_PAGES), IN_PAGED)
    [selecting] = [t for t in trials if t.variant == "F13"]
    assert selecting.backend == "page_selection" and "other pages" in selecting.data["finding"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", OVER_PAGES)
def test_backends_over_pages_are_clean_where_their_bugs_are_planted(backend):
    assert_clean_where_bugs_are_planted(backends.get(backend))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["normal", "large"])
def test_two_heads_a_block_alone_do_no_harm(pattern):
    """What makes a head's leftovers show in a traced call is no bug by itself."""
    found = bisect(Override(decode.TWO_HEADS_A_BLOCK).apply(backends.get("decode")), decode.TWO_HEADS, pattern=pattern)
    assert found.passed, found.finding()


def test_the_problems_are_ones_that_the_kernel_takes_and_name_every_bug():
    assert set(decode.PROBLEMS) == set(decode.DECODE)
    for name, problem in decode.PROBLEMS.items():
        assert backends.get("decode").why_not(problem) is None, name
    assert decode.PROBLEMS["G46"].num_heads_q // decode.PROBLEMS["G46"].num_heads_kv * 8 > 64, "more than a tile"
    assert decode.PROBLEMS["G27"].seqlen_k % decode.PLAIN.page_size == 0, "a last unit without a tail"


def test_the_softmax_is_shared_with_hopper_and_so_are_its_bugs():
    for name in decode.FROM_THE_HEADERS:
        assert decode.DECODE[name] is hopper.SHARED[name]


def test_whole_tiles_leave_out_the_heads_that_fill_none():
    problem = decode.PROBLEMS["G46"]  # 9 heads a group, of which 8 fill a tile of 64 rows
    assert decode._whole_tiles(problem) == 1 and decode._whole_tiles(problem.with_(num_heads_q=32)) == 2
    assert decode._whole_tiles(decode.PLAIN) == 1
