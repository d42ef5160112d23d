"""Runs as they are read, and the one that came before."""

from __future__ import annotations

import pytest
from support import synthetic_records as synthetic
from support.synthetic_history import snapshot, write

from flashcore.errors import RecordsError
from flashcore.page import history
from flashcore.page.history import views
from flashcore.page.history.runs import Snapshot
from flashcore.records import Trial


def test_the_run_before_is_the_newest_older_finished_one_of_this_gpu(tmp_path):
    now = write(tmp_path, snapshot("now"), "2001-02-05T00:00:00+00:00")
    assert history.previous(now) is None and views.since_last_run(now) is None
    write(tmp_path, snapshot("oldest"), "2001-02-01T00:00:00+00:00")
    write(tmp_path, snapshot("older"), "2001-02-02T01:00:00+02:00")
    write(tmp_path, snapshot("newer"), "2001-02-06T00:00:00+00:00")
    write(tmp_path, snapshot("other"), "2001-02-04T00:00:00+00:00", gpu="SYNTHETIC H100")
    synthetic.write_run(tmp_path / "dead", [Trial(kind="ceiling")],
                        synthetic.environment(date="2001-02-04T00:00:00+00:00"))  # fmt: skip
    (tmp_path / "latest").symlink_to("now")
    assert history.previous(now).name == "older"
    assert [run.name for run in history.runs_in(tmp_path)[0]][:2] == ["oldest", "older"]


@pytest.mark.parametrize(
    ("environment", "machine", "title"),
    [
        (
            {"gpu": "H200", "before": {"cpu": "Xeon"}, "date": "2001-02-03T04:05:06+00:00"},
            "H200",
            "x (H200, 2001-02-03)",
        ),
        ({"gpu": None, "before": {"cpu": "Xeon"}}, "Xeon", "x (Xeon, date not known)"),
        ({"before": 3}, None, "x (machine not known, date not known)"),
    ],
)
def test_a_machine_is_its_gpu_without_one_its_cpu(environment, machine, title):
    found = Snapshot("x", (), environment)
    assert (found.machine, found.title) == (machine, title)


@pytest.mark.parametrize(
    ("date", "utc"),
    [
        ("2001-02-03T01:00:00+02:00", "2001-02-02T23:00:00+00:00"),
        ("2001-02-03T01:00:00", "2001-02-03T01:00:00+00:00"),  # without a zone it is taken as UTC
        ("2001-02-03", "2001-02-03T00:00:00+00:00"),
        ("yesterday", ""),
        ("0001-01-01T00:00:00+10:00", ""),  # before the first year in UTC
    ],
)
def test_dates_are_in_utc_so_that_text_sorts_as_time(date, utc):
    assert Snapshot("x", (), {"date": date}).date == utc


def test_a_run_without_an_environment_began_with_its_first_record():
    trials = [Trial(kind="ceiling", time=f"2001-02-0{day}T00:00:00+00:00") for day in (3, 4)]
    assert Snapshot("x", tuple(trials), {}).day == "2001-02-03"
    assert Snapshot("x", (), {}).day == "date not known"


def test_a_run_is_finished_when_every_planned_notebook_has_said_so():
    environment = {"parameters": {"notebooks": ["01_a", "02_b", "06_status_report"]}}
    done = [synthetic.finished("01_a"), synthetic.finished("02_b")]
    assert Snapshot("x", tuple(done), environment).finished
    assert not Snapshot("x", tuple(done[:1]), environment).finished
    broken = synthetic.finished("02_b", status="error", reason="it died")
    assert not Snapshot("x", (*done, broken), environment).finished, "the last word counts"


def test_a_run_is_read_from_its_folder_its_records_or_a_bare_file(tmp_path):
    folder = write(tmp_path, snapshot("one"), "2001-02-01T00:00:00+00:00")
    whole = history.read(folder)
    assert whole.name == "one" and whole.gpu == "SYNTHETIC H200" and len(whole.trials) == len(folder.trials())
    assert history.read(folder.path) == history.read(folder.records_path) == whole
    bare = tmp_path / "kept.jsonl"
    bare.write_bytes(folder.records_path.read_bytes())
    found = history.read(bare)
    assert (found.name, found.machine, found.trials) == ("kept", None, whole.trials)


def test_a_cut_off_line_is_told_and_the_rest_is_read(tmp_path):
    folder = write(tmp_path, snapshot("one"), "2001-02-01T00:00:00+00:00")
    with folder.records_path.open("a") as file:
        file.write('{"kind": "cei')
    found = history.read(folder)
    assert len(found.trials) == len(snapshot("one").trials) + len(synthetic.NOTEBOOKS)
    assert len(found.problems) == 1 and "records.jsonl" in found.problems[0]


@pytest.mark.parametrize("text", ["[1, 2]", '"words"'])
def test_an_environment_that_is_no_object_is_an_error_that_names_the_file(tmp_path, text):
    folder = write(tmp_path, snapshot("one"), "2001-02-01T00:00:00+00:00")
    folder.environment_path.write_text(text)
    with pytest.raises(RecordsError, match="environment.json cannot be read"):
        history.read(folder)
    found, left_out = history.runs_in(tmp_path)
    assert found == [] and left_out[0].startswith("The run one was left out: ")


def test_without_a_gpu_the_run_before_is_one_on_the_same_cpu(tmp_path):
    def on(name, date, cpu, gpu=None):
        before = {**synthetic.environment(gpu)["before"], "cpu": cpu}
        return write(tmp_path, snapshot(name), date, gpu=gpu, before=before)

    now = on("now", "2001-02-05", "Xeon")
    on("gpu", "2001-02-04", "Xeon", "SYNTHETIC H200")
    on("other", "2001-02-03", "Epyc")
    assert history.previous(now) is None
    on("same", "2001-02-02", "Xeon")
    assert history.previous(now).name == "same"


def test_a_run_without_a_date_has_none_before_it_and_comes_before_none(tmp_path):
    now = write(tmp_path, snapshot("now"), "2001-02-05")
    undated = write(tmp_path, snapshot("undated"), "once upon a time")
    assert history.previous(undated) is None and history.previous(now) is None
