"""``%diagnose`` and ``%bisect``: what a line may say, and one sentence for a line that says something else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from IPython.core.error import UsageError
from support import wrong_attention as zoo

import flashcore
from flashcore.bisection.faults import catalogue


@pytest.fixture
def magics():
    """The magics, by name, and the names of the notebook."""
    kept = {}
    names = {
        "attention": zoo.heads_by_remainder, "box": SimpleNamespace(fn=zoo.two_pass), "number": 7, "which": "cpu",
        "planted": catalogue.get("F8").plant("cpu"),
    }  # fmt: skip
    shell = SimpleNamespace(
        user_ns=names, register_magic_function=lambda fn, kind, name: kept.update({name: fn}) or kind
    )
    flashcore.load_ipython_extension(shell)
    assert sorted(kept) == ["bisect", "diagnose"]
    return kept


def test_a_function_of_the_notebook_is_diagnosed(magics):
    found = magics["diagnose"]('attention "B=1, H=4, Hkv=2, S=64, D=16"')
    assert found.diagnosis.home.seqlen_q == 64 and not found.right
    assert magics["diagnose"]("box.fn B=1,H=2,S=64,D=16").right


def test_a_backend_is_bisected_by_id_and_by_name(magics):
    assert magics["bisect"]("cpu B=1,H=1,S=32,D=16").bisection.problem.seqlen_q == 32
    assert magics["bisect"]("which B=1,H=1,S=32,D=16").right
    assert magics["bisect"]("planted").bisection.producers == ["scores"]
    assert magics["diagnose"]("cpu B=1,H=1,S=32,D=16").diagnosis is not None, "from its outputs alone"


def test_a_file_is_named_by_its_place(magics, tmp_path):
    (tmp_path / "mine.py").write_text("def fn(q, k, v):\n    return q\n")
    found = magics["diagnose"](f"{tmp_path / 'mine.py'}:fn B=1,H=1,S=32,D=16")
    assert not found.right and found.diagnosis.name == "fn"


@pytest.mark.parametrize(
    ("magic", "line", "sentence"),
    [
        ("diagnose", "", '%diagnose takes one or two words and got nothing; write %diagnose FUNCTION ["PROBLEM"]'),
        ("bisect", "cpu tiny now", '%bisect takes one or two words and got 3 words; write %bisect BACKEND ["PROBLEM"]'),
        ("diagnose", 'attention "B=1', "A quotation mark of 'attention \"B=1' is not closed; write %diagnose"),
        ("diagnose", "atention", "Did you mean 'attention'?"),
        ("bisect", "wma", "There is no backend 'wma'; run the cell that defines it, or name a backend. Did you mean"),
        ("diagnose", "number", "'number' is int in this notebook, and %diagnose takes a function, a backend or"),
        ("bisect", "attention", "'attention' is function in this notebook, and %bisect takes a backend or the id"),
        ("diagnose", "box.none", "'box.none' has no part 'none' in this notebook"),
        ("diagnose", "attention B=1,Z=3", "'Z' in 'B=1,Z=3' is no key of a problem"),
        ("diagnose", "nowhere.py:fn", "There is no file 'nowhere.py'"),
        ("bisect", "sdpa-math", "Backend 'sdpa-math' cannot run this problem: it does not expose its stages"),
    ],
)
def test_a_wrong_line_is_one_sentence(magics, magic, line, sentence):
    with pytest.raises(UsageError) as error:
        magics[magic](line)
    assert sentence in str(error.value)
