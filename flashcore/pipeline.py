"""Make a report: run the notebooks on a run folder, judge its records, render one self-contained page."""

from __future__ import annotations

import html
import os
import re
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from flashcore import device, notebooks, page, verdict
from flashcore.build import data_dir
from flashcore.errors import FlashCoreError, NotebookFailed, RecordsError, UnknownName
from flashcore.problem import parse_problem
from flashcore.records import RunFolder, write_whole

PROFILES = ("quick", "full")
STATUS_NOTEBOOK = verdict.STATUS_NOTEBOOK
PAGE_TIMEOUT_S = 300.0
"""Seconds the status report may take: it only reads records and draws."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ReportResult:
    """What `report` made."""

    run: RunFolder
    html: Path
    decision: verdict.Decision
    failed: dict[str, str] = field(default_factory=dict)
    """Notebooks that did not finish, each with its reason."""


def runs_dir(out: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds run folders: `out`, else ``reports/runs`` of the checkout, else of the current folder."""
    if out is not None:
        return Path(out)
    checkout = Path(__file__).resolve().parent.parent
    home = checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
    return home / "reports" / "runs"


def new_run(out: str | os.PathLike[str] | None = None) -> RunFolder:
    """A fresh run folder, as in ``2026-11-22T18-40-03-h200-3f9a``."""
    machine = re.sub(r"[^a-z0-9]+", "-", (device.gpu_name() or "cpu").lower().replace("nvidia", "")).strip("-")
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    return RunFolder.create(runs_dir(out) / f"{stamp}-{machine}-{secrets.token_hex(2)}")


