"""Read what compute-sanitizer prints: one finding for each place in the source, with how often it was seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One error that the tool reports, at one place."""

    kind: str
    """What happened, as in `invalid read`, `uninitialized read`, `race`, `barrier error`, `api error`."""
    text: str
    """The tool's own first line."""
    kernel: str | None = None
    """The entry function, without arguments; None for an error outside of kernels."""
    functions: tuple[str, ...] = ()
    """Every function that the report names, the instruction's own first: it may be inlined into the kernel."""
    file: str | None = None
    """Its file, without folders."""
    line: int | None = None
    space: str | None = None
    """`global`, `shared` or `local` memory."""
    size: int | None = None
    """Bytes of the access."""
    address: str | None = None
    thread: tuple[int, int, int] | None = None
    block: tuple[int, int, int] | None = None
    other: str | None = None
    """The other side of a race, as `read at attention_wmma.cu:152`."""
    count: int = 1
    """How often it was seen."""

    def where(self) -> str:
        """Kernel, file and line in words."""
        place = f"{self.file}:{self.line}" if self.file else "an unknown line"
        return f"{self.kernel or 'the host'}, {place}"

    def to_dict(self) -> dict[str, Any]:
        """What is known of it, for a record."""
        known = {key: value for key, value in asdict(self).items() if value not in (None, ())}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}


@dataclass(frozen=True)
class Log:
    """All of one tool's output."""

    findings: tuple[Finding, ...]
    summary: str | None
    """The tool's last word, such as `ERROR SUMMARY: 0 errors`; None when it did not get that far."""
    errors: int | None
    """Errors or hazards that it counted, including those that it did not print."""


_LINE = re.compile(r"^=========( *)(.*?)\s*$")
_SUMMARY = re.compile(r"^(?:ERROR|RACECHECK|INITCHECK|SYNCCHECK|MEMCHECK) SUMMARY: (\d+)")
_TRIPLE = r"\((\d+),\s*(\d+),\s*(\d+)\)"
_THREAD = re.compile(rf"\bby thread {_TRIPLE} in block {_TRIPLE}")
_HAZARD_THREAD = re.compile(rf"(?:Read|Write) Thread {_TRIPLE}")
_BLOCK = re.compile(rf"\bin block {_TRIPLE}")
_ADDRESS = re.compile(r"(?:Address|Access (?:to|at)|shared address) (0x[0-9a-fA-F]+)")
_KINDS = (
    (re.compile(r"Invalid __(\w+)__ (\w+)(?: of size (\d+))?"), "invalid {1}"),
    (re.compile(r"(?:Misaligned|Unaligned) __(\w+)__ (\w+)(?: of size (\d+))?"), "misaligned {1}"),
    (re.compile(r"Uninitialized __(\w+)__ memory (\w+)(?: of size (\d+))?"), "uninitialized {1}"),
    (re.compile(r"Potential (\w+) hazard detected at __(\w+)__ (0x[0-9a-fA-F]+)"), "race"),
    (re.compile(r"Race reported between (\w+) access"), "race"),
    (re.compile(r"Barrier error detected"), "barrier error"),
    (re.compile(r"Program hit (\w+)"), "api error"),
    (re.compile(r"Host API .*(?:memory access|[Uu]ninitialized)"), "host access"),
    (re.compile(r"Leaked"), "leak"),
)
_NO_FINDING = re.compile(
    r"COMPUTE-SANITIZER|CUDA-MEMCHECK|Target application returned|Error: process didn't terminate|"
    r"(?:ERROR|RACECHECK|INITCHECK|SYNCCHECK|MEMCHECK|LEAK) SUMMARY|No attachable|Attaching|Connected|This tool"
)
_END = r"\s*(?:\[\d+ hazards?\]|\(.* : 0x[0-9a-f]+\))?$"
_NEW_PLACE = re.compile(r"^(?P<function>.*?)\s*(?:\+0x[0-9a-f]+)?(?: in (?P<file>[^:]+?):(?P<line>\d+))?" + _END)
_OLD_PLACE = re.compile(r"^(?:0x[0-9a-f]+ in )?(?P<file>[^:()]+):(?P<line>\d+):(?P<function>[^:].*?)" + _END)
_BARE_PLACE = re.compile(r"^0x[0-9a-f]+ in (?P<function>.*?)" + _END)


def parse(text: str) -> Log:
    """Read the whole output of one run of a tool (memcheck, racecheck, initcheck or synccheck).

    Lines of the checked program between the tool's own are passed over. Findings at one place are one, counted.
    """
    findings: dict[tuple, Finding] = {}
    for block in _blocks(text):
        if (found := _finding(block)) is not None:
            key = (found.kind, found.kernel, found.file, found.line, found.space, found.other,
                   found.text if found.kernel is None else None)  # fmt: skip
            seen = findings.get(key)
            findings[key] = found if seen is None else replace(seen, count=seen.count + found.count)
    summary, errors = None, None
    for line in text.splitlines():
        told = _LINE.match(line)
        if told and (counted := _SUMMARY.match(told[2])) and "not printed" not in line:
            summary, errors = told[2], int(counted[1])
    return Log(tuple(findings.values()), summary, errors)


