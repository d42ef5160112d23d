"""Random settings: what is drawn is taken, and the same again as Python; lengths lie where it matters."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from flashcore.errors import InvalidProblem
from flashcore.surveys.invariance import Setting, cases
from flashcore.surveys.invariance.cases import SIZES, Takes

ALL = Takes(("float16", "bfloat16"), (64, 128), ("window", "softcap", "sink"), mixed=True)


def drawn(count: int, size=SIZES["cuda"], takes=ALL) -> list[Setting]:
    return [cases.draw(random.Random(n), takes, size, lambda setting: False) for n in range(count)]


def test_settings_have_all_that_a_backend_takes():
    found = drawn(400)
    assert {s.dtype for s in found} == {"float16", "bfloat16"} and {s.head_dim for s in found} == {64, 128}
    assert {s.causal for s in found} == {s.sink for s in found} == {s.even for s in found} == {True, False}
    assert {pattern for s in found for pattern in s.patterns} == set(cases.PATTERNS)
    assert any(s.window_left >= 0 for s in found) and any(s.softcap for s in found)
    assert max(s.heads_q for s in found) == 32 and min(s.heads_q for s in found) == 1
    assert max(len(s) for s in found) == 256
    keys = [k for s in found for _, k in s.lengths]
    assert max(keys) > 15_000 and min(keys) == 1 and max(q for s in found for q, _ in s.lengths) == 300
    for base in (64, 1024, 2048, 4096):
        for beside in (-1, 0, 1):
            assert any(k > base - 2 and (k - beside) % base == 0 for k in keys), (base, beside)


def test_settings_are_no_larger_than_a_machine_bears():
    for kind, size in SIZES.items():
        for s in drawn(150, size):
            longest = max(k for _, k in s.lengths)
            assert len(s) == 1 or len(s) * longest * s.heads_kv * s.head_dim <= size.numbers or len(s) == 2, kind
            assert len(s) <= size.sequences and s.heads_q <= size.heads


def test_what_a_backend_takes_not_is_not_drawn():
    few = Takes(("bfloat16",), (128,), (), mixed=False)
    for s in drawn(60, SIZES["cpu"], few):
        assert (s.dtype, s.head_dim, s.even, s.sink, s.softcap, s.window_left) == (
            "bfloat16",
            128,
            True,
            False,
            None,
            -1,
        )
    assert cases.draw(random.Random(0), ALL, SIZES["cpu"], lambda setting: True) is None


def test_a_row_without_a_key_is_asked_of_ours_alone():
    def empty(takes: Takes) -> list[Setting]:
        return [s for s in drawn(300, takes=takes) if s.causal and any(rows > keys for rows, keys in s.lengths)]

    assert empty(ALL) and not empty(replace(ALL, empty=False))


def test_a_setting_as_python_is_the_same_setting():
    for s in drawn(40):
        assert eval(s.line(), {"Setting": Setting}) == s
    assert Setting().line() == "Setting()"
    assert Setting(lengths=((2, 5),) * 3, patterns=("normal",) * 3).line() == (
        "Setting(lengths=((2, 5),) * 3, patterns=('normal',) * 3)"
    )


def test_a_setting_without_sense_is_refused():
    with pytest.raises(InvalidProblem, match="2 lengths and 1 patterns"):
        Setting(lengths=((1, 1), (1, 1)))


def test_the_problem_of_a_call_says_whether_it_asks_for_the_same_bits():
    s = Setting(window_left=4, sink=True, group=2)
    assert (
        s.problem(3, 1, 9, invariant=True).batch_invariant and not s.problem(3, 1, 9, invariant=False).batch_invariant
    )
    assert s.problem(3, 1, 9, invariant=False, lengths="ragged").masks == ("window", "sink", "ragged")
