"""What a backend is: the attributes and methods that notebooks, checks and the sweep ask of each one."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flashcore.errors import BackendUnavailable, FaultError, Unsupported
from flashcore.numerics import ambient
from flashcore.problem import Problem

if TYPE_CHECKING:  # torch takes seconds to import, and listing backends needs none of it
    import torch

    from flashcore.numerics.masking import MaskTensors
    from flashcore.numerics.reference import Trace
    from flashcore.paging import PagedKV, PageSelection


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine; if not, why, and the command that mends it."""

    ok: bool
    reason: str = ""
    fix: str = ""


AVAILABLE = Availability(ok=True)


_MASKS = {
    "window": "a window", "softcap": "a softcap", "sink": "a sink", "lengths": "lengths of padded sequences",
    "ragged": "ragged batches",
}  # fmt: skip
"""What a reason calls each of `Problem.masks`."""


def _refused(problem: Problem, taken: tuple[str, ...]) -> str | None:
    """Why a backend that takes these masks does not take this problem, as a clause; None if it does."""
    refused = [_MASKS[name] for name in problem.masks if name not in taken]
    return f"it does not take {' or '.join(refused)}" if refused else None


REGISTERED: dict[str, Backend] = {}
"""Every backend that was registered, by its id: one that refuses a problem may name those that do not."""

COMPUTES = ("run", "run_with_lse", "trace", "run_paged")
"""Methods of a backend that compute: what torch has set around their calls, such as autocast, is kept out of them."""


