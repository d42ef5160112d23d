"""Planting a bug: the patch fits or is refused, the backend itself stays as it is, and what is not planted says why."""

from __future__ import annotations

import pytest

from flashcore import backends
from flashcore.bisection.bisecting import bisect
from flashcore.bisection.faults import catalogue, planting
from flashcore.bisection.faults.catalogue import FAULTS
from flashcore.bisection.faults.planting import Override, Source
from flashcore.bisection.faults.plants import decode
from flashcore.errors import FaultError
from flashcore.gpu.build import kernel_source
from flashcore.gpu.options import INVARIANT, MASKS, without_options


@pytest.mark.slow
def test_planting_leaves_the_backend_itself_alone():
    for fault in FAULTS:
        for backend in fault.plants if fault.found_by != "selection" else ():
            planted = fault.plant(backend)
            assert planted is not backends.get(backend) and planted.id == backend
    assert bisect("cpu", planting.PLAIN).passed
    assert backends.get("wmma").source is None


def test_a_patch_that_no_longer_fits_is_an_error():
    for text in ("no such text stands there", "__syncthreads();"):
        with pytest.raises(FaultError, match="stands there (0|2) times instead of once"):
            Source(((text, ""),)).apply(backends.get("scalar"))
    for plant in (Override({"no_such_method": lambda self: None}), Source((), {"no_such_method": None})):
        with pytest.raises(FaultError, match="which backend 'wmma' no longer has"):
            plant.apply(backends.get("wmma"))


@pytest.mark.parametrize("name", ["hopper", "hopper-unsplit", "hopper-paged", "decode"])
@pytest.mark.parametrize("options", [(), (MASKS,), (INVARIANT,), (MASKS, INVARIANT)], ids=", ".join)
def test_the_source_that_is_patched_has_the_options_that_the_bug_is_of(name, options):
    """And the backend promises and takes what the source has, no more."""
    honest = backends.get(name)
    plant = Source((), masks=MASKS in options, invariant=INVARIANT in options)
    planted = plant.apply(honest)
    directives = [line for line in planted.source.splitlines() if line.lstrip().startswith("#")]
    for option in (MASKS, INVARIANT):
        assert any(option in line for line in directives) == (option in options), option
    assert planted.source == without_options(kernel_source(honest.kernel), but=options)
    assert planted.masks == (honest.masks if MASKS in options else ())
    assert planted.paged_masks == (honest.paged_masks if MASKS in options else ())
    assert planted.batch_invariant == (INVARIANT in options) and honest.batch_invariant
    asks = planting.PLAIN.with_(seqlen_q=4, batch_invariant=True)
    assert (planted.why_not(asks) is None) == (INVARIANT in options)
    if INVARIANT not in options:
        assert "batch" in planted.why_not(asks)


def test_a_bug_of_the_mode_can_replace_methods_too():
    edits = (("{outgrown(page_sum[0]), outgrown(page_sum[1])}", "{true, true}"),)
    planted = Source(edits, {"entry": lambda self, problem, device: "another"}, invariant=True).apply(
        backends.get("decode")
    )
    assert planted.entry(planting.PLAIN, 0) == "another" and planted.batch_invariant
    assert "outgrown(page_sum[0])" not in planted.source
    assert (
        backends.get("decode").source is None and backends.get("decode").entry(planting.PLAIN, 0) == "attention_decode"
    )
    without = Source(edits)
    with pytest.raises(FaultError, match="stands there 0 times instead of once"):
        without.apply(backends.get("decode"))


def test_why_a_bug_is_not_planted_is_said():
    assert catalogue.get("F3").why_not("cublaslt") is None
    assert catalogue.get("F4").why_not("cpu") == "makes no sense in cpu"
    assert catalogue.get("F3").why_not("cublaslt-loop") == "planted in cublaslt, whose code this one runs"
    assert catalogue.get("G4").why_not("cublaslt-loop") == "makes no sense in cublaslt-loop"
    assert (
        catalogue.get("F10").why_not("cpu") == "makes no sense in cpu"
        and catalogue.get("F10").why_not("decode") is None
    )
    assert catalogue.get("F3").why_not("hopper-paged") == "planted in hopper, whose code this one runs"
    assert catalogue.get("F13").why_not("cpu") == "no bug of a backend: planted in page_selection"
    assert catalogue.get("F16").why_not("cpu").startswith("no bug of a backend: tests/")


def test_the_problem_that_shows_a_bug_may_be_another_in_a_backend():
    assert catalogue.get("F3").problem_in("cpu") == catalogue.get("F3").problem_in("hopper-paged") == planting.PLAIN
    assert catalogue.get("F3").problem_in("decode") == decode.PLAIN
    assert (
        catalogue.get("G38").problem_in("decode").page_size == catalogue.get("G38").problem_in("hopper-paged").page_size
    )
