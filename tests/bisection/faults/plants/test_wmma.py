"""Bugs of kernel `wmma`: every one changes the code by what it names, and copies that come late are no bug."""

from __future__ import annotations

import pytest
from support.planted_bugs import code_lines, instructions_apart

from flashcore import backends
from flashcore.bisection.faults.planting import Override, Source
from flashcore.bisection.faults.plants import PLANTS
from flashcore.bisection.faults.plants.wmma import LATE, WMMA

KERNEL = backends.get("wmma").kernel
PATCHES = [name for name, plant in WMMA.items() if isinstance(plant, Source)]


@pytest.mark.parametrize("name", PATCHES)
def test_a_bug_is_a_few_lines_of_code_beside_what_makes_it_show(name):
    apart = instructions_apart(KERNEL, WMMA[name])
    assert 0 < len(apart) <= 12, apart


def test_no_two_bugs_give_the_same_kernel():
    texts = {name: tuple(code_lines(WMMA[name].text(KERNEL))) for name in PATCHES}
    assert len(set(texts.values())) == len(texts)


def test_late_copies_only_sleep_and_are_in_the_bug_of_the_missing_barrier():
    late = instructions_apart(KERNEL, Source(LATE))
    assert late == ["+if (warp == 1) __nanosleep(20000);"]
    bug = instructions_apart(KERNEL, WMMA["G1"])
    assert set(late) < set(bug) and [line for line in bug if line not in late] == ["-__syncthreads();"]


def test_the_backend_is_planted_with_these_and_the_hosts_with_wrong_methods():
    assert PLANTS["wmma"] is WMMA
    assert {name for name, plant in WMMA.items() if isinstance(plant, Override)} == {"F11", "F12", "G50", "G6"}
