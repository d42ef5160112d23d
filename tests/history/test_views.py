"""History on the page: figures and lists, and nothing where there is none."""

from __future__ import annotations

import pytest
from support.synthetic_history import snapshot, write

from flashcore import history
from flashcore.errors import RecordsError, RecordsTooNew
from flashcore.history import views


def test_a_page_without_a_readable_run_before_goes_without_its_history(tmp_path):
    old = write(tmp_path, snapshot("old"), "2001-02-01T00:00:00+00:00")
    now = write(tmp_path, snapshot("now"), "2001-02-05T00:00:00+00:00")
    with old.records_path.open("a") as file:
        file.write('{"schema_version": 99, "kind": "ceiling"}\n')
    assert views.history_html(now) == ""
    found, left_out = history.runs_in(tmp_path)
    assert [run.name for run in found] == ["now"] and "install a newer FlashCore" in left_out[0]
    with pytest.raises(RecordsTooNew):
        history.read(old)
    with pytest.raises(RecordsError, match="no folder"):
        history.runs_in(tmp_path / "nowhere")
