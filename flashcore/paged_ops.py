"""Attention over a paged K/V cache as a user calls it: a policy picks the pages, a backend reads them."""

from __future__ import annotations

import functools

import torch

from flashcore import backends
from flashcore.errors import FlashCoreError, InvalidProblem, PageTableError, Unsupported
from flashcore.library import dense, masked, paged, traced
from flashcore.numerics import ambient, masking, plain, transforms
from flashcore.numerics.masking import MaskTensors
from flashcore.ops import DTYPES, first_of, masked_problem, nobody_promises
from flashcore.paging import PagedKV, PageSelection, Policy
from flashcore.paging.checks import can_read_back, debugging
from flashcore.problem import Problem

AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("decode-paired", "decode", "hopper-paged", "cublaslt-paged", "reference"),
    "cpu": ("reference", "cpu"),
}
"""What ``backend="auto"`` tries, fastest first; ids that this installation lacks are passed over."""


@functools.lru_cache(maxsize=4096)
def _problem(
    shape, dtype, num_heads_kv: int, room: int, page_size: int, causal: bool, softmax_scale, batch_invariant: bool
) -> Problem:
    return Problem(
        batch=shape[0], num_heads_q=shape[1], num_heads_kv=num_heads_kv, seqlen_q=shape[2],
        seqlen_k=room, head_dim=shape[3], dtype=DTYPES[dtype], causal=causal,
        softmax_scale=softmax_scale, page_size=page_size, batch_invariant=batch_invariant,
    )  # fmt: skip


def paged_problem_of(
    q: torch.Tensor, cache: PagedKV, causal: bool = True, softmax_scale: float | None = None,
    batch_invariant: bool = False,
) -> Problem:  # fmt: skip
    """Check a query against a cache and say what problem they are, its ``seqlen_k`` what a row of the table can hold.

    Raises
    ------
    InvalidProblem
        `cache` is no cache; `q` does not fit it, has a stride in head_dim, or is asked for derivatives or mapped by
        `torch.vmap`; a `causal` that is no bool; a scale that is no finite number.
    """
    if not isinstance(cache, PagedKV):
        raise InvalidProblem(
            f"cache is a {type(cache).__name__}; pass a flashcore.paging.PagedKVCache, or PagedKV.from_tables(...)."
        )
    cache.check_query(q)
    if q.stride(3) != 1 and q.shape[3] > 1:
        raise InvalidProblem(f"The last dimension of q is not contiguous (stride {q.stride(3)}); pass q.contiguous().")
    transforms.refuse("q or the cache", q, cache.k_pool, cache.v_pool)
    causal, scale = plain.flag("causal", causal), plain.softmax_scale(softmax_scale)
    # What the table can hold, not the longest length: that one grows with every token, and each would be a new problem.
    room = cache.max_pages * cache.page_size
    return _problem(q.shape, q.dtype, cache.num_heads_kv, room, cache.page_size, causal, scale, batch_invariant)


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, device: torch.device, name: str, selected: bool) -> backends.Backend:
    """The backend that runs this problem on this device."""
    if name == "auto":
        order = AUTO_ORDER.get(device.type, ())
        first = first_of(order, device, lambda backend: (
            backend.why_not_paged(problem, selected=selected) is None and backend.pays(problem)
        ))  # fmt: skip
        if first is None and problem.batch_invariant:
            raise Unsupported("auto", nobody_promises(
                problem, device, lambda backend: backend.why_not_paged(problem, selected=selected)
            ))  # fmt: skip
        if first is None:
            raise Unsupported("auto", f"no backend on '{device}' takes {problem.label()} in pages")
        return first
    backend = backends.get(name)
    if backend.device not in (device.type, "any"):
        raise InvalidProblem(
            f"Backend '{name}' takes {backend.device} tensors, and these lie on '{device}'; choose another backend."
        )
    backend.require()
    reason = backend.why_not_paged(problem, selected=selected)
    if reason:
        raise Unsupported(name, reason)
    return backend


def picked_for(
    q: torch.Tensor, cache: PagedKV, *, window_left: int = -1, softcap: float | None = None, sink: bool = False
) -> backends.Backend:
    """What ``backend="auto"`` picks for all pages of a cache, under these masks; whatever the lengths are."""
    base = paged_problem_of(q, cache, batch_invariant=plain.batch_invariant())
    problem = masked_problem(base, window_left, -1, softcap, sink, "")
    return _choose(problem, q.device, "auto", False)


