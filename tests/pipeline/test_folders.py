"""Where files lie: relative paths, names of runs, half-written files, homes, damaged notebooks, what make is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from support import synthetic_records as synthetic
from support.notebook_tools import finishing_notebook, measure, write_notebook

from flashcore import paths
from flashcore.backends import all_backends
from flashcore.errors import FlashCoreError, NotebookFailed, RecordsError
from flashcore.gpu import build
from flashcore.gpu.cache import cache_dir
from flashcore.paths import HOME, partial_path, sweep
from flashcore.pipeline import folders, notebooks, redo, rendering, reporting
from flashcore.records import RunFolder, Trial

pytestmark = pytest.mark.notebook

# ------------------------------------------------------------------------------------------------ relative paths


@pytest.mark.notebook
def test_a_report_into_a_relative_folder_finishes_every_notebook(tmp_path, toys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = reporting.report(notebooks_dir=Path("toys"), out="rel", pdf=False)
    assert result.failed == {} and result.run.path.parent == tmp_path / "rel"
    assert result.pdf is None and result.no_pdf == "", "none was wanted"
    assert [t.data["value"] for t in result.run.trials(kind="ceiling")] == [1, 2]
    assert folders.find_run("latest", "rel").path == result.run.path
    page = rendering.render(RunFolder(f"rel/{result.run.name}"), notebooks_dir=Path("toys"))
    assert page == result.html and page.is_absolute()
    again = redo.redo(RunFolder(f"rel/{result.run.name}"), "01_first", notebooks_dir=Path("toys"), pdf=False)
    assert again.failed == {}


@pytest.mark.notebook
def test_plugins_and_modules_in_relative_folders_reach_the_kernel(tmp_path, monkeypatch):
    (tmp_path / "plug").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "only_here.py").write_text("")
    asked = (
        "import os\nimport only_here\nfrom flashcore.paths import plugin_folders\n"
        "from flashcore.gpu.cache import cache_dir\n"
        'data = {"plugins": [str(p) for p in plugin_folders()], "cache": str(cache_dir())}\n'
        'run.append(Trial(kind="ceiling", data=data))'
    )
    finishing_notebook(tmp_path / "nb", "01_first", asked)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHCORE_PLUGINS", "plug:$HOME.d")
    monkeypatch.setenv("FLASHCORE_CACHE", "kept")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["lib", os.environ.get("PYTHONPATH", "")]))
    run = RunFolder.create("run")
    notebooks.execute_notebook("01_first", run, notebooks_dir=Path("nb"))
    [found] = run.trials(kind="ceiling")
    assert found.data == {"plugins": [f"{tmp_path}/plug", f"{tmp_path}/$HOME.d"], "cache": f"{tmp_path}/kept"}


def test_every_path_is_absolute_where_it_comes_in(tmp_path, monkeypatch):
    synthetic.write_run(tmp_path / "runs" / "a", synthetic.cpu_trials(), synthetic.environment(None))
    (tmp_path / "plug").mkdir()
    (tmp_path / "plug" / "mine.cu").write_text("// nothing\n")
    monkeypatch.chdir(tmp_path)
    for name in ("FLASHCORE_CACHE", "CUDA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "kept")
        assert paths.folder_in(name) == tmp_path / "kept"
    monkeypatch.setenv("FLASHCORE_PLUGINS", f"plug{os.pathsep}{os.pathsep}/other")
    assert paths.plugin_folders() == [tmp_path / "plug", Path("/other")]
    from flashcore.page import history

    named = [
        RunFolder("runs/a").path, RunFolder.create("runs/b").path, folders.runs_dir("runs"), cache_dir(),
        folders.find_run("runs/a").path, folders.find_run("a", "runs").path, build.kernel_path("mine"),
    ]  # fmt: skip
    assert all(path.is_absolute() and tmp_path in path.parents for path in named)
    assert [s.name for s in history.runs_in("runs")[0]] == ["b", "a"] and history.read("runs/a").name == "a"


# ------------------------------------------------------------------------------------------------- names of runs


def test_latest_and_ids_mean_the_runs_of_the_folder_that_is_named(tmp_path, monkeypatch):
    here, there = (reporting.new_run(tmp_path / name) for name in ("here", "there"))
    for run in (here, there):
        reporting.point_latest_at(run)
    monkeypatch.chdir(tmp_path / "here")
    assert folders.find_run("latest", "../there").path == there.path
    assert folders.find_run("latest").path == here.path == folders.find_run("./latest", "../there").path
    with pytest.raises(RecordsError, match="no run folder"):
        folders.find_run(here.name, "../there")
    assert folders.find_run(here.path, "../there").path == here.path
    with pytest.raises(RecordsError, match="none/latest"):
        folders.find_run("latest", "../none")


def test_a_name_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(RecordsError, match="No run is named"):
        folders.find_run("", tmp_path)
    (tmp_path / "latest").write_text("\n")
    with pytest.raises(RecordsError, match="names no run"):
        folders.find_run("latest", tmp_path)
    run = reporting.new_run(tmp_path)
    (tmp_path / "latest").write_bytes(b"\xef\xbb\xbf" + run.name.encode() + b"\r\n")
    assert folders.find_run("latest", tmp_path).path == run.path


# -------------------------------------------------------------------------------------------------- the Makefile

NAMES = ("OUT", "RUN", "PROFILE", "SET", "BACKEND", "KERNEL", "PROBLEM", "PYTEST_ARGS", "LAB_ARGS")
WORDS = dict.fromkeys(NAMES, "ENV")
needs_make = pytest.mark.skipif(
    shutil.which("make") is None or not (HOME / "Makefile").is_file(), reason="no make here, or no checkout"
)


def make(*arguments: str, **variables: str) -> str:
    """What make would run."""
    kept = {name: text for name, text in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", *WORDS)}
    done = subprocess.run(["make", "-n", *arguments], capture_output=True, text=True, cwd=HOME, env=kept | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_make
@pytest.mark.parametrize("target", ["report", "render", "verdict", "build", "test", "lab", "install"])
@pytest.mark.parametrize("flags", [[], ["-e"]], ids=["plain", "-e"])
def test_a_name_that_the_shell_exports_changes_nothing(target, flags):
    assert make(*flags, target, **WORDS) == make(target)
    assert "ENV" not in make(*flags, "PYTHON=python3", target, **WORDS)


@needs_make
def test_what_stands_on_the_command_line_counts():
    given = ["PYTHON=python3", "OUT=x", "PROFILE=quick", "BACKEND=cpu,wmma", "PROBLEM=B=1,H=8", "RUN=r", "SET=gpu"]
    said = " ".join(make(*given, "report", **WORDS).split())
    assert "report --profile quick --backend 'cpu,wmma' \\ --problem 'B=1,H=8' --out 'x'" in said
    assert "verdict 'r' --out 'x'" in make(*given, "verdict", **WORDS)
    assert make("PYTHON=python3", "PYTEST_ARGS=-k a", "test", **WORDS).rstrip().endswith(" -k a")
    assert ".installed-gpu-dev" in make("SET=gpu", "-W", "pyproject.toml", "-p", "install", **WORDS)


@needs_make
def test_the_interpreter_may_be_named_in_front_of_the_command():
    assert make("doctor", PYTHON="some-python").startswith("some-python -m flashcore doctor")


# -------------------------------------------------------------------------------------------- half-written files


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if "partial" in p.name or p.name.startswith("."))


@pytest.mark.notebook
def test_two_renderings_at_once_both_make_the_page(reported, toys):
    (reported.path / "report.html").unlink()
    with ThreadPoolExecutor(2) as pool:
        pages = list(pool.map(lambda _: rendering.render(reported, notebooks_dir=toys), range(2)))
    assert pages == [reported.path / "report.html"] * 2 and "FlashCore" in pages[0].read_text()
    assert hidden(reported.path) == []


@pytest.mark.notebook
def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path, toys):
    """Its half-written notebook and the keys of its kernel; what somebody writes just now stays."""
    write_notebook(
        tmp_path / "dies",
        "01_first",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nimport time\ntime.sleep(60)",
    )
    program = (
        "import sys, pathlib; from flashcore.pipeline import reporting; "
        f"reporting.report(notebooks_dir=pathlib.Path({str(tmp_path / 'dies')!r}), out={str(tmp_path / 'runs')!r})"
    )
    runtime = tmp_path / "runtime"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env={**os.environ, "JUPYTER_RUNTIME_DIR": str(runtime)}
    )
    assert done.returncode == -9
    [killed] = (tmp_path / "runs").glob("*/records.jsonl")
    assert hidden(killed.parent) != [], "the kill came too late to leave anything"
    assert list(runtime.glob("kernel-*.json")) == [], "the kernel's keys lie where nobody of ours looks"
    busy = partial_path(killed.parent / "notebooks" / "02_second")
    busy.mkdir()
    (killed.parent / "notebooks" / busy.name.replace(f"-{os.getpid()}-", "-4194999-")).mkdir()
    page = partial_path(killed.parent / "report.html")
    page.with_name(page.name.replace(f"-{os.getpid()}-", "-4194999-")).write_text("half")
    (toys / "02_second.ipynb").unlink()
    reporting.report(notebooks_dir=toys, out=tmp_path / "runs", pdf=False)
    assert hidden(tmp_path / "runs") == [busy.name]


def test_sweeping_leaves_what_is_not_ours(tmp_path):
    kept = [".report.html.partial", ".x.0123abcd-4194999-0123abcd.partial", "a.partial", ".gitignore"]
    for name in kept:
        (tmp_path / name).write_text("")
    own = partial_path(tmp_path / ("long" * 60))
    own.write_text("")
    sweep(tmp_path)
    sweep(tmp_path / "nowhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, own.name])


def test_sweeping_leaves_what_is_another_user_s_and_goes_on(tmp_path, monkeypatch):
    """A folder of runs that several share: whoever reports next need not be allowed to remove what was left."""
    for number in range(2):
        left = partial_path(tmp_path / f"report{number}")
        left.with_name(left.name.replace(f"-{os.getpid()}-", "-4194999-")).write_text("")
    tried = []

    def refuse(path, **_):
        tried.append(path)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    sweep(tmp_path)
    assert len(tried) == 2


def test_what_processes_of_another_container_write_is_not_taken_for_a_dead_one_s(monkeypatch):
    """Containers on one network have the machine's name, may share a folder, and each numbers its processes anew."""
    here = paths._numbering()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[4026530000]")
    assert paths._numbering() != here
    monkeypatch.undo()
    assert paths._numbering() == here


