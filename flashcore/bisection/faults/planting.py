"""Plant a bug in a backend: patch its kernel's source, put a wrong method in place of one of its own, or both."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from flashcore import backends
from flashcore.backends import with_methods
from flashcore.errors import FaultError, UnknownName
from flashcore.gpu.build import kernel_source
from flashcore.gpu.options import INVARIANT, MASKS, without_options
from flashcore.problem import Problem

if TYPE_CHECKING:
    from flashcore.backends import Backend

PLAIN = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=100, seqlen_k=200, head_dim=64, page_size=64)
"""Where most faults are planted: two sequences, grouped heads, several pages, tails on both sides."""

Edit = tuple[str, str]
"""What stands in the source, and what to put there instead."""


@functools.lru_cache(maxsize=32)
def _bare(text: str, kept: tuple[str, ...]) -> str:
    """`without_options`, which takes some 15 ms: a proof patches the same few sources hundreds of times."""
    return without_options(text, but=kept)


@dataclass(frozen=True)
class Source:
    """A patch of the kernel's source; each old text has to stand there exactly once."""

    edits: tuple[Edit, ...]
    methods: Mapping[str, Any] = field(default_factory=dict)
    """Methods and attributes of the backend to replace as well."""
    masks: bool = False
    """Whether it is a bug of a mask beyond the causal one. Otherwise the source that is patched has none of those, and
    the backend takes none."""
    invariant: bool = False
    """Whether it is a bug of the batch-invariant mode. Otherwise the source that is patched is without that, and the
    backend promises nothing."""

    def unpatched(self, kernel: str) -> str:
        """The kernel's source that the patch is made in."""
        kept = tuple(macro for macro, has in ((MASKS, self.masks), (INVARIANT, self.invariant)) if has)
        return _bare(kernel_source(kernel), kept)

    def text(self, kernel: str) -> str:
        """The kernel's source with the patch in it; `FaultError` when it no longer applies."""
        text = self.unpatched(kernel)
        for old, new in self.edits:
            if text.count(old) != 1:
                raise FaultError(
                    f"A planted fault no longer fits kernel '{kernel}': its text stands there "
                    f"{text.count(old)} times instead of once: {old!r}. Mend the patch in "
                    "flashcore/bisection/faults/plants."
                )
            text = text.replace(old, new)
        return text

    def apply(self, backend: Backend) -> Backend:
        """A copy of the backend that compiles the patched source."""
        without = {} if self.masks else {"masks": (), "paged_masks": ()}
        without |= {} if self.invariant else {"batch_invariant": False}
        planted = with_methods(backend, {**without, **self.methods})
        planted.source = self.text(backend.kernel)
        return planted


@dataclass(frozen=True)
class Override:
    """Other methods in place of the backend's own: a wrong host-side argument, or a wrong stage of the cpu backend.

    An attribute of the class may be among them.
    """

    methods: Mapping[str, Any]

    def apply(self, backend: Backend) -> Backend:
        """A copy of the backend with the other methods."""
        return with_methods(backend, self.methods)


@dataclass(frozen=True)
class Fault:
    """A bug, where it can be planted, and where it has to be found."""

    id: str
    title: str
    stage: str
    """The first producer that bisection has to name; `survey` and `page table` for what it cannot see (`found_by`)."""
    looks_like: str
    """What a check of `out` alone would show."""
    plants: Mapping[str, Source | Override] = field(default_factory=dict, repr=False)
    """How to plant it, by backend id; a bug of the page selection by the name of that kernel."""
    problem: Problem = PLAIN
    """A problem that shows it."""
    problems: Mapping[str, Problem] = field(default_factory=dict, repr=False)
    """By backend id, another problem, where that backend does not take this one or has other tiles."""
    pattern: str = "normal"
    may_crash: bool = False
    """It may read out of bounds or hang, which ends a CUDA context: on a GPU it runs in a process of its own."""
    crash_is_found: bool = False
    """The death of that process is a finding, since an access out of bounds is what the bug is."""
    error_is_found: bool = False
    """A typed error that carries the stage it was raised at (its `stage`) is a finding: a status code that nobody
    swallowed is how the bug shows."""
    found_by: Literal["bisection", "labels", "selection"] = "bisection"
    """`labels`: every stage is right, and the proof is that of `surveys.cublaslt.labels`, by the kernels' names.
    `selection`: it is a bug of the choice of pages, which no backend runs; the same choice made again shows it."""
    held_by: str | None = None
    """What holds a bug that is not one of a backend."""

    def why_not(self, backend_id: str | None = None) -> str | None:
        """None when it can be planted (in that backend); otherwise the reason, as a clause."""
        if self.held_by:
            return f"no bug of a backend: {self.held_by}"
        if backend_id is not None and backend_id not in self.plants:
            if self.found_by == "selection":
                return f"no bug of a backend: planted in {', '.join(self.plants)}"
            kin = next((b.variant_of for b in backends.all_backends() if b.id == backend_id), None)
            if kin in self.plants:
                return f"planted in {kin}, whose code this one runs"
            return f"makes no sense in {backend_id}"
        return None

    def problem_in(self, backend_id: str) -> Problem:
        """The problem that shows it in that backend."""
        return self.problems.get(backend_id, self.problem)

    def plant(self, backend_id: str) -> Backend:
        """The backend with this bug in it.

        Raises
        ------
        UnknownName
            The fault makes no sense in that backend.
        FaultError
            The patch no longer applies.
        """
        if backend_id not in self.plants:
            raise UnknownName(f"way to plant {self.id} in backend", backend_id, sorted(self.plants))
        return self.plants[backend_id].apply(backends.get(backend_id))
