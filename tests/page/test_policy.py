"""The page's policy: what the page was made with has its hash there, and nothing else has one."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import nbformat
import pytest
from support import synthetic_records as synthetic
from support.notebook_tools import write_notebook

from flashcore.page.policy import secured
from flashcore.paths import data_dir
from flashcore.pipeline import rendering

OWN = 'document.title = "</style>" + \'<p style="color:red">\';'


def page(body: str = "", *, head: str = "<style>p { color: blue }</style>") -> str:
    return f'<!doctype html>\n<html><head>\n<meta charset="utf-8">\n{head}</head>\n<body>{body}</body></html>\n'


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class Opened(HTMLParser):
    """A page as a browser reads it: tags with their attributes, and the text of styles and scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"style": [], "script": []}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in self.texts and self.cdata_elem:
            self.texts[self.tags[-1][0]].append(data)

    @property
    def policy(self) -> dict[str, list[str]]:
        [content] = [a["content"] for t, a in self.tags if t == "meta" and a.get("http-equiv")]
        return {name: sources for name, *sources in map(str.split, content.split(";"))}

    def rules(self) -> list[dict[str, str]]:
        """Of each element with one of the policy's classes, in order, the rules that its class has."""
        sheet = dict(re.findall(r":is\(#fc-none, \.([\w-]+)\) \{ (.*?) \}", "".join(self.texts["style"])))
        names = [name for _, a in self.tags for name in (a.get("class") or "").split() if name in sheet]
        return [sheet[name] for name in names]


def test_nothing_but_the_pages_own_styles_and_scripts_is_allowed():
    made = Opened(secured(page(f"<script>{OWN}</script>"), scripts=[OWN]))
    assert made.policy == {
        "default-src": ["'none'"], "style-src": [hash_of("p { color: blue }")], "script-src": [hash_of(OWN)],
        "img-src": ["data:"], "base-uri": ["'none'"], "form-action": ["'none'"],
    }  # fmt: skip
    assert made.texts["script"] == [OWN], "what looks like markup in a script is left as it is"


def test_without_styles_and_scripts_none_is_allowed():
    policy = Opened(secured(page(head=""))).policy
    assert policy["style-src"] == policy["script-src"] == ["'none'"]


def test_the_policy_stands_behind_the_character_set_and_before_all_it_holds_for():
    made = secured(page())
    assert made.index("<meta charset") < made.index("Content-Security-Policy") < made.index("<style")
    assert secured("<p>t</p>").lstrip().startswith('<meta http-equiv="Content-Security-Policy"')


@pytest.mark.parametrize(
    "came_in",
    ["<script>steal()</script>", "<SCRIPT TYPE=module>steal()</SCRIPT>", "<script>steal() /*",
     '<script type="text/javascript">steal()</script>'],
)  # fmt: skip
def test_a_script_that_came_in_by_what_the_page_shows_has_no_hash(came_in):
    """Where somebody forgot to escape: the text is in the page before it gets its policy."""
    made = secured(page(f"{came_in}<p>t</p><script>{OWN}</script>"), scripts=[OWN])
    assert set(Opened(made).policy["script-src"]) <= {hash_of(OWN), "'none'"}


def test_a_script_or_a_style_added_later_has_no_hash():
    made = secured(page(f"<script>{OWN}</script>"), scripts=[OWN])
    later = Opened(made.replace("</body>", "<script>steal()</script><style>p { color: red }</style></body>"))
    assert [hash_of(text) in later.policy["script-src"] for text in later.texts["script"]] == [True, False]
    assert [hash_of(text) in later.policy["style-src"] for text in later.texts["style"]] == [True, False]


def test_a_style_below_the_head_has_no_hash():
    made = Opened(secured(page("<style>main { display: none }</style>")))
    assert made.policy["style-src"] == [hash_of("p { color: blue }")]


def test_data_in_the_page_gets_no_hash():
    for kind in ("application/x-ndjson", "application/json"):
        data = f'<script type="{kind}" id="fc-records">{OWN}</script>'
        assert Opened(secured(page(data), scripts=[OWN])).policy["script-src"] == ["'none'"]


def test_a_style_at_an_element_becomes_a_class_with_the_same_rules():
    made = secured(
        page('<p style="color: red">a</p><p class="b c" style="fill:none;">b</p><i style="color: red">c</i>')
    )
    found = Opened(made)
    assert " style=" not in made and found.rules() == ["color: red", "fill:none;", "color: red"]
    second = [a["class"].split() for t, a in found.tags if t == "p"][1]
    assert second[:2] == ["b", "c"] and len(second) == 3
    assert set(found.policy["style-src"]) == {hash_of(text) for text in found.texts["style"]}
    assert len(found.texts["style"]) == 2


