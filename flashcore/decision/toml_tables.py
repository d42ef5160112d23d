"""Read a TOML file of [[tables]] into models; when it is wrong, say file, line, reason and what to write instead."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from flashcore.errors import FlashCoreError

Place = tuple[tuple[str, int], ...]
"""Where a table stands: (("option", 2), ("condition", 0)) is the first [[option.condition]] of the third [[option]]."""
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class TomlFile:
    """A TOML file as read, which knows on which line each of its keys stands."""

    path: str
    text: str
    values: Mapping[str, Any]
    error: Callable[[str, int | None, str], FlashCoreError]
    """Makes the error for a path, a line and a reason."""

    def wrong(self, reason: str, place: Place = (), key: str | None = None, value: str | None = None) -> FlashCoreError:
        """The error for what is wrong at a key of a table, or at the table's header."""
        return self.error(self.path, line_of(self.text, place, key, value), reason)

    def only(self, tables: Sequence[str], keys: Sequence[str] = ()) -> None:
        """Refuse everything in the file besides these tables, and these keys that stand above them."""
        for name in sorted(set(self.values) - {*tables, *keys}):
            read = " and ".join(f"[[{table}]]" for table in tables)
            raise self.wrong(f"there is no '{name}' here; only {read} tables are read.", (), name)

    def tables(self, model: type[Model], name: str) -> list[Model]:
        """Every [[name]] table as a model, ids used once; else the error that names the first bad one's line."""
        tables = self.values.get(name, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise self.wrong(f"write each {name} as a [[{name}]] table.", (), name)
        found: list[Model] = []
        for index, table in enumerate(tables):
            try:
                item = model.model_validate(table)
            except ValidationError as error:
                raise self._refused(error.errors()[0], model, name, index) from None
            if any(item.id == other.id for other in found):
                raise self.wrong(f"there are two {name}s with the id '{item.id}'; rename one.", ((name, index),), "id")
            found.append(item)
        return found

    def _refused(self, first: Mapping[str, Any], model: type[BaseModel], name: str, index: int) -> FlashCoreError:
        """What pydantic found first, at the innermost table it concerns."""
        table, place, loc = self.values[name][index], ((name, index),), list(first["loc"])
        called = f"{name} '{table.get('id', f'number {index + 1}')}'"
        while len(loc) > 1 and isinstance(loc[1], int) and isinstance(table[loc[0]][loc[1]], dict):
            inner, number = loc[0], loc[1]
            table, place, loc = table[inner][number], (*place, (inner, number)), loc[2:]
            model = _model_of(model, inner)
            called += f", {inner} '{table.get('id', f'number {number + 1}')}'"
        key = str(loc[0]) if loc else None
        return self.wrong(f"{called}: {_in_words(first, loc, key, model)}.", place, key)


def read_toml(path: Path, what: str, error: Callable[[str, int | None, str], FlashCoreError], **options) -> TomlFile:
    """Read a file; `what` it is ("gates", "claims") stands in the error when that fails."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as cause:
        raise error(str(path), None, f"the {what} file cannot be read ({cause.strerror}).") from cause
    except UnicodeDecodeError as cause:
        raise error(str(path), None, f"the {what} file is not UTF-8 text.") from cause
    return parse_toml(text, str(path), error, **options)


def parse_toml(text: str, path: str, error: Callable[[str, int | None, str], FlashCoreError], **options) -> TomlFile:
    """Parse the text of a file; `options` go to `tomllib.loads`."""
    try:
        return TomlFile(path, text, tomllib.loads(text, **options), error)
    except tomllib.TOMLDecodeError as cause:
        at = re.search(r"at line (\d+)", str(cause))
        line = int(at[1]) if at else text.removesuffix("\n").count("\n") + 1
        raise error(path, line, f"this is not TOML: {cause}.") from cause
    except RecursionError as cause:
        raise error(path, None, "its lists or tables are nested too deeply to be read; write them flat.") from cause
    except ValueError as cause:  # Python reads no number of more than some thousand digits
        at = next((n for n, line in enumerate(text.split("\n"), start=1) if re.search(r"\d{4000}", line)), None)
        raise error(
            path, at, "a number here has too many digits to be read; write one that means something."
        ) from cause


def line_of(text: str, place: Place = (), key: str | None = None, value: str | None = None) -> int | None:
    """Line of `key` in the table at this place; of the table's [[header]] when the key is not written there.

    Parameters
    ----------
    place
        The table; empty for the file itself.
    value
        One text of a list under the key: its own line when the list goes over several.
    """
    latest: dict[tuple[str, ...], int] = {}
    here, found, at_key = (), None, None
    for number, line in _lines(text):
        if match := re.match(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]", line):
            if at_key:
                return at_key
            names = tuple(part.strip().strip("\"'") for part in match[2].split("."))
            if match[1] == "[[":
                for deeper in [other for other in latest if len(other) > len(names) and other[: len(names)] == names]:
                    del latest[deeper]
                latest[names] = latest.get(names, -1) + 1
            here = tuple((name, latest.get(names[: depth + 1], 0)) for depth, name in enumerate(names))
            if here == place:
                found = number
            elif key and here[: len(place)] == place and names[len(place)] == key:
                return number
        elif key and here == place and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[.=]", line):
            at_key = number
        if at_key and (value is None or f'"{value}"' in line or f"'{value}'" in line):
            return number
    at_key = at_key or found
    return line_of(text, (), place[0][0]) if at_key is None and place else at_key  # a list of tables on one line


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The numbered lines that do not begin inside a string of several lines."""
    inside = None
    for number, line in enumerate(text.split("\n"), start=1):
        if inside is None:
            yield number, line
        for mark in () if line.lstrip().startswith("#") else re.findall(r"\"{3}|'{3}", line):
            inside = None if inside == mark else inside or mark


def _model_of(model: type[BaseModel], field: str) -> type[BaseModel]:
    """The model of the tables in a list-like field."""
    return next(part for part in get_args(model.model_fields[field].annotation) if isinstance(part, type))


def _in_words(error: Mapping[str, Any], loc: Sequence[Any], key: str | None, model: type[BaseModel]) -> str:
    got = error["input"]
    if error["type"] == "extra_forbidden" and len(loc) == 1:
        return f"there is no key '{key}'; the keys are {', '.join(model.model_fields)}"
    if error["type"] == "missing" and len(loc) == 1:
        return f"the key '{key}' is missing"
    if error["type"] == "literal_error" and len(loc) == 1 and isinstance(got, str):
        return f"there is no {key} '{got}'; use one of {', '.join(_choices(model.model_fields[key].annotation))}"
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    said = str(got) if isinstance(got, Decimal) else repr(got)
    return f"{key}: {message} (got {said[:80]})" if key else message


def _choices(annotation: Any) -> list[str]:
    """The words of a Literal, also inside an optional one."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for part in get_args(annotation) for word in _choices(part)]
