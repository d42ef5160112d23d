"""Figures and tables from records: SVG plots, HTML tables, and the survey's answers in sentences.

Each function takes trials and gives HTML; none measures, decides or imports torch. The other modules draw with `svg`
and `html_tables`.
"""

__all__ = ["answers", "html_tables", "paging_views", "plots", "stage_plots", "survey_views", "svg"]
