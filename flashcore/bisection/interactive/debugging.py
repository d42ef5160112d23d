"""`debug`: the finding about a function or a backend first, then maps of its errors and the numbers around one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from flashcore import backends
from flashcore.bisection import Bisection, traced
from flashcore.bisection.diagnosis import Diagnosis, candidate_of, diagnose, load, see
from flashcore.bisection.interactive.cells import CellProgress
from flashcore.bisection.interactive.looking import AnswerLook, Look, Place, StageLook
from flashcore.bisection.interactive.moving import widget_of
from flashcore.errors import InvalidProblem
from flashcore.page.drawing import closeups
from flashcore.problem import Problem, parse_problem, square
from flashcore.tables import WORDS

SMALL = square(1, 2, 256, 64, page_size=64)
"""What a backend is bisected on when no problem is named: several pages, and an answer within seconds."""


@dataclass(frozen=True)
class Debugging:
    """A finding that shows itself in a notebook, and prints itself anywhere else."""

    sentences: tuple[str, ...]
    """What was found, the finding first."""
    right: bool
    look: Look | None = field(repr=False)
    """What can be looked at closely; None where there is nothing."""
    diagnosis: Diagnosis | None = field(default=None, repr=False)
    bisection: Bisection | None = field(default=None, repr=False)
    """The answer itself: of a function the one, of a backend that exposes its stages the other."""

    def __str__(self) -> str:
        lines = list(self.sentences)
        if self.look and not self.right:
            tile, window = self.look.parts(self.look.first)
            lines += ["", closeups.tile_words(tile), closeups.numbers_text(window)]
        return "\n".join(lines)

    def finding_html(self) -> str:
        """The finding, and the rest of what is said folded under it."""
        word = WORDS["ok" if self.right else "failed"]
        said = "".join(f"<div>{escape(line)}</div>" for line in self.sentences[1:])
        more = f"<details open><summary>More</summary>{said}</details>" if said else ""
        return f'<div style="line-height:1.4"><b>{word}:</b> {escape(self.sentences[0])}{more}</div>'

    def grids_html(self) -> str:
        """The heat maps: stages by pages, or heads by tiles of keys."""
        grids = self.look.grids() if self.look else []
        return "".join(closeups.grid_html(rows, columns, caption, corner=corner)
                       for rows, columns, caption, corner in grids)  # fmt: skip

    def place_html(self, place: Place) -> str:
        """The map of the tile around a place, and got, expected and difference there."""
        tile, window = self.look.parts(place)
        return closeups.tile_html(tile) + closeups.numbers_html(window)

    def _repr_html_(self) -> str:
        closer = self.place_html(self.look.first) if self.look and not self.right else ""
        return self.finding_html() + self.grids_html() + closer

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        """What a cell shows: sliders where there are widgets, else HTML, else text; a frontend takes what it knows."""
        bundle: dict[str, Any] = {"text/plain": str(self), "text/html": self._repr_html_()}
        widget = widget_of(self) if self.look else None
        return bundle if widget is None else {**widget._repr_mimebundle_(), **bundle}


def debug(
    what: Callable | str | backends.Backend,
    problem: Problem | str | None = None,
    *,
    layout: str = "bhsd",
    lse: str | None = None,
    device: str | None = None,
    pattern: str | None = None,
    seed: int = 0,
) -> Debugging:
    """Find out where an attention function or a backend goes wrong, and show it in a notebook cell.

    A backend that exposes its stages is bisected; anything else is diagnosed from its inputs and outputs.

    Parameters
    ----------
    what
        A callable on tensors, ``"FILE.py:function"``, ``"MODULE:function"``, a `Backend` or the id of one.
    problem
        A `Problem` or its label. None for ordinary problems of many kinds, or for a small one where it is bisected.
    layout, lse
        As in `flashcore.diagnose`; refused for a backend that exposes its stages.
    device, pattern, seed
        As in `flashcore.diagnose` and `flashcore.bisect`.

    Returns
    -------
    Debugging
        The last line of a cell shows it; ``print`` works everywhere. Sliders need `ipywidgets`.

    Raises
    ------
    InvalidProblem, UnknownName, BackendUnavailable, Unsupported
        The question itself makes no sense.
    """
    if isinstance(what, str) and ":" not in what:
        what = backends.get(what)
    if isinstance(what, backends.Backend) and what.traceable:
        given = [name for name, value, usual in (("layout", layout, "bhsd"), ("lse", lse, None)) if value != usual]
        if given:
            raise InvalidProblem(f"{' and '.join(given)}: backend '{what.id}' exposes its stages and says that itself; "
                                 f"leave {'them' if len(given) > 1 else 'it'} out.")  # fmt: skip
        return debug_stages(what, problem, device=device, pattern=pattern or "normal", seed=seed)
    return debug_answers(what, problem, layout=layout, lse=lse, device=device, pattern=pattern, seed=seed)


def debug_stages(backend: str | backends.Backend, problem: Problem | str | None = None, **options: Any) -> Debugging:
    """Bisect a backend that exposes its stages; `options` as in `flashcore.bisect`."""
    chosen = backends.get(backend) if isinstance(backend, str) else backend
    if problem is None:
        problem = chosen.suits(SMALL)
    elif isinstance(problem, str):
        problem = parse_problem(problem)
    elif not isinstance(problem, Problem):
        raise InvalidProblem(f"problem: {type(problem).__name__} is no problem; give a Problem or its label.")
    with CellProgress() as progress:
        run = traced(chosen, problem, **options)
        found = run.judge(progress=progress)
    said = [f"{found.backend} on {found.problem.label()}: {found.finding()}."]
    if not found.passed:
        later = [row.stage for row in found.stages if row.role == "propagator"]
        said.append(f"Stages that made an error: {', '.join(found.producers) or 'none'}. "
                    f"Stages that passed one on: {', '.join(later) or 'none'}.")  # fmt: skip
        if not found.production.passed:
            said.append("Production gives another result than its traced build.")
    return Debugging(tuple(said), found.passed, StageLook(run, found), bisection=found)


def debug_answers(what: Callable | str | backends.Backend, problem: Problem | str | None = None, *,
                  layout: str = "bhsd", lse: str | None = None, device: str | None = None,
                  pattern: str | None = None, seed: int = 0) -> Debugging:  # fmt: skip
    """Diagnose any function or backend from its inputs and outputs; parameters as in `flashcore.diagnose`."""
    if isinstance(what, str) and ":" in what:
        what = load(what)
    with CellProgress() as progress:
        found = diagnose(what, problem, layout=layout, lse=lse, device=device, pattern=pattern, seed=seed,
                         progress=progress)  # fmt: skip
        seen = None if found.right else see(candidate_of(what, layout=layout, lse=lse, device=device), found)
    said = found.sentences()
    if seen and seen.why_no_weights:
        said.append(f"The weights of its keys are not shown: {seen.why_no_weights}.")
    return Debugging(tuple(said), found.right, AnswerLook(seen) if seen else None, diagnosis=found)
