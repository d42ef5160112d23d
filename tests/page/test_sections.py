"""The page's sections: those that are wanted and hold something, in the page's order."""

from __future__ import annotations

import nbformat

from flashcore import page
from flashcore.page.sections import sections, unlinked


def status(*, since: str = "<p>changed</p>") -> nbformat.NotebookNode:
    v4 = nbformat.v4

    def shown(html: str):
        return v4.new_output("display_data", data={"text/html": html, "text/plain": "<HTML>"})

    cells = [
        v4.new_markdown_cell("# Title", metadata={"tags": ["notebook-only"]}),
        v4.new_code_cell("figures", outputs=[shown('<a href="#speed">live</a><a href="#claims">here</a>')]),
        v4.new_markdown_cell("## Decision\n\nWords.", metadata={"section": "decision", "tags": ["executive"]}),
        v4.new_code_cell("decide", outputs=[shown("<p>decided</p>")]),
        v4.new_markdown_cell("## Since", metadata={"section": "since"}),
        v4.new_code_cell("since", outputs=[shown(since)]),
        v4.new_markdown_cell("## Claims", metadata={"section": "claims"}),
        v4.new_code_cell("claims", outputs=[v4.new_output("error", ename="E", evalue="v", traceback=[])]),
        v4.new_markdown_cell("## My own section"),
        v4.new_code_cell("mine", outputs=[v4.new_output("stream", name="stdout", text="printed")]),
    ]
    return v4.new_notebook(cells=cells)


def names(notebook) -> list[str]:
    return [s.name for s in sections(notebook) if s.name]


def test_an_empty_section_is_left_out_and_a_failed_one_is_not():
    made = status()
    own = made.cells[-2].id  # a section that the page does not know has its cell's id for a name
    assert names(page.chosen(made, page.Variant())) == ["decision", "since", "claims", own]
    made = status(since=" \n")
    own = made.cells[-2].id
    assert names(page.chosen(made, page.Variant())) == ["decision", "claims", own]


def test_a_choice_keeps_the_pages_order_and_unlinks_what_is_gone():
    made = page.chosen(status(), page.variant(sections=" claims ,decision"))
    assert names(made)[:2] == ["decision", "claims"]
    assert made.cells[0].outputs[0].data["text/html"] == 'live<a href="#claims">here</a>'
    assert [cell.source for cell in made.cells if "Title" in cell.source] == []


def test_links_to_sections_that_are_there_stay():
    text = '<a href="#speed">live<span>, shown</span></a> and <a href="#fc-other">x</a>'
    assert unlinked(text, ["speed"]) == text
    assert unlinked(text, []) == 'live<span>, shown</span> and <a href="#fc-other">x</a>'


def test_the_notebook_has_every_section_in_the_pages_order():
    from flashcore.page.variants import OF_THE_TEMPLATE
    from flashcore.paths import data_dir

    notebook = nbformat.read(data_dir("notebooks") / "06_status_report.ipynb", as_version=4)
    assert names(notebook) == [s for s in page.SECTIONS if s not in OF_THE_TEMPLATE]
