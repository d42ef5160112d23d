"""The whole job: notebooks in order, failures survived, a page always, and a verdict that comes from records alone."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from support.notebook_tools import KILL, final, finishing_notebook, measure, write_notebook
from typer.testing import CliRunner

from flashcore.cli.program import app
from flashcore.errors import FlashCoreError, InvalidProblem, RecordsError, UnknownName
from flashcore.gpu import device
from flashcore.paths import data_dir
from flashcore.pipeline import reporting
from flashcore.pipeline.notebooks import declared_parameters
from flashcore.records import read_trials

SMALL = "B=1,H=1,S=32,D=64"


@pytest.mark.notebook
def test_a_report_runs_every_notebook_and_ends_with_a_verdict_and_a_page(tmp_path, toys):
    lines = []
    result = reporting.report(notebooks_dir=toys, out=tmp_path / "runs", problems=SMALL, seed=3, progress=lines.append)
    run = result.run
    assert result.failed == {}
    assert [t.data["value"] for t in run.trials(kind="ceiling")] == [1, 2]
    assert [t.data["name"] for t in run.trials(kind="notebook", status="ok")] == ["01_first", "02_second"]
    [verdict] = run.trials(kind="verdict")
    assert verdict.data["verdict"] == result.decision.verdict
    assert result.html == run.path / "report.html" and result.decision.verdict in result.html.read_text()
    assert [p.name for p in sorted((run.path / "notebooks").iterdir())] == [
        "01_first.ipynb", "02_second.ipynb", "06_status_report.ipynb",
    ]  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d-[a-z0-9-]+-[0-9a-f]{4}", run.name)
    assert (tmp_path / "runs" / "latest").resolve() == run.path
    assert any("01_first: finished in" in line for line in lines)

    environment = run.environment()
    assert environment["parameters"] == {
        "profile": "quick", "backends": "all", "problems": SMALL, "seed": 3, "notebooks": ["01_first", "02_second"],
        "peers": reporting.planned_peers("all"),
    }  # fmt: skip
    assert environment["before"] and environment["after"]
    assert {t.environment for t in run.trials()} == {environment["id"]}


@pytest.mark.notebook
def test_a_failed_notebook_stops_neither_the_others_nor_the_page(tmp_path, toys):
    finishing_notebook(toys, "01_first", measure(1), "raise RuntimeError('<no> & luck')")
    result = reporting.report(notebooks_dir=toys, out=tmp_path / "runs")
    assert list(result.failed) == ["01_first"] and "<no> & luck" in result.failed["01_first"]
    assert [t.data["value"] for t in result.run.trials(kind="ceiling")] == [1, 2]
    assert result.decision.verdict == "INCONCLUSIVE"
    assert "01_first" in result.decision.reason
    page = result.html.read_text()
    assert "01_first" in page and "<no>" not in page


@pytest.mark.browser
@pytest.mark.notebook
def test_the_pdf_lies_beside_the_page_and_a_missing_browser_is_a_sentence(tmp_path, toys, reported, monkeypatch):
    from flashcore.page import pdf

    (toys / "02_second.ipynb").unlink()
    if pdf.browser() is not None:
        result = reporting.report(notebooks_dir=toys, out=tmp_path / "runs")
        assert result.pdf == result.run.path / "report.pdf" and result.no_pdf == ""
        assert result.pdf.read_bytes().startswith(b"%PDF-")
    monkeypatch.setenv("FLASHCORE_CHROMIUM", "")
    result = reporting.conclude(reported, {}, folder=toys)
    assert result.failed == {} and result.pdf is None and "No PDF was made" in result.no_pdf


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"profile": "fast"}, UnknownName),
        ({"backends": "cpu,wmm"}, UnknownName),
        ({"problems": "reprot"}, UnknownName),
        ({"problems": "B=0,H=1,S=1,D=64"}, InvalidProblem),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_made(tmp_path, toys, wrong, error):
    with pytest.raises(error):
        reporting.report(notebooks_dir=toys, out=tmp_path / "runs", **wrong)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("named", "measured"), [("all", "all"), ("cpu", "cpu,reference"), ("reference, cpu", "reference, cpu")]
)
def test_a_function_that_is_taken_in_is_measured_whatever_others_are_named(
    tmp_path, toys, monkeypatch, named, measured
):
    kernel = {"backend": "reference", "place": "/nowhere/mine.py:fn", "layout": "bhsd", "lse": None}
    asked = []
    monkeypatch.setattr(reporting, "measure", lambda run, names, common, **_: asked.append(common["backends"]) or {})
    for name in ("diagnose_adopted", "conclude", "point_latest_at"):
        monkeypatch.setattr(reporting, name, lambda *_, **__: None)
    reporting.report(backends=named, kernel=kernel, notebooks_dir=toys, out=tmp_path / "runs")
    [environment] = (tmp_path / "runs").glob("*/environment.json")
    parameters = json.loads(environment.read_text())["parameters"]
    assert asked == [measured] == [parameters["backends"]] and parameters["kernel"]["function"] == "mine.py:fn"


def test_an_output_folder_that_cannot_be_written_is_one_clear_error(tmp_path, toys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordsError, match="--out"):
        reporting.report(notebooks_dir=toys, out=tmp_path / "file")


def test_a_folder_without_notebooks_is_an_error(tmp_path):
    with pytest.raises(FlashCoreError, match="no notebooks"):
        reporting.report(notebooks_dir=tmp_path, out=tmp_path / "runs")


def test_latest_is_replaced_and_can_be_a_file_where_links_are_impossible(tmp_path, monkeypatch):
    first, second = (reporting.new_run(tmp_path) for _ in range(2))
    assert first.path != second.path
    reporting.point_latest_at(first)
    assert reporting.find_run("latest", tmp_path).path == first.path

    def impossible(*args, **kwargs):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", impossible)
    reporting.point_latest_at(second)
    assert not (tmp_path / "latest").is_symlink()
    for name in ("latest", tmp_path / "latest", second.name, second.path):
        assert reporting.find_run(name, tmp_path).path == second.path
    with pytest.raises(RecordsError, match="no run folder"):
        reporting.find_run("never", tmp_path)


@pytest.mark.notebook
def test_ctrl_c_ends_the_kernel_and_leaves_nothing_half_written(tmp_path, toys):
    wait = 'import time\nrun.append(Trial(kind="ceiling", data={"value": __import__("os").getpid()}))\ntime.sleep(3000)'
    finishing_notebook(toys, "01_first", wait)
    program = (
        "import signal, sys, pathlib; from flashcore import cli; from flashcore.pipeline import reporting; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored by what a shell starts in the background
        f"reporting.data_dir = lambda name: pathlib.Path({str(toys)!r}); "
        f"sys.argv[1:] = ['report', '--out', {str(tmp_path / 'runs')!r}]; cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        records = _wait_for(lambda: next((tmp_path / "runs").glob("*/records.jsonl"), None))
        kernel = _wait_for(lambda: next((t.data["value"] for t in read_trials(records)), None))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130
    assert said.rstrip().splitlines()[-1] == "Interrupted; records written so far are kept in the run's folder."
    assert "Traceback" not in said
    left = sorted(str(p.relative_to(records.parent)) for p in records.parent.rglob("*") if p.is_file())
    assert left == ["environment.json", "records.jsonl"]
    assert len(records.read_text().splitlines()) == 1
    _wait_for(lambda: not _runs(kernel))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end while it is looked at
        return False


def _wait_for(question, seconds: float = 600):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := question():
            return answer
        time.sleep(0.1)
    pytest.fail("it did not happen in time")


# --- FlashCore's own notebooks -------------------------------------------------------------------------------------


def test_every_notebook_takes_what_the_pipeline_gives():
    from flashcore.pipeline.notebooks import declared_parameters

    folder = data_dir("notebooks")
    for name in [*reporting.measuring_notebooks(folder), reporting.STATUS_NOTEBOOK]:
        declared = declared_parameters(folder / f"{name}.ipynb")
        assert declared["run_dir"].type is str, name
        for shared, kind in (("profile", str), ("backends", str), ("problems", str), ("seed", int)):
            assert shared not in declared or declared[shared].type is kind, f"{name}: {shared}"


@pytest.mark.parametrize(("profile", "gpu"), [("quick", False), ("quick", True), ("full", False), ("full", True)])
def test_the_proof_from_outputs_alone_is_the_last_part_of_a_full_report_on_a_gpu_and_of_no_other(
    profile, gpu, monkeypatch
):
    monkeypatch.setattr(device, "has_gpu", lambda: gpu)
    folder, proof = data_dir("notebooks"), "08_outputs_alone"
    planned = reporting.planned_notebooks(folder, profile)
    assert (planned[-1] == proof) == (proof in planned) == (profile == "full" and gpu)
    assert [name for name in planned if name != proof] == reporting.measuring_notebooks(folder)[:-1]
    assert reporting.parts_named("proof", folder) == [proof], "--only runs it whatever was planned"


def test_a_part_that_is_not_planned_cannot_be_left_for_later(tmp_path):
    with pytest.raises(FlashCoreError, match="08_outputs_alone is no part of this report.*--later"):
        reporting.report(profile="quick", out=tmp_path / "runs", later="proof")
    assert not (tmp_path / "runs").exists()


@pytest.mark.notebook
def test_killing_the_sweeps_kernel_half_way_is_inconclusive_and_exit_code_1(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    finishing_notebook(folder, "05_next", measure(5))
    write_notebook(folder, "06_status_report", "1")
    path = Path(shutil.copy(data_dir("notebooks") / "04_tflops_sweep.ipynb", folder))
    notebook = nbformat.read(path, as_version=4)
    sweeping = next(i for i, c in enumerate(notebook.cells) if c.cell_type == "code" and "sweep(" in c.source)
    notebook.cells.insert(sweeping + 1, nbformat.v4.new_code_cell(KILL))
    assert sweeping + 2 < len(notebook.cells)
    nbformat.write(notebook, path)

    own = reporting.data_dir
    monkeypatch.setattr(reporting, "data_dir", lambda name: folder if name == "notebooks" else own(name))
    asked = ["--profile", "quick", "--backend", "reference,cpu", "--problem", SMALL, "--out", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, ["report", *asked])
    assert done.exit_code == 1, done.output[-2000:]
    assert "Verdict: INCONCLUSIVE" in done.stdout
    assert "Notebook 04_tflops_sweep did not finish: its Jupyter kernel died" in done.stdout

    run = reporting.find_run("latest", tmp_path / "runs")
    kept = run.trials(kind="attention_timing") + run.trials(kind="correctness")
    assert [t for t in kept if t.backend == "cpu" and t.status == "ok"], "what the sweep had measured is gone"
    statuses = {t.data["name"]: t.status for t in run.trials(kind="notebook")}
    assert statuses == {"04_tflops_sweep": "error", "05_next": "ok"}
    page = (run.path / "report.html").read_text()
    assert "INCONCLUSIVE" in page and "04_tflops_sweep" in page and "kernel died" in page

    assert CliRunner().invoke(app, ["verdict", str(run.path)]).exit_code == 4


def test_a_report_states_every_parameter_of_every_notebook_of_its_own():
    """Whatever somebody saved in a parameters cell in JupyterLab, such as a planted bug, is not what a report runs."""
    folder = data_dir("notebooks")
    common = {"profile", "backends", "problems", "seed"}
    for name in reporting.measuring_notebooks(folder):
        declared = set(declared_parameters(folder / f"{name}.ipynb"))
        assert declared == {"run_dir"} | common | set(reporting.OWN.get(name, {})), name


@pytest.mark.notebook
def test_what_was_saved_in_a_parameters_cell_goes_into_no_report(tmp_path, toys, monkeypatch):
    saved = 'run_dir: str = ""  # the run\nfault: str = "F8"  # a bug that somebody saved here\n'
    cell = 'run.append(Trial(kind="ceiling", data={"value": fault}))'
    write_notebook(toys, "01_first", cell, final("01_first"), parameters=saved)
    (toys / "02_second.ipynb").unlink()
    monkeypatch.setattr(reporting, "OWN", {"01_first": {"fault": ""}})
    run = reporting.report(notebooks_dir=toys, out=tmp_path / "runs", pdf=False).run
    assert "F8" not in [t.data["value"] for t in run.trials(kind="ceiling")]