def test_two_reports_that_begin_in_one_second_have_a_run_each_whatever_is_drawn(tmp_path, monkeypatch):
    drawn = iter(["3f9a", "3f9a", "71c2"])
    monkeypatch.setattr(folders.secrets, "token_hex", lambda size: next(drawn))
    monkeypatch.setattr(folders, "datetime", type("Clock", (), {"now": lambda: datetime(2001, 2, 3, 4, 5, 6)}))
    assert [reporting.new_run(tmp_path).name[-4:] for _ in range(2)] == ["3f9a", "71c2"]


# -------------------------------------------------------------------------------------------------------- homes


@pytest.mark.exhaustive
@pytest.mark.notebook
def test_a_user_without_a_home_gets_one(tmp_path):
    """As in a container that runs under a user id which nobody told it of."""
    folder = tmp_path / "nb"
    finishing_notebook(folder, "01_first", measure(1))
    write_notebook(folder, "06_status_report", "1")
    program = (
        "import os, pathlib, pwd\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "from flashcore.gpu.cache import cache_dir\n"
        "from flashcore.page import pdf\n"
        "from flashcore.pipeline import reporting\n"
        "print(cache_dir()); pdf.browser()\n"
        f"where = {{'notebooks_dir': pathlib.Path({str(folder)!r}), 'out': {str(tmp_path / 'runs')!r}}}\n"
        "print(reporting.report(**where, pdf=False).failed)\n"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "FLASHCORE_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**kept, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cache, failed = done.stdout.splitlines()
    assert Path(cache) == tmp_path / f"flashcore-home-{os.getuid()}" / ".cache" / "flashcore" and failed == "{}"


def test_a_home_that_somebody_else_laid_out_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(paths.tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"flashcore-home-{os.getuid()}").symlink_to(tmp_path)
    found = paths._made_up_home()
    assert found.parent == tmp_path and not found.is_symlink()


# --------------------------------------------------------------------------------------------- notebooks and names


@pytest.mark.notebook
def test_a_notebook_that_prints_faster_than_anybody_reads_is_no_dead_kernel(tmp_path, run, monkeypatch):
    monkeypatch.setattr(notebooks, "OUTPUT_S", 0)
    flood = "for i in range(600): print('line', i, flush=True)"
    finishing_notebook(tmp_path / "nb", "01_first", flood)
    notebooks.execute_notebook("01_first", run, notebooks_dir=tmp_path / "nb")
    finishing_notebook(tmp_path / "nb", "02_second", f"{flood}\nraise ValueError('the true cause')")
    with pytest.raises(NotebookFailed, match="cell 4 raised ValueError: the true cause"):
        notebooks.execute_notebook("02_second", run, notebooks_dir=tmp_path / "nb")


@pytest.mark.notebook
def test_a_notebook_need_not_say_its_language(tmp_path, toys):
    (toys / "02_second.ipynb").unlink()
    for path in toys.glob("*.ipynb"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "metadata": {}}))
    assert reporting.report(notebooks_dir=toys, out=tmp_path / "runs", pdf=False).failed == {}


