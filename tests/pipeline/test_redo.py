"""One part of a run measured again: its records are replaced, none is lost, and the rest stays."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from support.notebook_tools import finishing_notebook, measure, values, write_notebook

from flashcore.decision import seal
from flashcore.errors import FlashCoreError, OutOfTime, RecordsError, UnknownName
from flashcore.gpu import device
from flashcore.pipeline import folders, reporting, superseding
from flashcore.pipeline.redo import redo, resume, unfinished
from flashcore.pipeline.reporting import parts_named
from flashcore.records import RunFolder, Trial

# --- the whole of it -----------------------------------------------------------------------------------------------


@pytest.fixture
def toys(tmp_path) -> Path:
    folder = tmp_path / "toys"
    finishing_notebook(folder, "01_first", measure(1))
    finishing_notebook(folder, "04_tflops_sweep", measure(4))
    write_notebook(folder, "06_status_report", "print(len(run.trials()))")
    return folder


@pytest.fixture
def made(reported) -> RunFolder:
    return reported


def ceilings(run: RunFolder) -> list:
    return [t.data["value"] for t in run.trials(kind="ceiling")]


@pytest.mark.notebook
def test_a_part_is_measured_again_and_nothing_is_lost(made, toys):
    before = made.records_path.read_text().splitlines()
    date = made.environment()["date"]
    finishing_notebook(toys, "04_tflops_sweep", measure(44))
    result = redo(made, "sweep", notebooks_dir=toys, pdf=False)
    assert result.run.path == made.path and result.failed == {}
    assert ceilings(made) == [1, 44]
    aside = superseding.superseded_path(made).read_text().splitlines()
    assert values(aside) == [4]
    after = made.records_path.read_text().splitlines()
    assert set(before) <= set(after) | set(aside)
    environment = made.environment()
    assert environment["date"] == date and environment["redone"][0]["parts"] == ["04_tflops_sweep"]
    assert {t.environment for t in made.trials()} == {environment["id"]}

    finishing_notebook(toys, "04_tflops_sweep", measure(45))
    redo(made, "04_tflops_sweep", notebooks_dir=toys, pdf=False)
    assert ceilings(made) == [1, 45] and len(made.environment()["redone"]) == 2
    history = seal.earlier(made)
    assert len(history) == 2 and all("which held; then it was sealed anew." in sentence for sentence in history)
    assert values(superseding.superseded_path(made).read_text().splitlines()) == [4, 44]


@pytest.mark.exhaustive
@pytest.mark.notebook
def test_a_part_that_fails_again_leaves_the_run_inconclusive(made, toys):
    finishing_notebook(toys, "04_tflops_sweep", measure(44), "1 / 0")
    result = redo(made, "sweep", notebooks_dir=toys, pdf=False)
    assert list(result.failed) == ["04_tflops_sweep"] and result.decision.verdict == "INCONCLUSIVE"
    assert ceilings(made) == [1, 44]
    finishing_notebook(toys, "04_tflops_sweep", measure(46))
    assert redo(made, "sweep", notebooks_dir=toys, pdf=False).failed == {}
    assert ceilings(made) == [1, 46]
    assert values(superseding.superseded_path(made).read_text().splitlines()) == [4, 44]


@pytest.mark.notebook
def test_a_part_that_is_killed_leaves_no_page_of_before(made, toys, monkeypatch):
    def killed(*_, **__):
        assert not (made.path / "report.html").exists(), "it is gone before anything is measured"
        raise KeyboardInterrupt

    monkeypatch.setattr(reporting, "measure", killed)
    (made.path / "report.pdf").write_bytes(b"%PDF- of the page before")
    assert (made.path / "report.html").exists()
    with pytest.raises(KeyboardInterrupt):
        redo(made, "sweep", notebooks_dir=toys, pdf=False)
    assert not (made.path / "report.html").exists() and not (made.path / "report.pdf").exists()


@pytest.mark.notebook
def test_a_run_of_another_machine_is_refused_before_anything_is_touched(made, toys, monkeypatch):
    records, environment = made.records_path.read_bytes(), made.environment_path.read_bytes()
    snapshot = device.snapshot()
    monkeypatch.setattr(device, "snapshot", lambda: {**snapshot, "torch": "9.9"})
    with pytest.raises(RecordsError, match="torch .* then, 9.9 now.*flashcore report"):
        redo(made, "sweep", notebooks_dir=toys)
    assert (made.records_path.read_bytes(), made.environment_path.read_bytes()) == (records, environment)


def test_a_run_that_does_not_say_how_it_was_made_is_refused(run, toys):
    run.append(Trial(kind="ceiling"))
    with pytest.raises(RecordsError, match="does not say how it was made"):
        redo(run, "sweep", notebooks_dir=toys)


@pytest.mark.notebook
def test_sources_count_as_current_only_where_no_older_record_stays(made, toys):
    environment = made.environment()
    old = {name: f"old-{name}" for name in environment["kernels"]}
    made.environment_path.write_text(json.dumps({**environment, "kernels": old}))
    names = sorted(old)
    made.append(Trial(kind="build", source_hash=old[names[0]]))
    redo(made, "sweep", notebooks_dir=toys, pdf=False)
    now = made.environment()["kernels"]
    assert now[names[0]] == old[names[0]] and all(now[n] == environment["kernels"][n] for n in names[1:])


def test_parts_by_short_name_in_the_order_of_a_report(toys):
    assert parts_named("sweep, 01_first", toys) == ["01_first", "04_tflops_sweep"]
    for wrong in ("paging", "06_status_report", "swep", " "):
        with pytest.raises(UnknownName, match="sweep, 01_first"):
            parts_named(wrong, toys)


def test_a_run_that_somebody_else_is_measuring_is_refused_before_anything_is_touched(run, toys):
    """Records do not say which notebook wrote them: two at once would be laid at each other's doors."""
    run.append(Trial(kind="ceiling", data={"value": 1}))
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with folders.measuring(run):
        for again in (lambda: redo(run, "sweep", notebooks_dir=toys), lambda: resume(run, notebooks_dir=toys)):
            with pytest.raises(RecordsError, match=f"{run.name} is being measured by another process or thread"):
                again()
    assert {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == before
    with folders.measuring(run), pytest.raises(RecordsError), folders.measuring(run):
        pass
    with folders.measuring(run):
        pass


# --- what did not finish -------------------------------------------------------------------------------------------


@pytest.mark.notebook
def test_a_run_that_was_killed_is_resumed_and_keeps_what_it_had(made, toys):
    lines = made.records_path.read_text().splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if '"01_first"' in line and '"notebook"' in line)
    half = next(line for line in lines if values([line]) == [4])
    made.records_path.write_text("".join([*lines[: first + 1], half]))  # killed in the second part
    (made.path / "seal.json").unlink()
    made.environment_path.write_text(json.dumps({**made.environment(), "after": None}))
    assert unfinished(made) == ["04_tflops_sweep"]
    finishing_notebook(toys, "04_tflops_sweep", measure(44))
    result = resume(made, notebooks_dir=toys, pdf=False)
    assert result.failed == {} and result.html.is_file() and unfinished(made) == []
    assert ceilings(made) == [1, 44] and made.environment()["after"]["python"]
    with pytest.raises(RecordsError, match=f"Every part of the run {made.name} finished"):
        resume(made, notebooks_dir=toys)


