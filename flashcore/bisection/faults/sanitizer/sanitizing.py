"""Run compute-sanitizer on a backend: accesses out of bounds, races, reads of unwritten memory, wrong barriers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flashcore.backends import Backend
from flashcore.bisection.faults.sanitizer.log import ours, parse
from flashcore.errors import UnknownName
from flashcore.gpu.build import kernel_names, source_hash
from flashcore.measure.cluster import Pool, Task, perform
from flashcore.paths import folder_in
from flashcore.records import RunFolder, Trial

TOOLS = {
    "memcheck": "accesses out of bounds or misaligned",
    "racecheck": "races in shared memory",
    "initcheck": "reads of global memory that nobody wrote",
    "synccheck": "barriers used wrongly",
}
"""The tools of compute-sanitizer, and what each looks for."""
AT_ONCE = 4
TIME_LIMIT_S = 240.0
"""Seconds one tool may take; it slows a kernel down a hundredfold, and torch's start too."""
KEPT = 20
"""Findings that a record keeps; it counts them all."""
_FIX = "pip install nvidia-cuda-sanitizer-api, or install a CUDA toolkit and set CUDA_HOME"


def executable() -> str | None:
    """Path of compute-sanitizer: on PATH, in CUDA_HOME, a toolkit or its wheel; None when it is not installed."""
    if found := shutil.which("compute-sanitizer"):
        return found
    roots = [h for h in (folder_in("CUDA_HOME"), folder_in("CUDA_PATH"), Path("/usr/local/cuda")) if h]
    spec = importlib.util.find_spec("nvidia")
    for wheels in spec.submodule_search_locations if spec else []:
        roots += sorted(p for p in Path(wheels).iterdir() if p.is_dir())
    for root in roots:
        for folder in ("bin", "compute-sanitizer", "extras/compute-sanitizer", "bin/compute-sanitizer"):
            path = root / folder / "compute-sanitizer"
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return None


def tools_of(names: str) -> list[str]:
    """Tools by a comma-separated list, `all` or `none`; `UnknownName` for one that does not exist."""
    if names.strip() == "none":
        return []
    wanted = list(TOOLS) if names.strip() == "all" else [n.strip() for n in names.split(",") if n.strip()]
    for name in wanted:
        if name not in TOOLS:
            raise UnknownName("tool of compute-sanitizer", name, [*TOOLS, "all"])
    return wanted


