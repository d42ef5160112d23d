"""Shared by all tests: markers and who may start what, one thread a process, fixed seeds, caches of the session.

A test that starts the CUDA compiler, a browser or a Jupyter kernel has the marker `compiler`, `browser` or `notebook`;
without it the test fails, so that `make test-fast` stays what it says. `gpu` stands for all three.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import re
import sys
from pathlib import Path

# Before torch is imported, and for every process that a test starts. The tensors of tests are small: a second thread
# makes no test faster, and on a busy machine it makes them ten times slower, since threads wait for each other.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = os.environ.get("MPLBACKEND", "Agg")

import pytest

from flashcore.gpu import build, device
from flashcore.records import RunFolder

# jsonschema, which nbformat imports, would build grammars for a format that no notebook has: a second in each worker.
sys.modules.setdefault("rfc3987_syntax", None)

# Collecting makes many objects and frees few; a search for garbage among them finds next to none.
gc.disable()

# pytest rewrites each test module for its assertions, which takes a worker six seconds. What it made is kept beside the
# modules, also where a shell tells Python to keep nothing.
_keeps_nothing, sys.dont_write_bytecode = sys.dont_write_bytecode, False

STARTS = {"compiler": "the CUDA compiler", "browser": "a browser", "notebook": "a Jupyter kernel"}
"""What a test may start only under the marker of that name. A test with a fixture of that name has the marker."""

WAITING = (
    "pipeline/test_spread_reports.py", "measure/cluster/test_spreading.py", "parallel/test_parallel_example.py",
    "page/test_in_a_browser.py", "pipeline/test_folders.py", "pipeline/test_reporting.py", "pipeline/test_redo.py",
    "pipeline/test_notebooks.py", "pipeline/test_rendering.py", "bisection/faults/test_proving.py",
    "bisection/interactive/test_your_kernel.py", "page/drawing/test_paging_views.py", "measure/cluster/test_slurm.py",
)  # fmt: skip
"""What takes long and waits half of the time, for kernels of Jupyter, browsers and processes that end."""
COMPUTING = (
    "kernels/test_sass.py", "bisection/faults/test_catalogue.py", "gpu/test_build.py", "kernels/test_new_kernel.py",
    "bisection/diagnosis/test_diagnosing.py", "bisection/diagnosis/test_conforming.py",
    "bisection/diagnosis/test_apart.py", "bisection/faults/test_diagnosing.py", "page/test_random_runs.py",
    "cli/test_printing_contract.py", "page/drawing/test_stage_plots.py", "page/test_contradictions.py",
    "bisection/test_split_traces.py", "surveys/invariance/test_measuring.py", "cli/test_diagnose.py",
    "cli/test_verdict.py", "parallel/test_attending.py", "parallel/test_gradients.py",
    "bisection/faults/plants/test_invariance.py", "paging/test_selecting.py", "paging/test_appending.py",
    "paging/test_cache_machine.py", "backends/test_hopper_masks.py",
)  # fmt: skip
"""What takes long and keeps a core busy."""


# --- which tests run -------------------------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run the complete form of the tests that are sampled")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for name in STARTS:
            if name in item.fixturenames:
                item.add_marker(name)

    if not config.getoption("--exhaustive") and "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]

    if os.environ.get("PYTEST_XDIST_WORKER"):
        items[:] = shared_out(items, int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))

    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not device.has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="this machine has no NVIDIA GPU that torch can use"))


def shared_out(items: list, workers: int) -> list:
    """The tests in the order in which workers of pytest-xdist begin with them: each with an equal share of the list.

    What takes longest comes first, so that at the end none waits for another. The first worker begins with what waits,
    beside the second one, which begins with what keeps a core busy; were all to wait at once, cores would idle.
    """
    place = {Path(__file__).parent / name: number for number, name in enumerate((*WAITING, *COMPUTING))}
    first, second, rest = [], [], []
    for item in items:
        number = place.get(item.path, len(place))
        (first if number < len(WAITING) else second if number < len(place) else rest).append(item)
    for some in (first, second):
        some.sort(key=lambda item: place[item.path])
    beside = max(0, len(items) // workers - len(first))
    return first + rest[:beside] + second + rest[beside:]


def pytest_collection_finish():
    sys.dont_write_bytecode = _keeps_nothing
    gc.freeze()  # what collection made stays to the end, so no search for garbage has to walk through it
    gc.set_threshold(20_000, 20, 20)  # a twelfth of the time went into searches that found next to nothing
    gc.enable()


# --- what a test may start -------------------------------------------------------------------------------------------

_started: set[str] = set()
_nvrtc = build._nvrtc


def _counted(*arguments):
    _started.add("compiler")
    return _nvrtc(*arguments)


def _hear(event: str, arguments: tuple) -> None:
    if event == "subprocess.Popen":
        program, line = arguments[0], arguments[1]
        if re.search(r"chrom|edge|playwright", str(program)):
            _started.add("browser")
        if "ipykernel" in str(line):
            _started.add("notebook")


build._nvrtc = _counted
# A cubin's name holds the hash of what it was made from. To read one takes the disassembler as long as the compiler
# took to write it, and a test of the text asks for the counts too.
build.disassemble = functools.lru_cache(maxsize=16)(build.disassemble)
sys.addaudithook(_hear)


def _may_start(item, name: str) -> bool:
    return any(item.get_closest_marker(marker) for marker in (name, "gpu"))


def _check_what_started(item, own_cache: Path | None = None) -> None:
    if own_cache is not None and any(own_cache.glob("*.cubin")):  # also by a process of its own
        _started.add("compiler")
    wrong = sorted(name for name in _started if not _may_start(item, name))
    _started.clear()
    if wrong:
        told = " and ".join(STARTS[name] for name in wrong)
        pytest.fail(f"This test starts {told}: mark it {', '.join(f'pytest.mark.{name}' for name in wrong)}.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    _started.clear()
    result = yield
    _check_what_started(item)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    _check_what_started(item, item.funcargs.get("_alone"))
    return result


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """Of what a worker of pytest-xdist tells of a test, keywords are the most, and nobody reads them."""
    told = yield
    if told and told.get("keywords"):
        told["keywords"] = {}
    return told


# --- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder of this session that all workers see; `support.sharing.made_once` makes things there."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _shared_cubins(shared_folder):
    """What one test compiled no other test of the session compiles again. It starts empty, and the user's stays alone.

    A test that needs an empty cache sets FLASHCORE_CACHE to a folder of its own.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FLASHCORE_CACHE", str(shared_folder / "cubins"))
        yield