def find_run(name: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> RunFolder:
    """A run by its path, by its id, or by the word ``latest``.

    Raises
    ------
    RecordsError
        There is no such run.
    """
    for candidate in (Path(name), runs_dir(out) / name):
        if candidate.is_dir():
            return RunFolder(candidate.resolve())
        if (
            candidate.is_file() and candidate.name == "latest"
        ):  # where links are impossible it is a file with the run's id
            return RunFolder(candidate.parent / candidate.read_text(encoding="utf-8").strip())
    return RunFolder(name)


def planned_notebooks(notebooks_dir: Path) -> list[str]:
    """Stems of the notebooks that measure, in order; the status report, which only reads, is not among them."""
    found = sorted(path.stem for path in notebooks_dir.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise FlashCoreError(f"There are no notebooks in {notebooks_dir}; reinstall FlashCore, or restore the folder.")
    return [name for name in found if name != STATUS_NOTEBOOK]


def execute_notebook(
    name: str,
    run: RunFolder,
    parameters: dict | None = None,
    *,
    notebooks_dir: Path | None = None,
    timeout_s: float = notebooks.TIMEOUT_S["quick"],
    progress: Progress | None = None,
) -> Path:
    """`flashcore.notebooks.execute_notebook` on FlashCore's own notebooks."""
    return notebooks.execute_notebook(
        name,
        run,
        parameters,
        notebooks_dir=notebooks_dir or data_dir("notebooks"),
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
    progress: Progress | None = None,
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
        Seconds one notebook may take; default by profile, see `flashcore.notebooks.TIMEOUT_S`.
    progress
        Called with one line at each step.

    Raises
    ------
    UnknownName, InvalidProblem
        Before anything is measured: a profile, backend or problem does not exist.
    RecordsError
        The output folder cannot be written.
    """
    from flashcore import backends as registry

    say = progress or (lambda line: None)
    if profile not in PROFILES:
        raise UnknownName("profile", profile, list(PROFILES))
    registry.select(backends)
    if problems != "default":
        for label in problems.split(";"):
            parse_problem(label)
    folder = notebooks_dir or data_dir("notebooks")
    planned = planned_notebooks(folder)

    run = new_run(out)
    say(f"Run {run.name} ({profile} profile, {device.gpu_name() or 'no GPU: the CPU path'})")
    common = {"profile": profile, "backends": backends, "problems": problems, "seed": seed}
    device.record_environment(run, "before", {**common, "notebooks": planned})

    failed: dict[str, str] = {}
    for number, name in enumerate(planned, start=1):
        say(f"[{number}/{len(planned)}] {name} ...")
        started = time.perf_counter()
        try:
            declared = notebooks.declared_parameters(notebooks.notebook_path(name, folder))
            execute_notebook(
                name,
                run,
                {key: value for key, value in common.items() if key in declared},
                notebooks_dir=folder,
                timeout_s=timeout_s or notebooks.TIMEOUT_S[profile],
                progress=progress,
            )
            say(f"[{number}/{len(planned)}] {name}: finished in {time.perf_counter() - started:.1f} s")
        except NotebookFailed as error:
            failed[name] = error.reason
            say(f"[{number}/{len(planned)}] {name}: FAILED after {time.perf_counter() - started:.1f} s: {error.reason}")
    device.record_environment(run, "after")

    decision = verdict.judge(run)
    run.append(decision.to_trial())
    say("Rendering the report ...")
    try:
        html_path = render(run, notebooks_dir=folder, progress=progress)
    except NotebookFailed as error:
        failed[STATUS_NOTEBOOK] = error.reason
        html_path = write_plain_page(run, decision, failed)
        say(f"{STATUS_NOTEBOOK}: FAILED: {error.reason}; a plain page stands in for it")
    point_latest_at(run)
    return ReportResult(run, html_path, decision, failed)


def render(run: RunFolder, *, notebooks_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Make ``report.html`` of a run from its records, without a GPU and without measuring anything.

    Raises
    ------
    NotebookFailed
        The status report's notebook did not finish; an older page, if any, is left as it was.
    RecordsError
        The page cannot be written.
    """
    executed = notebooks.execute_notebook(
        STATUS_NOTEBOOK,
        run,
        notebooks_dir=notebooks_dir or data_dir("notebooks"),
        timeout_s=PAGE_TIMEOUT_S,
        needs_record=False,
        show_bar=progress is not None,
    )
    try:
        text = _to_html(executed, run)
    except FlashCoreError:
        raise
    except Exception as error:  # a template that breaks raises whatever it likes; the records are still worth a page
        raise NotebookFailed(
            STATUS_NOTEBOOK, f"its page could not be drawn ({type(error).__name__}: {error})"
        ) from error
    return _write_page(run, text)


def _to_html(executed: Path, run: RunFolder) -> str:
    """The executed status report through the project's own template, with the other notebooks as evidence."""
    evidence = [
        {"name": path.stem, "title": _title(path), "html": _convert(path, "evidence.html.j2", {})}
        for path in sorted((run.path / "notebooks").glob("[0-9][0-9]_*.ipynb"))
        if path.stem != STATUS_NOTEBOOK
    ]
    return _convert(executed, "index.html.j2", {"flashcore": page.resources(run, verdict.judge(run), evidence)})


def _convert(path: Path, template: str, resources: dict) -> str:
    import nbformat
    from nbconvert import HTMLExporter

    folder = data_dir("reports") / "template"
    exporter = HTMLExporter(
        template_name=folder.name, template_file=template, extra_template_basedirs=[str(folder.parent)]
    )
    body, _ = exporter.from_notebook_node(nbformat.read(path, as_version=4), resources=resources)
    return body


def _title(path: Path) -> str:
    """The first heading of a notebook, or its name in words."""
    import nbformat

    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and (heading := re.match(r"#+\s+(.+)", cell.source)):
            return heading[1].strip()
    return path.stem[3:].replace("_", " ")


def write_plain_page(run: RunFolder, decision: verdict.Decision, failed: dict[str, str]) -> Path:
    """A page without figures, for when the status report's own notebook fails: verdict, gates and failures in words."""
    gates = "".join(
        f"<tr><td>{html.escape(g.title)}</td><td>{g.state}</td><td>{html.escape(g.reason)}</td></tr>"
        for g in decision.gates
    )
    failures = "".join(f"<li>{html.escape(name)}: {html.escape(reason)}</li>" for name, reason in failed.items())
    return _write_page(
        run,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>FlashCore status report: {decision.verdict}</title>
<style>:root{{color-scheme:light dark}}body{{font:1rem/1.5 system-ui,sans-serif;
max-width:60rem;margin:2rem auto;padding:0 1rem}}
td,th{{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0}}</style></head>
<body><h1>Verdict: {decision.verdict}</h1><p>{html.escape(decision.reason)}</p>
<h2>This page could not be drawn in full</h2><ul>{failures}</ul>
<p>Run <code>flashcore render {html.escape(run.name)}</code> to draw it again from the records.</p>
<h2>Gates</h2><table><thead><tr><th>Gate</th><th>Result</th><th>Reason</th></tr></thead><tbody>{gates}</tbody></table>
</body></html>
""",
    )


def _write_page(run: RunFolder, text: str) -> Path:
    path = run.path / "report.html"
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise RecordsError(
            f"The report {path} cannot be written ({error.strerror}); free the disk or choose another folder "
            "with --out."
        ) from error
    return path


def point_latest_at(run: RunFolder) -> None:
    """Make ``latest`` beside the run name it: a link, or a file with the run's id where links are impossible."""
    latest, partial = run.path.parent / "latest", run.path.parent / f".latest.{os.getpid()}"
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
