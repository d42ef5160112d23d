"""The page's parts without a browser: figures and their targets, sections, variants, claims, provenance."""

from __future__ import annotations

import re

import nbformat
import pytest
from support import synthetic_paging as paging
from support import synthetic_records as synthetic

from flashcore import page
from flashcore.decision import claims, verdict
from flashcore.errors import PageError, UnknownName
from flashcore.page.claims import audit_html
from flashcore.page.parts import frame_html
from flashcore.page.provenance import command
from flashcore.page.resources import embedded_records
from flashcore.page.sections import sections, unlinked
from flashcore.page.variants import MOST_LOGO_BYTES
from flashcore.records import RunFolder, Trial

PIXEL = bytes.fromhex("89504e470d0a1a0a0000000d49484452")


@pytest.fixture
def gpu_run(tmp_path) -> RunFolder:
    return synthetic.write_run(tmp_path / "gpu", synthetic.gpu_trials(synthetic.FAST), synthetic.environment())


def headline(run: RunFolder) -> str:
    return page.headline_html(verdict.judge(run), verdict.gather(run))


# --- the four figures ----------------------------------------------------------------------------------------------


def test_the_memory_saved_comes_from_the_last_record_that_holds_it(gpu_run):
    assert "70.3" in headline(gpu_run)
    gpu_run.append(synthetic.memory_saved(64.2))
    assert "64.2" in headline(gpu_run) and "70.3" not in headline(gpu_run)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"what": "memory", "case": "shared_prefix", "saved_percent": "nan"}},
        {"data": {"what": "memory", "case": "shared_prefix", "saved_percent": float("nan")}},
        {"data": {"what": "memory", "case": "shared_prefix"}},
        {"status": "error", "reason": "it broke"},
        {"environment": "env-of-another-machine"},
        {"data": {"what": "memory", "case": "mixed_lengths", "saved_percent": 47.0}},
    ],
)
def test_a_memory_figure_that_cannot_be_used_is_not_measured(tmp_path, changes):
    trials = [t for t in synthetic.gpu_trials() if t.kind != "paging"]
    record = synthetic.memory_saved(70.3, **changes)
    run = synthetic.write_run(tmp_path / "run", [*trials, record], synthetic.environment())
    assert "not measured" in headline(run) and "70.3" not in headline(run)


def test_without_any_record_every_figure_is_not_measured(tmp_path):
    run = synthetic.write_run(tmp_path / "run", [], synthetic.environment())
    assert headline(run).count("not measured") == 4  # speed, its ratio, latency, memory
    assert ">0 <" in headline(run)


# --- sections ------------------------------------------------------------------------------------------------------


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
    from flashcore.paths import data_dir

    notebook = nbformat.read(data_dir("notebooks") / "06_status_report.ipynb", as_version=4)
    assert names(notebook) == [s for s in page.SECTIONS if s not in ("evidence", "provenance")]


# --- variants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ({"sections": "speed,sped"}, UnknownName, "no section 'sped'.*decision, since, speed"),
        ({"sections": " , "}, PageError, "No section is named.*decision"),
        ({"audience": "everybody"}, UnknownName, "leadership, engineering"),
        ({"title": "  "}, PageError, "title is empty"),
    ],
)
def test_a_page_that_does_not_exist_is_refused_with_what_does(words, error, said):
    with pytest.raises(error, match=said):
        page.variant(**words)


@pytest.mark.parametrize(
    ("content", "mime"),
    [
        (PIXEL, "image/png"),
        (b"\xff\xd8\xff\xe0 rest", "image/jpeg"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "image/webp"),
        (b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="x"></svg>', "image/svg+xml"),
        (b"<svg/>", "image/svg+xml"),
    ],
)
def test_a_logo_is_embedded_by_what_it_is(tmp_path, content, mime):
    path = tmp_path / "logo.txt"
    path.write_bytes(content.replace(b"<svg/>", b"<svg >"))
    assert page.variant(logo=path).logo.startswith(f"data:{mime};base64,")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GIF89a", "no PNG, JPEG"),
        (b"", "no PNG"),
        (b"<html><svg>", "no PNG"),
        (PIXEL * 20_000, "200,000"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_logo_is_one_clear_error(tmp_path, content, said):
    path = tmp_path / "logo.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PageError, match=said):
        page.variant(logo=path)
    assert MOST_LOGO_BYTES == 200_000
    with pytest.raises(PageError):
        page.variant(logo=tmp_path)


def test_leadership_gets_no_executed_notebooks_and_engineering_does():
    assert not page.Variant(audience="leadership").has("evidence") and page.Variant(audience="engineering").has(
        "evidence"
    )
    assert page.opened('<details class="a"><details open>') == '<details open class="a"><details open>'


# --- claims, provenance, records -----------------------------------------------------------------------------------


def test_the_claims_that_do_not_stand_come_first_with_our_own_figure(gpu_run):
    html = page.claims_html(verdict.gather(gpu_run))
    words = re.findall(r'<strong class="\w+">([a-z ]+)</strong>', html)
    order = ["impossible", "contradicted", "undefined", "not checkable", "confirmed"]
    assert words == sorted(words, key=order.index) and {"impossible", "confirmed"} <= set(words)
    assert "(wmma)" in html and "256 of every 4096 scores" in html and "nothing to measure" in html
    assert "Measured by FlashCore" in html and audit_html([]).startswith('<p class="fc-none">')


def test_a_claims_file_that_cannot_be_read_is_a_sentence(gpu_run, monkeypatch):
    def broken():
        raise claims.file.ClaimsError("claims.toml", 3, "it is no TOML")

    monkeypatch.setattr(claims, "load_claims", broken)
    assert "could not be audited: claims.toml, line 3" in page.claims_html(verdict.gather(gpu_run))


def test_the_command_names_what_is_not_the_default():
    given = {"profile": "quick", "backends": "all", "problems": "tiny;report", "seed": 0}
    assert command({"parameters": given}) == "make report PROFILE=quick PROBLEM='tiny;report'"
    assert command({}) == command({"parameters": "odd"}) == "make report"


def test_backends_keep_their_names_and_counts_have_thousands():
    from pandas import DataFrame

    html = frame_html(DataFrame([{"bug": "x", "cpu": "found", "values judged": 1234567}]), "t", ids={"cpu"})
    assert ">cpu<" in html and ">Bug<" in html and "1,234,567" in html and 'class="num"' in html


def test_records_are_embedded_as_written_and_cannot_end_the_script(gpu_run):
    gpu_run.append(Trial(kind="ceiling", reason="</script><script>"))
    [found] = embedded_records(gpu_run, verdict.gather(gpu_run))
    assert "<" not in found["text"]
    lines = found["text"].splitlines()
    assert [Trial.model_validate_json(line) for line in lines] == gpu_run.trials()


def test_a_page_without_a_gpu_carries_the_recorded_records_too(tmp_path):
    run = synthetic.write_run(tmp_path / "cpu", synthetic.cpu_trials(), synthetic.environment(None))
    found = embedded_records(run, verdict.gather(run))
    assert [f["id"] for f in found] == ["fc-records", "fc-records-recorded"]


def test_go_says_what_to_ship_and_what_would_change_it(tmp_path):
    trials = [t for t in synthetic.gpu_trials(synthetic.FAST) if t.kind != "paging"] + paging.everything()
    run = synthetic.write_run(tmp_path / "run", trials, synthetic.environment())
    decision = verdict.judge(run)
    html = page.blockers_html(decision)
    assert decision.verdict == "GO"
    assert "Nothing blocks" in html and "Ship option" in html and "What would change this" in html
