"""What commands say about workers: the options that name them, and a line for each card while they work."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from flashcore.measure.cluster import Pool

GpusOption = Annotated[
    str | None, typer.Option("--gpus", metavar="N|all", help="Spread the work over this many cards of this machine.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", metavar="N", help="Spread the work over processes of this machine's CPU.")
]
SchedulerOption = Annotated[
    str | None,
    typer.Option("--scheduler", metavar="tcp://...", help="Spread the work over the workers of a Dask scheduler."),
]
ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", metavar="slurm.toml", help="Spread the work over jobs of Slurm.")
]


class Board:
    """What each card does now, from the events that whoever gives out the tasks sends through Dask."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def hear(self, event: tuple[float, Any]) -> None:
        """Take one event: when, and what a worker does."""
        told = event[1]
        if not isinstance(told, dict) or "key" not in told:
            return
        with self._lock:
            line = self._lines.setdefault(str(told["key"]), {"done": 0, "doing": "", "since": 0.0})
            doing = str(told.get("doing", ""))
            line["done"] += bool(told.get("ended", doing == "" and line["doing"] not in ("", "ready")))
            line |= {"label": str(told.get("label", told["key"])), "doing": doing, "since": time.monotonic()}

    def rows(self) -> list[tuple[str, int, str, float]]:
        """For each card: its label, tasks done, what it does, and for how many seconds."""
        now = time.monotonic()
        with self._lock:
            return [(one["label"], one["done"], one["doing"], now - one["since"]) for one in self._lines.values()]

    def __rich__(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for column in ("Card", "Done", "Now"):
            table.add_column(column, justify="right" if column == "Done" else "left", no_wrap=True)
        for label, done, doing, seconds in sorted(self.rows()):
            busy = f"{escape(doing)} ({seconds:.0f} s)" if doing not in ("", "ready") else "waits"
            table.add_row(escape(label), str(done), busy)
        return table


@contextlib.contextmanager
def spread(
    err: Console,
    *,
    gpus: str | None,
    workers: int | None,
    scheduler: str | None,
    cluster: Path | None,
    mixed: bool = False,
) -> Iterator[Pool | None]:
    """The workers that the options name, with a line a card on a terminal; None where none is named.

    Parameters
    ----------
    err
        Where progress goes. Whoever prints meanwhile prints there, so that the lines of the cards stay in their place.
    """
    if (gpus, workers, scheduler, cluster) == (None, None, None, None):
        yield None
        return
    from flashcore.measure import cluster as engine

    asked = {"gpus": gpus, "workers": workers, "scheduler": scheduler, "cluster": cluster}
    board = Board()

    def progress(line: str) -> None:
        err.print(escape(line))

    with engine.spread(**asked, mixed=mixed, say=progress) as pool:
        for place in pool.places:
            board.hear((0.0, {"key": place.key, "label": place.label, "doing": "ready"}))
        pool.client.subscribe_topic(engine.TOPIC, board.hear)
        if not err.is_terminal:
            yield pool
        else:
            with Live(board, console=err, refresh_per_second=2, transient=True, redirect_stdout=False):
                yield pool
        for label, done, _, _ in sorted(board.rows()):
            progress(f"{label}: {done} tasks")
