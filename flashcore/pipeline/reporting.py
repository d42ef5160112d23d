"""Make a report: run the notebooks on a run folder, judge its records, render one self-contained page."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.decision import seal, verdict
from flashcore.errors import FlashCoreError, NotebookFailed, NotebookParameterError, OutOfTime, UnknownName
from flashcore.gpu import device
from flashcore.numerics.inputs import refuse_seed
from flashcore.page import Variant
from flashcore.paths import absolute, data_dir, partial_path, sweep
from flashcore.pipeline import notebooks
from flashcore.pipeline.folders import LATEST, find_run, measuring, new_run, runs_dir
from flashcore.pipeline.rendering import STATUS_NOTEBOOK, Progress, print_page, render, write_plain_page
from flashcore.problem import check_profile, parse_problem
from flashcore.records import RunFolder

if TYPE_CHECKING:
    from flashcore.backends import Backend
    from flashcore.measure.cluster import Place

__all__ = [
    "ReportResult", "find_run", "judge_and_seal", "measuring_notebooks", "new_run", "planned_notebooks", "print_page",
    "render", "report", "runs_dir",
]  # fmt: skip

OWN: Mapping[str, Mapping[str, Any]] = {
    "02_correctness_bisection": {"backend": "auto", "pattern": "normal", "fault": "", "sanitize": "auto"},
    "05_sparse_paging": {"report_layers": 1},
    "08_outputs_alone": {"most_bugs": 0, "cases": 100},
}
"""Parameters that one notebook alone has, as a report states them: what somebody saved in its cell is not asked."""
PAGE_S = 60.0
"""Seconds that a report with a limit keeps for the verdict, the page and its PDF."""
LEAST_S = 15.0
"""Seconds under which a notebook is not begun: they would go into starting it."""


@dataclass(frozen=True)
class ReportResult:
    """What `report` made."""

    run: RunFolder
    html: Path
    decision: verdict.Decision
    failed: dict[str, str] = field(default_factory=dict)
    """Notebooks that did not finish, each with its reason."""
    pdf: Path | None = None
    """The page as PDF; None when none was wanted, or none could be made."""
    no_pdf: str = ""
    """Why there is no PDF, in a sentence, when one was wanted."""


def notebooks_folder(named: Path | None) -> Path:
    """The folder of notebooks that was named, from the root; else FlashCore's own."""
    return absolute(named) if named is not None else data_dir("notebooks")


def sweep_runs(folder: Path) -> None:
    """Remove what killed processes left half-written in the runs of a folder."""
    sweep(folder)
    for run in folder.iterdir():
        sweep(run)
        sweep(run / notebooks.FOLDER)