def ours(log: Log, kernels: Iterable[str]) -> tuple[list[Finding], int]:
    """The findings in these kernels or of the program as a whole, and how many were seen elsewhere."""
    names, kept, others = set(kernels), [], 0
    for finding in log.findings:
        kernel = next((f for f in reversed(finding.functions) if f in names), None)
        if kernel or finding.kind == "api error":
            kept.append(replace(finding, kernel=kernel))
        else:
            others += finding.count
    return kept, others


def _blocks(text: str) -> Iterator[list[str]]:
    """Each report: its headline, which follows one space, and the lines indented below it."""
    block: list[str] = []
    for line in text.splitlines():
        told = _LINE.match(line)
        if told is None:
            continue
        indent, content = len(told[1]), told[2]
        if not content or (indent <= 1 and not content.startswith(("at ", "by ", "and ", "Address ", "Access "))):
            if block:
                yield block
            block = [content] if content and not _NO_FINDING.match(content) else []
        elif block:
            block.append(content)
    if block:
        yield block


def _finding(block: list[str]) -> Finding | None:
    headline = block[0]
    name, match = next(((name, m) for pattern, name in _KINDS if (m := pattern.search(headline))), (None, None))
    if name is None:
        # A headline nobody foresaw is kept in its own words: no report may be lost.
        return Finding("other", headline, **_place(block)) if any(line.startswith("at ") for line in block) else None
    if name == "race":
        return _race(block, match)
    space, size, kind = None, None, name
    if "{1}" in name:
        space, kind = match[1], name.format(None, match[2])
        size = int(match[3]) if match[3] else None
    body = "\n".join(block)
    address = _ADDRESS.search(body)
    return Finding(kind, headline, space=space, size=size, address=address[1] if address else None,
                   **_threads(body), **(_place(block) if kind != "api error" else {}))  # fmt: skip


def _race(block: list[str], match: re.Match) -> Finding:
    """Racecheck, in the analysis report (two accesses and a number of hazards) or the hazard report (two threads)."""
    body = "\n".join(block)
    more: dict[str, Any] = {"space": "shared"}
    if "hazard detected" in block[0]:
        sides = re.findall(r"^(Read|Write) Thread .*? at (.*)$", body, flags=re.MULTILINE)
        more = {"space": match[2], "address": match[3], "thread": _triple(_HAZARD_THREAD.search(body), 0),
                "block": _triple(_BLOCK.search(block[0]), 0)}  # fmt: skip
    else:
        # A place may stand on a line of its own, and both accesses on one.
        joined = re.sub(r"\n(?=in )", " ", body).replace(" and Read access", "\nand Read access")
        joined = joined.replace(" and Write access", "\nand Write access")
        sides = re.findall(r"(Read|Write) access at (.*)$", joined, flags=re.MULTILINE)
    places = [(access.lower(), _read_place(place)) for access, place in sides]
    functions = tuple(dict.fromkeys(p["function"] for _, p in places if p.get("function")))
    first = places[0][1] if places else {}
    others = dict.fromkeys(f"{access} at {_in_words(place)}" for access, place in places[1:])
    count = sum(map(int, re.findall(r"\[(\d+) hazards?\]", body))) or 1
    return Finding("race", block[0], kernel=functions[-1] if functions else None, functions=functions,
                   file=first.get("file"), line=first.get("line"), other=" and ".join(others) or None, count=count,
                   **more)  # fmt: skip


def _in_words(place: dict[str, Any]) -> str:
    return f"{place['file']}:{place['line']}" if place.get("file") else place.get("function") or "an unknown place"


def _place(block: list[str]) -> dict[str, Any]:
    """Kernel, functions, file and line: of the instruction, and of the outermost device frame for the kernel."""
    at = next((line[3:] for line in block[1:] if line.startswith("at ")), None)
    frames = [line.split(":", 1)[1].strip() for line in block[1:] if line.startswith("Device Frame:")]
    places = [_read_place(text) for text in ([at] if at else []) + frames]
    functions = tuple(dict.fromkeys(p["function"] for p in places if p.get("function")))
    known = next((p for p in places if p.get("file")), {})
    return {"kernel": functions[-1] if functions else None, "functions": functions, "file": known.get("file"),
            "line": known.get("line")}  # fmt: skip


def _read_place(text: str) -> dict[str, Any]:
    """`kernel(args)+0x70 in folder/file.cu:41`, or the older `0x70 in folder/file.cu:41:kernel(args)`."""
    match = _OLD_PLACE.match(text) or _BARE_PLACE.match(text) or _NEW_PLACE.match(text)
    if not match:
        return {}
    parts = match.groupdict()
    file = parts.get("file")
    return {"function": _bare(parts["function"]), "file": file.rpartition("/")[2] if file else None,
            "line": int(parts["line"]) if file else None}  # fmt: skip


def _bare(function: str) -> str | None:
    """A function's own name: without return type, template arguments, parameters and namespaces."""
    while (shorter := re.sub(r"<[^<>]*>", "", function)) != function:
        function = shorter
    name = re.sub(r"\(.*$", "", function).strip().rpartition(" ")[2].rpartition("::")[2]
    return name or None


def _threads(body: str) -> dict[str, Any]:
    match = _THREAD.search(body)
    return {"thread": _triple(match, 0), "block": _triple(match, 3)}


def _triple(match: re.Match | None, skip: int) -> tuple[int, int, int] | None:
    if match is None:
        return None
    x, y, z = (int(n) for n in match.groups()[skip : skip + 3])
    return (x, y, z)
