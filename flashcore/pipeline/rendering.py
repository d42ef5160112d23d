"""Draw a run's page from its records: the status report's notebook through the template, and the page as PDF."""

from __future__ import annotations

import contextlib
import html
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flashcore import page
from flashcore.decision import seal, verdict
from flashcore.errors import FlashCoreError, NotebookFailed, PrintError, RecordsError, ToolMissing
from flashcore.page import Variant, cleaning, pdf, policy
from flashcore.paths import absolute, data_dir, is_partial
from flashcore.pipeline import notebooks
from flashcore.records import RunFolder, copy_records, write_whole

if TYPE_CHECKING:
    from nbformat import NotebookNode

STATUS_NOTEBOOK = verdict.STATUS_NOTEBOOK
PAGE_TIMEOUT_S = 300.0
"""Seconds the status report may take: it only reads records and draws."""
MOST_PAGE_BYTES = 1_900_000
"""A page that is mailed stays under 2 MB; executed notebooks that do not fit are left out, and named."""

Progress = Callable[[str], None]


def render(
    run: RunFolder,
    *,
    variant: Variant | None = None,
    notebooks_dir: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make ``report.html`` of a run from its records, without a GPU and without measuring anything.

    Parameters
    ----------
    variant
        For whom, under which title, with which sections; the default has everything, details folded.

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
        notebooks_dir=absolute(notebooks_dir) if notebooks_dir is not None else data_dir("notebooks"),
        timeout_s=PAGE_TIMEOUT_S,
        needs_record=False,
        show_bar=progress is not None,
    )
    try:
        text = _to_html(executed, run, variant or Variant())
    except FlashCoreError:
        raise
    except Exception as error:  # a template that breaks raises whatever it likes; the records are still worth a page
        raise NotebookFailed(
            STATUS_NOTEBOOK, f"its page could not be drawn ({type(error).__name__}: {error})"
        ) from error
    return _write_page(run, text)


