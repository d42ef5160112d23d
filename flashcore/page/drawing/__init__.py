"""Figures and tables from records: SVG plots, HTML tables, and the survey's answers in sentences.

Each function takes trials and gives HTML; none measures, decides or imports torch. The other modules draw with `svg`
and `html_tables`; `closeups` draws what changes under a slider.
"""

import os

__all__ = [
    "answers", "closeups", "fleet_views", "html_tables", "invariance_views", "masked_views", "model_views",
    "paging_views", "plots", "serving_views", "stage_plots", "survey_views", "svg",
]  # fmt: skip


def _load_matplotlib() -> None:
    """Import matplotlib, whatever MPLBACKEND says: our figures become SVG without any backend.

    A backend that does not exist would make matplotlib's import fail; one that does is what the user wants elsewhere.
    """
    named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    if named:
        try:
            matplotlib.rcParams["backend"] = named
        except ValueError:
            pass


_load_matplotlib()