DAMAGES = {
    "half": lambda path: path.write_text(path.read_text()[:200]),
    "list": lambda path: path.write_text("[]"),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "deep": lambda path: path.write_text("[" * 5000),
    "no cells": lambda path: path.write_text('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{}]}'),
}


def damaged_copies(notebook: Path) -> list[str]:
    """The notebook's place is taken by copies, each damaged in another way; their names, in order."""
    names = [f"01_{place}_{damage.replace(' ', '_')}" for place, damage in enumerate(DAMAGES)]
    for name, damage in zip(names, DAMAGES.values(), strict=True):
        damage(Path(shutil.copy(notebook, notebook.with_stem(name))))
    notebook.unlink()
    return names


@pytest.mark.notebook
def test_damaged_notebooks_fail_alone(tmp_path, toys):
    names = damaged_copies(toys / "01_first.ipynb")
    result = reporting.report(notebooks_dir=toys, out=tmp_path / "runs", pdf=False)
    assert list(result.failed) == names and all("is damaged" in why for why in result.failed.values())
    assert [t.data["value"] for t in result.run.trials(kind="ceiling")] == [2]
    assert result.decision.verdict == "INCONCLUSIVE" and names[0] in result.decision.reason


@pytest.mark.notebook
def test_a_page_does_without_damaged_executed_notebooks_and_names_them(reported, toys):
    names = damaged_copies(reported.path / "notebooks" / "01_first.ipynb")
    page = rendering.render(reported, notebooks_dir=toys).read_text()
    assert f"is damaged: {'; '.join(names)}." in page


