"""`debug`: the finding first, then the maps, for a function and for a backend; the same printed and as HTML."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from support import wrong_attention as zoo

import flashcore
from flashcore.bisection.faults import catalogue
from flashcore.bisection.interactive import debug
from flashcore.errors import InvalidProblem, UnknownName
from flashcore.problem import square

SMALL = "B=1,H=4,Hkv=2,S=130,D=32"


@pytest.fixture(scope="module")
def of_function():
    return flashcore.debug(zoo.one_key_too_many, SMALL + ",causal", device="cpu", pattern="normal")


@pytest.fixture(scope="module")
def of_backend():
    fault = catalogue.get("F8")
    return debug(fault.plant("cpu"), fault.problem)


def test_a_function_shows_its_finding_then_heads_by_keys_then_the_tile(of_function):
    html = of_function._repr_html_()
    finding = of_function.diagnosis.headline()
    places = [html.index(x) for x in (finding.split(":")[0], "weights that each head gives", "<svg", "got (row down")]
    assert places == sorted(places) and html.startswith('<div style="line-height:1.4"><b>FAIL:</b>')
    assert "batch 0, head 3" in html and "FAIL</td>" in html and not of_function.right
    assert "weights, batch 0, head 0: " in html and "elements of this tile are beyond their bounds" in html


def test_what_is_printed_begins_with_the_finding_and_ends_with_numbers(of_function, of_backend):
    lines = str(of_function).splitlines()
    assert lines[0].rstrip(".") == of_function.diagnosis.headline()
    assert any(line.startswith("difference (row down, key across)") for line in lines)
    first = str(of_backend).splitlines()[0]
    assert "scores goes wrong first" in first and of_backend.bisection.finding() in first


def test_a_backend_shows_stages_by_pages_both_ways(of_backend):
    html = of_backend._repr_html_()
    assert "Worst error of each stage from its own inputs" in html and "from the start, as a share" in html
    grid = html[html.index("from its own inputs") : html.index("from the start, as a share")]
    row = re.search(r">scores</th>(.*?)</tr>", grid)[1]
    assert row.count("FAIL") == 4 and grid.count("FAIL") == 4, "made at `scores`, on each page"
    assert "Stages that made an error: scores." in of_backend.sentences[1]


def test_what_is_right_says_so_and_shows_no_tile():
    for found in (debug("cpu"), debug(zoo.two_pass, SMALL, device="cpu", pattern="normal")):
        html = found._repr_html_()
        assert found.right and html.startswith('<div style="line-height:1.4"><b>PASS:</b>') and "<svg" not in html
        assert "[" not in str(found).split("\n")[0]
    assert "every stage is right" in str(debug("cpu", square(1, 1, 16, 16)))


def test_no_answer_is_a_finding_without_anything_to_look_at():
    found = debug(zoo.raises, SMALL, device="cpu")
    assert not found.right and found.look is None and "no kernel image" in found._repr_html_()


def test_markup_in_what_a_function_says_is_text():
    def rude(q, k, v):
        raise ValueError("<script>alert(1)</script>")

    html = debug(rude, SMALL, device="cpu")._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_a_file_is_read_anew_by_each_question(tmp_path):
    file = tmp_path / "mine.py"
    text = "import torch\ndef fn(q, k, v):\n    s = (q.float() @ k.float().mT) * {scale}\n"
    text += "    return (s.softmax(-1) @ v.float()).to(q.dtype)\n"
    problem = "B=1,H=2,S=64,D=16"
    file.write_text(text.format(scale=1.0))
    assert "the scale is missing" in str(debug(f"{file}:fn", problem, device="cpu", pattern="normal"))
    file.write_text(text.format(scale=0.25))
    assert debug(f"{file}:fn", problem, device="cpu", pattern="normal").right


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("cpu",), {"layout": "bshd"}, InvalidProblem, "layout: backend 'cpu' exposes its stages .* leave it out"),
        (("cpu",), {"layout": "bshd", "lse": "natural"}, InvalidProblem, "layout and lse: .* leave them out"),
        (("wma",), {}, UnknownName, "Did you mean 'wmma'"),
        ((7,), {}, InvalidProblem, "int is none"),
        (("cpu", 7), {}, InvalidProblem, "int is no problem"),
        (("cpu", "B=1,X=3"), {}, InvalidProblem, "'X'"),
    ],
)
def test_a_question_without_sense_is_one_sentence(arguments, options, error, words):
    with pytest.raises(error, match=words):
        debug(*arguments, **options)


@pytest.mark.slow
def test_importing_flashcore_loads_neither_this_nor_torch_nor_ipython():
    code = (
        "import sys, flashcore; flashcore.load_ipython_extension; "
        "sys.exit(any(n in sys.modules for n in ('torch', 'IPython', 'flashcore.bisection.interactive')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
