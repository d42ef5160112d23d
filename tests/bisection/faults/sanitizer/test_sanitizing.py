"""compute-sanitizer: what it printed becomes a trial; not being there is a state."""

from __future__ import annotations

import copy
import os

import pytest
from support.sanitizer_logs import CLEAN, CLEAN_RACE, INITCHECK, MEMCHECK, RACECHECK, SYNCCHECK

from flashcore import backends
from flashcore.backends import AVAILABLE
from flashcore.bisection.faults.sanitizer import sanitizing
from flashcore.errors import UnknownName
from flashcore.records import Trial


def fake_tool(folder, monkeypatch, text: str, code: int = 0, before: str = ""):
    """A program in the tool's place that prints `text`, and a backend that seems to work here."""
    (folder / "log.txt").write_text(text)
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{before}\ncat {folder}/log.txt\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    backend = copy.copy(backends.get("scalar"))
    backend.__class__ = type("Here", (type(backend),), {"availability": lambda self: AVAILABLE})
    return backend


@pytest.mark.parametrize(
    ("tool", "text", "code", "status", "words"),
    [
        ("memcheck", MEMCHECK, 1, "failed", "attention_scalar, attention_scalar.cu:63"),
        ("racecheck", RACECHECK, 0, "failed", "attention_wmma, ptx.cuh:14"),
        ("initcheck", INITCHECK, 0, "failed", "attention_scalar.cu:52"),
        ("synccheck", SYNCCHECK, 0, "failed", "Barrier error detected. Divergent thread(s) in block"),
        ("memcheck", CLEAN, 0, "ok", None),
        ("racecheck", CLEAN_RACE, 0, "ok", None),
        ("memcheck", "========= COMPUTE-SANITIZER\nImportError: no cupy\n", 1, "error", "ImportError: no cupy"),
        ("memcheck", "ImportError: no cupy\n" + CLEAN, 1, "error", "did not finish"),
        ("memcheck", "", 127, "error", "it printed nothing"),
        ("initcheck", INITCHECK.replace("attention_scalar", "somebody_elses"), 0, "ok", None),
    ],
)
def test_what_the_tool_printed_becomes_a_trial(tmp_path, monkeypatch, run, tool, text, code, status, words):
    backend = fake_tool(tmp_path, monkeypatch, text, code)
    [trial] = sanitizing.sanitize(run, [backend], tools=tool)
    assert (trial.kind, trial.backend, trial.variant, trial.status) == ("sanitizer", "scalar", tool, status), trial
    assert run.trials(kind="sanitizer") == [trial] and Trial.model_validate_json(trial.model_dump_json()) == trial
    assert trial.source_hash == backend.source_hash() and trial.data["tool"] == tool
    if words is None:
        assert trial.reason is None and trial.data["findings"] == []
    else:
        assert words in trial.reason
    if status == "failed":
        first = trial.data["findings"][0]
        assert first["kernel"] and first["file"] and first["line"]


@pytest.mark.slow
def test_a_tool_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    backend = fake_tool(tmp_path, monkeypatch, CLEAN, before="sleep 60")
    [trial] = sanitizing.sanitize(None, [backend], tools="memcheck", time_limit_s=0.5)
    assert trial.status == "error" and "exceeded 0.5 s" in trial.reason


def test_not_being_there_is_a_state_with_what_mends_it(tmp_path, monkeypatch):
    backend = fake_tool(tmp_path, monkeypatch, CLEAN)
    monkeypatch.setattr(sanitizing, "executable", lambda: None)
    trials = sanitizing.sanitize(None, [backend])
    assert [t.variant for t in trials] == list(sanitizing.TOOLS)
    assert {t.status for t in trials} == {"unavailable"}
    assert all("not installed; to mend it: pip install" in t.reason for t in trials)


def test_a_backend_without_a_kernel_has_nothing_to_watch():
    assert sanitizing.sanitize(None, [backends.get("cpu")]) == []


def test_the_tool_is_found_in_a_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    path = tmp_path / "bin" / "compute-sanitizer"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    assert sanitizing.executable() == str(path)


def test_tools_by_name():
    assert sanitizing.tools_of("all") == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert sanitizing.tools_of("memcheck, synccheck") == ["memcheck", "synccheck"]
    with pytest.raises(UnknownName, match="'leakcheck'; choose one of: memcheck"):
        sanitizing.tools_of("leakcheck")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sanitizing.executable() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(
    ("tool", "fault", "ids"),
    [
        *((tool, None, ("scalar", "wmma")) for tool in sanitizing.TOOLS),
        ("memcheck", "F11", ("scalar", "wmma")),
        # Without its barrier wmma races too, but its pages arrive by cp.async, whose writes racecheck does not follow.
        ("racecheck", "G1", ("scalar",)),
    ],
)
def test_our_kernels_are_clean_and_planted_bugs_are_found(tool, fault, ids):
    for trial in sanitizing.sanitize(None, [backends.get(one) for one in ids], tools=tool, fault=fault):
        assert trial.status == ("failed" if fault else "ok"), (trial.backend, trial.reason)
