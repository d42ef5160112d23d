"""HTML of others: whatever acts or asks for something elsewhere is gone, and what shows something is still there."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser

import pytest
from support import synthetic_records as synthetic

from flashcore.page import cleaning
from flashcore.page.cleaning import cleaned
from flashcore.page.drawing import html_tables, plots
from flashcore.problem import PRESETS

AWAY = "https://elsewhere.invalid/x"
HOSTILE = [
    "<script>act()</script>", "<SCRIPT src=x>act()</ScRipT >", "<script>act() // never closed",
    "<scr<script></script>ipt>act()</script>", "<script/>act()", "<noscript><img src=x onerror=act()></noscript>",
    '<noscript><p title="</noscript><img src=x onerror=act()>"></noscript>',
    "<img src=x onerror=act()>", "<IMG SRC=x OnError=act()>", "<img/onerror=act()/src=x>", '<p onclick="act()">t</p>',
    "<img src=x onerror=act() never closed", '<body onload=act()><p onfocus=act() tabindex=0 autofocus>',
    '<a href="javascript:act()">l</a>', '<a href="JaVa&#115;cript:act()">l</a>',
    '<a href="&#1;java\nscript:act()">l</a>',
    '<a href="data:text/html,<script>act()</script>">l</a>', f'<a href="{AWAY}">l</a>', '<a href="//elsewhere">l</a>',
    '<img src="data:text/html,<script>act()</script>">', f'<img src="{AWAY}">', f'<img srcset="{AWAY} 2x">',
    f'<iframe src="{AWAY}">in</iframe>', "<IFRAME srcdoc='<script>act()</script>'>",
    f'<object data="{AWAY}">in</object>',
    f'<embed src="{AWAY}">', f'<meta http-equiv="refresh" content="0;url={AWAY}">', f'<base href="{AWAY}">',
    f'<link rel="stylesheet" href="{AWAY}">', f"<style>p {{ background: url({AWAY}) }}</style>",
    "<style>p { color: red",
    f'<form action="{AWAY}"><input name="a"><button formaction="{AWAY}">b</button></form>',
    f'<p style="background:url({AWAY})">t</p>', f'<p style="color:red;fill:url({AWAY}#a)">t</p>',
    f"<p style=\"fill:URL( '{AWAY}' )\">t</p>", f'<p style="color:\\75 rl({AWAY})">t</p>',
    f'<p style="color:var(--x, url({AWAY}))">t</p>', f'<p style="fill:image-set(\'{AWAY}\' 1x)">t</p>',
    '<p style="color:expression(act())">t</p>', f"<p style=\"fill:{{url({AWAY})}}\">t</p>",
    "<svg onload=act()><script>act()</script></svg>", "<svg><script href='data:,act()'/></svg>",
    f"<svg><foreignObject><body onload=act()><iframe src='{AWAY}'></iframe></body></foreignObject></svg>",
    f'<svg><use href="{AWAY}#a"/><use xlink:href="data:image/svg+xml,x#a"/></svg>',
    '<svg><a xlink:href="javascript:act()"><text>t</text></a></svg>', f'<svg><image href="{AWAY}"/></svg>',
    '<svg><a><animate attributeName="href" to="javascript:act()"/></a><set attributeName="onload" to="act()"/></svg>',
    f'<svg><rect fill="url({AWAY}#a)"/><g clip-path="url({AWAY}#c)"/><g filter="url({AWAY}#f)"/></svg>',
    "<math><mtext><table><mglyph><style><img src=x onerror=act()></style></math>",
    "<svg></p><style><a id=\"</style><img src=x onerror=act()>\">",
    "<svg><title><img src=x onerror=act()></title></svg>",
    "<svg><desc><script>act()</script></desc></svg>", "<textarea><img src=x onerror=act()></textarea>",
    "<title></title><img src=x onerror=act()>", "<xmp><img src=x onerror=act()></xmp>",
    "<plaintext><img onerror=act()>",
    '<!--<img src="--><img src=x onerror=act()//">', "<![CDATA[<img onerror=act()>]]>", "<?xml <img onerror=act()>?>",
    "<template><img src=x onerror=act()></template>", f'<video src="{AWAY}"><source onerror=act()></video>',
    '<div><b><table><p onclick="act()"><i>', '<p title="&quot;><img src=x onerror=act()>">t</p>',
]  # fmt: skip


class Seen(HTMLParser):
    """Tags with their attributes, and text, in the order in which they come; another parser than the cleaner's."""

    def __init__(self, html: str):
        super().__init__()
        self.all: list = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        style = dict(attrs).get("style")
        found = {name: value for name, value in attrs if name != "style"}
        if style is not None:
            rules = [rule.partition(":") for rule in style.split(";") if rule.strip()]
            found["style"] = {name.strip(): value.strip() for name, _, value in rules}
        self.all.append((tag, found))

    def handle_data(self, data):
        if data.strip():
            self.all.append(data.strip())

    def tags(self) -> list[tuple[str, dict]]:
        return [one for one in self.all if not isinstance(one, str)]


