"""The page in a real browser: opened from disk it asks for nothing, says nothing on the console, and fits screens."""

from __future__ import annotations

import json
import os
import shutil
import warnings

import nbformat
import pytest
import synthetic_records as synthetic

from flashcore import pipeline
from flashcore.records import RunFolder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RUNS = ("no-go", "broken", "cpu")
LONG = "a_word_so_long_that_it_must_break_" * 6
A4_INSIDE = (695, 1032)
"""CSS pixels of an A4 page inside the margins of the print style."""


def other_notebook() -> nbformat.NotebookNode:
    """An executed notebook with every kind of output that could call out or break the page."""
    v4 = nbformat.v4
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    outputs = [
        v4.new_output("stream", name="stdout", text=f"\x1b[31mred\x1b[0m {LONG * 3}\n"),
        v4.new_output("display_data", data={"image/png": pixel}),
        v4.new_output("display_data", data={"image/png": pixel}, metadata={"image/png": {"alt": 'the "plot"'}}),
        v4.new_output("display_data", data={"image/svg+xml": '<svg xmlns="http://www.w3.org/2000/svg"/>'}),
        v4.new_output("display_data", data={"application/javascript": "fetch('https://example.invalid/')"}),
        v4.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}),
        v4.new_output(
            "execute_result", data={"text/html": f"<table><tr><td>{LONG}</td></tr></table>"}, execution_count=1
        ),
        v4.new_output("error", ename="ValueError", evalue="<b>not bold</b>", traceback=["trace"]),
    ]
    cells = [
        v4.new_markdown_cell("# A synthetic notebook\n\nProse, $x^2$ and `code`.\n\n## Deeper"),
        v4.new_code_cell("run_dir = ''", metadata={"tags": ["parameters"]}),
        v4.new_code_cell("secret_code()", outputs=outputs, execution_count=1),
    ]
    return v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, RunFolder]:
    """Rendered pages of synthetic runs: one that fails gates, one that broke off, and one without a GPU."""
    root = tmp_path_factory.mktemp("pages")
    died = synthetic.finished("04_tflops_sweep", status="error", reason="its Jupyter kernel died (killed)")
    hostile = record_with_markup()
    broken = [t for t in synthetic.gpu_trials() if t.data.get("name") != "04_tflops_sweep"]
    runs = {
        "no-go": synthetic.write_run(root / "no-go", synthetic.gpu_trials(), synthetic.environment()),
        "broken": synthetic.write_run(root / "broken", [*broken, hostile, died], synthetic.environment()),
        "cpu": synthetic.write_run(root / "cpu", synthetic.cpu_trials(), synthetic.environment(None)),
    }
    folder = runs["no-go"].path / "notebooks"
    folder.mkdir()
    nbformat.write(other_notebook(), folder / "02_correctness_bisection.ipynb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for run in runs.values():
            pipeline.render(run)
    return runs


def record_with_markup():
    """A record whose text tries to leave its place."""
    reason = f"</script><script>document.title='broken out'</script><img src=x onerror=alert(1)> {LONG}"
    return synthetic.correctness("scalar", synthetic.PRESETS["tiny"], status="failed", reason=reason, correctness=None)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is not installed, and in CI the page has to be opened in one: install chromium")
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, pages):
    """Open a run's page from disk; gives the page, and the list of what it asked for or complained of."""
    contexts = []

    def open_(name: str, *, scheme="light", width=1280, **options):
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}, accept_downloads=True, **options
        )
        contexts.append(context)
        tab, heard = context.new_page(), []
        tab.on("console", lambda m: heard.append(f"console {m.type}: {m.text}"))
        tab.on("pageerror", lambda e: heard.append(f"page error: {e}"))
        path = (pages[name].path / "report.html").as_uri()
        tab.on("request", lambda r: heard.append(f"request: {r.url}") if r.url not in (path, "data:,") else None)
        tab.goto(path)
        return tab, heard

    yield open_
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_asks_for_nothing_says_nothing_and_fits(opened, name, scheme, width):
    tab, heard = opened(name, scheme=scheme, width=width)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    tab.wait_for_timeout(100)
    assert heard == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.body.scrollWidth") <= width