class Backend(ABC):
    """One implementation of attention under a stable id."""

    id: str
    """The name in records, on the command line and in plots."""
    title: str
    """One line for a reader who never saw the code."""
    role: Literal["reference", "ours", "peer"]
    device: Literal["cpu", "cuda", "any"]
    """Where its tensors have to be."""
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    head_dims: tuple[int, ...] | None = None
    """The head_dims it takes; None for any."""
    masks: tuple[str, ...] = ()
    """What it takes besides `causal`: some of ``window, softcap, sink, lengths, ragged`` (`Problem.masks`)."""
    paged_masks: tuple[str, ...] = ()
    """What `run_paged` takes of those: some of ``window, softcap, sink``, since a cache has its lengths anyhow."""
    kernel: str | None = None
    """Name of the `.cu` file it launches, if one of ours; its hash goes into every record."""
    swept: bool = True
    """Whether a sweep measures it at every problem; otherwise only at the original report's workloads."""
    dense: bool = True
    """Whether `run` is worth timing on dense K and V; otherwise it copies them into pages first, for the checks."""
    foreign: bool = False
    """Whether it calls a package of somebody else's, which may crash, or compile for a while at a new kind of problem:
    a report then tries it in a process of its own first."""
    variant_of: str | None = None
    """The backend whose kernels and stages it runs in another order; a report then checks it on fewer problems."""
    rounds_scores: bool = False
    """Whether scores are rounded to the problem's dtype before the softmax, by design: its bound then allows for it."""
    tanh_error: float = 2.0**-21
    """Absolute error of the tanh under a softcap, by design; what a GPU's approximate instruction makes is 2^-11. Its
    bound then allows for it."""
    traceable: bool = False
    """Whether `trace` returns its stages, so that it can be bisected."""
    paged: bool = False
    """Whether `run_paged` reads K and V through a page table."""
    batch_invariant: bool = False
    """Whether `run`, and `run_paged` if it is `paged`, keep the promise of `Problem.batch_invariant` where a problem
    asks for it. `why_not` refuses such a problem otherwise."""

    def __init_subclass__(cls, **more):
        super().__init_subclass__(**more)
        # Here, and not in each backend, so that a plug-in's is shielded as ours are.
        for name in COMPUTES:
            if name in vars(cls):
                setattr(cls, name, ambient.shielded(vars(cls)[name]))

    def availability(self) -> Availability:
        """Whether this machine has what the backend needs. Cheap, and never raises."""
        return AVAILABLE

    def software(self) -> str | None:
        """Name and version of the software that a peer calls, such as ``cuDNN 9.19.0``; None for ours, or not known."""
        return None

    def why_not(self, problem: Problem) -> str | None:
        """None when the problem can be run; otherwise the reason, as a clause."""
        if problem.dtype not in self.dtypes:
            return f"dtype {problem.dtype} is not among {', '.join(self.dtypes)}"
        if self.head_dims is not None and problem.head_dim not in self.head_dims:
            return f"head_dim {problem.head_dim} is not among {', '.join(map(str, self.head_dims))}"
        return _refused(problem, self.masks) or self._unpromised(
            problem, lambda other: other.dense and other.swept and other.why_not(problem) is None
        )

    def _unpromised(self, problem: Problem, takes: Callable[[Backend], bool]) -> str | None:
        """Why bits that are the same in every batch are not to be had here, and where they are; None if they are."""
        if self.batch_invariant or not problem.batch_invariant:
            return None
        places = (self.device, "any")
        able = [
            f"'{other.id}'" for other in REGISTERED.values()
            if other.batch_invariant and (self.device == "any" or other.device in places) and takes(other)
        ]  # fmt: skip
        who = ", ".join(able[:-1]) + " and " * bool(able[1:]) + "".join(able[-1:])
        does = f"{who} {'do' if able[1:] else 'does'}" if able else "no backend does for this problem"
        return f"it does not promise bits that are the same in every batch (batch_invariant), and {does}"

    def suits(self, problem: Problem) -> Problem:
        """The problem, or one much like it that the backend takes: for checks that ask the same of every backend."""
        return problem

    @abstractmethod
    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, masks: MaskTensors | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention on the tensors' device and torch's current stream, without synchronising.

        Parameters
        ----------
        q, k, v
            ``[batch, num_heads_q, seqlen_q, head_dim]`` and ``[batch, num_heads_kv, seqlen_k, head_dim]``, any strides
            with the last dimension contiguous; already checked against `problem`. Of a ragged batch
            ``[1, num_heads, total, head_dim]``.
        masks
            The tensors that the masks of `problem` need, checked and on the same device; never read on the host by a
            backend on a GPU. Given by name, and only where the problem needs some: a backend that takes no such mask
            may leave the argument out.

        Returns
        -------
        out, lse
            ``[batch, num_heads_q, seqlen_q, head_dim]`` in the dtype of `q`, and the natural log of the softmax
            denominator, float32 ``[batch, num_heads_q, seqlen_q]``, -inf for a row that sees no key
            (None from a peer that does not return it). Laid out as `q`; rows that are not real hold 0 and -inf.
        """

    def run_with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, masks: MaskTensors | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`run`, by another way where there is one that gives `lse` and `run` does not."""
        return self.run(q, k, v, problem, **with_masks(masks))

    def trace(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, masks: MaskTensors | None = None
    ) -> Trace:
        """What the backend really computed at each stage (see `flashcore.numerics.reference.Trace`)."""
        raise Unsupported(self.id, "it does not expose its stages, so it cannot be bisected")

    def pays(self, problem: Problem) -> bool:
        """Whether ``backend="auto"`` is to take it on the GPU at hand: it was measured there, and was ahead."""
        return True

    def why_not_paged(self, problem: Problem, *, selected: bool = False) -> str | None:
        """As `why_not`, for K and V in pages; with `selected`, of which each KV head attends to some."""
        if not self.paged:
            return "it reads no page table"
        # Who promises the bits over pages are others than over dense K and V, so that is asked here, and last.
        promised = self.batch_invariant or not problem.batch_invariant
        reason = self.why_not(problem if promised else problem.with_(batch_invariant=False))
        refused = _refused(problem, self.paged_masks) if reason is None else None
        reason = f"{refused} over pages" if refused else reason
        return reason or self._unpromised(
            problem, lambda other: other.why_not_paged(problem, selected=selected) is None
        )

    def run_paged(
        self, q: torch.Tensor, cache: PagedKV, problem: Problem, selection: PageSelection | None = None,
        masks: MaskTensors | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Compute attention over K and V in pages, under the terms of `run`.

        Parameters
        ----------
        q
            ``[batch, num_heads_q, q_tokens, head_dim]``: row i is the query at position ``length - q_tokens + i`` of
            its sequence.
        cache
            The pages, their table, and each sequence's length; what lies past a length may be anything.
        problem
            Of the call: ``seqlen_q`` is q_tokens, ``seqlen_k`` the bound on all lengths that the host knows. A window
            counts from each query's position in its own sequence.
        selection
            Pages that each KV head attends to; None for all that are resident. A window hides keys of theirs, and
            selects none.
        masks
            As in `run`: the sink, if the problem has one.

        Returns
        -------
        out, lse
            As `run`; 0 and -inf for a query that sees neither key nor sink.
        """
        raise Unsupported(self.id, "it reads no page table")

    def require(self, problem: Problem | None = None) -> None:
        """Raise `BackendUnavailable` or `Unsupported` unless the backend can run (this problem) here."""
        state = self.availability()
        if not state.ok:
            raise BackendUnavailable(self.id, state.reason, state.fix)
        reason = self.why_not(problem) if problem else None
        if reason:
            raise Unsupported(self.id, reason)

    def source_hash(self, problem: Problem | None = None) -> str | None:
        """Hash of the kernel's source without comments and white space; None for a backend without a kernel of ours.

        What the kernel has for masks, and for the batch-invariant mode, counts only where the problem asks for either
        (`flashcore.gpu.options.without_options`).
        """
        if self.kernel is None:
            return None
        from flashcore.gpu.build import source_hash

        options = problem is not None and (bool(problem.masks) or problem.batch_invariant)
        return source_hash(self.kernel, options=options)


def with_masks(masks: MaskTensors | None) -> dict[str, MaskTensors]:
    """The keyword arguments that hand `masks` to `Backend.run` and `Backend.trace`; none where there are none."""
    return {} if masks is None else {"masks": masks}


def with_methods(backend: Backend, methods: Mapping[str, Any]) -> Backend:
    """A copy of the backend with these methods and attributes in place of its own; `FaultError` where it has none."""
    missing = [name for name in methods if not hasattr(backend, name)]
    if missing:
        raise FaultError(f"A planted fault overrides '{missing[0]}', which backend '{backend.id}' no longer has.")
    changed = copy.copy(backend)
    changed.__class__ = type("Planted", (type(backend),), dict(methods))
    return changed
