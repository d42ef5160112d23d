"""TOML files of tables: read into models, and when one is wrong, the line and the reason of the first fault."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from flashcore.decision.toml_tables import line_of, parse_toml, read_toml
from flashcore.errors import GatesError


class Wheel(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str
    spokes: int = Field(gt=0)


class Bike(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str
    colour: Literal["red", "blue"] | None = None
    weight: Decimal | float = 1.0
    wheel: tuple[Wheel, ...] = ()


FILE = '''
[[bike]]
id = "one"
colour = "red"

[[bike.wheel]]
id = "front"
spokes = 32

[[bike.wheel]]
id = "back"
spokes = 36

# [[bike]] in a comment
[[bike]]
id = "two"
note = """
[[bike]]
id = "not a bike"
"""
"quoted" = 1
tags = [
    "light",
    "fast",
]
[bike.size]
height = 3
'''
FIRST, SECOND = (("bike", 0),), (("bike", 1),)


@pytest.mark.parametrize(
    ("place", "key", "value", "line"),
    [
        ((), None, None, None),
        (FIRST, None, None, 2),
        (FIRST, "colour", None, 4),
        (FIRST, "weight", None, 2),  # not written there, so the header
        ((*FIRST, ("wheel", 0)), "spokes", None, 8),
        ((*FIRST, ("wheel", 1)), "spokes", None, 12),
        (SECOND, None, None, 15),  # neither the comment nor the text of `note` is a header
        (SECOND, "id", None, 16),
        (SECOND, "quoted", None, 21),
        (SECOND, "tags", None, 22),
        (SECOND, "tags", "fast", 24),
        (SECOND, "tags", "heavy", 22),  # not in the list, so the key
        (SECOND, "size", None, 26),  # a table of its own
    ],
)
def test_a_key_is_found_on_its_own_line(place, key, value, line):
    assert line_of(FILE, place, key, value) == line


def test_tables_of_a_list_on_one_line_are_found_at_that_line():
    text = 'name = "x"\nbike = [{ id = "one" }, { id = "two" }]\n'
    assert line_of(text, SECOND, "id") == 2


def parsed(text: str, **options):
    return parse_toml(text, "bikes.toml", GatesError, **options)


def test_tables_become_models_in_the_files_order():
    text = FILE.split("# [[bike]]")[0]
    (bike,) = parsed(text).tables(Bike, "bike")
    assert (bike.id, bike.colour) == ("one", "red")
    assert [(w.id, w.spokes) for w in bike.wheel] == [("front", 32), ("back", 36)]
    assert parsed("").tables(Bike, "bike") == []


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            '[[bike]]\nid = "a"\ncolor = "red"\n',
            3,
            "bike 'a': there is no key 'color'; the keys are id, colour, weight",
        ),
        ("[[bike]]\n", 1, "bike 'number 1': the key 'id' is missing."),
        ('[[bike]]\nid = "a"\ncolour = "green"\n', 3, "there is no colour 'green'; use one of red, blue."),
        ('[[bike]]\nid = "a"\ncolour = 3\n', 3, "(got 3)"),
        ('[[bike]]\nid = "a"\n[[bike]]\nid = "a"\n', 4, "there are two bikes with the id 'a'; rename one."),
        ('[[bike]]\nid = "a"\n[[bike.wheel]]\nid = "w"\nspokes = 0\n', 5, "bike 'a', wheel 'w': spokes: "),
        ('[[bike]]\nid = "a"\n[[bike.wheel]]\nspokes = 1\n', 3, "wheel 'number 1': the key 'id' is missing."),
        ('x = 1\nbike = "a"\n', 2, "write each bike as a [[bike]] table."),
    ],
)
def test_the_first_bad_table_is_named_with_line_and_reason(text, line, said):
    with pytest.raises(GatesError) as caught:
        parsed(text).tables(Bike, "bike")
    assert said in caught.value.reason and caught.value.line == line
    assert str(caught.value).startswith(f"bikes.toml, line {line}: ")


def test_a_long_value_is_cut_and_a_decimal_is_shown_as_it_was_written():
    with pytest.raises(GatesError) as caught:
        parsed(f'[[bike]]\nid = "a"\nweight = "{"x" * 500}"\n').tables(Bike, "bike")
    assert len(caught.value.reason) < 250
    with pytest.raises(GatesError, match=r"\(got 0\.10\)"):
        text = '[[bike]]\nid = "a"\n[[bike.wheel]]\nid = "w"\nspokes = 0.10\n'
        parsed(text, parse_float=Decimal).tables(Bike, "bike")


def test_what_is_not_read_is_refused_at_its_line():
    file = parsed('top = 1\n[[bike]]\nid = "a"\n[[bikes]]\nid = "b"\n')
    with pytest.raises(GatesError, match=r"there is no 'bikes' here; only \[\[bike\]\] tables are read") as caught:
        file.only(("bike",), keys=("top",))
    assert caught.value.line == 4
    with pytest.raises(GatesError, match=r"no 'top' here; only \[\[bike\]\] and \[\[bikes\]\]"):
        file.only(("bike", "bikes"))
    file.only(("bike", "bikes"), keys=("top",))


@pytest.mark.parametrize(
    ("text", "line"), [("a = 1\nb = = 2\n", 2), ('a = 1\nb = "open\n', 2), ("a = 1\nb = [1,\n", 2)]
)
def test_text_that_is_no_toml_is_an_error_with_its_line(text, line):
    with pytest.raises(GatesError, match="this is not TOML") as caught:
        parsed(text)
    assert caught.value.line == line


def test_a_file_that_cannot_be_read_says_which_kind_of_file_it_should_have_been(tmp_path):
    with pytest.raises(GatesError, match="the bikes file cannot be read") as caught:
        read_toml(tmp_path / "none.toml", "bikes", GatesError)
    assert caught.value.line is None and caught.value.path == str(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe9"\n')
    with pytest.raises(GatesError, match="the bikes file is not UTF-8 text"):
        read_toml(tmp_path / "latin.toml", "bikes", GatesError)
    (tmp_path / "good.toml").write_text('a = "é"\n', encoding="utf-8")
    assert read_toml(tmp_path / "good.toml", "bikes", GatesError).values == {"a": "é"}