def test_parts_without_time_left_fail_and_are_what_a_resumed_run_measures(run, toys):
    run.environment_path.write_text(json.dumps({"parameters": {"notebooks": ["01_first", "04_tflops_sweep"]}}))
    run.append(Trial(kind="notebook", data={"name": "01_first"}))
    failed = reporting.measure(run, ["04_tflops_sweep"], {"profile": "quick"}, folder=toys, until=0.0)
    assert "no time was left" in failed["04_tflops_sweep"] and "--resume" in failed["04_tflops_sweep"]
    assert unfinished(run) == ["04_tflops_sweep"]
    run.append(Trial(kind="notebook", data={"name": "04_tflops_sweep"}))
    assert unfinished(run) == []


def test_parts_that_are_left_for_later_are_not_begun_and_are_named_before_anything_is_made(run, toys, tmp_path):
    failed = reporting.measure(run, ["04_tflops_sweep"], {"profile": "quick"}, folder=toys, later=["04_tflops_sweep"])
    assert "left for later" in failed["04_tflops_sweep"] and "--resume" in failed["04_tflops_sweep"]
    with pytest.raises(UnknownName, match="sweep, 01_first"):
        reporting.report(notebooks_dir=toys, out=tmp_path / "runs", later="swep")
    assert not (tmp_path / "runs").exists()


