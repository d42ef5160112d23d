"""The picture of the house shows the house: it is drawn from the imports, and it is drawn anew when they change."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashcore

ROOT = Path(flashcore.__file__).parent.parent
SCRIPT = ROOT / "docs" / "draw_house.py"
if not SCRIPT.is_file():
    pytest.skip("these tests read the checkout, and FlashCore runs from an install here", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("draw_house", SCRIPT)
house = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = house  # where a dataclass looks for its module
_spec.loader.exec_module(house)

MENDED = "docs/house.svg does not show the package as it is; draw it again: python docs/draw_house.py"
LINES = re.compile(r"[\d,]+(?= lines)")


@functools.cache
def rooms_now() -> dict:
    """The rooms of the package as it is."""
    return house.read_rooms()


@functools.cache
def drawn_now() -> str:
    return house.draw(rooms_now())


@pytest.mark.slow
def test_the_picture_shows_the_rooms_their_purposes_and_what_they_use_as_they_are():
    kept, now = house.PICTURE.read_text(encoding="utf-8"), drawn_now()
    assert LINES.sub("some", kept) == LINES.sub("some", now), MENDED


@pytest.mark.slow
def test_the_numbers_of_lines_in_the_picture_are_off_by_a_fifth_at_most():
    """They may lag behind, so that not every change of the code has to draw the house again."""
    kept, now = (
        [int(n.replace(",", "")) for n in LINES.findall(text)]
        for text in (house.PICTURE.read_text(encoding="utf-8"), drawn_now())
    )
    assert len(kept) == len(now) > 15, MENDED
    assert [(a, b) for a, b in zip(kept, now, strict=True) if abs(a - b) > max(100, b / 5)] == [], MENDED


@pytest.mark.slow
def test_every_room_stands_above_those_that_it_uses_and_as_low_as_it_can():
    rooms = rooms_now()
    floor = {room.name: number for number, storey in enumerate(house.floors(rooms)) for room in storey}
    assert floor.keys() == rooms.keys() and {"cli", "gpu", "ops.py", "errors.py"} <= floor.keys()
    for room in rooms.values():
        highest = max((floor[used] for used in room.uses), default=0)
        assert floor[room.name] == highest + 1 or floor[room.name] == 0, room.name
    assert [name for name, number in floor.items() if number == 0 and rooms[name].is_folder] == []


@pytest.fixture
def toy(tmp_path):
    """A package of two folders and two modules in its root."""
    sources = {
        "__init__.py": "",
        "words.py": '"""Words."""\n',
        "call.py": '"""Call."""\nfrom toy.low import thing\n',
        "low/__init__.py": '"""Low.\n\nMore."""\n',
        "low/thing.py": "import torch\nfrom toy import words\n",
        "high/__init__.py": '"""The `high` one."""\n',
        "high/deep/__init__.py": '"""Deep <below>."""\ndef f():\n    import toy.low.thing\n',
        "high/deep/deeper/__init__.py": "import torch\n",
        "high/typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy.call import f\n",
    }
    for name, text in sources.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "toy"


def test_what_is_read_from_the_sources(toy):
    rooms = house.read_rooms(toy)
    assert {name: sorted(room.uses) for name, room in rooms.items()} == {
        "high": ["low"],
        "low": ["words.py"],
        "words.py": [],
        "call.py": ["low"],
    }
    assert (rooms["low"].purpose, rooms["high"].purpose, rooms["low"].lines) == ("Low.", "The high one.", 5)
    assert [name for name, room in rooms.items() if room.torch] == ["high", "low"]
    assert [[room.name for room in storey] for storey in house.floors(rooms)] == [
        ["words.py"], ["low"], ["call.py", "high"],
    ]  # fmt: skip


def test_a_room_within_another_is_named_in_it_and_no_deeper_one(toy):
    rooms = house.read_rooms(toy)
    [deep] = rooms["high"].within
    assert (deep.name, deep.purpose, deep.torch, deep.within[0].name) == ("deep", "Deep <below>.", True, "deeper")
    assert rooms["low"].within == ()
    drawn = house.draw(rooms)
    assert ">deep/<" in drawn and "Deep &lt;below&gt;." in drawn and "deeper" not in drawn


def test_a_circle_is_named(toy):
    (toy / "low" / "back.py").write_text("from toy.high import typed\n")
    with pytest.raises(ValueError, match=r"circle: (high → low → high|low → high → low)\."):
        house.floors(house.read_rooms(toy))


@pytest.mark.slow
def test_the_count_adds_up():
    done = subprocess.run([sys.executable, str(SCRIPT), "--count"], capture_output=True, text=True)
    rows = {name: int(lines.replace(",", "")) for name, _, lines in map(str.split, done.stdout.splitlines()[1:])}
    every = sum(len(path.read_text().splitlines()) for path in (ROOT / "flashcore").rglob("*.py"))
    assert rows.pop("all") == every == sum(rows.values())
    assert "gpu/" in rows and "(root)" in rows and "ops.py" not in rows
