"""Addressed trials on whatever workers there are: this process, the cards of one box, or those of a cluster.

A `Task` says which trials to compute and what is owed if they never come; `perform` does lists of them on a pool and
writes the records in this one process. `Here` is the pool without any other process, `spread` starts or joins Dask
workers, one a card, and `pool` gives a notebook the workers that its report has. A worker measures in a process of its
own that knows nothing of Dask, so that none of Dask's threads stands beside a timing. Where nothing is timed, several
processes share a card: those of `crew` beside a notebook, and those that each worker of `spread` has.
"""

from __future__ import annotations

from importlib import import_module

from flashcore.measure.cluster.pools import Here, Pool, perform, pool
from flashcore.measure.cluster.sharing import crew
from flashcore.measure.cluster.tasks import Task, Work

__all__ = ["Here", "Place", "Pool", "Task", "Work", "crew", "perform", "pool", "spread", "TOPIC"]

_LATER = {"Place": "places", "spread": "starting", "TOPIC": "spreading"}


def __getattr__(name: str):
    if name in _LATER:  # a report of one process loads nothing of this
        return getattr(import_module(f"flashcore.measure.cluster.{_LATER[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