def measuring_notebooks(notebooks_dir: Path) -> list[str]:
    """Stems of the notebooks that measure, in order; the status report, which only reads, is not among them."""
    found = sorted(path.stem for path in notebooks_dir.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise FlashCoreError(f"There are no notebooks in {notebooks_dir}; reinstall FlashCore, or restore the folder.")
    return [name for name in found if name != STATUS_NOTEBOOK]


def planned_notebooks(notebooks_dir: Path, profile: str) -> list[str]:
    """Stems of the notebooks that a report of this profile runs on this machine, in order."""
    whole = profile == "full" and device.has_gpu()
    return [name for name in measuring_notebooks(notebooks_dir) if whole or name not in FULL_ON_A_GPU]


FULL_ON_A_GPU = ("08_outputs_alone",)
"""Notebooks that a report plans with the full profile alone, and only on a GPU. `flashcore report --only` runs them
anywhere."""
SHORT = {
    "environment": "01_environment", "bisection": "02_correctness_bisection", "survey": "03_cublaslt_survey",
    "sweep": "04_tflops_sweep", "paging": "05_sparse_paging", "model": "07_in_a_model",
    "proof": "08_outputs_alone",
}  # fmt: skip
"""What a user calls the notebooks that measure."""


def parts_named(text: str, folder: Path) -> list[str]:
    """Notebooks by their names or short names, separated by commas; in the order in which a report runs them.

    Raises
    ------
    UnknownName
        There is no such part; names those there are.
    """
    there = measuring_notebooks(folder)
    short = {name: stem for name, stem in SHORT.items() if stem in there}
    wanted = set()
    for word in filter(None, (word.strip() for word in text.split(","))):
        stem = short.get(word, word.removesuffix(".ipynb"))
        if stem not in there:
            raise UnknownName("part of a report", word, [*short, *there])
        wanted.add(stem)
    if not wanted:
        raise UnknownName("part of a report", text, [*short, *there])
    return [name for name in there if name in wanted]


def _left_for_later(later: str, planned: Sequence[str], folder: Path) -> list[str]:
    """The parts of a plan that are left to `resume`; refuses one that is not in the plan."""
    left = parts_named(later, folder) if later else []
    for name in left:
        if name not in planned:
            raise FlashCoreError(
                f"Notebook {name} is no part of this report, since only one of profile full on a GPU plans it; take it "
                "out of --later."
            )
    return left


def execute_notebook(
    name: str,
    run: RunFolder,
    parameters: dict | None = None,
    *,
    notebooks_dir: Path | None = None,
    timeout_s: float = notebooks.TIMEOUT_S["quick"],
    progress: Progress | None = None,
) -> Path:
    """`flashcore.pipeline.notebooks.execute_notebook` on FlashCore's own notebooks."""
    return notebooks.execute_notebook(
        name,
        run,
        parameters,
        notebooks_dir=notebooks_folder(notebooks_dir),
        timeout_s=timeout_s,
        show_bar=progress is not None,
    )


def report(
    *,
    profile: str = "quick",
    backends: str = "all",
    problems: str = "default",
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    notebooks_dir: Path | None = None,
    timeout_s: float | None = None,
    within_s: float | None = None,
    later: str = "",
    variant: Variant | None = None,
    pdf: bool = True,
    progress: Progress | None = None,
    bars: bool = True,
    kernel: Mapping[str, Any] | None = None,
    places: Sequence[Place] = (),
) -> ReportResult:
    """Measure, judge and render: the whole job of ``make report``.

    A notebook that fails does not stop the others, and the page is rendered whatever failed.

    Parameters
    ----------
    profile
        ``quick`` or ``full``: how much the notebooks measure.
    backends
        ``all``, or ids separated by commas.
    problems
        ``default``, or presets and labels separated by semicolons, as in ``report;B=1,H=8,S=512,D=64``.
    seed
        Seed of every random input.
    out
        Folder that gets the run's folder and ``latest``; default ``reports/runs``.
    notebooks_dir
        Other notebooks than FlashCore's own.
    timeout_s
        Seconds one notebook may take; default by profile, see `flashcore.pipeline.notebooks.TIMEOUT_S`.
    within_s
        Seconds that all of it may take: `PAGE_S` of them are kept for the page, and notebooks that do not fit into the
        rest count as failed. `flashcore.pipeline.redo.resume` measures them.
    later
        Parts that are left to `resume` from the start, by their names or short names, separated by commas.
    variant
        How the page is made; default: everything on it.
    pdf
        Whether to print the page to PDF, where there is a browser.
    progress
        Called with one line at each step.
    bars
        Whether papermill shows its bar in each notebook, where there is `progress`.
    places
        Of the workers that `flashcore.measure.cluster.spread` has for the notebooks: named in the run's environment.
    kernel
        A function that the caller adopted as a backend, to be diagnosed beside what the notebooks measure, which is
        this one too, whatever `backends` are named: its
        ``backend`` id, its ``place``, and the ``layout`` and ``lse`` of `flashcore.bisection.diagnosis.diagnose`.

    Raises
    ------
    UnknownName, InvalidProblem
        Before anything is measured: a profile, backend, problem or part does not exist.
    FlashCoreError
        Before that too: `later` names a part that this report does not plan, or there is too little time.
    RecordsError
        The output folder cannot be written.
    """
    say = progress or (lambda line: None)
    backends = with_kernel(backends, kernel)
    common = {"profile": profile, "backends": backends, "problems": problems, "seed": seed}
    check_request(common)
    until = deadline(within_s)
    folder = notebooks_folder(notebooks_dir)
    planned = planned_notebooks(folder, profile)
    left = _left_for_later(later, planned, folder)

    run = new_run(out)
    sweep_runs(run.path.parent)
    say(f"Run {run.name} ({profile} profile, {device.gpu_name() or 'no GPU: the CPU path'})")
    asked = {**common, "notebooks": planned, "peers": planned_peers(backends)}
    if kernel is not None:
        asked["kernel"] = as_told(kernel)
    with measuring(run):
        device.record_environment(run, "before", asked, cards=[place.as_dict() for place in places])
        failed = measure(run, planned, common, folder=folder, timeout_s=timeout_s, until=until, later=left,
                         progress=progress, bars=bars)  # fmt: skip
        if kernel is not None:
            diagnose_adopted(run, kernel, say, until=until)
        device.record_environment(run, "after")
        result = conclude(run, failed, folder=folder, variant=variant, pdf=pdf, progress=progress)
    point_latest_at(run)
    return result


def deadline(within_s: float | None) -> float:
    """When the last notebook has to be over, by `time.monotonic`, in a report that may take so many seconds from now.

    Raises
    ------
    FlashCoreError
        So few seconds leave none for a notebook.
    """
    if within_s is None:
        return math.inf
    if not within_s > PAGE_S + LEAST_S:
        raise FlashCoreError(
            f"A report needs more than {PAGE_S + LEAST_S:g} s, {PAGE_S:g} of them for its page; give --within more "
            f"(got {within_s:g})."
        )
    return time.monotonic() + within_s - PAGE_S


def with_kernel(backends: str, kernel: Mapping[str, Any] | None) -> str:
    """The backends to measure, the adopted function among them: whoever names others to compare with means it too."""
    if kernel is None or kernel["backend"] in [one.id for one in _selected(backends)]:
        return backends
    return f"{backends},{kernel['backend']}"


def as_told(kernel: Mapping[str, Any]) -> dict[str, Any]:
    """An adopted function as a run's environment tells of it: without the folder, and with a digest of its file."""
    where, _, name = kernel["place"].rpartition(":")
    return {
        "backend": kernel["backend"], "function": f"{Path(where).name}:{name}", "layout": kernel["layout"],
        "lse": kernel["lse"], "sha256": _digest(Path(where)),
    }  # fmt: skip


def _digest(path: Path) -> str | None:
    """16 hex digits of the SHA-256 of a function's file; None for an installed module."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def diagnose_adopted(run: RunFolder, kernel: Mapping[str, Any], say: Progress, *, until: float = math.inf) -> None:
    """Diagnose the adopted function by its outputs, and write the record; where no time is left, that is said.

    `until` is when it has to be over, by `time.monotonic`.
    """
    from flashcore.bisection.diagnosis import diagnose_apart

    left_s = until - time.monotonic()
    say(f"Diagnosing {kernel['place']} ...")
    try:
        if left_s < LEAST_S:
            raise OutOfTime(kernel["place"], max(0.0, left_s))
        found = diagnose_apart(kernel["place"], within_s=left_s, layout=kernel["layout"], lse=kernel["lse"])
    except OutOfTime as error:
        say(f"{error} 'flashcore report --resume' with the same --kernel makes it.")
        return
    run.append(found.to_trial().model_copy(update={"backend": kernel["backend"]}))
    say(f"{found.headline()}.")


def check_request(common: Mapping[str, Any]) -> None:
    """Refuse a profile, backend or problem that does not exist, before anything is made."""
    check_profile(common["profile"])
    _selected(common["backends"])
    refuse_seed(common["seed"])
    if common["problems"] != "default":
        for label in common["problems"].split(";"):
            parse_problem(label)


def planned_peers(backends: str) -> list[str]:
    """Ids of the peers among these backends that are installed here, so that a sweep has to time them."""
    return [peer.id for peer in _selected(backends) if peer.role == "peer" and peer.availability().ok]


def _selected(names: str) -> list[Backend]:
    from flashcore import backends as registry

    return registry.select(names)


def measure(
    run: RunFolder,
    names: Sequence[str],
    common: Mapping[str, Any],
    *,
    folder: Path,
    timeout_s: float | None = None,
    until: float = math.inf,
    later: Sequence[str] = (),
    progress: Progress | None = None,
    bars: bool = True,
) -> dict[str, str]:
    """Execute notebooks on a run, one after the other; gives those that did not finish, each with its reason.

    `until` is when the last one has to be over, by `time.monotonic`: one that runs then is ended. Those of `later` are
    not begun.
    """
    say = progress or (lambda line: None)
    failed: dict[str, str] = {}
    for number, name in enumerate(names, start=1):
        left_s = until - time.monotonic()
        if left_s < LEAST_S or name in later:
            why = "it was left for later" if name in later else "no time was left for it"
            failed[name] = f"{why}; 'flashcore report --resume' measures it"
            notebooks.record_failure(run, name, failed[name])
            say(f"[{number}/{len(names)}] {name}: {failed[name]}")
            continue
        say(f"[{number}/{len(names)}] {name} ...")
        started = time.perf_counter()
        try:
            declared = _declared(run, name, folder)
            execute_notebook(
                name,
                run,
                {key: value for key, value in {**common, **OWN.get(name, {})}.items() if key in declared},
                notebooks_dir=folder,
                timeout_s=min(timeout_s or notebooks.TIMEOUT_S[common["profile"]], left_s),
                progress=progress if bars else None,
            )
            say(f"[{number}/{len(names)}] {name}: finished in {time.perf_counter() - started:.1f} s")
        except NotebookFailed as error:
            failed[name] = error.reason
            say(f"[{number}/{len(names)}] {name}: FAILED after {time.perf_counter() - started:.1f} s: {error.reason}")
    return failed


def _declared(run: RunFolder, name: str, folder: Path) -> Mapping[str, notebooks.Parameter]:
    """The parameters of a notebook; one that cannot be read fails as one that runs does, and the others go on."""
    try:
        return notebooks.declared_parameters(notebooks.notebook_path(name, folder))
    except (NotebookFailed, NotebookParameterError) as error:
        reason = error.reason if isinstance(error, NotebookFailed) else str(error).rstrip(".")
        notebooks.record_failure(run, name, reason)
        raise NotebookFailed(name, reason) from error


def conclude(
    run: RunFolder,
    failed: dict[str, str],
    *,
    folder: Path,
    variant: Variant | None = None,
    pdf: bool = True,
    progress: Progress | None = None,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> ReportResult:
    """Judge a run, record the decision, seal the run, and make its page and PDF.

    Parameters
    ----------
    earlier
        Entries on seals that the run had before (see `flashcore.decision.seal.unseal`).
    """
    say = progress or (lambda line: None)
    decision = judge_and_seal(run, earlier=earlier)
    say("Rendering the report ...")
    try:
        page = render(run, variant=variant, notebooks_dir=folder, progress=progress)
    except NotebookFailed as error:
        failed[STATUS_NOTEBOOK] = error.reason
        page = write_plain_page(run, decision, failed)
        say(f"{STATUS_NOTEBOOK}: FAILED: {error.reason}; a plain page stands in for it")
    printed, why = print_page(run) if pdf else (None, "")
    seal.seal_pages(run)
    return ReportResult(run, page, decision, failed, printed, why)


def judge_and_seal(run: RunFolder, *, earlier: Sequence[Mapping[str, Any]] = ()) -> verdict.Decision:
    """Judge a run by today's gates and sources, append the verdict to its records, and seal it."""
    gates = verdict.load_gates()
    decision = verdict.judge(run, gates=gates)
    run.append(decision.to_trial(sealed=True))
    seal.seal(run, gates, verdict=decision.verdict, earlier=earlier)
    return replace(decision.with_seal(seal.check(run, gates)), stored="")


def point_latest_at(run: RunFolder) -> None:
    """Make ``latest`` beside the run name it: a link, or a file with the run's id where links are impossible."""
    latest = run.path.parent / LATEST
    partial = partial_path(latest)
    try:
        try:
            partial.symlink_to(run.name, target_is_directory=True)
        except OSError:
            partial.write_text(run.name + "\n", encoding="utf-8")
        os.replace(partial, latest)
    except OSError as error:
        print(f"'{latest}' still names an older run ({error.strerror}).", file=sys.stderr)
    finally:
        partial.unlink(missing_ok=True)