@plain.constant_when_traced
def kernel_takes(
    kind: str, index: int, dtype: torch.dtype, head_dim: int, page_size: int, masks: tuple[str, ...] = (),
    backend: str = "auto",
) -> bool:  # fmt: skip
    """Whether a kernel of ours, or the backend that is named, reads pages under these masks, whatever the sizes are.

    Parameters
    ----------
    kind, index
        Of the device.
    masks
        Some of ``window, softcap, sink``, as `Problem.masks` has them.
    """
    try:
        problem = Problem(
            batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=1, seqlen_k=1024, head_dim=head_dim, dtype=DTYPES[dtype],
            causal=True, page_size=page_size, window_left=64 if "window" in masks else -1,
            softcap=1.0 if "softcap" in masks else None, sink="sink" in masks, batch_invariant=plain.batch_invariant(),
        )  # fmt: skip
        return _choose(problem, torch.device(kind, index), backend, False).role == "ours" or backend != "auto"
    except (FlashCoreError, KeyError):  # another device, a backend that says no, or a dtype that is not ours
        return False


def paged_attention(
    q: torch.Tensor,
    cache: PagedKV,
    *,
    policy: Policy | PageSelection | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
):
    """``softmax(softmax_scale * q k^T + mask) v`` over K and V in pages, forward only.

    Under `torch.compile` and `torch.export` the call is one op, ``torch.ops.flashcore.paged_attention`` (with a window,
    a softcap or a sink ``masked_paged_attention``), and so is the choice of pages by a policy of ours.

    Parameters
    ----------
    q
        ``[batch, num_heads_q, q_tokens, head_dim]``, dtype and device of the cache, any strides with the last
        dimension contiguous: the queries of each sequence's last `q_tokens` tokens, whose keys are in the cache.
    cache
        A `flashcore.paging.PagedKVCache`, or a `PagedKV` over tables made elsewhere. Lengths are read on the device
        only, so that a captured CUDA graph sees those of each replay.
    policy
        What picks the pages that each sequence and KV head attends to (any object with ``select(q, cache)``), a
        `PageSelection` already made, or None for all pages.
    causal
        The query at position p sees keys at positions up to p; False: all keys.
    softmax_scale
        Multiplies ``q k^T``; None for ``1/sqrt(head_dim)``.
    backend
        An id that ``flashcore.backends`` knows and that reads page tables, or ``auto``.
    return_lse
        Return ``(out, lse)``.
    window_left, window_right
        The query at position p of its sequence sees keys from ``p - window_left`` to ``p + window_right``; -1 for no
        limit. With `causal` the right side is 0. Our kernels never read pages that lie before the windows of all of a
        sequence's queries. A policy knows nothing of the window: of the pages that it picks a query sees what lies in
        its window.
    softcap
        Above 0: a score s becomes ``softcap * tanh(s / softcap)``, before any mask.
    sink
        Float tensor ``[num_heads_q]``: the score, which no scale multiplies, of one more key of each head, whose value
        is 0. `lse` counts it. It is read on the device, so that a captured graph sees the numbers of each replay.
    batch_invariant
        As in `flashcore.attention`: then the bits of a row do not depend on the page size either, nor on where pages
        lie, nor on how many query tokens the call has. A policy may choose other keys for another page size or batch.

    Returns
    -------
    out : ``[batch, num_heads_q, q_tokens, head_dim]``
        In the dtype of `q`, with the strides of ``torch.empty_like(q)``; 0 in rows that see no key.
    lse : float32 ``[batch, num_heads_q, q_tokens]``, with `return_lse`
        Natural logarithm of the softmax denominator, -inf in rows that see neither key nor sink.

    Raises
    ------
    InvalidProblem, PageTableError
        The query, the sink or the selection does not fit the cache; an option is of the wrong type, or makes no sense.
        What lies in a table on the GPU is read only with FLASHCORE_DEBUG=1, or by ``cache.check()``.
    UnknownName, Unsupported, BackendUnavailable
        No such backend; it does not take this; it does not work here; none promises `batch_invariant` for this.
    """
    batch_invariant = plain.batch_invariant(batch_invariant)
    plainly = window_left == -1 and window_right == -1 and softcap is None and sink is None
    if traced():
        if torch.compiler.is_compiling():
            transforms.refuse_traced_derivatives("q or the cache")
        selection = policy if policy is None or isinstance(policy, PageSelection) else _of_policy(policy)(q, cache)
        pages, counts = (None, None) if selection is None else (selection.pages, selection.counts)
        tables = cache.k_pool, cache.v_pool, cache.page_table, cache.lengths
        if plainly:
            out, lse = paged.paged_attention(
                q, *tables, pages, counts, causal, softmax_scale, return_lse, backend, cache.lengths_fit,
                batch_invariant, cache.holes,
            )  # fmt: skip
        else:
            out, lse = paged.masked_paged_attention(
                q, *tables, sink, pages, counts, causal, softmax_scale,
                *masked.window(causal, window_left, window_right), masked.softcap(softcap), return_lse, backend,
                cache.lengths_fit, batch_invariant,
            )  # fmt: skip
    else:
        masks = () if plainly else (window_left, window_right, softcap, sink)
        out, lse = _compute(q, cache, policy, causal, softmax_scale, backend, return_lse, batch_invariant, *masks)
    return (out, lse) if return_lse else out


