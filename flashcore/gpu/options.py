"""Leave the options of a kernel out of its source: what the compiler sees where their macros are not defined.

An option is code that is compiled in where a problem asks for it. So a kernel keeps the hash, and the machine code, of
what was measured before the option came.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

MASKS = "FLASHCORE_MASKS"
"""The macro without which a kernel is compiled as if its masks beyond the causal one were not in its source."""
INVARIANT = "FLASHCORE_INVARIANT"
"""The macro that compiles the batch-invariant mode in; no product is contracted with a sum then."""
OPTIONS = {MASKS: ("MASKED",), INVARIANT: ("INVARIANT", "CHUNKED")}
"""Macros that compile an option in, each with the function-like macros around what belongs to the option."""
WITH_OPTIONS = " with options"
"""What follows a kernel's name where it is compiled with any of them."""


def without_options(text: str, *, but: Collection[str] = ()) -> str:
    """A kernel's source as the compiler sees it where none of `OPTIONS` is defined, but for those named.

    What stands under a condition that wants such a macro, and in ``MASKED(...)`` or ``INVARIANT(...)``, is gone. A
    condition that asks for something else as well stays, with its answer for this. A kernel whose options were edited
    is the same kernel without them, down to its machine code, and what was measured of it still holds.
    """
    left_out = {macro: names for macro, names in OPTIONS.items() if macro not in but}
    around = [name for names in left_out.values() for name in names]
    kept: list[str] = []
    nested: list[_Conditional] = []
    """Those that are open, the outermost first."""
    for line in text.split("\n"):
        directive = _DIRECTIVE.match(line)
        word, rest = directive.groups() if directive else ("", "")
        if word in ("if", "ifdef", "ifndef"):
            nested.append(_Conditional())
        if word in ("", "define") or not nested:
            lines = [] if word == "define" and rest.startswith(tuple(f"{name}(" for name in around)) else [line]
            if all(one.keeps for one in nested):
                kept += lines
            continue
        inner = nested.pop()
        lines = inner.turn(line, word, rest, left_out)
        if all(one.keeps for one in nested):
            kept += lines
        if word != "endif":
            nested.append(inner)
    bare = "\n".join(kept)
    for name in around:
        bare = _without_calls(bare, name)
    return bare


@dataclass
class _Conditional:
    """A conditional of the preprocessor, from its ``#if`` to its ``#endif``, some of whose answers are known."""

    keeps: bool = False
    """Whether the lines of its branch stay."""
    told: bool = False
    """Whether it has a branch whose condition stays."""
    settled: bool = False
    """Whether a branch was taken for certain, so that none after it is."""

    def turn(self, line: str, word: str, rest: str, undefined: Collection[str]) -> list[str]:
        """Begin its next branch, or end it; the line that is left of the directive."""
        if word == "endif":
            return [line] if self.told else []
        answer = True if word == "else" else _answer(word, rest.partition("//")[0].strip(), undefined)
        self.keeps = not self.settled and answer is not False
        if not self.keeps:
            return []
        if answer:
            self.settled = True
            return [line if word == "else" else f"{line.partition('#')[0]}#else"] if self.told else []
        if word == "elif" and not self.told:  # nothing is left of the branches before it
            line = line.replace("elif", "if", 1)
        self.told = True
        return [_DEFINED.sub(lambda found: "0" if found[1] in undefined else found[0], line)]


def _answer(word: str, condition: str, undefined: Collection[str]) -> bool | None:
    """Whether a condition holds where these macros are not defined; None where it hangs on something else."""
    if word in ("ifdef", "ifndef"):
        return (word == "ifndef") if condition in undefined else None
    for operator, deciding in (("||", True), ("&&", False)):
        if len(parts := _split(condition, operator)) > 1:
            answers = [_answer("if", part, undefined) for part in parts]
            if deciding in answers:
                return deciding
            return None if None in answers else not deciding
    if condition.startswith("!"):
        answer = _answer("if", condition[1:].strip(), undefined)
        return None if answer is None else not answer
    if condition.startswith("(") and condition.endswith(")"):
        return _answer("if", condition[1:-1].strip(), undefined)
    asked = _DEFINED.fullmatch(condition)
    return False if condition == "0" or (asked and asked[1] in undefined) else None


def _split(condition: str, operator: str) -> list[str]:
    """The parts of a condition between the operators that stand in no parentheses."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(condition):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0 and condition.startswith(operator, at) and at >= start:
            parts.append(condition[start:at].strip())
            start = at + len(operator)
    return [*parts, condition[start:].strip()]


_DEFINED = re.compile(r"\bdefined\((\w+)\)")
_DIRECTIVE = re.compile(r"^\s*#\s*(if|ifdef|ifndef|elif|else|endif|define)\b\s*(.*)$")


def _without_calls(text: str, name: str) -> str:
    """A source without the calls of a function-like macro, their arguments with them."""
    parts, start = [], 0
    for call in re.finditer(rf"\b{name}\(", text):
        if call.start() < start:
            continue  # inside of another call
        depth, end = 1, call.end()
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        before = text[start : call.start()]
        bare = before.rstrip(" ")
        if bare.endswith("\n") and text[end : end + 1] == "\n":  # a line of its own goes with its end
            before, end = bare, end + 1
        elif before != bare:
            before = bare
        elif text[end : end + 1] == " ":
            end += 1
        parts.append(before)
        start = end
    return "".join([*parts, text[start:]])
