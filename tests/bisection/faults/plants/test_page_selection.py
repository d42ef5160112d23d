"""The bug of the kernel that selects pages: a counter that others change takes the place of the sum before."""

from __future__ import annotations

from support.planted_bugs import instructions_apart

from flashcore import backends
from flashcore.bisection.faults import catalogue
from flashcore.bisection.faults.planting import Source
from flashcore.bisection.faults.plants import page_selection
from flashcore.gpu import build


def test_the_kernel_is_one_and_of_no_backend():
    assert page_selection.KERNEL in build.kernel_names()
    assert page_selection.KERNEL not in {backend.kernel for backend in backends.all_backends()}


def test_each_warps_place_no_longer_comes_from_the_warps_before_it():
    apart = instructions_apart(page_selection.KERNEL, Source(page_selection.RACY_BASE))
    gone, put = ([line[1:] for line in apart if line[0] == sign] for sign in "-+")
    assert "before.above += chosen_smem[other].above;" in gone and "if (other < warp) {" in gone
    assert "Chosen before = next_smem;" in put and any("__nanosleep" in line for line in put)
    assert sum("__syncthreads" in line for line in put) == 1, "nothing orders the warps after the counter is cleared"


def test_it_is_planted_as_f13_alone():
    plant = catalogue.get("F13").plants[page_selection.KERNEL]
    assert plant.edits == page_selection.RACY_BASE
    assert [f.id for f in catalogue.FAULTS if page_selection.KERNEL in f.plants] == ["F13"]
