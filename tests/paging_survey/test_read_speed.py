"""The speed of reading alone is measured once a run."""

from __future__ import annotations

from flashcore.paging_survey.read_speed import NAME, read_speed


def test_the_read_speed_is_measured_once_a_run(run):
    first = read_speed(run)
    assert first.kind == "ceiling" and first.data["name"] == NAME and first.data["unit"] == "TB/s"
    assert first.data["value"] > 0
    assert read_speed(run).data == first.data and len(run.trials(kind="ceiling")) == 1
