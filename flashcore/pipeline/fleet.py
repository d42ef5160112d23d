"""Compare the cards of a fleet: a run folder of its own, its records, and one page about them."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flashcore.decision import fleet
from flashcore.errors import RecordsError
from flashcore.gpu import device
from flashcore.page import policy
from flashcore.page.drawing import fleet_views
from flashcore.paths import data_dir
from flashcore.pipeline.folders import new_run, runs_dir
from flashcore.records import RunFolder, write_whole

if TYPE_CHECKING:
    from flashcore.measure.cluster import Pool

PAGE = "fleet.html"


def fleets_dir() -> Path:
    """The folder that holds what fleets were measured: beside the one of the runs, since no report is among them."""
    return runs_dir().with_name("fleets")


def compare_cards(pool: Pool, *, out: str | os.PathLike[str] | None = None) -> tuple[RunFolder, fleet.Fleet, Path]:
    """Measure all cards of a pool, judge them, and draw their page.

    Parameters
    ----------
    out
        Folder that gets the run's folder; default `fleets_dir`.

    Returns
    -------
    run, found, page
        The folder with the records, what came of them, and the page.

    Raises
    ------
    RecordsError
        The folder cannot be written.
    ClusterError
        The workers or their scheduler are gone.
    """
    from flashcore.measure import cards

    run = new_run(out if out is not None else fleets_dir())
    device.record_environment(run, "before", {"command": "fleet"}, cards=[place.as_dict() for place in pool.places])
    cards.measure(run, pool)
    device.record_environment(run, "after")
    found = fleet.judge(run.trials())
    return run, found, write_page(run, found)


def write_page(run: RunFolder, found: fleet.Fleet) -> Path:
    """The page of a fleet, one file that asks for nothing."""
    first = html.escape(found.sentences()[0])
    template = data_dir("reports") / "template"
    date = html.escape(str(run.environment().get("date") or "")[:19].replace("T", " "))
    try:
        css = (template / "page.css").read_text(encoding="utf-8")
        text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>FlashCore fleet: {first}</title><link rel="icon" href="data:,">
<style>{css}</style></head>
<body><header class="fc-head"><p class="fc-kicker">FlashCore fleet</p>
<h1>Which of these cards is slow, hot or wrong?</h1>
<p class="fc-sub">Measured side by side, {date} UTC. Run <code>{html.escape(run.name)}</code>.</p></header>
<main id="main"><section>{fleet_views.whole_html(found)}</section>
<section><p class="fc-note">A card is off when a figure lies on the worse side of the median of its kind by more than
{fleet.OFF:g} spreads. The spread is the median absolute deviation times {fleet.TO_SIGMA:g}, and at least the figure's
own noise. The records lie beside this page in <code>records.jsonl</code>.</p></section></main></body></html>
"""
        path = run.path / PAGE
        write_whole(path, policy.secured(text).encode())
    except OSError as error:
        raise RecordsError(f"The page of the fleet cannot be written to {run.path} ({error.strerror}).") from error
    return path
