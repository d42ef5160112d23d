"""Records of a part that is measured again: which they are, and that none is lost."""

from __future__ import annotations

import json

from support.notebook_tools import values

from flashcore.pipeline import superseding

PLANNED = ["01_a", "02_b", "03_c"]


def line(kind: str, value=None, **data) -> str:
    return json.dumps({"kind": kind, "data": {**({"value": value} if value is not None else {}), **data}})


def ceiling(value) -> str:
    return line("ceiling", value)


def done(name: str) -> str:
    return line("notebook", name=name)


def test_a_part_is_what_lies_before_its_own_final_record():
    lines = [ceiling(1), done("01_a"), ceiling(2), ceiling(3), done("02_b"), ceiling(4), done("03_c"), line("verdict")]
    kept, gone = superseding.split(lines, ["02_b"], planned=PLANNED)
    assert values(gone) == [2, 3] and values(kept) == [1, 4] and done("02_b") in gone
    assert sorted(kept + gone) == sorted(lines)


def test_what_was_added_by_hand_after_the_verdict_stays():
    lines = [ceiling(1), done("01_a"), line("verdict"), ceiling("by hand"), line("verdict", redo=["01_a"])]
    kept, gone = superseding.split(lines, ["01_a"], planned=PLANNED)
    assert values(kept) == ["by hand"] and values(gone) == [1]


def test_an_interrupted_stretch_is_of_the_part_that_was_to_come():
    lines = [ceiling(1), done("01_a"), ceiling("half")]
    assert values(superseding.split(lines, ["02_b"], planned=PLANNED)[1]) == ["half"]
    assert values(superseding.split(lines, ["03_c"], planned=PLANNED)[1]) == []
    lines += [line("verdict", redo=["03_c"]), ceiling("half again"), line("verdict", redo=["03_c"])]
    assert values(superseding.split(lines, ["03_c"], planned=PLANNED)[1]) == ["half again"]
    assert values(superseding.split(lines, ["02_b"], planned=PLANNED)[1]) == ["half"]


def test_every_earlier_go_of_a_part_is_superseded_and_damaged_lines_stay_in_order():
    lines = [ceiling(1), done("01_a"), '{"kind": "ceil', ceiling(2), done("02_b"), line("verdict"), ceiling(3),
             done("01_a"), line("verdict")]  # fmt: skip
    kept, gone = superseding.split(lines, ["01_a"], planned=PLANNED)
    assert values(gone) == [1, 3] and values(kept) == [2] and lines[2] in kept
