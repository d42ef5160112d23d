"""Adopt any function as a backend, so that a report checks, times and judges it beside the others."""

from __future__ import annotations

import re
from pathlib import Path

from flashcore.backends import Backend, register
from flashcore.bisection.diagnosis.calling import Candidate, Layout, Lse, candidate_of
from flashcore.errors import FlashCoreError, InvalidProblem, Unsupported
from flashcore.problem import Problem

_PLUGIN = '''"""A function of yours as a backend of one report."""

from flashcore.bisection.diagnosis import adopt

adopt({place!r}, backend_id={backend_id!r}, layout={layout!r}, lse={lse!r})
'''


def id_of(place: str) -> str:
    """The id under which a function is adopted: its name, in small letters and dashes."""
    name = re.sub(r"[^a-z0-9]+", "-", place.rpartition(":")[2].lower()).strip("-")
    return name or "function"


def adopt(place: str, *, backend_id: str | None = None, layout: Layout = "bhsd", lse: Lse | None = None) -> Backend:
    """Put a function into the registry of backends of this process, and return its backend.

    Parameters
    ----------
    place
        ``FILE.py:function`` or ``MODULE:function``.
    backend_id
        Its id there; None for its name.
    layout, lse
        As in `flashcore.bisection.diagnosis.diagnose`.

    Raises
    ------
    InvalidProblem, UnknownName
        No such function, or one that cannot be called as attention.
    FlashCoreError
        Another backend has this id.
    """
    if ":" not in place:
        raise InvalidProblem(f"'{place}' is not FILE.py:function or MODULE:function.")
    candidate = candidate_of(place, layout=layout, lse=lse)
    name = backend_id or id_of(place)

    class Adopted(_Adopted):
        id = name
        title = f"{candidate.name}, a function from {Path(place.rpartition(':')[0]).name}"
        function = candidate

    Adopted.__qualname__ = f"Adopted[{name}]"
    register(Adopted)
    from flashcore.backends import get

    return get(name)


class _Adopted(Backend):
    """A function under the terms of a backend; one that raises says by that what it does not take."""

    role = "ours"
    device = "any"
    dtypes = ("float16", "bfloat16", "float32")
    foreign = True
    function: Candidate

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        for option, asked in (("causal", problem.causal), ("softmax_scale", problem.softmax_scale is not None)):
            if reason is None and asked and option not in self.function.takes:
                reason = f"its signature takes no {option}"
        return reason

    def run(self, q, k, v, problem: Problem):
        # Views, and no copies: a report also times this call.
        given = (q, k, v) if self.function.layout == "bhsd" else tuple(t.transpose(1, 2) for t in (q, k, v))
        try:
            result = self.function.call(*given, problem, False)
        except FlashCoreError:
            raise
        except Exception as error:  # a function that was not written for this problem says so in its own way
            reason = f"it raised {type(error).__name__}: {error}".rstrip(".")
            raise Unsupported(self.id, reason) from error
        answer = self.function.answer(result, q)
        lse = answer.lse if answer.lse is None else answer.lse.float()
        return answer.out if answer.out.is_contiguous() else answer.out.contiguous(), lse


def write_plugin(folder: Path, place: str, *, layout: Layout = "bhsd", lse: Lse | None = None) -> str:
    """Write a plug-in that adopts the function in every process of a report; returns the backend's id.

    The function is looked up first, so that one that does not exist is said before anything is measured.
    """
    if ":" not in place:
        raise InvalidProblem(f"'{place}' is not FILE.py:function or MODULE:function.")
    candidate_of(place, layout=layout, lse=lse)
    backend_id = id_of(place)
    text = _PLUGIN.format(place=place, backend_id=backend_id, layout=layout, lse=lse)
    (folder / f"adopted_{backend_id.replace('-', '_')}.py").write_text(text)
    return backend_id
