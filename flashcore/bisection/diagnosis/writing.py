"""Write the smallest failing case as a pytest file that stays with the code it was found in."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from flashcore.bisection.diagnosis.diagnosing import Diagnosis
from flashcore.errors import InvalidProblem, RecordsError
from flashcore.records import write_whole

_TEST = '''"""Written by flashcore diagnose: {finding}"""

import flashcore


def test_{name}_is_right_at_{case}():
    found = flashcore.diagnose({place!r}, {problem!r}{more})
    assert found.right, str(found)
'''


def write_test(diagnosis: Diagnosis, path: str, place: str) -> str:
    """Write a pytest file that fails while the smallest case is wrong; returns its path.

    Parameters
    ----------
    path
        Of the file; one that exists is replaced.
    place
        The function, as ``FILE.py:function``, ``MODULE:function`` or the id of a backend.

    Raises
    ------
    InvalidProblem
        Nothing fails, so there is nothing to write.
    RecordsError
        The file cannot be written.
    """
    if diagnosis.smallest is None:
        raise InvalidProblem("There is no failing case to write a test of: the function is right, or takes no problem.")
    inputs = diagnosis.smallest.inputs
    more = "" if inputs.pattern == "normal" else f", pattern={inputs.pattern!r}"
    if inputs.seed:
        more += f", seed={inputs.seed}"
    for name, usual in (("layout", "bhsd"), ("lse", "none")):
        if diagnosis.context.get(name) not in (None, usual) and not diagnosis.context.get("backend"):
            more += f", {name}={diagnosis.context[name]!r}"
    name = "".join(c if c.isalnum() else "_" for c in place.rpartition(":")[2]).lower()
    case = "".join(c if c.isalnum() else "_" for c in inputs.problem.label()).lower()
    finding = diagnosis.headline().replace('"""', "'''").replace("\\", "/")
    target = Path(path)
    text = _TEST.format(finding=finding, name=name, case=case, place=place, more=more, problem=inputs.problem.label())
    try:
        if not target.name:  # the current folder, or the root: there is no name to write beside
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        write_whole(target, text.encode())
    except OSError as error:
        raise RecordsError(
            f"The test cannot be written to {target} ({error.strerror}); name a file that can."
        ) from error
    return str(target)
