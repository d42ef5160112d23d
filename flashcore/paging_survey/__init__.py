"""Measure the paged cache: memory, decode, prefill, append, accuracy, tokens a second and correctness, a record each.

`measuring` runs what is asked for on the shapes that `plan` holds; each other module measures one thing. `facts` reads
the records again: they are of kind `paging`, and ``data["what"]`` says what was measured.
"""

__all__ = ["facts", "measuring", "plan"]