def assert_harmless(html: str):
    known, comments = {name.lower() for name in cleaning.TAGS}, re.search(r"<[!?]", html)
    assert not comments, html
    for tag, attributes in Seen(html).tags():
        assert tag in known, html
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("srcdoc", "srcset", "action", "formaction"), html
            if name in ("href", "xlink:href"):
                assert value.startswith("#"), html
            elif name == "src":
                assert value.startswith("data:image/"), html
            elif name in ("style", "fill", "stroke", "clip-path", "filter"):
                assert not re.search(r"url\((?!#)|expression|image-set|\\", str(value), re.IGNORECASE), html


@pytest.mark.parametrize("html", HOSTILE)
def test_what_acts_or_leads_away_is_gone(html):
    for text in (html, f"<table><tr><td>{html}</td></tr></table>", f"<svg><g>{html}</g></svg>", html.upper()):
        assert_harmless(cleaned(text))


def test_pieces_put_together_are_as_harmless_and_cleaning_again_finds_nothing_more():
    """Half a tag may make the other half of the next piece something else."""
    draw = random.Random(0)
    for _ in range(100):
        pieces = draw.sample(HOSTILE, 4)
        html = "".join(piece[: draw.randrange(len(piece) + 1)] if draw.random() < 0.4 else piece for piece in pieces)
        once = cleaned(html)
        assert_harmless(once)
        assert_harmless(cleaned(once))


def test_the_words_around_what_is_left_out_stay():
    assert cleaned("<p>before</p><script>act()</script><p>after</p>") == "<p>before</p><p>after</p>"
    assert cleaned(f'<p>before</p><embed src="{AWAY}"><p>after</p>') == "<p>before</p><p>after</p>"
    assert cleaned(f'<p>a <a href="{AWAY}">link</a>, <font>old</font></p>') == "<p>a <a>link</a>, old</p>"
    assert cleaned("<p>a &lt;script&gt; &amp; b</p>") == "<p>a &lt;script&gt; &amp; b</p>"
    assert cleaned("<p><b>never closed") == "<p><b>never closed</b></p>"


def test_of_a_style_what_is_harmless_stays():
    kept = Seen(cleaned(f'<p style="color:red; position:fixed; background:url({AWAY}); font-weight:bold">t</p>'))
    assert kept.tags() == [("p", {"style": {"color": "red", "font-weight": "bold"}})]
    drawn = "fill: url(#f1-3); stroke: var(--fc-ink,#123); color: rgb(1,2,3)"
    assert Seen(cleaned(f'<svg><path style="{drawn}"/></svg>')).tags() == Seen(f'<svg><path style="{drawn}"/>').tags()


def test_nothing_takes_the_place_of_the_pages_own_records():
    """The page's script finds them by their id, and would find another element by that id first."""
    assert cleaned('<pre id="fc-records">made up</pre><pre id="FC-x">t</pre>') == "<pre>made up</pre><pre>t</pre>"
    assert cleaned('<a href="#f1-2">to</a><p id="f1-2">t</p>') == '<a href="#f1-2">to</a><p id="f1-2">t</p>'


@pytest.mark.parametrize(
    "draw",
    [
        lambda trials: plots.tflops_html(trials, caption="Speed < 700 & more"),
        lambda trials: plots.latency_html(trials, target_us=5.0, target_problem=PRESETS["latency"]),
        html_tables.times_table, html_tables.latency_table, html_tables.correctness_table, html_tables.ceilings_table,
    ],
    ids=["speed", "latency", "times", "small", "correctness", "ceilings"],
)  # fmt: skip
@pytest.mark.slow
def test_what_our_own_notebooks_display_survives(draw):
    html = draw(synthetic.gpu_trials())
    drawn = Seen(html)
    assert len(drawn.all) > 20 and Seen(cleaned(html)).all == drawn.all
    for name in (" viewBox=", "<clipPath "):  # SVG tells capitals apart, and the parser here does not
        assert cleaned(html).count(name) == html.count(name)


def test_a_picture_inside_the_page_and_a_markdown_table_survive():
    picture = '<img src="data:image/png;base64,iVBORw0KGgo=" alt="a &quot;plot&quot;" class="fc-image">'
    assert Seen(cleaned(picture)).all == Seen(picture).all
    table = (
        '<table><thead><tr><th style="text-align:right">n</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>'
    )
    assert Seen(cleaned(table)).all == Seen(table).all
