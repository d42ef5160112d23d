"""Adding records to a run: they come under its seal, and a page that shows the run without them is removed."""

from __future__ import annotations

import pytest
from support import synthetic_records as synthetic

from flashcore.cli.adding import adding_to
from flashcore.decision import seal
from flashcore.errors import RecordsError
from flashcore.pipeline.folders import measuring
from flashcore.records import RunFolder, Trial


@pytest.fixture
def shown(tmp_path) -> RunFolder:
    """A SYNTHETIC run with a page and its PDF."""
    run = synthetic.write_run(tmp_path / "run", synthetic.cpu_trials(), synthetic.environment(None))
    for name in ("report.html", "report.pdf"):
        (run.path / name).write_text("a page")
    return run


def pages(run: RunFolder) -> list[str]:
    return sorted(p.name for p in run.path.glob("report.*"))


def test_without_a_path_no_records_are_kept():
    with adding_to(None) as run:
        assert run is None


def test_a_folder_is_made_where_there_is_none(tmp_path, capsys):
    with adding_to(tmp_path / "new" / "run") as run:
        run.append(Trial(kind="ceiling"))
    assert len(RunFolder(tmp_path / "new" / "run").trials()) == 1
    assert capsys.readouterr().err == "", "there was no page to remove"


def test_a_page_without_the_new_records_is_removed_and_said(shown, capsys):
    with adding_to(shown.path) as run:
        run.append(Trial(kind="ceiling"))
        assert pages(shown) == ["report.html", "report.pdf"]
    assert pages(shown) == [] and len(shown.trials()) == len(synthetic.cpu_trials()) + 1
    assert f"'flashcore render {shown.path}' draws it anew" in capsys.readouterr().err


def test_where_nothing_was_added_the_page_stays(shown, capsys):
    with adding_to(shown.path):
        pass
    assert pages(shown) == ["report.html", "report.pdf"] and capsys.readouterr().err == ""


def test_what_was_added_before_an_error_counts_too(shown):
    with pytest.raises(RuntimeError, match="half way"), adding_to(shown.path) as run:
        run.append(Trial(kind="ceiling"))
        raise RuntimeError("half way")
    assert pages(shown) == [] and shown.trials()[-1].kind == "ceiling"


def test_nobody_adds_to_a_run_that_is_being_measured_or_whose_seal_somebody_else_is_about_to_renew(shown):
    """Records do not say whose they are, and a seal would not know of those that came while it was being made."""
    with adding_to(shown.path), adding_to(shown.path):
        pass  # without a seal several may add
    with measuring(shown), pytest.raises(RecordsError, match="is being measured by another"), adding_to(shown.path):
        pass
    (shown.path / seal.FILE).write_text("{}")
    with adding_to(shown.path), pytest.raises(RecordsError, match="is being measured by another"):
        with adding_to(shown.path):
            pass


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordsError), adding_to(tmp_path / "file" / "run"):
        pass
