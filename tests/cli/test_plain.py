"""Records, tables and lines for another program: whole, unfolded, and as they are."""

from __future__ import annotations

import pandas
import pytest

from flashcore.cli import plain, printing
from flashcore.records import Trial


def test_a_long_line_is_not_folded_and_brackets_stay(capsys):
    plain.say("[red]" + "x" * 3000)
    assert capsys.readouterr().out == "[red]" + "x" * 3000 + "\n"
    plain.progress()("compiling [a]")
    assert capsys.readouterr() == ("", "compiling [a] ...\n")


def test_a_place_that_reads_like_a_picture_stays_as_it_is(capsys):
    plain.say("kernel.py:x: P1")
    plain.progress()("kernel.py:x: P1")
    printing.say("kernel.py:x: P1")
    printing.errors().print("kernel.py:x: P1")
    out, err = capsys.readouterr()
    assert out == "kernel.py:x: P1\n" * 2 and err == "kernel.py:x: P1 ...\nkernel.py:x: P1\n"


def test_columns_stand_two_spaces_apart(capsys):
    plain.print_frame(pandas.DataFrame({"name": ["a", "long"], "share": [0.5, 12345.0]}), "not shown in a file")
    assert capsys.readouterr().out == "name  share\na     5.00e-01\nlong  1.23e+04\n"


def test_records_are_json_lines(capsys):
    trials = [Trial(kind="diagnosis", backend=name) for name in ("a", "b")]
    plain.print_records(trials)
    lines = capsys.readouterr().out.splitlines()
    assert [Trial.model_validate_json(line).backend for line in lines] == ["a", "b"]


@pytest.mark.parametrize("frame", [pandas.DataFrame(columns=["a", "b"])])
def test_a_table_without_rows_has_its_header(frame, capsys):
    plain.print_frame(frame, "")
    assert capsys.readouterr().out == "a  b\n"