@pytest.mark.parametrize(
    ("tag", "rules"),
    [
        ('<p title="a > b" style="color:red" id="x">', "color:red"),
        ("<p title='a \"quoted\" &amp; b' style='color:red' id=x>", "color:red"),
        ('<p id="x" style="font-family:&quot;A B&quot;,serif" title="&lt;b&gt;">', 'font-family:"A B",serif'),
        ("<p style='font-family:\"DejaVu Sans\"' id=x>", 'font-family:"DejaVu Sans"'),
        ('<P\n  ID="x"\n  STYLE = "color:red"\n>', "color:red"),
        ('<path d="M 0 0 L 1 1" style="fill:url(#f1-2)" id="x"/>', "fill:url(#f1-2)"),
        ('<p id="x" hidden style="color:red" style="color:blue">', "color:red"),
    ],
)  # fmt: skip
def test_quotes_entities_and_signs_in_attributes_are_read_as_a_browser_does(tag, rules):
    before, after = Opened(tag).tags[0], Opened(secured(page(tag)))
    [(_, found)] = [(t, a) for t, a in after.tags if a.get("id") == "x"]
    assert after.rules() == [rules]
    assert {k: v for k, v in found.items() if k != "class"} == {k: v for k, v in before[1].items() if k != "style"}


@pytest.mark.parametrize(
    "text",
    ['<p title=\'a style="color:red" b\'>t</p>', '<p data-style="color:red">t</p>', "<p>a style=\"color:red\" b</p>",
     '<!-- <p style="color:red"> -->', "<p>1 < 2 style=\"x\" > 0</p>"],
)  # fmt: skip
def test_what_only_looks_like_a_style_is_left_alone(text):
    assert f"<body>{text}</body>" in secured(page(text))


def test_an_empty_style_goes_without_a_class():
    assert '<p id="x">t</p>' in secured(page('<p id="x" style=" ">t</p>'))


def test_a_rule_cannot_end_itself_or_its_element():
    hostile = "color:red } body { display:none } &lt;/style&gt;&lt;script&gt;steal()&lt;/script&gt;"
    found = Opened(secured(page(f'<p style="{hostile}">t</p>')))
    [made] = [text for text in found.texts["style"] if "fc-none" in text]
    assert made.count("{") == made.count("}") == 1 and "<" not in made and found.texts["script"] == []


# ------------------------------------------------------------------------------------------------ a rendered page

HOSTILE = "</script><script>steal()</script><img src=x onerror=steal()>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    """The page of a run whose plug-in, reason, error and executed notebook all try to put a script there."""
    folder = tmp_path_factory.mktemp("hostile")
    failed = synthetic.correctness("scalar", synthetic.PRESETS["tiny"], status="failed", correctness=None,
                                   reason=f"reason {HOSTILE}")  # fmt: skip
    plug_in = failed.model_copy(update={"backend": f"plugin {HOSTILE}"})
    died = synthetic.finished("04_tflops_sweep", status="error", reason=f"ValueError: raised {HOSTILE}")
    run = synthetic.write_run(folder / "run", [*synthetic.gpu_trials(), failed, plug_in, died], synthetic.environment())
    v4 = nbformat.v4
    shown = f'<p id="kept" style="color:red;fill:url(//elsewhere.invalid)">kept</p><svg onload=steal()>{HOSTILE}</svg>'
    outputs = [
        v4.new_output("display_data", data={"text/html": f"{shown}<iframe src=//elsewhere.invalid></iframe>"}),
        v4.new_output("error", ename=f"Error {HOSTILE}", evalue=HOSTILE, traceback=["trace"]),
    ]
    cells = [v4.new_markdown_cell(f"# Title {HOSTILE}"), v4.new_code_cell("show()", outputs=outputs, execution_count=1)]
    (run.path / "notebooks").mkdir()
    nbformat.write(v4.new_notebook(cells=cells), run.path / "notebooks" / "02_correctness_bisection.ipynb")
    views = (
        "from IPython.display import HTML, display\nfrom flashcore import page\n"
        "from flashcore.decision import verdict\ndecision = verdict.judge(run)\n"
        "display(HTML(page.correctness_html(verdict.gather(run))))\n"
        "display(HTML(page.gates_html(decision)))"
    )
    write_notebook(folder / "toys", "06_status_report", views)
    return rendering.render(run, notebooks_dir=folder / "toys").read_text(encoding="utf-8")


@pytest.mark.notebook
def test_a_rendered_page_holds_nothing_that_came_in_and_acts(hostile):
    found = Opened(hostile)
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert {"iframe", "object", "embed"}.isdisjoint(tag for tag, _ in found.tags)
    kinds = [a.get("type") for t, a in found.tags if t == "script"]
    assert kinds == ["application/x-ndjson", None], "the records, and the page's own program"
    assert "<script>steal" not in hostile and "elsewhere.invalid" not in re.sub(r"<script.*?</script>", "", hostile)


@pytest.mark.notebook
def test_a_rendered_page_shows_what_came_in_as_text(hostile):
    assert "04_tflops_sweep" in hostile and "ValueError: raised &lt;/script&gt;&lt;script&gt;" in hostile
    assert "Error &lt;/script&gt;" in hostile and ">kept</p>" in hostile


@pytest.mark.notebook
def test_the_rendered_pages_hashes_are_those_of_its_styles_and_of_its_own_program(hostile):
    found = Opened(hostile)
    program = found.texts["script"][-1]
    assert program.strip() == (data_dir("reports") / "template" / "page.js").read_text(encoding="utf-8").strip()
    assert found.policy["script-src"] == [hash_of(program)]
    assert set(found.policy["style-src"]) == {hash_of(text) for text in found.texts["style"]}
    assert "color:red;" in found.rules() and not any("style" in attributes for _, attributes in found.tags)
