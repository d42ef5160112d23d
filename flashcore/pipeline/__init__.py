"""Make a report: run the notebooks on a run folder, judge the records, render one page.

`folders` finds runs, `reporting` makes a whole report, `redo` measures a part of it again, and `rendering` makes page
and PDF from records alone. `notebooks` runs one notebook so that its failure is a record. `superseding` keeps what was
measured before. `fleet` compares cards in a run of its own.
"""

__all__ = ["fleet", "folders", "redo", "rendering", "reporting", "workbench"]
