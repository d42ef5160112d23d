"""Tests of many like cases: some run by default, all of them under the marker `exhaustive`."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest


def sampled(cases: Iterable[tuple], *, kind: Callable[[tuple], Hashable] = lambda case: None, seed: int = 0) -> list:
    """Cases of several parameters; by default so few run that within each kind every value of each parameter occurs.

    So a mistake that depends on one value is still found by default, and one that needs two at once by all cases.

    Parameters
    ----------
    cases
        Tuples, of one length.
    kind
        Tells cases apart that no single mistake would break; by default all are of one kind.

    Returns
    -------
    list of pytest.param
        All cases in their order; those that were not drawn carry the marker `exhaustive`.
    """
    cases, kinds = list(cases), {}
    for place, case in enumerate(cases):
        kinds.setdefault(kind(case), []).append(place)
    rng, drawn = random.Random(seed), set()
    for places in kinds.values():
        rng.shuffle(places)
        missing = {value for place in places for value in _values(cases[place])}
        while missing:
            best = max(places, key=lambda place: len(_values(cases[place]) & missing))
            missing -= _values(cases[best])
            drawn.add(best)
    return [_param(case, runs=place in drawn) for place, case in enumerate(cases)]


def _values(case: tuple) -> set[tuple[int, str]]:
    return {(position, repr(value)) for position, value in enumerate(case)}


def first(cases: Sequence[Any], number: int) -> list:
    """Cases that are random themselves, as seeds are: the first `number` run by default."""
    return [_param((case,), runs=place < number) for place, case in enumerate(cases)]


def _param(case: tuple, *, runs: bool):
    return pytest.param(*case, marks=() if runs else pytest.mark.exhaustive)
