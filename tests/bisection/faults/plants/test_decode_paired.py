"""Bugs of the decode kernel by pairs: those of `decode`, and where their text is another one."""

from __future__ import annotations

from flashcore import backends
from flashcore.bisection.faults.planting import Source
from flashcore.bisection.faults.plants import PLANTS, decode, decode_paired


def test_every_bug_of_decode_is_planted_here_but_those_of_two_warpgroups():
    assert set(decode.DECODE) - set(decode_paired.PAIRED) == set(decode_paired.OF_TWO_WARPGROUPS)
    assert set(decode_paired.PROBLEMS) == set(decode_paired.PAIRED) == set(PLANTS["decode-paired"])
    paired = backends.get("decode-paired")
    for name, problem in decode_paired.PROBLEMS.items():
        assert paired.why_not(problem) is None, name


def test_every_patch_fits_its_text_once_and_changes_it():
    sources = {name: plant for name, plant in decode_paired.PAIRED.items() if isinstance(plant, Source)}
    assert len(sources) > 55
    for name, plant in sources.items():
        if plant.edits:  # else it is a bug of the host
            assert plant.text("attention_decode_paired") != plant.unpatched("attention_decode_paired"), name


def test_a_block_with_two_heads_asks_the_backend_that_the_bug_is_in(monkeypatch):
    paired = backends.get("decode-paired")
    monkeypatch.setattr(type(paired), "paged_arguments", lambda self, *arguments: ([self.kernel], 8, None))
    planted = decode_paired.PAIRED["G34"].apply(paired)
    assert planted.paged_arguments(False) == (["attention_decode_paired"], 8, None)
    assert planted.paged_arguments(True) == (["attention_decode_paired"], 4, None), "a traced call has half the blocks"
