"""Tables for a reader, made from records alone: verdicts in words, the first bad element spelt out. Never torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flashcore.records import Trial

if TYPE_CHECKING:
    import pandas
    from pandas.io.formats.style import Styler

WORDS = {"ok": "PASS", "failed": "FAIL", "error": "ERROR", "unsupported": "unsupported", "unavailable": "unavailable"}
"""What a reader sees for the status of a trial."""


def correctness_table(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row a `correctness` trial: backend, problem, verdict, largest error and its bound, and what went wrong."""
    import pandas

    rows = []
    for trial in trials:
        c = trial.correctness
        rows.append({
            "backend": trial.backend,
            "problem": trial.problem.label() if trial.problem else "",
            "verdict": WORDS[trial.status],
            "values compared": c.checked if c else 0,
            "largest error of out": c.max_abs_error if c else None,
            "bound": c.bound if c else None,
            "largest error of lse": c.lse_max_abs_error if c else None,
            "reason": trial.reason or "",
        })  # fmt: skip
    return pandas.DataFrame(rows)


def verdict_grid(trials: Iterable[Trial]) -> pandas.DataFrame:
    """Problems down, backends across, one word in each cell."""
    table = correctness_table(trials)
    if table.empty:
        return table
    grid = table.pivot_table(index="problem", columns="backend", values="verdict", aggfunc=" / ".join, sort=False)
    return grid.fillna("not run").reset_index().rename_axis(columns=None)


def stage_table(trial: Trial) -> pandas.DataFrame:
    """One row a stage of a `bisection` trial, in dataflow order."""
    import pandas

    rows = []
    for row in trial.data.get("stages", []):
        own, start = row["local"], row["global"]
        rows.append({
            "stage": row["stage"],
            "role": row["role"],
            "from own inputs": _verdict(own),
            "worst error": float(own["worst_error"]),
            "bound": float(own["bound"]),
            "from the start": _verdict(start),
            "worst error from the start": float(start["worst_error"]),
            "bound from the start": float(start["bound"]),
            "first bad": _where(own["first_bad"] or start["first_bad"]),
        })  # fmt: skip
    return pandas.DataFrame(rows)


def styled(table: pandas.DataFrame, caption: str) -> Styler:
    """An HTML table with a caption, errors in scientific notation and no row numbers."""
    floats = [name for name in table.columns if table[name].dtype.kind == "f"]
    return table.style.hide(axis="index").set_caption(caption).format("{:.2e}", subset=floats, na_rep="none")


def describe(element: dict[str, Any] | None) -> str:
    """An element's coordinates and both its values, in words."""
    if not element:
        return "none"
    where = ", ".join(f"{k} {v}" for k, v in element.items() if k not in ("got", "expected", "tensor", "kind", "stage"))
    return f"at {where}: got {float(element['got']):.6g}, expected {float(element['expected']):.6g}"


def _where(element: dict[str, Any] | None) -> str:
    return "none" if element is None else f"{element['kind']} {describe(element)}"


def _verdict(judgement: dict[str, Any]) -> str:
    return "PASS" if judgement["passed"] else f"FAIL ({judgement['num_bad']} of {judgement['checked']})"