@pytest.fixture(scope="session")
def _nothing_to_start(tmp_path_factory) -> tuple[Path, str]:
    """A cache of cubins that stays empty, and a browser that is none."""
    folder = tmp_path_factory.getbasetemp()
    program = folder / "no-browser"
    program.write_text("#!/bin/sh\necho 'mark this test pytest.mark.browser' >&2\nexit 1\n")
    program.chmod(0o755)
    return folder / "no-cubins", str(program)


@pytest.fixture(autouse=True)
def _alone(request, _shared_cubins, _nothing_to_start):
    """Every test starts from the same random state, and one without a marker cannot start what the marker stands for.

    Without `compiler` it finds an empty cache; that this stays empty is checked after the test. Without `browser` it
    prints no PDF, so that a report that it makes takes less long. One fixture for all this: it is set up for each test.
    """
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    # Where there is no GPU, `torch.manual_seed` keeps a stack trace each time for the GPU that may come.
    (torch if device.has_gpu() else torch.default_generator).manual_seed(0)

    own, program = _nothing_to_start
    held = {}
    if not _may_start(request.node, "compiler"):
        held["FLASHCORE_CACHE"] = str(own)
    if not _may_start(request.node, "browser"):
        held["FLASHCORE_CHROMIUM"] = program
    before = {name: os.environ.get(name) for name in held}
    os.environ.update(held)
    yield own if "FLASHCORE_CACHE" in held else None
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for path in own.glob("*"):
        path.unlink()


@pytest.fixture(scope="session")
def exhaustive(request) -> bool:
    """Whether the complete form of what is sampled otherwise is wanted."""
    return request.config.getoption("--exhaustive")


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """An empty run folder."""
    return RunFolder.create(tmp_path / "run")
