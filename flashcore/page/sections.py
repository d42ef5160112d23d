"""Cut the executed status report into the page's sections: those that were asked for and hold something."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashcore.page.variants import OF_THE_TEMPLATE, SECTIONS, Variant

if TYPE_CHECKING:
    from nbformat import NotebookNode

OPENING = "## "
"""What a markdown cell begins with that opens a section."""


@dataclass(frozen=True)
class Section:
    """One section of the page: a heading, and the cells below it."""

    name: str
    """Out of `variants.SECTIONS`: the anchor, and what `--sections` calls it. Empty: the figures under the verdict."""
    title: str
    executive: bool
    """Whether it belongs to the first printed page."""
    cells: list[Any] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether no cell shows anything, as 'Since the last run' does without one."""
        outputs = [o for cell in self.cells if cell.cell_type == "code" for o in cell.get("outputs", [])]
        return not any(_shows(output) for output in outputs)


def sections(notebook: NotebookNode) -> list[Section]:
    """The sections of a status report, the part before the first heading included; cells for the notebook alone not."""
    found = [Section("", "", True)]
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown" and cell.source.startswith(OPENING):
            title = cell.source.split("\n")[0].removeprefix(OPENING).strip()
            name = str(cell.metadata.get("section") or cell.id)
            found.append(Section(name, title, "executive" in tags))
        if "notebook-only" not in tags:
            found[-1].cells.append(cell)
    return found


def chosen(notebook: NotebookNode, variant: Variant) -> NotebookNode:
    """The notebook with the cells of the page that is wanted, each opening cell with its section's name.

    A section that nobody named (a notebook of other sections than the page's own) stays. A link to a section that is
    not there becomes plain text.
    """
    kept = [
        s for s in sections(notebook)
        if not s.name or ((s.name not in SECTIONS or variant.has(s.name)) and not s.empty)
    ]  # fmt: skip
    there = [s.name for s in kept if s.name] + [s for s in OF_THE_TEMPLATE if variant.has(s)]
    cells = []
    for section in kept:
        for cell in section.cells:
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "text/html" in data:
                    data["text/html"] = unlinked("".join(data["text/html"]), there)
            cells.append(cell)
    notebook.cells = cells
    return notebook


def unlinked(html: str, there: Sequence[str]) -> str:
    """Links into sections that are not on the page, as their text."""
    gone = [name for name in SECTIONS if name not in there]
    return re.sub(rf'<a href="#(?:{"|".join(gone)})"[^>]*>(.*?)</a>', r"\1", html, flags=re.DOTALL) if gone else html


def opened(html: str) -> str:
    """A page with every detail open."""
    return re.sub(r"<details(?![^>]*\sopen\b)", "<details open", html)


def _shows(output: Any) -> bool:
    if output.get("output_type") == "stream":
        return output.get("name") == "stdout" and bool("".join(output.get("text", "")).strip())
    data = output.get("data", {})
    return output.get("output_type") == "error" or any(
        "".join(data[kind]).strip() for kind in data if kind == "text/html" or kind.startswith("image/")
    )