def sanitize(
    run: RunFolder | None,
    backends: Sequence[Backend],
    *,
    tools: str = "all",
    fault: str | None = None,
    time_limit_s: float = TIME_LIMIT_S,
    pool: Pool | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Trial]:
    """Watch each backend with each tool; one `sanitizer` trial each, written as made.

    Parameters
    ----------
    run
        Where trials go; None keeps them in memory.
    backends
        Those to watch; one without a kernel of ours has nothing to watch and is left out.
    tools
        `all`, `none`, or names from `TOOLS` separated by commas.
    fault
        Id of a bug to plant first, to see that the tool finds it.
    time_limit_s
        Of one tool on one backend.
    pool
        Workers of other cards, each of which then watches one backend with one tool at a time; None for this process.

    Returns
    -------
    list of Trial
        Status `ok` (nothing found), `failed` (findings in our kernels), `unavailable` (no tool or no GPU; the reason
        says how to mend it) or `error` (the tool did not finish). Data `tool`, `findings` (see
        `sanitizer_log.Finding`), `num_findings`, `elsewhere` (findings in other libraries' kernels, which are only
        counted) and `summary`.
    """
    pairs = [(backend, tool) for backend in backends if backend.kernel is not None for tool in tools_of(tools)]

    def watch(pair: tuple[Backend, str]) -> Trial:
        backend, tool = pair
        if progress:
            progress(f"{tool} on {backend.id}: {TOOLS[tool]}")
        return _one(backend, tool, fault, time_limit_s)

    if pool is not None and pool.places:
        todo = [Task(f"{tool} on {one.id}: {TOOLS[tool]}", _watched, (one, tool, fault, time_limit_s),
                     limit_s=time_limit_s + 60, cost_s=5.0,
                     owed=({"kind": "sanitizer", "backend": one.id, "variant": tool, "data": {"tool": tool},
                            "source_hash": source_hash(one.kernel)},)) for one, tool in pairs]  # fmt: skip
        return perform(todo, run=run, pool=pool, progress=progress)[0]
    trials = []
    # Each is a process of its own and spends its time in starting up, so a few run side by side.
    with ThreadPoolExecutor(max_workers=max(1, min(AT_ONCE, (os.cpu_count() or 1) // 2))) as threads:
        for trial in threads.map(watch, pairs):
            trials.append(run.append(trial) if run else trial)
    return trials


def _watched(backend: Backend, tool: str, fault: str | None, time_limit_s: float) -> Iterator[Trial]:
    yield _one(backend, tool, fault, time_limit_s)


def _one(backend: Backend, tool: str, fault: str | None, time_limit_s: float) -> Trial:
    data = {"tool": tool, "looks_for": TOOLS[tool], "fault": fault}
    common = dict(kind="sanitizer", backend=backend.id, variant=tool, source_hash=source_hash(backend.kernel))
    state, program = backend.availability(), executable()
    if program is None:
        return Trial(**common, status="unavailable", data=data,
                     reason=f"compute-sanitizer is not installed; to mend it: {_FIX}")  # fmt: skip
    if not state.ok:
        return Trial(**common, status="unavailable", data=data, reason=f"{state.reason}; to mend it: {state.fix}")
    # Calls of the driver's API that fail are not reported: CUDA's own libraries ask for functions that an older driver
    # lacks, and the calls of ours are checked where they are made.
    command = [program, "--tool", tool, "--report-api-errors", "no", "--print-limit", "1000", sys.executable, "-m",
               "flashcore.bisection.faults.sanitizer.target", backend.id, *([fault] if fault else [])]  # fmt: skip
    started = time.perf_counter()
    text, code = _watch(command, time_limit_s)
    data["seconds"] = round(time.perf_counter() - started, 1)
    return _read(text, code, time_limit_s, data, common)


def _read(text: str, code: int | None, time_limit_s: float, data: dict, common: dict) -> Trial:
    """The trial of what a tool printed; `code` is its exit code, None when it was ended."""
    log = parse(text)
    findings, elsewhere = ours(log, kernel_names())
    in_kernels = [f for f in findings if f.kernel]
    count = sum(f.count for f in findings)
    data = {**data, "findings": [f.to_dict() for f in findings[:KEPT]], "num_findings": count, "elsewhere": elsewhere,
            "summary": log.summary}  # fmt: skip
    if code is None:
        reason = f"it exceeded {time_limit_s:g} s and was ended"
        return Trial(**common, status="failed" if in_kernels else "error", reason=reason, data=data)
    if in_kernels:
        first = in_kernels[0]
        places = "one place" if len(findings) == 1 else f"{len(findings)} places"
        reason = f"found {count} times at {places}, first {first.text.rstrip('.')}: {first.where()}"
        return Trial(**common, status="failed", reason=reason, data=data)
    if log.summary is None or (code != 0 and not log.errors):
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip("= \t")), "it printed nothing")
        return Trial(**common, status="error", reason=f"the tool did not finish: {last[:300]}", data=data)
    if findings:
        return Trial(**common, status="error", reason=f"the program failed under the tool: {findings[0].text}",
                     data=data)  # fmt: skip
    return Trial(**common, data=data)


def _watch(command: list[str], time_limit_s: float) -> tuple[str, int | None]:
    """Everything a command prints, and its exit code; None when it took too long and was ended with its children."""
    # Without torch's cache every tensor is an allocation of its own, so that a step over its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    folders = [p for p in sys.path if p]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
                                   start_new_session=True)  # fmt: skip
        try:
            code: int | None = process.wait(time_limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(0)
        return file.read().decode(errors="replace"), code
