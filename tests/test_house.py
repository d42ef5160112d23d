"""The house itself: notebooks, documents, pins and the recorded run are what the rest relies on."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from support.warned import NeverRecorded

import flashcore
from flashcore.decision.evidence import Recorded, recorded_runs
from flashcore.gpu.build import source_hashes
from flashcore.records import read_trials

ROOT = Path(flashcore.__file__).parent.parent
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("these tests read the checkout, and FlashCore runs from an install here", allow_module_level=True)

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RECORDED = sorted(path.parent for path in (ROOT / "reports" / "recorded").glob("*/report.html"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/architecture.md"]
MOST_CELLS = 20  # two a section of the page
DEFINES = {"your_kernel": {"attention"}}
"""What a notebook may define: the kernel of whoever opens it, and nothing else."""
RECORDED_BYTES = 1_000_000


def kept_files() -> list[Path]:
    """What git keeps or would keep; every file of interest where there is no git."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        names = [name for name in done.stdout.split("\0") if name]
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    folders = ("flashcore", "kernels", "notebooks", "reports", "tests", "docs", "constraints")
    return [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file()]


# --- notebooks -----------------------------------------------------------------------------------------------------


def test_there_are_the_notebooks_of_the_report():
    stems = {path.stem for path in NOTEBOOKS}
    assert {
        "01_environment",
        "02_correctness_bisection",
        "04_tflops_sweep",
        "06_status_report",
        "08_outputs_alone",
    } <= stems


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert len(notebook.cells) <= MOST_CELLS
    ids = [cell.id for cell in notebook.cells]
    assert ids == [f"cell-{number:02}" for number in range(1, len(ids) + 1)]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code if cell.outputs or cell.execution_count] == []
    for cell in code:
        tree = ast.parse(TransformerManager().transform_cell(cell.source))
        defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert defined <= DEFINES.get(path.stem, set()), "a notebook calls functions and defines none"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_one_parameters_cell_typed_and_commented(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    for line in cells[0].source.splitlines():
        assert re.fullmatch(r"\w+: [^=#]+ = [^#]+  # \S.*", line), line


# --- documents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_make_command_a_document_names_exists(name):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z][a-z-]*)", (ROOT / name).read_text(), flags=re.MULTILINE))
    assert named <= targets
    assert name != "README.md" or {"report", "test"} <= named


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flashcore_command_a_document_names_exists(name):
    from flashcore.cli.program import app

    known = {command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"(?:`|^ {4})flashcore ([a-z]+)", (ROOT / name).read_text(), flags=re.MULTILINE))
    assert named <= known


