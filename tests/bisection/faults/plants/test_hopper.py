"""Bugs of the Hopper kernel: what makes them show is no bug, and they are found on a GPU."""

from __future__ import annotations

import pytest
from support.planted_bugs import assert_clean_where_bugs_are_planted, instructions_apart, run_and_find_all

from flashcore import backends
from flashcore.bisection.bisecting import bisect
from flashcore.bisection.faults import catalogue
from flashcore.bisection.faults.catalogue import FAULTS
from flashcore.bisection.faults.planting import Source
from flashcore.bisection.faults.plants import hopper
from flashcore.gpu import options
from flashcore.measure.check import check_attention

ALL_WARPS_ARE_WHOLE = ("const bool whole_warp = !HAS_LENGTHS || ", "const bool whole_warp = true || ")
HANG = {"G28", "G32", "G74"}
IN_HOPPER = [(f.id, b) for f in FAULTS for b in f.plants if b in ("hopper", "hopper-unsplit")]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_bug_of_the_hopper_kernel_is_found_at_its_stage():
    trials = run_and_find_all("hopper,hopper-unsplit", IN_HOPPER)
    hung = [t for t in trials if t.variant in HANG and t.status == "ok"]
    assert [t.data["outcome"] for t in hung] == ["crashed"] * 5
    assert "timeout" not in [t.data["ended"] for t in hung], "the watchdog ends a hang, not the time limit"


@pytest.mark.gpu
@pytest.mark.parametrize("edits", [(), (hopper.TWO_SPLITS,), hopper.WATCHDOG], ids=["as it is", "two", "watchdog"])
def test_hopper_is_clean_where_its_bugs_are_planted(edits):
    """With two chains of pages as with four, and with barriers that end a hang; under masks and without."""
    assert_clean_where_bugs_are_planted(hopper.masked(*edits).apply(backends.get("hopper")))
    if hopper.TWO_SPLITS not in edits:
        assert_clean_where_bugs_are_planted(hopper.masked(*edits).apply(backends.get("hopper-unsplit")))


def test_a_barrier_with_a_watchdog_traps_and_is_otherwise_the_same():
    apart = instructions_apart(backends.get("hopper").kernel, Source(hopper.WATCHDOG))
    assert any("trap" in line for line in apart) and any("globaltimer" in line for line in apart)


@pytest.mark.parametrize("plants", [hopper.SPLIT, hopper.UNSPLIT], ids=["split", "unsplit"])
def test_bugs_that_hang_have_the_watchdog_with_them(plants):
    for name in HANG & set(plants):
        assert plants[name].edits[: len(hopper.WATCHDOG)] == hopper.WATCHDOG


def test_where_keys_are_split_bugs_of_later_pages_have_two_chains():
    for name in hopper.LATER_PAGES:
        assert hopper.SPLIT[name].edits == (hopper.TWO_SPLITS, *hopper.LATER_PAGES[name].edits)
        assert hopper.UNSPLIT[name] is hopper.LATER_PAGES[name]


# ------------------------------------------------------------------------------------------------ masks


def directives(source: str) -> str:
    """The lines of a source that the preprocessor acts on."""
    return "\n".join(line for line in source.splitlines() if line.lstrip().startswith("#"))


def test_bugs_of_masks_are_planted_in_the_source_with_masks_and_others_in_the_one_without():
    ours = ("hopper", "hopper-unsplit")
    masks = {f.id for f in FAULTS if any(b in f.plants and f.problem_in(b).masks for b in ours)}
    assert masks == {f"G{number}" for number in range(53, 75)} == set(hopper.IN_MASKS)
    for backend, plants in (("hopper", hopper.SPLIT), ("hopper-unsplit", hopper.UNSPLIT)):
        for name, plant in plants.items():
            if isinstance(plant, Source):
                assert plant.masks == (name in masks), name
                planted = plant.apply(backends.get(backend))
                assert bool(planted.masks) == plant.masks == (options.MASKS in directives(planted.source)), name
                assert not planted.batch_invariant and options.INVARIANT not in directives(planted.source), name
    assert set(hopper.SPLIT) & masks == set(hopper.IN_WINDOWS)


@pytest.mark.parametrize(("backend", "tile_m"), [("hopper", 128), ("hopper-unsplit", 256)])
@pytest.mark.parametrize("name", sorted(hopper.IN_WINDOWS))
def test_where_a_window_begins_a_bug_has_what_it_needs_to_show(name, backend, tile_m, monkeypatch):
    """The second warpgroup of a tile begins a page after the first; a ring that has to come round is shorter."""
    monkeypatch.setattr("flashcore.backends.hopper.multiprocessors", lambda device: 132)
    problem = catalogue.get(name).problem_in(backend)
    assert dict(backends.get(backend).defines(problem, 0)).get("FLASHCORE_NUM_CONSUMERS", 4) * 64 == tile_m
    position = problem.seqlen_k - problem.seqlen_q
    begins = [max(0, position + row - problem.window_left) for row in (0, 63, 64)]
    assert begins[2] // 64 == begins[0] // 64 + 1 and begins[0] % 64 > 0
    if name == "G69":  # a page without a mask at its end, which the last row of a warpgroup sees in part
        assert problem.window == (40, -1) and begins[1] // 64 * 64 < begins[1] < problem.seqlen_k // 64 * 64 - 64
    if name == "G70":
        assert begins[1] // 64 > begins[0] // 64, "rows of one warpgroup that see nothing of its first page"
    if name == "G74":
        assert -(-problem.seqlen_k // 64) - begins[0] // 64 > 8, "more pages than slots"


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [catalogue.CAPPED, catalogue.PADDED.with_(softcap=30.0)], ids=["capped", "padded"])
def test_without_the_series_a_softcap_is_as_right(problem):
    """What makes bugs of the softcap show on every page is no bug by itself."""
    planted = hopper.masked(hopper.CAPPED_BY_EXPONENTIALS).apply(backends.get("hopper-unsplit"))
    assert bisect(planted, problem).passed


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", ["right", "ragged"])
def test_a_warp_that_stores_beyond_its_sequence_is_seen_by_a_check(lengths):
    """No stage of a sequence is wrong: what was stored lies in padding, or in another sequence for a while."""
    problem = catalogue.PADDED.with_(lengths=lengths, batch=6)
    assert check_attention("hopper-unsplit", problem).status == "ok"
    planted = hopper.masked(ALL_WARPS_ARE_WHOLE).apply(backends.get("hopper-unsplit"))
    assert check_attention(planted, problem).status == "failed"


def test_the_patch_of_a_warp_that_stores_beyond_its_sequence_still_fits():
    assert len(instructions_apart("attention_hopper", hopper.masked(ALL_WARPS_ARE_WHOLE))) == 2