@pytest.mark.notebook
def test_a_parameters_cell_that_makes_no_sense_fails_its_notebook_alone(tmp_path, toys):
    write_notebook(toys, "01_first", "1", parameters="run_dir: str = (")
    result = reporting.report(notebooks_dir=toys, out=tmp_path / "runs", pdf=False)
    assert "is not Python" in result.failed["01_first"] and len(result.run.trials(kind="ceiling")) == 1


def test_a_status_report_that_is_damaged_is_one_sentence(tmp_path, toys, run):
    DAMAGES["half"](toys / "06_status_report.ipynb")
    with pytest.raises(NotebookFailed, match="06_status_report' did not finish: its file .* is damaged"):
        rendering.render(run, notebooks_dir=toys)


@pytest.mark.parametrize("name", ["b" * 60, "x" * 200, "a$b", "$\\frac$", "ok"])
def test_a_backend_of_any_name_makes_a_page(name):
    from flashcore.page.drawing import plots, svg

    trials = [
        t.model_copy(update={"backend": name}) if t.backend == "wmma" else t
        for t in synthetic.gpu_trials()
        if t.kind == "attention_timing"
    ]
    for figures in (plots.tflops_html(trials), plots.latency_html(trials)):
        assert "<svg" in figures
    assert len(svg.named(name).replace("\\$", "$")) <= svg.MOST_LETTERS and svg.named("ok") == "ok"


