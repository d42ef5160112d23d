"""The structs that kernels take, as their sources declare them: to hold beside what the host packs."""

from __future__ import annotations

import re
import struct

from flashcore.gpu import build

LETTERS = {"int": "i", "float": "f", "Index": "q", "Strides": "qqq"}
"""How `struct` names a field of each type; a pointer is Q."""


def declared(kernel: str, name: str) -> str:
    """The fields of a struct of a kernel's source, one letter each."""
    body = re.search(rf"struct {name} \{{(.*?)^\}};", build.kernel_source(kernel), flags=re.DOTALL | re.MULTILINE)[1]
    letters = ""
    for line in re.sub(r"//[^\n]*|#line[^\n]*", "", body).split(";"):
        declaration = re.sub(r"=.*", "", line).strip()
        if not declaration:
            continue
        if "*" in declaration:
            letters += "Q"
            continue
        kind, names = declaration.split(None, 1)
        for declared_name in names.split(","):
            size = re.search(r"\[(\d+)\]", declared_name)
            letters += LETTERS[kind] * (int(size[1]) if size else 1)
    return letters


def packed(layout: struct.Struct) -> str:
    """What a `struct.Struct` packs, one letter each, without its padding."""
    counted = re.findall(r"(\d*)([a-zA-Z])", layout.format)
    return "".join(letter * int(count or 1) for count, letter in counted if letter != "x")


def size_in_c(letters: str) -> int:
    """Bytes of a struct of these fields, filled up to a multiple of its widest field as C does."""
    widest = max(letters, key=struct.calcsize)
    return struct.calcsize(f"@{letters}0{widest}")