@pytest.mark.parametrize("name", RUNS)
def test_every_picture_has_a_text_alternative(opened, name):
    tab, _ = opened(name)
    nameless = tab.evaluate(
        """[...document.querySelectorAll('img, svg')].filter(e => e.closest('svg') === e || e.tagName === 'IMG')
           .filter(e => !(e.getAttribute('alt') || (e.getAttribute('role') === 'img' && e.getAttribute('aria-label'))))
           .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    if name != "cpu":
        assert tab.locator("svg[role=img]").count() >= 6


@pytest.mark.parametrize("name", RUNS)
def test_the_outline_is_whole(opened, name):
    """One h1, no level skipped on the way down, every table captioned, every id used once, every link met."""
    tab, _ = opened(name)
    levels = tab.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), levels
    ours = "document.querySelectorAll('.fc-table table')"
    assert tab.evaluate(f"[...{ours}].every(t => t.caption && t.querySelector('th[scope=col]'))")
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    targets = tab.evaluate(
        "[...document.querySelectorAll('a[href^=\"#\"]:not(.anchor-link)')].map(a => a.hash.slice(1))"
    )
    assert targets and set(targets) <= set(ids)
    for landmark in ("header", "nav", "main", "footer"):
        assert tab.locator(f"body > {landmark}").count() == 1


def test_the_first_tab_stop_skips_to_the_verdict(opened):
    tab, _ = opened("no-go")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "fc-skip"
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0


def test_the_verdict_is_the_one_of_the_records(opened, pages):
    tab, _ = opened("no-go")
    decision = pipeline.verdict.judge(pages["no-go"])
    assert decision.verdict == "NO-GO" and "NO-GO" in tab.locator(".fc-verdict").inner_text()
    assert tab.locator(".fc-reason").inner_text() == decision.reason
    assert tab.title().startswith("NO-GO: FlashCore status report")
    assert tab.locator("meta[name=description]").get_attribute("content") == f"NO-GO. {decision.reason}"


def test_the_options_stand_before_the_gates_and_their_conditions_are_folded(opened, pages):
    tab, _ = opened("no-go")
    shown = tab.locator(".fc-options tbody tr")
    options = pipeline.verdict.judge(pages["no-go"]).options
    assert [o.result in row for o, row in zip(options, shown.all_inner_texts(), strict=True)] == [True] * 3
    tops = [tab.locator(name).first.bounding_box()["y"] for name in (".fc-banner", ".fc-options", ".fc-gates")]
    assert tops == sorted(tops)
    fold = tab.locator(".fc-options + details")
    assert not fold.evaluate("e => e.open")
    fold.locator("summary").click()
    assert "Paging saves 70 %" in fold.inner_text() and "HOLDS" in fold.inner_text()


def test_a_failed_notebook_is_said_prominently(opened):
    tab, _ = opened("broken")
    alert = tab.locator("main > .fc-alert")
    assert "04_tflops_sweep" in alert.inner_text() and "kernel died" in alert.inner_text()
    assert "INCONCLUSIVE" in tab.locator(".fc-verdict").inner_text()
    assert alert.bounding_box()["y"] < 700


def test_text_in_a_record_cannot_leave_its_place(opened):
    tab, heard = opened("broken")
    assert tab.title() != "broken out" and tab.locator("img[onerror]").count() == 0 and heard == []


def test_without_a_gpu_the_page_says_so(opened):
    tab, _ = opened("cpu")
    assert "without a GPU" in tab.locator(".fc-sub").inner_text()


def test_evidence_is_folded_and_holds_outputs_but_no_code(opened):
    tab, _ = opened("no-go")
    fold = tab.locator("#evidence details")
    assert fold.count() == 1 and not fold.evaluate("e => e.open")
    assert "A synthetic notebook" in fold.locator("summary").inner_text()
    fold.locator("summary").click()
    text = fold.inner_text()
    assert "red" in text and "ValueError: <b>not bold</b>" in text and "secret_code" not in text
    assert fold.locator("img[alt='the \"plot\"']").count() == 1 and fold.locator("script, iframe").count() == 0


def test_the_records_can_be_had_from_the_page(opened, pages, tmp_path):
    tab, _ = opened("broken")
    with tab.expect_download() as download:
        tab.locator("#fc-download").click()
    download.value.save_as(tmp_path / "records.jsonl")
    lines = (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()
    written = pages["broken"].records_path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(line) for line in written]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plots_follow_the_scheme_and_words_stand_out(opened, scheme):
    """Every colour of plots and states has at least 4.5:1 against the page."""
    tab, _ = opened("no-go", scheme=scheme)
    names = "fc-ink fc-muted fc-target fc-s1 fc-s2 fc-s3 fc-s4 fc-s5 fc-p1 fc-p4 ink muted link go no open".split()
    colours = tab.evaluate(
        """names => { const probe = document.body.appendChild(document.createElement('i'));
             const read = v => { probe.style.color = v;
               return getComputedStyle(probe).color.match(/\\d+/g).map(Number); };
             return Object.fromEntries(['paper', ...names].map(n => [n, read(`var(--${n})`)])); }""",
        names,
    )

    def luminance(rgb):
        parts = [c / 255 for c in rgb[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    paper = luminance(colours.pop("paper"))
    assert (paper > 0.8) == (scheme == "light")
    for name, rgb in colours.items():
        high, low = sorted((paper, luminance(rgb)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, name
    text = tab.locator("svg.fc-plot text").first
    assert text.evaluate("e => getComputedStyle(e).fill") == f"rgb({', '.join(map(str, colours['fc-muted'][:3]))})"


@pytest.mark.parametrize("name", ["no-go", "cpu"])
def test_the_executive_part_fits_one_printed_page(opened, name):
    tab, _ = opened(name)
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": A4_INSIDE[0], "height": A4_INSIDE[1]})
    bottom = tab.evaluate(
        "Math.max(...[...document.querySelectorAll('section.executive')].map(e => e.getBoundingClientRect().bottom))"
    )
    assert 300 < bottom <= A4_INSIDE[1]
    assert tab.evaluate("document.documentElement.scrollWidth") <= A4_INSIDE[0]


def test_the_file_is_small(pages):
    for run in pages.values():
        assert (run.path / "report.html").stat().st_size < 3_000_000