def test_kernel_sources_end_their_lines_at_a_line_feed(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCORE_PLUGINS", str(tmp_path))
    (tmp_path / "mine.cu").write_text("// one \u2028 comment\nint x;\f\n#pragma once\n", encoding="utf-8")
    assert build.kernel_source("mine").split("\n") == ['#line 1 "mine.cu"', "// one \u2028 comment", "int x;\f", "", ""]
    (tmp_path / "mine.cu").write_bytes(b"// \xff\n")
    with pytest.raises(FlashCoreError, match=r"mine\.cu cannot be read \(it is not UTF-8 text\)"):
        build.kernel_source("mine")


def test_plugins_are_found_once_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("FLASHCORE_PLUGINS", "none")
    assert {b.id for b in all_backends()} >= {"cpu", "wmma"}


# ------------------------------------------------------------------------------------------------ damaged neighbours

BAD = {
    "list": b"[]", "null": b"null", "deep": b"[" * 3000, "bytes": b"\xff\xfe", "newer": b'{"schema_version": 7}',
    "before": b'{"gpu": "SYNTHETIC H200", "date": "2001-01-01", "before": [1]}', "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_damaged_run_does_not_take_its_neighbours_down(tmp_path, bad):
    from flashcore.page import history
    from flashcore.page.history.views import since_last_run

    trials = synthetic.gpu_trials()
    for day in (1, 3):
        synthetic.write_run(
            tmp_path / f"run{day}", trials, synthetic.environment(date=f"2001-02-0{day}T00:00:00+00:00")
        )
    damaged = RunFolder.create(tmp_path / "run2")
    damaged.environment_path.write_bytes(BAD[bad])
    damaged.records_path.write_bytes(b'{"kind": "ceiling", "data": {"value": ' + b"[" * 3000 + b"\n")
    found = since_last_run(RunFolder(tmp_path / "run3"))
    assert found is not None and found.before.name == "run1"
    runs, left_out = history.runs_in(tmp_path)
    assert [run.name for run in runs] == ["run1", "run3"] and "run2 was left out" in left_out[0]


def test_a_neighbour_that_may_not_be_looked_into_is_none(tmp_path, monkeypatch):
    from flashcore.page import history

    synthetic.write_run(tmp_path / "run1", [Trial(kind="ceiling")], synthetic.environment())
    (tmp_path / "closed").mkdir()
    real = os.stat

    def stat(path, *args, **options):
        if "closed/" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert [run.name for run in history.runs_in(tmp_path)[0]] == ["run1"]


# ---------------------------------------------------------------------------------------------------- recorded runs


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A recorded run, where FlashCore keeps those."""
    run = synthetic.write_run(
        tmp_path / "reports" / "recorded" / "h100", synthetic.gpu_trials(), synthetic.environment()
    )
    own = folders.data_dir
    monkeypatch.setattr(folders, "data_dir", lambda name: tmp_path / name if name == "reports" else own(name))
    return run


def test_a_recorded_run_is_never_written_to(recorded, tmp_path):
    from typer.testing import CliRunner

    from flashcore.cli.program import app

    before = {path.name: path.read_bytes() for path in recorded.path.iterdir()}
    for line in (["render"], ["seal"], ["report", "--only", "sweep", "--run"], ["bisect", "--backend", "cpu", "--run"]):
        done = CliRunner().invoke(app, [*line, str(recorded.path)])
        assert done.exit_code == 2 and "is a recorded run, and those are never written to" in done.output, done.output
    assert {path.name: path.read_bytes() for path in recorded.path.iterdir()} == before


def test_the_page_of_a_recorded_run_is_drawn_elsewhere(recorded, tmp_path):
    before = {path.name: path.read_bytes() for path in recorded.path.iterdir()}
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "report.pdf").write_bytes(b"%PDF- of an earlier page")
    page, pdf, why = rendering.render_to(recorded, tmp_path / "there", pdf=False)
    assert page == tmp_path / "there" / "report.html" and "NO-GO" in page.read_text() and pdf is None and why == ""
    assert not (tmp_path / "there" / "report.pdf").exists()
    assert {path.name: path.read_bytes() for path in recorded.path.iterdir()} == before


def test_a_page_that_is_drawn_elsewhere_compares_with_the_run_before_as_in_its_own_folder(tmp_path):
    for name, day in (("older", "03"), ("newer", "05")):
        synthetic.write_run(
            tmp_path / "runs" / name,
            synthetic.gpu_trials(),
            synthetic.environment(date=f"2001-02-{day}T04:05:06+00:00"),
        )
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    page, *_ = rendering.render_to(RunFolder(tmp_path / "runs" / "newer"), tmp_path / "there", pdf=False)
    assert 'id="since"' in page.read_text() and "Compared with <code>older</code>" in page.read_text()
    after = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert [path for path in after if path not in before] == [Path("there"), Path("there/report.html")]


def test_the_run_begun_last_is_a_report_whatever_others_are_called(tmp_path):
    told = {
        "2026-01-02T03-04-05-cpu-0001": {"date": "2026-01-02", "parameters": {"notebooks": ["01_environment"]}},
        "baseline": {"date": "2025-01-01", "parameters": {"notebooks": ["01_environment"]}},
        "paging": {"date": "2027-01-01", "parameters": {"command": "paging"}},
        "odd": {"date": "2028-01-01", "parameters": {}},
    }
    for name, environment in told.items():
        RunFolder.create(tmp_path / name).environment_path.write_text(json.dumps(environment))
    RunFolder.create(tmp_path / "damaged").environment_path.write_text("{")
    assert folders.newest_run(tmp_path).name == "2026-01-02T03-04-05-cpu-0001"
    with pytest.raises(RecordsError, match="There is no run in"):
        folders.newest_run(tmp_path / "odd")
