"""Make a report: run the notebooks on a run folder, judge the records, render one page.

`reporting` is the whole way, `redo` measures a part again, `rendering` makes page and PDF from records alone, and
`notebooks` runs one notebook so that its failure is a record. What an older measurement said is kept by `superseding`.
"""

__all__ = ["redo", "rendering", "reporting"]
