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
