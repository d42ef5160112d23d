"""Arguments as plain values: what each kind is read as, and one sentence for everything else."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from flashcore.errors import InvalidProblem
from flashcore.numerics import plain


@pytest.mark.parametrize("value", [True, False, np.True_, np.bool_(False)])
def test_a_flag_is_a_bool_of_pythons_own(value):
    assert plain.flag("causal", value) is bool(value)


def test_the_variable_is_read_at_each_call_wherever_in_the_process_it_was_set(monkeypatch):
    name = plain.BATCH_INVARIANT.decode()
    monkeypatch.delenv(name, raising=False)
    assert plain.batch_invariant() is False and plain.batch_invariant(True) is True
    for text, asked in (("1", True), ("0", False)):
        monkeypatch.setenv(name, text)
        assert plain.batch_invariant() is asked and plain.process[plain.BATCH_INVARIANT].decode() == text
        assert plain.batch_invariant(not asked) is not asked
    monkeypatch.setenv(name, "on")
    with pytest.raises(InvalidProblem, match=f"^{name} is 'on'; set it to 1 or 0, or leave it out.$"):
        plain.batch_invariant()
    with pytest.raises(InvalidProblem, match="^batch_invariant has to be True or False; got 1"):
        plain.batch_invariant(1)


@pytest.mark.parametrize("value", [1, 0, "true", None, torch.tensor(True), np.array(True), [True]])
def test_what_may_mean_something_else_is_no_flag(value):
    with pytest.raises(InvalidProblem, match=r"^causal has to be True or False; got .*\.$"):
        plain.flag("causal", value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, 2.0), (0.25, 0.25), (Fraction(1, 4), 0.25), (np.float16(0.25), 0.25), (np.int8(-3), -3.0),
        (np.array(0.25), 0.25), (torch.tensor(0.25), 0.25), (torch.tensor(7), 7.0),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25), (torch.tensor(0.1), float(np.float32(0.1))),
    ],
)  # fmt: skip
def test_a_number_is_the_float_that_it_is_worth(value, expected):
    found = plain.number("scale", value)
    assert type(found) is float and found == expected


def test_none_is_no_number_and_stays_none():
    assert plain.number("scale", None) is None and plain.softmax_scale(None) is None


@pytest.mark.parametrize(
    "value",
    [
        True, np.True_, torch.tensor(True), "1", 1j, torch.tensor(1j), [1.0], np.array([1.0]), torch.tensor([1.0]),
        Decimal("0.5"), object(),
    ],
)  # fmt: skip
def test_anything_else_is_no_number(value):
    with pytest.raises(InvalidProblem, match=r"^scale must be a number, or None; got "):
        plain.number("scale", value)


@pytest.mark.parametrize("value", [10**400, Fraction(10**400, 3)])
def test_a_number_that_no_float_is_as_large_as_is_one_sentence(value):
    with pytest.raises(InvalidProblem, match=r"^scale is .*; no float is as large\.$"):
        plain.number("scale", value)


def test_a_number_is_read_once_and_not_looked_at_again():
    value = torch.tensor(0.5)
    found = plain.number("scale", value)
    value.fill_(9.0)
    assert found == 0.5


@pytest.mark.parametrize("read", [plain.number, plain.integer])
def test_a_tensor_on_a_device_would_be_waited_for(read):
    with pytest.raises(InvalidProblem, match="^it is a torch.int64 tensor .* would wait for the device; pass a Python"):
        read("it", torch.tensor(1, device="meta"))


@pytest.mark.parametrize("read", [plain.number, plain.softmax_scale])
def test_a_number_that_gradients_are_asked_of_is_refused(read):
    with pytest.raises(InvalidProblem, match="requires gradients"):
        read(*(("scale",) if read is plain.number else ()), torch.tensor(0.5, requires_grad=True))


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int8)])
def test_a_whole_number_is_an_int_of_pythons_own(value):
    found = plain.integer("pages", value)
    assert type(found) is int and found == 3


@pytest.mark.parametrize("value", [
    3.0, "3", None, np.float32(3), torch.tensor(3.0), torch.tensor([3, 4]), True, False, np.True_, torch.tensor(True),
    torch.tensor([False]),
])  # fmt: skip
def test_what_is_not_whole_is_one_sentence(value):
    with pytest.raises(InvalidProblem, match=r"^pages is .*; it has to be a whole number\.$"):
        plain.integer("pages", value)


@pytest.mark.parametrize("value", [
    math.nan, math.inf, -math.inf, torch.tensor(math.inf), np.float64("nan"), 3.41e38, -1e300,
])  # fmt: skip
def test_a_softmax_scale_is_finite(value):
    words = r"^softmax_scale must be finite in float32, or None for 1/sqrt\(head_dim\); got "
    with pytest.raises(InvalidProblem, match=words):
        plain.softmax_scale(value)


def test_any_finite_softmax_scale_is_one():
    assert [plain.softmax_scale(s) for s in (0, -2.5, np.float64(3.4e38))] == [0.0, -2.5, 3.4e38]


def test_a_word_is_a_string_of_pythons_own():
    class Name(str):
        __slots__ = ()

    assert type(plain.word("backend", Name("cpu"))) is str and plain.word("backend", "") == ""
    for wrong in (None, b"cpu", ["cpu"], torch.tensor(1)):
        with pytest.raises(InvalidProblem, match=r"^backend has to be a string; got "):
            plain.word("backend", wrong)


def test_a_value_is_shown_short_and_a_tensor_without_its_numbers():
    assert plain.shown("a'b") == repr("a'b")
    assert plain.shown(torch.zeros(2, 3).half()) == "a torch.float16 tensor [2, 3] on cpu"
    assert plain.shown(torch.zeros((), device="meta")) == "a torch.float32 tensor [] on meta"
    assert plain.shown(np.zeros((4, 1), np.int16)) == "a numpy array of int16 [4, 1]"
    at_most = "x" * (plain.SHOWN - 2)
    assert plain.shown(at_most) == repr(at_most), "as long as may be, with its quotes"
    assert plain.shown(at_most + "x") == repr(at_most + "x")[: plain.SHOWN] + "..."


def test_a_constant_is_the_number_that_it_was():
    assert plain.constant(64) == 64 and type(plain.constant(torch.tensor([0, 0]).numel())) is int


@pytest.mark.slow
def test_a_function_is_marked_as_torch_marks_it():
    """Without its decorator, which loads the compiler."""

    def ours(): ...

    def theirs(): ...

    assert plain.constant_when_traced(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}
