"""Bugs of the Hopper kernel: what makes them show is no bug, and they are found on a GPU."""

from __future__ import annotations

import pytest
from support.planted_bugs import assert_clean_where_bugs_are_planted, instructions_apart, run_and_find_all

from flashcore import backends
from flashcore.faults.catalogue import FAULTS
from flashcore.faults.planting import Source
from flashcore.faults.plants import hopper

IN_HOPPER = [(f.id, b) for f in FAULTS for b in f.plants if b in ("hopper", "hopper-unsplit")]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_bug_of_the_hopper_kernel_is_found_at_its_stage():
    trials = run_and_find_all("hopper,hopper-unsplit", IN_HOPPER)
    hung = [t for t in trials if t.variant in ("G28", "G32") and t.status == "ok"]
    assert [t.data["outcome"] for t in hung] == ["crashed"] * 3
    assert "timeout" not in [t.data["ended"] for t in hung], "the watchdog ends a hang, not the time limit"


@pytest.mark.gpu
@pytest.mark.parametrize("edits", [(), (hopper.TWO_SPLITS,), hopper.WATCHDOG], ids=["as it is", "two", "watchdog"])
def test_hopper_is_clean_where_its_bugs_are_planted(edits):
    """With two chains of pages as with four, and with barriers that end a hang."""
    assert_clean_where_bugs_are_planted(Source(edits).apply(backends.get("hopper")))
    if hopper.TWO_SPLITS not in edits:
        assert_clean_where_bugs_are_planted(Source(edits).apply(backends.get("hopper-unsplit")))


def test_a_barrier_with_a_watchdog_traps_and_is_otherwise_the_same():
    apart = instructions_apart(backends.get("hopper").kernel, Source(hopper.WATCHDOG))
    assert any("trap" in line for line in apart) and any("globaltimer" in line for line in apart)


@pytest.mark.parametrize("plants", [hopper.SPLIT, hopper.UNSPLIT], ids=["split", "unsplit"])
def test_bugs_that_hang_have_the_watchdog_with_them(plants):
    for name in {"G28", "G32"} & set(plants):
        assert plants[name].edits[: len(hopper.WATCHDOG)] == hopper.WATCHDOG


def test_where_keys_are_split_bugs_of_later_pages_have_two_chains():
    for name in hopper.LATER_PAGES:
        assert hopper.SPLIT[name].edits == (hopper.TWO_SPLITS, *hopper.LATER_PAGES[name].edits)
        assert hopper.UNSPLIT[name] is hopper.LATER_PAGES[name]