def _of_policy(policy):
    """What picks the pages; `InvalidProblem` for what is no policy."""
    if isinstance(policy, type) or not callable(getattr(policy, "select", None)):
        raise InvalidProblem(
            f"policy is {plain.shown(policy)}; it has to be an object with select(q, cache), such as "
            "flashcore.paging.TopK(...), a PageSelection, or None for all pages."
        )
    return policy.select


@ambient.shielded
def _compute(
    q, cache, policy, causal, softmax_scale, backend, return_lse, batch_invariant, window_left=-1, window_right=-1,
    softcap=None, sink=None,
):  # fmt: skip
    """`paged_attention` of tensors that lie in memory."""
    backend, return_lse = plain.word("backend", backend), plain.flag("return_lse", return_lse)
    problem, masks = paged_problem_of(q, cache, causal, softmax_scale, batch_invariant), {}
    if window_left != -1 or window_right != -1 or softcap is not None or sink is not None:
        window, softcap = masked.window(problem.causal, window_left, window_right), masked.softcap(softcap)
        masked.check_sink(sink, q.shape[1], q.device)
        problem = masked_problem(problem, *window, softcap, sink is not None, "")
        if sink is not None:
            transforms.refuse("sink", sink)
            masks = {"masks": MaskTensors(sink=sink.detach().float().contiguous())}
            if not sink.is_cuda or (debugging() and can_read_back(sink.device)):
                masking.check_values(masks["masks"], problem, problem.seqlen_q, problem.seqlen_k)
    if debugging():
        cache.check()
    cache = cache.within_table()
    if policy is None or isinstance(policy, PageSelection):
        selection = policy
    else:  # a policy looks for the highest ``q k^T``, and below zero the scale makes them the lowest scores
        selection = _of_policy(policy)(-q if problem.scale < 0 else q, cache)
    if selection is not None:
        if not isinstance(selection, PageSelection):
            raise PageTableError(
                f"The policy returned a {type(selection).__name__}; select() has to return a PageSelection."
            )
        selection.check(cache, contents=debugging())
    chosen = _choose(problem, q.device, backend, selection is not None)
    with torch.cuda.device(q.device if q.is_cuda else -1):
        out, lse = chosen.run_paged(q, cache, problem, selection, **masks)
    return dense.laid_out(out, dense.out_strides(q)), lse


def _compute_op(
    q, k_pool, v_pool, page_table, lengths, pages=None, counts=None, causal=True, softmax_scale=None,
    return_lse=False, backend="auto", lengths_fit=False, batch_invariant=False, holes=False,
):  # fmt: skip
    """What computes ``torch.ops.flashcore.paged_attention``: the same, and an empty `lse` where none is asked for."""
    cache = PagedKV.from_tables(k_pool, v_pool, page_table, lengths, lengths_fit=lengths_fit, holes=holes)
    selection = None if pages is None else PageSelection(pages, counts)
    out, lse = _compute(q, cache, selection, causal, softmax_scale, backend, return_lse, batch_invariant)
    return out, lse if return_lse else out.new_empty(0, dtype=torch.float32)


def _compute_masked_op(
    q, k_pool, v_pool, page_table, lengths, sink=None, pages=None, counts=None, causal=True, softmax_scale=None,
    window_left=-1, window_right=-1, softcap=None, return_lse=False, backend="auto", lengths_fit=False,
    batch_invariant=False,
):  # fmt: skip
    """What computes ``torch.ops.flashcore.masked_paged_attention``."""
    cache = PagedKV.from_tables(k_pool, v_pool, page_table, lengths, lengths_fit=lengths_fit)
    selection = None if pages is None else PageSelection(pages, counts)
    out, lse = _compute(
        q, cache, selection, causal, softmax_scale, backend, return_lse, batch_invariant, window_left, window_right,
        softcap, sink,
    )  # fmt: skip
    return out, lse if return_lse else out.new_empty(0, dtype=torch.float32)


paged.computed_by(paged.paged_attention, _compute_op)
paged.computed_by(paged.masked_paged_attention, _compute_masked_op)
