"""Measure the paged cache: memory, times, accuracy, tokens a second and correctness, a record each.

`measuring` runs what is asked for on the shapes that `plan` holds; the other modules measure one thing each, times for
decode, prefill and append. `serving` and `shapes` measure beside every peer, each `contest` in the same rounds.
`facts` and `serving_facts` read the records again: they are of kind `paging`, and ``data["what"]`` says what was
measured.
"""

__all__ = ["facts", "measuring", "plan", "serving_facts"]
