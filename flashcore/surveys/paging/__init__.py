"""Measure the paged cache: memory, times, accuracy, tokens a second and correctness, a record each.

`measuring` runs what is asked for on the shapes that `plan` holds; the other modules measure one thing each, times for
decode, prefill and append. `facts` reads the records again: they are of kind `paging`, and ``data["what"]`` says what
was measured.
"""

__all__ = ["facts", "measuring", "plan"]
