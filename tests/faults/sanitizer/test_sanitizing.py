"""compute-sanitizer: its text becomes findings with kernel, file and line; not being there is a state."""

from __future__ import annotations

import copy
import os

import pytest

from flashcore import backends
from flashcore.backends import AVAILABLE
from flashcore.errors import UnknownName
from flashcore.faults.sanitizer import sanitizing
from flashcore.faults.sanitizer.log import Finding, ours, parse
from flashcore.records import Trial

# The samples below are in the form that the tool prints; places and numbers are invented.

MEMCHECK = """\
========= COMPUTE-SANITIZER
the checked program says something
========= Invalid __global__ read of size 2 bytes
=========     at attention_scalar+0x4f0 in /somewhere/attention_scalar.cu:63
=========     by thread (37,0,0) in block (4,0,0)
=========     Access to 0x7f10c0a00200 is out of bounds
=========     and is 513 bytes after the nearest allocation at 0x7f10c0a00000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernel [0x2e5a31] in libcuda.so.1
=========
========= Invalid __global__ read of size 2 bytes
=========     at attention_scalar+0x4f0 in /somewhere/attention_scalar.cu:63
=========     by thread (38,0,0) in block (4,0,0)
=========     Access to 0x7f10c0a00202 is out of bounds
=========
========= Invalid __shared__ write of size 16 bytes
=========     at cp_async_16(void *, const void *, int)+0x90 in ptx.cuh:14
=========     by thread (1,0,0) in block (0,2,0)
=========     Address 0x18004 is misaligned
=========         Device Frame: copy_rows<(int)64>(__half (*)[72], const __half *, int)+0x80 in attention_wmma.cu:62
=========         Device Frame: attention_wmma+0x60 in attention_wmma.cu:121
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernel [0x2e5a31] in libcuda.so.1
=========
========= Program hit cudaErrorIllegalAddress (error 700) due to "an illegal memory access was encountered" on a call.
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: [0x48b53f] in libcuda.so.1
=========
========= Target application returned an error
========= ERROR SUMMARY: 4 errors
========= ERROR SUMMARY: 2 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""

RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at cp_async_16(void *, const void *, int)+0x3380 in ptx.cuh:14
=========     and Read access at attention_wmma+0x1f0 in /a folder/attention_wmma.cu:152 [248 hazards]
=========     and Read access at attention_wmma+0x2f0 in /b/attention_wmma.cu:207 [8 hazards]
=========
========= Warning: Race reported between Read access at void other::Kernel<(int)256>(const int *, int)+0x130
=========     and Write access at void other::Kernel<(int)256>(const int *, int)+0x160 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""

HAZARDS = """\
========= ERROR: Potential WAR hazard detected at __shared__ 0x410 in block (11,0,0) :
=========     Read Thread (127,0,0) at attention_scalar+0x860 in attention_scalar.cu:70
=========     Write Thread (0,0,0) at attention_scalar+0x9d0 in attention_scalar.cu:62
=========     Current Value : 0, Incoming Value : 181
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""

INITCHECK = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 2 bytes
=========     at attention_scalar+0x250 in attention_scalar.cu:52
=========     by thread (16,0,0) in block (0,0,0)
=========     Address 0x7f3c7ec000fc
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::FillFunctor<float>>(int, T2)+0x70
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc
=========
========= ERROR SUMMARY: 2 errors
"""

SYNCCHECK = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at attention_wmma+0xa0 in attention_wmma.cu:134
=========     by thread (19,0,0) in block (0,0,0)
=========
========= Barrier error detected. Divergent thread(s) in block
=========     at 0x000008f0 in /somewhere/attention_wmma.cu:134:attention_wmma(AttentionParams)
=========     by thread (63,0,0) in block (0,0,0)
=========     Device Frame:/somewhere/attention_wmma.cu:134:attention_wmma(AttentionParams) (attention_wmma : 0x8f0)
========= ERROR SUMMARY: 2 errors
"""

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
CLEAN_RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


def test_memcheck():
    log = parse(MEMCHECK)
    assert (log.errors, log.summary) == (4, "ERROR SUMMARY: 4 errors")
    read, write, api = log.findings
    assert (read.kind, read.space, read.size, read.count) == ("invalid read", "global", 2, 2)
    assert (read.kernel, read.file, read.line) == ("attention_scalar", "attention_scalar.cu", 63)
    assert (read.thread, read.block, read.address) == ((37, 0, 0), (4, 0, 0), "0x7f10c0a00200")
    assert (write.kind, write.space, write.kernel) == ("invalid write", "shared", "attention_wmma")
    assert write.functions == ("cp_async_16", "copy_rows", "attention_wmma")
    assert (write.file, write.line, write.block) == ("ptx.cuh", 14, (0, 2, 0))
    assert api.kind == "api error" and api.kernel is None and "illegal memory access" in api.text
    kept, others = ours(log, ["attention_scalar"])
    assert [f.kind for f in kept] == ["invalid read", "api error"] and others == 1
    assert read.where() == "attention_scalar, attention_scalar.cu:63"


def test_racecheck_in_both_reports():
    race, other = parse(RACECHECK).findings
    assert (race.kind, race.space, race.count, race.file, race.line) == ("race", "shared", 256, "ptx.cuh", 14)
    assert race.other == "read at attention_wmma.cu:152 and read at attention_wmma.cu:207"
    assert other.kernel == "Kernel" and other.count == 4 and other.file is None
    [hazard] = parse(HAZARDS).findings
    assert (hazard.kernel, hazard.line, hazard.other) == ("attention_scalar", 70, "write at attention_scalar.cu:62")
    assert (hazard.thread, hazard.block, hazard.address) == ((127, 0, 0), (11, 0, 0), "0x410")
    assert parse(CLEAN_RACE).findings == () and parse(CLEAN_RACE).errors == 0


def test_a_race_in_an_inlined_function_counts_when_the_other_side_is_ours():
    kept, others = ours(parse(RACECHECK), ["attention_wmma"])
    assert [f.kind for f in kept] == ["race"] and others == 4


def test_initcheck_keeps_our_kernels_and_counts_the_rest():
    log = parse(INITCHECK)
    kept, others = ours(log, ["attention_scalar", "attention_wmma"])
    assert [(f.kind, f.kernel, f.line) for f in kept] == [("uninitialized read", "attention_scalar", 52)]
    assert others == 1 and log.findings[1].kernel == "vectorized_elementwise_kernel"


def test_synccheck_in_the_newer_and_the_older_form():
    [barrier] = parse(SYNCCHECK).findings
    assert (barrier.kind, barrier.kernel, barrier.file, barrier.line) == (
        "barrier error", "attention_wmma", "attention_wmma.cu", 134,
    )  # fmt: skip
    assert barrier.count == 2


def test_nothing_is_lost_and_nothing_is_invented():
    unknown = "========= Something new happened\n=========     at attention_wmma+0x10 in attention_wmma.cu:9\n"
    [finding] = parse(unknown + CLEAN).findings
    assert (finding.kind, finding.text, finding.line) == ("other", "Something new happened", 9)
    for text in ("", "no tool at all\n", "========= COMPUTE-SANITIZER\n"):
        assert parse(text).findings == () and parse(text).summary is None
    assert Finding("race", "x").to_dict() == {"kind": "race", "text": "x", "count": 1}


# ------------------------------------------------------------------------------------------------ running the tool


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
