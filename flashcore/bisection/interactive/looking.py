"""What can be looked at closely: the traced stages of a backend, or what a function answered beside the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from flashcore.bisection import Bisection, Traced
from flashcore.bisection.diagnosis import Seen
from flashcore.numerics.reference import STAGES

KEY_TILE = 64
"""Keys of a tile where a function says nothing of its own."""
_PAGED = ("scores", "probs")
_WITHOUT_PAGE = ("out", "lse")
_WITHOUT_COLUMN = ("row_max", "rescale", "row_sum", "lse")


@dataclass(frozen=True)
class Place:
    """Where one looks: what a slider moves."""

    stage: str
    head: int = 0
    """Counted over all batches."""
    page: int = 0
    row: int = 0
    column: int = 0
    """Within the page of a stage over keys, else of head_dim."""
    from_start: bool = False
    """Expect what follows from Q, K and V, and not from the stage's own inputs."""


class Look(Protocol):
    """What can be looked at, whether stages were traced or only outputs are there."""

    stages: tuple[str, ...]
    heads: int
    rows: int
    first: Place
    has_own_inputs: bool
    """Whether each stage can also be judged from its own inputs."""

    def pages(self, stage: str) -> int:
        """How many pages, or tiles of keys, a stage has; 1 for one without."""

    def columns(self, stage: str) -> int:
        """How many columns a page of it has; 1 for a stage without columns."""

    def parts(self, place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tile and the window around a place, as `flashcore.page.drawing.closeups` draws them."""

    def grids(self) -> list[tuple[dict[str, list[float | None]], list[str], str, str]]:
        """Rows, columns, caption and corner of each grid of errors."""


@dataclass(frozen=True)
class StageLook:
    """The stages of a backend that was traced."""

    run: Traced
    found: Bisection
    has_own_inputs: bool = True
    stages: tuple[str, ...] = STAGES

    @property
    def heads(self) -> int:
        return self.run.problem.batch * self.run.problem.num_heads_q

    @property
    def rows(self) -> int:
        return self.run.problem.seqlen_q

    @property
    def first(self) -> Place:
        if not self.found.first_row:
            return Place("scores")
        row, judgement = self.found.first_row
        bad = judgement.first_bad
        page, column = bad.get("page") or 0, bad.get("column") or 0
        if row.stage in _PAGED:
            column -= page * self.run.own.page_size
        head = bad["batch"] * self.run.problem.num_heads_q + bad["head"]
        return Place(row.stage, head, page, bad["row"], column, from_start=row.role != "producer")

    def pages(self, stage: str) -> int:
        return 1 if stage in _WITHOUT_PAGE else self.found.coverage["pages"]

    def columns(self, stage: str) -> int:
        if stage in _WITHOUT_COLUMN:
            return 1
        problem = self.run.problem
        return min(self.run.own.page_size, problem.seqlen_k) if stage in _PAGED else problem.head_dim

    def parts(self, place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        problem, column = self.run.problem, place.column
        if place.stage in _PAGED:
            column = min(place.page * self.run.own.page_size + column, problem.seqlen_k - 1)
        element = {"stage": place.stage, "batch": place.head // problem.num_heads_q,
                   "head": place.head % problem.num_heads_q, "row": place.row}  # fmt: skip
        if place.stage not in _WITHOUT_PAGE:
            element["page"] = place.page
        if place.stage not in _WITHOUT_COLUMN:
            element["column"] = column
        local = not place.from_start
        return self.run.tile(element, is_local=local), self.run.window(element, is_local=local)

    def grids(self) -> list[tuple[dict[str, list[float | None]], list[str], str, str]]:
        grid = self.found.grid()
        together = grid["pages_a_cell"]
        cells = -(-self.found.coverage["pages"] // together)
        columns = [f"page {p * together}" if together == 1 else f"pages {p * together}-" for p in range(cells)]
        views = [("local", "from its own inputs")]
        if not self.found.passed:
            views.append(("global", "from the start"))
        return [
            ({stage: [None] * cells + shares if stage in _WITHOUT_PAGE else [*shares, None]
              for stage, shares in grid[view].items()}, [*columns, "end"],
             f"Worst error of each stage {words}, as a share of its bound", "stage")
            for view, words in views
        ]  # fmt: skip


@dataclass(frozen=True)
class AnswerLook:
    """What one wrong call of a function gave, beside what was meant."""

    seen: Seen
    has_own_inputs: bool = False

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.seen.parts)

    @property
    def heads(self) -> int:
        return self.seen.problem.batch * self.seen.problem.num_heads_q

    @property
    def rows(self) -> int:
        return self.seen.problem.seqlen_q

    @property
    def first(self) -> Place:
        bad = self.seen.first_bad
        if bad is None:
            return Place(self.stages[0])
        head = bad["batch"] * self.seen.problem.num_heads_q + bad["head"]
        page, column = divmod(bad["column"], KEY_TILE) if bad["stage"] == "weights" else (0, bad["column"])
        return Place(bad["stage"], head, page, bad["row"], column)

    def pages(self, stage: str) -> int:
        return -(-self.seen.problem.seqlen_k // KEY_TILE) if stage == "weights" else 1

    def columns(self, stage: str) -> int:
        return {"weights": min(KEY_TILE, self.seen.problem.seqlen_k), "out": self.seen.problem.head_dim}.get(stage, 1)

    def parts(self, place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        problem, column = self.seen.problem, place.column
        if place.stage == "weights":
            column = min(place.page * KEY_TILE + column, problem.seqlen_k - 1)
        element = {"stage": place.stage, "batch": place.head // problem.num_heads_q,
                   "head": place.head % problem.num_heads_q, "row": place.row, "column": column}  # fmt: skip
        return self.seen.tile(element), self.seen.window(element)

    def grids(self) -> list[tuple[dict[str, list[float | None]], list[str], str, str]]:
        grid = self.seen.grid()
        what = "the weights that each head gives to its keys" if grid["stage"] == "weights" else "each head's output"
        caption = f"Worst error of {what}, as a share of its bound, with {self.seen.inputs.label()}"
        return [(dict(grid["rows"]), grid["columns"], caption, grid["across"])]
