"""Profiles: whose kernels are whose, and what a time is made of."""

from __future__ import annotations

from flashcore.gpu.profiling import split_by_marker


def test_the_profilers_kernels_are_split_call_by_call():
    assert split_by_marker(["add", "add", "a", "b", "add", "add", "c", "add"], 3) == [["a", "b"], [], ["c"]]
    assert split_by_marker(["add", "add", "a", "add"], 2) == [[], []], "lost events name no kernel at all"
    assert split_by_marker([], 1) == [[]]
