"""Runs as they are read, and the one that came before."""

from __future__ import annotations

from support import synthetic_records as synthetic
from support.synthetic_history import snapshot, write

from flashcore import history
from flashcore.history import views
from flashcore.records import Trial


def test_the_run_before_is_the_newest_older_finished_one_of_this_gpu(tmp_path):
    now = write(tmp_path, snapshot("now"), "2001-02-05T00:00:00+00:00")
    assert history.previous(now) is None and views.history_html(now) == ""
    write(tmp_path, snapshot("oldest"), "2001-02-01T00:00:00+00:00")
    write(tmp_path, snapshot("older"), "2001-02-02T01:00:00+02:00")
    write(tmp_path, snapshot("newer"), "2001-02-06T00:00:00+00:00")
    write(tmp_path, snapshot("other"), "2001-02-04T00:00:00+00:00", gpu="SYNTHETIC H100")
    synthetic.write_run(tmp_path / "dead", [Trial(kind="ceiling")],
                        synthetic.environment(date="2001-02-04T00:00:00+00:00"))  # fmt: skip
    (tmp_path / "latest").symlink_to("now")
    assert history.previous(now).name == "older"
    assert [run.name for run in history.runs_in(tmp_path)[0]][:2] == ["oldest", "older"]