def render_to(
    run: RunFolder, folder: Path, *, variant: Variant | None = None, pdf: bool = True
) -> tuple[Path, Path | None, str]:
    """Make the page of a run in another folder, and leave the run as it is.

    Returns
    -------
    page, pdf, why
        The page; the PDF, or None and a sentence on why there is none.

    Raises
    ------
    NotebookFailed, RecordsError
        As `render`; or the folder is a run, whose own page that would replace, or none can be made there.
    """
    folder = absolute(folder)
    if os.path.exists(folder / "records.jsonl"):
        raise RecordsError(
            f"{folder} is a run, and this page would take the place of its own, which its seal holds; name another "
            "folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the seconds that the page takes
    except OSError as error:
        raise RecordsError(f"The page cannot be written to {folder} ({error.strerror}); choose another.") from error
    with tempfile.TemporaryDirectory(prefix="flashcore-render-") as place:
        copy = RunFolder(shutil.copytree(run.path, Path(place) / run.name, ignore=_unfinished, copy_function=_copied))
        _beside(run.path, copy.path)
        page = render(copy, variant=variant)
        printed, why = print_page(copy) if pdf else (None, "")
        try:
            (folder / "report.pdf").unlink(missing_ok=True)  # of an earlier page
            made = [write_copy(path, folder) for path in (page, printed) if path is not None]
        except OSError as error:
            raise RecordsError(f"The page cannot be written to {folder} ({error.strerror}); choose another.") from error
    return made[0], made[1] if printed is not None else None, why


def _unfinished(folder: str, names: list[str]) -> list[str]:
    """What somebody else is writing just now into a run that is copied."""
    return [name for name in names if is_partial(name)]


def _copied(source: str, target: str) -> None:
    """Copy a file of a run that may be in the making: without half a record; one that has gone is left out."""
    with contextlib.suppress(FileNotFoundError):
        if Path(source).name == "records.jsonl":
            copy_records(Path(source), Path(target))
        else:
            shutil.copy2(source, target)


def _beside(run: Path, copy: Path) -> None:
    """Put what a page reads of the runs in the run's folder beside its copy: it compares with the run before."""
    try:
        others = [path for path in run.resolve().parent.iterdir() if path.name not in (run.name, run.resolve().name)]
    except OSError:
        return
    for other in others:
        if other.is_dir() and not other.is_symlink() and (other / "records.jsonl").is_file():
            (copy.parent / other.name).mkdir()
            for name in ("records.jsonl", "environment.json"):
                if (other / name).is_file():
                    (copy.parent / other.name / name).symlink_to(other / name)


def write_copy(path: Path, folder: Path) -> Path:
    """Copy a file into a folder, in one piece."""
    write_whole(folder / path.name, path.read_bytes())
    return folder / path.name


def print_page(run: RunFolder) -> tuple[Path | None, str]:
    """Print ``report.html`` to ``report.pdf`` beside it; the PDF, or None and one sentence on why there is none.

    A page without its PDF is still a report, so nothing here is raised.
    """
    made = run.path / "report.pdf"
    try:
        return pdf.print_pdf(run.path / "report.html", made), ""
    except (ToolMissing, PrintError) as error:
        old = ""
        with contextlib.suppress(FileNotFoundError):
            made.unlink()
            old = " The report.pdf that lay there was of an earlier page and was removed."
        return None, f"No PDF was made: {error}{old}"


def _to_html(executed: Path, run: RunFolder, variant: Variant) -> str:
    """The executed status report through the project's own template, with the other notebooks as evidence."""
    decision = verdict.judge(run)
    # An older page beside the records is about to be replaced; whether it was edited says nothing of the new one.
    decision = decision.with_seal(decision.based_on.seal.without("pages"))
    status = page.chosen(notebooks.read_notebook(executed), variant)
    evidence, damaged = _evidence(run) if variant.has("evidence") else ([], [])

    def drawn(items: list[dict[str, str]]) -> str:
        left_out = [item["title"] for item in evidence if item not in items]
        needed = page.resources(run, decision, items, variant=variant, left_out=left_out, damaged=damaged)
        return _convert(status, "index.html.j2", {"flashcore": needed})

    text = drawn(evidence)
    if len(text.encode()) > MOST_PAGE_BYTES and evidence:
        text = drawn(_fitting(evidence, MOST_PAGE_BYTES - len(drawn([]).encode())))
    text = page.anchored(text)
    return page.opened(text) if variant.audience == "engineering" else text


def _evidence(run: RunFolder) -> tuple[list[dict[str, str]], list[str]]:
    """The executed notebooks as HTML, and the names of those whose file is damaged: a page does without them."""
    found, damaged = [], []
    for path in sorted((run.path / notebooks.FOLDER).glob("[0-9][0-9]_*.ipynb")):
        if path.stem == STATUS_NOTEBOOK:
            continue
        try:
            text = cleaning.cleaned(_convert(path, "evidence.html.j2", {}))
            found.append({"name": path.stem, "title": _title(path), "html": text})
        except Exception:  # outputs that are none break the template with whatever error they meet first
            damaged.append(path.stem)
    return found, damaged


def _fitting(evidence: list[dict[str, str]], room: int) -> list[dict[str, str]]:
    """The notebooks that fit, the smallest first, in their own order."""
    kept = []
    for item in sorted(evidence, key=lambda item: len(item["html"].encode())):
        room -= len(item["html"].encode()) + 500  # and its heading
        if room >= 0:
            kept.append(item)
    return [item for item in evidence if item in kept]


def _convert(source: Path | NotebookNode, template: str, resources: dict) -> str:
    """A notebook, or the file of one, through a template."""
    notebooks.load_nbformat()
    from nbconvert import HTMLExporter

    folder = data_dir("reports") / "template"
    exporter = HTMLExporter(
        template_name=folder.name, template_file=template, extra_template_basedirs=[str(folder.parent)]
    )
    notebook = notebooks.read_notebook(source) if isinstance(source, Path) else source
    body, _ = exporter.from_notebook_node(notebook, resources=resources)
    return body


def _title(path: Path) -> str:
    """The first heading of a notebook, or its name in words."""
    for cell in notebooks.read_notebook(path).cells:
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


def remove_pages(run: RunFolder) -> None:
    """Remove a run's page and PDF, before what they show is no longer so."""
    try:
        for name in seal.PAGES:
            (run.path / name).unlink(missing_ok=True)
    except OSError as error:
        raise RecordsError(
            f"The page in {run.path} cannot be removed ({error.strerror}), and it would show an older state; make the "
            "folder writable."
        ) from error


def _write_page(run: RunFolder, text: str) -> Path:
    path = run.path / "report.html"
    try:
        (run.path / "report.pdf").unlink(missing_ok=True)  # of an earlier page, which may have said another verdict
        own = (data_dir("reports") / "template" / "page.js").read_text(encoding="utf-8")
        write_whole(path, policy.secured(text, scripts=[own]).encode())
    except OSError as error:
        raise RecordsError(
            f"The report {path} cannot be written ({error.strerror}); free the disk or choose another folder "
            "with --out."
        ) from error
    return path
