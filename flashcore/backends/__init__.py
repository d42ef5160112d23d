"""Implementations of attention, each under a stable id and found through one registry.

A module whose name has no underscore in front holds backends: `Backend` subclasses under the decorator `register`. So
do the modules in a folder that FLASHCORE_PLUGINS names. Notebooks, the sweep, bisection and the command line ask the
registry (`get`, `select`) and know no backend by name.

One room lies within: `others` computes what no kernel of ours takes, and is in no registry.
"""

from __future__ import annotations

from importlib import import_module

from flashcore.backends._contract import AVAILABLE, Availability, Backend, with_masks, with_methods
from flashcore.backends._registry import all_backends, get, ids_in, register, select

__all__ = [
    "AVAILABLE", "Availability", "Backend", "CudaBackend", "all_backends", "get", "ids_in", "register", "select",
    "with_masks", "with_methods", "cpu", "cublaslt", "cublaslt_paged", "decode", "others",
]  # fmt: skip


def __getattr__(name: str):
    if name == "CudaBackend":  # loads torch, which listing backends does without
        return import_module("flashcore.backends._cuda").CudaBackend
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
