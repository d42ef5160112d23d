"""`flashcore compare` and `flashcore trend`: exit codes, words and JSON."""

from __future__ import annotations

import json
import math

import pytest
from support import synthetic_records as synthetic
from support.synthetic_history import REPORT, snapshot, write
from typer.testing import CliRunner

from flashcore.cli import compare
from flashcore.cli.program import app
from flashcore.page.history.trend import FIRST

runner = CliRunner()


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, snapshot("a"), "2001-02-01T00:00:00+00:00")
    write(tmp_path, snapshot("same"), "2001-02-02T00:00:00+00:00")
    write(tmp_path, snapshot("slow", faster=0.9), "2001-02-03T00:00:00+00:00")
    write(tmp_path, snapshot("slightly", faster=0.98, noise=0.001), "2001-02-03T00:00:00+00:00")
    write(tmp_path, snapshot("noisy", faster=0.99, noise=0.3), "2001-02-03T00:00:00+00:00")
    write(tmp_path, snapshot("other", faster=0.5), "2001-02-04T00:00:00+00:00", gpu="SYNTHETIC H100")
    write(tmp_path, snapshot("nothing", trials=[]), "2001-02-05T00:00:00+00:00")
    wrong = [synthetic.correctness("wmma", REPORT, status=s) for s in ("ok", "failed")]
    write(tmp_path, snapshot("right", trials=[*snapshot("a").trials, wrong[0]]), "2001-02-05T00:00:00+00:00")
    write(tmp_path, snapshot("wrong", trials=[*snapshot("a").trials, wrong[1]]), "2001-02-05T00:00:00+00:00")
    (tmp_path / "latest").symlink_to("slow")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "now", "code"),
    [
        ("a", "same", 0), ("a", "slow", 3), ("slow", "a", 0), ("a", "slightly", 0), ("a", "noisy", 0),
        ("a", "other", 4), ("a", "nothing", 3), ("nothing", "a", 4), ("right", "wrong", 3), ("wrong", "right", 0),
    ],
)  # fmt: skip
def test_strict_by_exit_code(folder, before, now, code):
    arguments = ["compare", before, now, "--out", str(folder)]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0 and "Traceback" not in done.output
    strict = runner.invoke(app, [*arguments, "--strict"])
    assert strict.exit_code == code, strict.output
    assert ("Regression: " in done.stdout) == (code == 3) == ("No regression" not in done.stdout)
    assert ("settles nothing" in strict.stdout) == (code == 4)


@pytest.mark.slow
def test_runs_by_name_folder_file_and_latest(folder):
    for name in ("slow", str(folder / "slow"), str(folder / "slow" / "records.jsonl"), "latest"):
        done = runner.invoke(app, ["compare", "a", name, "--out", str(folder), "--json"])
        assert done.exit_code == 0 and json.loads(done.stdout)["now"]["name"] == "slow"
    done = runner.invoke(app, ["compare", "a", "no-such-run", "--out", str(folder)])
    assert done.exit_code == 2 and "no-such-run" in done.stderr


def test_json_for_machines(folder):
    done = runner.invoke(app, ["compare", "a", "slow", "--out", str(folder), "--json", "--strict"])
    found = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert done.exit_code == 3 and len(found["regressions"]) == 12
    row = next(r for r in found["rows"] if r["backend"] == "wmma")
    assert row["word"] == "slower" and row["basis"] == "relative" and row["regression"]
    assert row["interval_percent"][0] < row["percent"] < row["interval_percent"][1] < 0


def test_the_table_says_it_in_words(folder):
    done = runner.invoke(app, ["compare", "a", "slow", "--out", str(folder)])
    text = " ".join(done.stdout.split())
    assert "Of 12 timings of ours in both runs: 12 slower." in text and "relative to sdpa-cudnn" in text
    assert "Intervals are widened by how far unchanged code moved" in text


@pytest.mark.slow
def test_the_trend_of_a_folder(folder):
    done = runner.invoke(app, ["trend", str(folder)])
    assert done.exit_code == 0 and "first measured" in done.stdout and "SYNTHETIC H100" in done.stdout
    done = runner.invoke(app, ["trend", str(folder), "--json"])
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert {p["run"] for p in points} >= {"a", "slow", "other"} and points[0]["word"] == FIRST
    done = runner.invoke(app, ["trend", str(folder), "--problem", "B=1,H=2,S=77,D=64"])
    assert done.exit_code == 0 and "there is no trend" in done.stdout
    assert runner.invoke(app, ["trend", str(folder / "nowhere")]).exit_code == 2
    assert runner.invoke(app, ["trend", str(folder), "--problem", "reprot"]).exit_code == 2


def test_all_lists_what_is_otherwise_counted(folder, monkeypatch):
    monkeypatch.setattr(compare, "MOST_LINES", 0)
    arguments = ["compare", "a", "other", "--out", str(folder)]
    short, whole = (runner.invoke(app, [*arguments, *more]).stdout for more in ([], ["--all"]))
    assert "more; --all lists them" in short and "--all lists them" not in whole
    assert "Every timing" in whole and "Every timing" not in short and "sdpa-flash" in whole


def test_what_is_no_number_is_null_in_json(capsys):
    compare._print_json({"a": [math.nan, (math.inf, 1.5)], 3: {"b": -math.inf, "c": None, "d": "é"}}, indent=None)
    text = capsys.readouterr().out
    assert json.loads(text) == {"a": [None, [None, 1.5]], "3": {"b": None, "c": None, "d": "é"}} and "é" in text


def test_a_run_that_could_not_be_read_is_named_below_the_trend(folder):
    with (folder / "same" / "records.jsonl").open("a") as file:
        file.write('{"schema_version": 99, "kind": "ceiling"}\n')
    done = runner.invoke(app, ["trend", str(folder)])
    text = " ".join(done.stdout.split())
    assert done.exit_code == 0 and "The run same was left out:" in text and "install a newer FlashCore" in text
    done = runner.invoke(app, ["trend", str(folder), "--json"])
    assert "The run same was left out:" in done.stderr and all(map(json.loads, done.stdout.splitlines()))


def test_a_bare_file_of_records_can_be_compared_without_a_machine(folder, tmp_path):
    bare = tmp_path / "kept.jsonl"
    bare.write_bytes((folder / "slow" / "records.jsonl").read_bytes())
    done = runner.invoke(app, ["compare", "a", str(bare), "--out", str(folder), "--strict"])
    assert done.exit_code == 4 and "machine not known" in done.stdout
