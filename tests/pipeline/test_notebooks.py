"""Running one notebook: parameters are strict, and only its own final record says that it finished."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from support.notebook_tools import KILL, finishing_notebook, measure, write_notebook

from flashcore.errors import NotebookFailed, NotebookParameterError, UnknownName
from flashcore.pipeline import notebooks
from flashcore.pipeline.notebooks import check_parameters, declared_parameters, execute_notebook

LOADS = """
import sys
from flashcore.pipeline import notebooks
assert notebooks.load_nbformat().__name__ == "nbformat"
assert "lark" not in sys.modules and "rfc3987_syntax" not in sys.modules
"""


@pytest.mark.slow
def test_nbformat_is_loaded_without_grammars_and_they_can_be_loaded_later():
    subprocess.run([sys.executable, "-c", LOADS], check=True)


def values(run) -> list[int]:
    return [t.data["value"] for t in run.trials(kind="ceiling")]


def test_the_parameters_cell_is_read_with_its_types(tmp_path):
    text = (
        'a: int = 1\nb: str = "x"  # comment\nc = 2.5\nd = None\ne: dict[str, int] = {}\nf: tuple[int, int] = (1, 2)\n'
    )
    found = declared_parameters(write_notebook(tmp_path, "01_toy", parameters=text))
    assert {name: p.annotation for name, p in found.items()} == {
        "a": "int", "b": "str", "c": "float", "d": "any type", "e": "dict[str, int]", "f": "tuple[int, int]",
    }  # fmt: skip


@pytest.mark.parametrize(
    "parameters",
    [
        {"sizes": [1, 2]},
        {"sizes": []},
        {"scale": None},
        {"scale": 2},
        {"scale": 0.5},
        {"seed": 7, "profile": "full"},
        {},
    ],
)
def test_right_values_are_taken(tmp_path, parameters):
    check_parameters(write_notebook(tmp_path, "01_toy"), parameters)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("sizes", "[1, 2]", r"list\[int\]"),  # papermill would pass this text on as a string
        ("sizes", [1, "2"], r"list\[int\]"),
        ("sizes", 3, r"list\[int\]"),
        ("seed", "3", "int"),
        ("seed", True, "int"),
        ("seed", 1.0, "int"),
        ("seed", None, "int"),
        ("scale", "0.5", r"float \| None"),
        ("profile", 3, "str"),
    ],
)
def test_a_mistyped_value_is_an_error_that_names_the_type(tmp_path, name, value, wanted):
    with pytest.raises(NotebookParameterError, match=f"'{name}' of notebook 01_toy has to be {wanted}"):
        check_parameters(write_notebook(tmp_path, "01_toy"), {name: value})


def test_an_unknown_parameter_is_an_error_that_names_the_known_ones(tmp_path):
    with pytest.raises(
        NotebookParameterError, match="no parameter 'size'; it has: run_dir, profile, sizes, scale, seed"
    ):
        check_parameters(write_notebook(tmp_path, "01_toy"), {"size": 3})


@pytest.mark.parametrize("cell", ["a: int = = 1", "a: print(1) = 2", "a: torch.Tensor = None"])
def test_a_parameters_cell_that_cannot_be_checked_is_an_error(tmp_path, cell):
    with pytest.raises(NotebookParameterError, match="01_toy"):
        declared_parameters(write_notebook(tmp_path, "01_toy", parameters=cell))


def test_a_bad_parameter_stops_the_notebook_before_it_runs(tmp_path, run):
    finishing_notebook(tmp_path, "01_toy", measure(1))
    with pytest.raises(NotebookParameterError):
        execute_notebook("01_toy", run, {"sizes": "[1, 2]"}, notebooks_dir=tmp_path)
    assert run.trials() == []


def test_an_unknown_notebook_lists_those_there_are(tmp_path, run):
    write_notebook(tmp_path, "01_toy")
    with pytest.raises(UnknownName, match="01_toy"):
        execute_notebook("02_toy", run, notebooks_dir=tmp_path)


@pytest.mark.notebook
def test_a_notebook_runs_with_its_parameters_on_this_interpreter_in_its_run(tmp_path, run, monkeypatch):
    """This process stays where it is: its folder is that of all its threads, and of a second notebook that runs."""
    changes = []
    monkeypatch.setattr(os, "chdir", lambda path, real=os.chdir: changes.append(os.path.realpath(path)) or real(path))
    facts = '{"value": sizes, "python": sys.executable, "folder": os.getcwd()}'
    finishing_notebook(tmp_path, "01_toy", f'import os, sys\nrun.append(Trial(kind="ceiling", data={facts}))')
    executed = execute_notebook("01_toy", run, {"sizes": [3, 4]}, notebooks_dir=tmp_path)
    data = run.trials(kind="ceiling")[0].data
    folder = run.path.resolve() / "notebooks"
    assert data == {"value": [3, 4], "python": sys.executable, "folder": str(folder)}
    assert executed == run.path / "notebooks" / "01_toy.ipynb"
    assert nbformat.read(executed, as_version=4).cells[-1].execution_count
    assert set(changes) <= {os.path.realpath(".")}


@pytest.mark.notebook
def test_a_cell_that_raises_keeps_what_was_measured_and_says_which_cell(tmp_path, run):
    finishing_notebook(tmp_path, "01_toy", measure(1), "1 / 0", measure(2))
    with pytest.raises(NotebookFailed, match="ZeroDivisionError: division by zero"):
        execute_notebook("01_toy", run, notebooks_dir=tmp_path)
    assert values(run) == [1]
    [record] = run.trials(kind="notebook")
    assert record.status == "error" and record.data == {"name": "01_toy"} and "ZeroDivisionError" in record.reason
    assert (run.path / "notebooks" / "01_toy.ipynb").is_file()


@pytest.mark.notebook
@pytest.mark.parametrize(
    "cells", [(measure(1), KILL, measure(2)), (measure(1), KILL)], ids=["in the middle", "at the end"]
)
def test_a_killed_kernel_keeps_what_was_measured_and_is_a_failure(tmp_path, run, cells):
    finishing_notebook(tmp_path, "01_toy", *cells)
    with pytest.raises(NotebookFailed, match="kernel died"):
        execute_notebook("01_toy", run, notebooks_dir=tmp_path)
    assert values(run) == [1]
    assert [t.status for t in run.trials(kind="notebook")] == ["error"]


@pytest.mark.notebook
def test_a_notebook_without_its_final_record_did_not_finish_whatever_its_cells_say(tmp_path, run):
    finishing_notebook(tmp_path, "01_toy")
    execute_notebook("01_toy", run, notebooks_dir=tmp_path)
    write_notebook(tmp_path, "01_toy", measure(1))
    with pytest.raises(NotebookFailed, match="without its final record"):
        execute_notebook("01_toy", run, notebooks_dir=tmp_path)
    assert [t.status for t in run.trials(kind="notebook")] == ["ok", "error"]


@pytest.mark.notebook
def test_a_notebook_that_takes_too_long_is_ended_with_everything_it_started(tmp_path, run):
    child = 'import subprocess\nchild = subprocess.Popen(["sleep", "3000"])\n'
    record = 'run.append(Trial(kind="ceiling", data={"value": child.pid}))\n'
    finishing_notebook(tmp_path, "01_toy", child + record + "child.wait()")
    for seconds in (3, 30, 300):  # on a busy machine its kernel may need all of the time to start
        with pytest.raises(NotebookFailed, match=f"longer than {seconds} s"):
            execute_notebook("01_toy", run, notebooks_dir=tmp_path, timeout_s=seconds)
        if values(run):
            break
    [pid] = values(run)
    until = time.monotonic() + 300  # it was killed, and a busy machine may take its time over it
    while _state_of(pid) not in (None, "Z") and time.monotonic() < until:
        time.sleep(0.05)
    assert _state_of(pid) in (None, "Z")


@pytest.mark.notebook
def test_a_notebook_whose_time_is_up_before_its_kernel_has_started_is_ended_all_the_same(tmp_path, run):
    finishing_notebook(tmp_path, "01_toy", "import time\ntime.sleep(3000)")
    with pytest.raises(NotebookFailed, match="longer than 0 s"):
        execute_notebook("01_toy", run, notebooks_dir=tmp_path, timeout_s=0.0)


@pytest.mark.parametrize(("deaths", "reason"), [(1, None), (2, "did not start .Kernel died before replying to kern")])
def test_a_kernel_that_ended_before_its_first_cell_is_started_once_more(tmp_path, run, monkeypatch, deaths, reason):
    """Its ports are chosen before it begins, and another process may have taken one."""
    import papermill

    asked = []

    def execute(source, target, **options):
        asked.append(source)
        if len(asked) <= deaths:
            raise RuntimeError("Kernel died before replying to kernel_info")
        Path(target).write_text("{}")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    finishing_notebook(tmp_path, "01_toy")
    ran = functools.partial(execute_notebook, "01_toy", run, notebooks_dir=tmp_path, needs_record=False)
    if reason is None:
        assert ran().read_text() == "{}"
    else:
        with pytest.raises(NotebookFailed, match=reason):
            ran()
    assert len(asked) == 2


def _state_of(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it may end while it is looked at
        return None


@pytest.mark.notebook
def test_braces_in_the_folder_are_no_parameters(tmp_path):
    from flashcore.records import RunFolder

    run = RunFolder.create(tmp_path / "{run_dir} {x}")
    finishing_notebook(tmp_path / "{x}", "01_toy")
    execute_notebook("01_toy", run, notebooks_dir=tmp_path / "{x}")
    assert [t.status for t in run.trials()] == ["ok"]


@pytest.mark.notebook
def test_nothing_half_written_is_left(tmp_path, run):
    finishing_notebook(tmp_path, "01_toy", measure(1))
    execute_notebook("01_toy", run, notebooks_dir=tmp_path)
    left = sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file())
    assert left == ["notebooks/01_toy.ipynb", "records.jsonl"]


def test_a_package_that_compiles_keeps_its_kernels_for_the_notebooks_that_come_after(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHCORE_CACHE", str(tmp_path / "kept"))
    monkeypatch.delenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", raising=False)
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "/mine")
    found = notebooks._kernel_environment()
    assert found["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR" not in found, "the user's own folder stays"
    monkeypatch.delenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
    folder = Path(notebooks._kernel_environment()["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
    assert folder == tmp_path / "kept" / "flash-attention-4" and not folder.exists(), "who writes into it makes it"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED" not in notebooks._kernel_environment(), "others may write it"
