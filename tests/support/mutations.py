"""Files of a run as accidents and strangers leave them: one random mutation at a time, the same for a seed.

Each function takes what a file holds and gives it changed, with a few words on how, for the message of a failing test.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MARKUP = '<b id="mutated">x</b>'
"""Markup that no page may show but as text."""
STRANGE = (
    "\u2028", "\u2029\u0085", "\ufeff", "\x00", "\x1b[31m", "a\nb", "é\u0301\u202e", "\U0001f9ea", "x" * 70_000, "",
    "[bold]", "{{ 7 * 7 }}", MARKUP, "</script>" + MARKUP, "../../etc/passwd", "nan", "None", "9" * 5000,
    "<script>acts()</script>", '<img src="x" onerror="acts()">',
)  # fmt: skip
RAW = ('"\\ud800"', "1" + "0" * 400, "9" * 6000, "-1e999", "NaN", "-Infinity", "[" * 3000 + "]" * 3000,
       '{"a":' * 3000 + "1" + "}" * 3000, '"\\u0000"', "1.0", "true", "0x10", "01")  # fmt: skip
"""JSON, or nearly, that no Python value is written as."""
VALUES = (None, [], {}, "text", True, False, 0, -1, 2**31, 2**63, 2**64, 1e308, 5e-324, [[]], {"a": None}, [1, "b"])
WORDS = ("ok", "failed", "error", "unsupported", "unavailable", "ours", "peer", "GO", "verdict", "notebook", "any")
MARK = b"\xef\xbb\xbf"

Change = tuple[str, bytes]
"""How, in a few words, and what the file holds then."""


# ------------------------------------------------------------------------------------------------ values of JSON


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place inside a value, as its container and key."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _number(rng: random.Random, old: float) -> tuple[str, Any]:
    return rng.choice([
        ("times 3", old * 3), ("a third", old / 3), ("its sign", -old), ("NaN", float("nan")), ("Inf", float("inf")),
        ("zero", 0), ("a text", str(old)), ("next", old + 1), ("a fraction", old + 0.5),
    ])  # fmt: skip


def value_changed(rng: random.Random, whole: Any) -> tuple[str, Any, str | None]:
    """A JSON value with one place in it changed in place; the third is JSON to write where the text ``@raw`` stands."""
    places = list(_places(whole))
    if not places:
        return "replaced", rng.choice(VALUES), None
    inside, key = rng.choice(places)
    old, where = inside[key], f"{str(key)[:30]}"
    way = rng.choice(["number", "type", "strange", "word", "raw", "gone", "renamed", "copied"])
    if way == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        what, inside[key] = _number(rng, old)
        return f"{where}: {what}", whole, None
    if way in ("type", "number"):
        inside[key] = rng.choice(VALUES)
        return f"{where}: {str(inside[key])[:20]!r}", whole, None
    if way == "strange":
        inside[key] = rng.choice(STRANGE)
        return f"{where}: a strange text", whole, None
    if way == "word":
        inside[key] = rng.choice(WORDS)
        return f"{where}: {inside[key]!r}", whole, None
    if way == "raw":
        inside[key], raw = "@raw", rng.choice(RAW)
        return f"{where}: {raw[:12]}", whole, raw
    if way == "gone":
        del inside[key]
        return f"{where}: gone", whole, None
    other = rng.choice(list(inside)) if isinstance(inside, dict) else None
    if way == "copied" and other is not None:
        inside[other] = old
        return f"{where}: in {other[:30]} too", whole, None
    if isinstance(inside, dict):
        inside[rng.choice([f"{key}s", str(key).upper(), "", "__class__", MARKUP])] = inside.pop(key)
        return f"{where}: renamed", whole, None
    inside.append(old)
    return f"{where}: twice", whole, None


def written(value: Any, raw: str | None, **options) -> bytes:
    """A value that `value_changed` gave, as JSON."""
    text = json.dumps(value, **options)
    return (text if raw is None else text.replace('"@raw"', raw)).encode()


# ---------------------------------------------------------------------------------------------------- any content


def damaged(rng: random.Random, content: bytes) -> Change:
    """Bytes flipped, cut, put in or written over, as disks and editors do."""
    way = rng.choice(["flips", "cut", "inserted", "zeros", "twice", "mark", "ends", "encoding"])
    if not content:
        return "a mark alone", MARK
    at = rng.randrange(len(content))
    if way == "flips":
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 3, 50])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return "flipped bits", bytes(changed)
    if way == "cut":
        return f"cut at {at}", content[:at]
    if way == "inserted":
        some = rng.choice([b"\xed\xa0\x80", b"\xff", b"\n", b"{", '"\u2028'.encode(), b"\x00" * 9, b"]]]", MARK])
        return f"{some!r} put in at {at}", content[:at] + some + content[at:]
    if way == "zeros":
        return f"zeros from {at}", content[:at] + bytes(len(content) - at)
    if way == "twice":
        return "all of it twice", content + content
    if way == "mark":
        return "a mark before it", MARK + content
    if way == "ends":
        return "CRLF", content.replace(b"\n", b"\r\n")
    return "UTF-16", content.decode(errors="replace").encode("utf-16")


WHOLE = (b"", b"\n", b"[]", b"null", b"{}", b"text", b"\x1f\x8b\x08\x00binary\x00\xff", b"[" * 100_000, b"0" * 10_000,
         b'{"cells": []}', b'"a"', b"[[gate]]\n")  # fmt: skip


def whole_file(rng: random.Random, path: Path) -> str:
    """The file emptied, replaced, gone, or a folder of its name."""
    way = rng.choice(["content", "content", "gone", "folder", "link"])
    path.unlink()
    if way == "folder":
        path.mkdir()
        return "a folder"
    if way == "link":
        path.symlink_to(path.parent / "nowhere")
        return "a link to nothing"
    if way == "gone":
        return "gone"
    content = rng.choice(WHOLE)
    path.write_bytes(content)
    return f"{content[:12]!r} alone"


# ------------------------------------------------------------------------------------------------------- the files


def lines_changed(rng: random.Random, content: bytes) -> Change:
    """Records: a line gone, twice, elsewhere or changed."""
    lines = content.removesuffix(b"\n").split(b"\n")
    way = rng.choice(["gone", "twice", "order", "value", "value", "value", "value", "cut", "joined"])
    at = rng.randrange(len(lines))
    if way == "gone":
        many = rng.choice([1, 1, 2, 20])
        del lines[at : at + many]
        how = f"{many} lines from {at} gone"
    elif way == "twice":
        lines.insert(rng.randrange(len(lines)), lines[at])
        how = f"line {at} twice"
    elif way == "order":
        rng.shuffle(lines)
        how = "lines shuffled"
    elif way == "cut":
        lines[at] = lines[at][: rng.randrange(len(lines[at]))]
        how = f"line {at} cut"
    elif way == "joined":
        lines[at : at + 2] = [b"".join(lines[at : at + 2])]
        how = f"line {at} joined with the next"
    else:
        what, value, raw = value_changed(rng, json.loads(lines[at]))
        lines[at] = written(value, raw)
        how = f"line {at}: {what}"
    return how, b"".join(line + b"\n" for line in lines)


def object_changed(rng: random.Random, content: bytes) -> Change:
    """A file of one JSON value, such as an environment, a seal or a notebook."""
    what, value, raw = value_changed(rng, json.loads(content))
    return what, written(value, raw, indent=1)


TOML_VALUES = (
    "true", "false", '""', '"text"', "0", "-1", "nan", "inf", "-inf", "1e400", "9" * 5000, "[]", "{}", "1979-05-27",
    "[" * 2000 + "]" * 2000, '"ours"', '"peers"', '"any"', '"data."', '"data.x.y"', '"tflops"', '"latency_us"',
    '"ratio_to_best_peer"', '"correct_percent"', '"B=0,H=1,S=8,D=64"', f"'{MARKUP}'", '"\\u2028"', '"%"', "1_0.5",
    '["ours-correct"]', '{ what = "memory" }', '{ what = nan }', "07:32:00",
)  # fmt: skip


def toml_changed(rng: random.Random, content: bytes) -> Change:
    """Gates or claims: a value, a key, an operator or a table another one, gone or twice."""
    lines = content.decode().split("\n")
    keys = [n for n, line in enumerate(lines) if re.match(r"\w+ = ", line)]
    at = rng.choice(keys)
    key, _, value = lines[at].partition(" = ")
    way = rng.choice(["value", "value", "value", "markup", "gone", "twice", "key", "operator", "table", "number"])
    if way == "value":
        value = rng.choice(TOML_VALUES)
        lines[at], how = f"{key} = {value}", f"{key}: {value[:12]}"
    elif way == "markup":
        lines[at], how = f"{key} = '''{rng.choice([MARKUP, chr(0x2028), '[red]x[/red]', '{{x}}'])}'''", f"{key}: markup"
    elif way == "gone":
        del lines[at]
        how = f"{key} gone"
    elif way == "twice":
        lines.insert(at, lines[at])
        how = f"{key} twice"
    elif way == "key":
        other = lines[rng.choice(keys)].partition(" = ")[0]
        lines[at], how = f"{other} = {value}", f"{key} named {other}"
    elif way == "operator":
        named = [n for n in keys if lines[n].startswith(("at_least", "at_most"))] or keys
        at = rng.choice(named)
        key, _, value = lines[at].partition(" = ")
        other = {"at_least": "at_most", "at_most": "at_least"}.get(key, "at_least")
        lines[at] = rng.choice([f"{other} = {value}", f"{key} = {value}\n{other} = {value}", f"{key} = -{value}"])
        how = f"{key}: another operator"
    elif way == "table":
        heads = [n for n, line in enumerate(lines) if line.startswith("[")]
        at = rng.choice(heads)
        lines[at] = rng.choice(["", f"# {lines[at]}", lines[at][1:-1], f"{lines[at]}\n{lines[at]}", "[[other]]"])
        how = f"table {at}"
    else:
        numbers = [n for n in keys if re.search(r" = -?[\d.]+$", lines[n])]
        at = rng.choice(numbers)
        key, _, value = lines[at].partition(" = ")
        lines[at], how = f"{key} = {_number(rng, float(value))[1]}", f"{key}: another number"
    return how, "\n".join(lines).encode()


def mutated(rng: random.Random, path: Path, change: Callable[[random.Random, bytes], Change], most: int = 1) -> str:
    """Mutate a file in place, one to `most` times, until it is not as it was; says how."""
    before, told = path.read_bytes(), ""
    while not told or (path.is_file() and path.read_bytes() == before):
        told = _mutated(rng, path, change, most)
    return f"{path.name}: {told}"


def _mutated(rng: random.Random, path: Path, change: Callable[[random.Random, bytes], Change], most: int) -> str:
    if rng.random() < 0.06:
        return whole_file(rng, path)
    told = []
    for _ in range(rng.randint(1, most)):
        try:
            how, content = (damaged if rng.random() < 0.2 else change)(rng, path.read_bytes())
        except (ValueError, IndexError, RecursionError):  # what is left is none of these files any more
            how, content = damaged(rng, path.read_bytes())
        path.write_bytes(content)
        told.append(how)
    return "; ".join(told)