def test_a_run_that_was_killed_before_its_verdict_is_judged_and_drawn(run, monkeypatch):
    run.environment_path.write_text(json.dumps({"parameters": {"notebooks": ["01_first"]}}))
    with pytest.raises(RecordsError, match="finished"):
        resume(RunFolder.create(run.path.parent / "empty"))
    run.append(Trial(kind="notebook", data={"name": "01_first"}))
    asked = []
    monkeypatch.setattr(reporting, "conclude", lambda *given, **named: asked.append((given[:2], named["pdf"])))
    resume(run, pdf=False, within_s=100.0)
    assert asked == [((run, {}), False)]


def test_a_function_of_somebody_is_diagnosed_once_and_asked_for_again(run, monkeypatch):
    kernel = {"backend": "mine-fn", "place": "/nowhere/mine.py:fn", "layout": "bhsd", "lse": None}
    told = {"notebooks": ["01_first"], "kernel": reporting.as_told(kernel)}
    run.environment_path.write_text(json.dumps({"parameters": told}))
    run.append(Trial(kind="notebook", data={"name": "01_first"}))
    run.append(Trial(kind="diagnosis", backend="mine-fn", variant="conform:P1"))
    diagnosed = []
    monkeypatch.setattr(reporting, "conclude", lambda run, *_, **__: run.append(Trial(kind="verdict")))

    def diagnose(run, kernel, say, *, until):
        diagnosed.append(kernel["backend"])
        assert until < float("inf")

    monkeypatch.setattr(reporting, "diagnose_adopted", diagnose)
    with pytest.raises(FlashCoreError, match="name it again by --kernel"):
        resume(run)
    with pytest.raises(FlashCoreError, match="name it again by --kernel"):
        redo(run, "environment")
    with pytest.raises(FlashCoreError, match="its layout is bshd, and was bhsd"):
        resume(run, kernel={**kernel, "layout": "bshd"})
    for _ in range(2):  # as long as it had no time
        resume(run, kernel=kernel, within_s=100.0)
    run.append(Trial(kind="diagnosis", backend="mine-fn"))
    with pytest.raises(RecordsError, match="finished"):
        resume(run, kernel=kernel)
    assert diagnosed == ["mine-fn"] * 2


def test_a_diagnosis_without_time_is_left_for_later_and_says_so(run, monkeypatch):
    kernel = {"backend": "mine-fn", "place": "/nowhere/mine.py:fn", "layout": "bhsd", "lse": None}
    said = []

    def late(place, *, within_s, **_):
        raise OutOfTime(place, within_s)

    monkeypatch.setattr("flashcore.bisection.diagnosis.diagnose_apart", late)
    for seconds in (-5.0, 40.0):
        reporting.diagnose_adopted(run, kernel, said.append, until=time.monotonic() + seconds)
    assert run.trials() == [] and [line for line in said if "Diagnosing" not in line] == [
        f"The diagnosis of /nowhere/mine.py:fn did not end within the {left} s that were left. 'flashcore report "
        "--resume' with the same --kernel makes it." for left in (0, 40)
    ]  # fmt: skip


@pytest.mark.parametrize("seconds", [0.0, 75.0, float("nan")])
def test_a_limit_that_leaves_no_time_for_a_notebook_is_refused(seconds):
    with pytest.raises(FlashCoreError, match="more than 75 s, 60 of them for its page"):
        reporting.deadline(seconds)
    assert reporting.deadline(None) == float("inf")