@pytest.mark.parametrize("name", [*DOCUMENTS, "CHANGELOG.md", "kernels/README.md"])
def test_every_relative_link_of_a_document_leads_somewhere(name):
    page = ROOT / name
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_make_help_lists_every_target():
    done = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", "help"], capture_output=True, text=True)
    listed = set(re.findall(r"^  make ([a-z-]+)", done.stdout, flags=re.MULTILINE))
    phony = set(re.findall(r"^\.PHONY: (\S+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert listed == phony and {"report", "test", "lab", "build", "lint", "clean"} <= listed


def pytest_line(target: str) -> str:
    """What a target of the Makefile runs."""
    line = ["make", "-C", str(ROOT), "-n", target, "PYTHON=python3"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def test_the_fast_tests_are_those_without_any_marker_of_something_slow():
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    wanted = {marker.partition(":")[0] for marker in markers} - {"exhaustive"}
    [left_out] = re.findall(r"-m 'not \(([^)]*)\)'", pytest_line("test-fast"))
    assert set(left_out.split(" or ")) == wanted >= {"compiler", "browser", "notebook"}


def test_the_three_sets_of_tests_are_one_within_the_other():
    assert "--exhaustive" in pytest_line("test-all") and "--exhaustive" not in pytest_line("test")
    assert not re.search(r" -[mk] '", pytest_line("test") + pytest_line("test-all"))


def test_the_build_machine_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.rstrip().splitlines()[-1] == "make test"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first[1] == flashcore.__version__


@pytest.mark.slow
def test_no_kept_file_names_a_machine_or_a_package_registry():
    folders = [f"/{name}/" for name in ("work", "root", "home")]
    hosts = ["py" + "pi.org", "python" + "hosted", "download.py" + "torch"]
    pattern = re.compile("|".join([*(rf"(?<![\w.:<}}*\])]){f}\w" for f in folders), *map(re.escape, hosts)]))
    found = []
    for path in kept_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert found == []


# --- packaging -----------------------------------------------------------------------------------------------------


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins(pins_file: str) -> list[str]:
    lines = [*(ROOT / "constraints" / "common.txt").read_text().splitlines(),
             *(ROOT / "constraints" / f"{pins_file}.txt").read_text().splitlines()]  # fmt: skip
    return [line for line in lines if line and not line.startswith(("#", "-c "))]


def test_every_dependency_is_pinned_exactly_in_each_set():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for pins_file, names in (("cuda12", ["gpu"]), ("cuda13", ["compile", "gpu-cuda13", "peers"])):
        pins = _pins(pins_file)
        assert [p for p in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", p)] == []
        pinned = [p.split("==")[0] for p in pins]
        assert len(set(pinned)) == len(pinned), "pinned twice"
        wanted = [
            *project["dependencies"],
            *extras["dev"],
            *extras["transformers"],
            *(r for name in names for r in extras[name]),
        ]
        asked = {_normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted} - {"flashcore"}
        assert asked <= set(pinned)


@pytest.mark.slow
@pytest.mark.parametrize("pins_file", ["cuda12", "cuda13"])
def test_pins_agree_with_each_other_and_with_the_oldest_python(pins_file):
    """pip passes over a pin that this Python is too old for, and then says that whoever asks for it is in conflict.

    What a pinned version asks for is known where it is installed; one that is not is judged on another machine.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    there = {"python_version": oldest, "python_full_version": f"{oldest}.0", "extra": ""}
    pinned = dict(pin.split("==") for pin in _pins(pins_file))
    judged, wrong = 0, []
    for name, version in pinned.items():
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(found.version).public != version:
            continue
        judged += 1
        if not SpecifierSet(found.metadata.get("Requires-Python") or "").contains(f"{oldest}.0"):
            wrong.append(f"{name}=={version} asks for Python {found.metadata['Requires-Python']}")
        for asked in map(Requirement, found.requires or ()):
            pin = pinned.get(_normal(asked.name))
            in_force = asked.marker is None or asked.marker.evaluate(there)
            if pin is not None and in_force and not asked.specifier.contains(pin, prereleases=True):
                wrong.append(f"{name}=={version} asks for {asked}, and {pin} is pinned")
    assert wrong == []
    if judged < len(pinned) // 2:
        pytest.skip(f"of {len(pinned)} pinned versions {judged} are installed here; `make install` installs them")


def test_what_the_wheel_carries_exists():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert [source for source in config["force-include"] if not (ROOT / source).exists()] == []


# --- recorded runs -------------------------------------------------------------------------------------------------


def test_there_is_a_recorded_run():
    assert RECORDED, "reports/recorded holds no run: make one on a GPU, as CONTRIBUTING.md says"


def kernels_to_record(runs: Sequence[Recorded], current: Mapping[str, str]) -> list[str]:
    """The kernels whose source changed since the newest run was recorded; one that was never recorded is a warning.

    An older run, of another GPU, may be stale: reports do not stand on it.
    """
    newest = runs[-1]
    if added := newest.added(current):
        warnings.warn(
            f"{', '.join(added)}: not in the recorded run {newest.folder}; to record again: CONTRIBUTING.md",
            NeverRecorded,
            stacklevel=2,
        )
    return newest.changed(current)


@pytest.mark.filterwarnings("always::support.warned.NeverRecorded")
def test_the_newest_recorded_run_measured_the_kernels_as_they_are():
    runs, left_out = recorded_runs(ROOT / "reports" / "recorded")
    assert left_out == () and len(runs) == len(RECORDED)
    assert kernels_to_record(runs, source_hashes()) == [], "record again on a GPU, as CONTRIBUTING.md says"


def test_a_new_kernel_is_a_warning_and_a_changed_one_in_the_newest_run_is_not(recwarn):
    old = Recorded((), {"kernels": {"wmma": "1"}}, "h200")
    new = Recorded((), {"kernels": {"wmma": "2"}}, "h100")
    assert kernels_to_record([old, new], {"wmma": "2"}) == [] and not recwarn.list
    assert kernels_to_record([new, old], {"wmma": "2"}) == ["wmma"]
    with pytest.warns(NeverRecorded, match="^attention_mine: not in the recorded run h100"):
        assert kernels_to_record([old, new], {"wmma": "2", "attention_mine": "3"}) == []


@pytest.mark.parametrize("folder", RECORDED, ids=lambda p: p.name)
def test_a_recorded_run_is_whole_or_says_that_it_is_not(folder):
    assert (folder / "records.jsonl").stat().st_size < RECORDED_BYTES
    trials = read_trials(folder / "records.jsonl", on_damage="raise")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["gpu"] and environment["before"]
    assert environment["git"]["dirty"] is not None
    finished = {t.data["name"] for t in trials if t.kind == "notebook" and t.status == "ok"}
    unfinished = set(environment["parameters"]["notebooks"]) - finished
    assert bool(environment["after"]) == (not unfinished), "what the machine was like is recorded when all is done"
    assert {t.environment for t in trials} == {environment["id"]}
    assert all(len(t.timing.samples_us) <= 50 for t in trials if t.timing)
    page = (folder / "report.html").read_text()
    assert environment["gpu"] in page and (folder / "report.pdf").stat().st_size
    if unfinished:
        assert "INCONCLUSIVE" in page and all(f"no record that notebook {name} finished" in page for name in unfinished)


def test_a_recorded_fleet_is_whole():
    folders = sorted(path.parent for path in (ROOT / "reports" / "recorded").glob("*/fleet.html"))
    assert folders
    for folder in folders:
        trials = read_trials(folder / "records.jsonl", on_damage="raise")
        cards = json.loads((folder / "environment.json").read_text())["cards"]
        assert {trial.kind for trial in trials} == {"fleet"} and len(trials) == len(cards) > 1
        page = (folder / "fleet.html").read_text()
        assert all(trial.status == "ok" and trial.card[:12] in page for trial in trials)


# --- tests ---------------------------------------------------------------------------------------------------------


def test_every_module_has_a_test_file_of_its_name():
    package, tests = ROOT / "flashcore", ROOT / "tests"
    modules = [path.relative_to(package) for path in package.rglob("*.py") if not path.stem.startswith("__")]
    wanted = {m: tests / m.parent / f"test_{m.stem.removeprefix('_')}.py" for m in modules}
    assert sorted(str(m) for m, path in wanted.items() if not path.is_file()) == []
