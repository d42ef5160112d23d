"""Records of a part that is measured again: which they are, and that none is lost."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.notebook_tools import values

from flashcore.errors import RecordsError
from flashcore.pipeline import superseding
from flashcore.records import RunFolder, Trial

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


# --- the files -------------------------------------------------------------------------------------------------------


def with_lines(run: RunFolder, *lines: str) -> RunFolder:
    run.records_path.write_text("".join(f"{x}\n" for x in lines), encoding="utf-8", errors="surrogateescape")
    return run


def test_what_is_set_aside_is_added_to_what_was_and_counted(run):
    with_lines(run, ceiling(1), done("01_a"), ceiling(2), done("02_b"))
    assert superseding.set_aside(run, ["01_a"], planned=PLANNED) == 2
    assert run.records_path.read_text().splitlines() == [ceiling(2), done("02_b")]
    assert superseding.set_aside(run, ["02_b"], planned=PLANNED) == 2
    assert run.records_path.read_text() == ""
    aside = superseding.superseded_path(run).read_text().splitlines()
    assert aside == [ceiling(1), done("01_a"), ceiling(2), done("02_b")]


def test_where_there_is_nothing_to_set_aside_no_file_is_touched(run):
    with_lines(run, ceiling(1), done("01_a"))
    before = run.records_path.stat().st_mtime_ns
    assert superseding.set_aside(run, ["02_b"], planned=PLANNED) == 0
    assert run.records_path.stat().st_mtime_ns == before and not superseding.superseded_path(run).exists()


def test_bytes_that_are_no_text_are_moved_as_they_are(run):
    torn = b'{"kind": "ceil\xff\xfe\n'
    run.records_path.write_bytes(torn + f"{done('01_a')}\n{ceiling(2)}\n".encode() + torn)
    assert superseding.set_aside(run, ["01_a"], planned=PLANNED) == 2
    assert superseding.superseded_path(run).read_bytes() == torn + f"{done('01_a')}\n".encode()
    assert run.records_path.read_bytes() == f"{ceiling(2)}\n".encode() + torn


def test_a_full_disk_is_one_clear_error_and_loses_nothing(run, monkeypatch):
    with_lines(run, ceiling(1), done("01_a"))
    whole = run.records_path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(superseding, "write_whole", full)
    with pytest.raises(RecordsError, match="cannot be set aside .No space left on device.*None was lost"):
        superseding.set_aside(run, ["01_a"], planned=PLANNED)
    assert run.records_path.read_text() == whole, "still in its place, besides in the other file"


def test_names_with_and_without_their_ending_are_the_same_part():
    kept, gone = superseding.split([ceiling(1), done("01_a.ipynb"), ceiling(2)], ["01_a"], planned=PLANNED)
    assert values(gone) == [1] and values(kept) == [2]


@pytest.mark.parametrize("odd", ["[1]", "3", "null", '{"kind": "notebook"}', '{"data": {"name": "01_a"}}', ""])
def test_lines_that_are_no_record_of_a_part_go_with_their_stretch(odd):
    lines = [ceiling(1), odd, done("01_a")] if "notebook" not in odd else [ceiling(1), done("01_a"), odd]
    kept, gone = superseding.split(lines, ["01_a"], planned=PLANNED)
    assert sorted(kept + gone) == sorted(lines) and done("01_a") in gone
    assert (odd in kept) == ("notebook" in odd)


def test_a_record_that_comes_while_others_are_set_aside_is_not_lost(tmp_path, monkeypatch):
    """Another process goes on adding to the same run."""
    run = RunFolder.create(tmp_path)
    run.records_path.write_text("".join(f"{text}\n" for text in (ceiling(1), done("01_a"), ceiling(2), done("02_b"))))

    def split(lines, parts, *, planned, real=superseding.split):
        asked.append(pool.submit(run.append, Trial(kind="ceiling", data={"value": 3})))
        time.sleep(0.1)  # it is under way
        return real(lines, parts, planned=planned)

    asked = []
    monkeypatch.setattr(superseding, "split", split)
    with ThreadPoolExecutor(1) as pool:
        superseding.set_aside(run, ["01_a"], planned=["01_a", "02_b"])
        asked[0].result()
    assert [t.data["value"] for t in run.trials(kind="ceiling")] == [2, 3]
