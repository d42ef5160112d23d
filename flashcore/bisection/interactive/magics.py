"""The magics of ``%load_ext flashcore``: ``%diagnose`` any function, ``%bisect`` a backend."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from flashcore import backends
from flashcore.bisection.interactive.debugging import Debugging, debug_answers, debug_stages
from flashcore.errors import FlashCoreError, did_you_mean

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

_FORMS = {"diagnose": 'FUNCTION ["PROBLEM"]', "bisect": 'BACKEND ["PROBLEM"]'}


def load_magics(shell: InteractiveShell) -> None:
    """Put ``%diagnose`` and ``%bisect`` into a shell of IPython.

    Parameters
    ----------
    shell
        As IPython passes it to an extension. Its names are those that a line may use.
    """

    def diagnose(line: str) -> Debugging:
        """%diagnose FUNCTION ["PROBLEM"]: where any attention function goes wrong, from its inputs and outputs alone.

        FUNCTION is a name of the notebook, FILE.py:function, MODULE:function, or the id of a backend.
        """
        return _asked("diagnose", line, shell.user_ns)

    def bisect(line: str) -> Debugging:
        """%bisect BACKEND ["PROBLEM"]: the first stage, page and element at which a backend goes wrong.

        BACKEND is an id, such as cpu, or a name of the notebook that holds a backend.
        """
        return _asked("bisect", line, shell.user_ns)

    shell.register_magic_function(diagnose, "line", "diagnose")
    shell.register_magic_function(bisect, "line", "bisect")


def _asked(magic: str, line: str, names: dict[str, Any]) -> Debugging:
    from IPython.core.error import UsageError

    form = f"write %{magic} {_FORMS[magic]}"
    try:
        words = shlex.split(line)
    except ValueError:
        raise UsageError(f"A quotation mark of '{line}' is not closed; {form}.") from None
    if not 1 <= len(words) <= 2:
        what = "nothing" if not words else f"{len(words)} words"
        raise UsageError(f"%{magic} takes one or two words and got {what}; {form}.")
    try:
        ask = debug_answers if magic == "diagnose" else debug_stages
        return ask(_meant(words[0], names, magic), *words[1:])
    except FlashCoreError as error:
        raise UsageError(str(error)) from None


def _meant(word: str, names: dict[str, Any], magic: str) -> Any:
    """What a word stands for: a name of the notebook, dots and all, else a place or an id of a backend."""
    from IPython.core.error import UsageError

    if magic == "diagnose" and ":" in word:
        return word
    head, *rest = word.split(".")
    if head in names:
        found = names[head]
        for part in rest:
            if not hasattr(found, part):
                raise UsageError(f"'{word}' has no part '{part}' in this notebook; run the cell that makes it.")
            found = getattr(found, part)
        wanted = "a backend or the id of one" if magic == "bisect" else "a function, a backend or the id of one"
        known = isinstance(found, (str, backends.Backend)) or (magic == "diagnose" and callable(found))
        if not known:
            raise UsageError(f"'{word}' is {type(found).__name__} in this notebook, and %{magic} takes {wanted}.")
        return found
    ids = [one.id for one in backends.select("all")]
    if word in ids:
        return word
    mine = [n for n, value in names.items() if not n.startswith("_") and callable(value)] if magic == "diagnose" else []
    kind = "function of this notebook and no backend" if magic == "diagnose" else "backend"
    meant = did_you_mean(word, [*ids, *mine])
    raise UsageError(f"There is no {kind} '{word}'; run the cell that defines it, or name a backend. {meant}".rstrip())
