"""Attention in float64, whole and stage by stage: what every backend is judged against.

All functions work on the device of their tensors and in pieces, so that a large problem on a GPU is checked there.
Shapes: B batch, Hq and Hkv heads, Sq queries, Sk keys, D head_dim, P pages of `page_size` keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from flashcore.problem import Problem

if TYPE_CHECKING:
    import torch

STAGES = ("scores", "row_max", "rescale", "probs", "row_sum", "accum", "out", "lse")
"""The stages of attention over key pages, in dataflow order."""

CHUNK_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Scores held at once: 8 MB of float64 on a CPU (its caches), 512 MB on a GPU (a few such temporaries fit easily)."""


@dataclass(frozen=True)
class Trace:
    """What a backend really computed at each stage, natural logarithm throughout.

    ``safe(m)`` is 0 where m is -inf, else m. Page j holds keys ``j*page_size`` to ``(j+1)*page_size - 1``.
    A page that a backend skips is a no-op: scores -inf, probs 0, the other stages carried over.
    """

    page_size: int
    scores: torch.Tensor
    """``[B, Hq, Sq, Sk]``: ``softmax_scale * q @ k^T``, -inf where masked."""
    row_max: torch.Tensor
    """``[B, Hq, P, Sq]``: the reference after page j; the running maximum, or any value that keeps probs finite."""
    rescale: torch.Tensor
    """``[B, Hq, P, Sq]``: ``exp(row_max_{j-1} - safe(row_max_j))``, with row_max_{-1} = -inf."""
    probs: torch.Tensor
    """``[B, Hq, Sq, Sk]``: ``exp(scores_j - safe(row_max_j))``."""
    row_sum: torch.Tensor
    """``[B, Hq, P, Sq]``: ``rescale_j * row_sum_{j-1} + sum(probs_j)``."""
    accum: torch.Tensor
    """``[B, Hq, P, Sq, D]``: ``rescale_j * accum_{j-1} + probs_j @ v_j``."""
    out: torch.Tensor
    """``[B, Hq, Sq, D]``: ``accum / row_sum`` after the last page, 0 for a row that sees no key."""
    lse: torch.Tensor
    """``[B, Hq, Sq]``: ``row_max + ln(row_sum)`` after the last page, -inf for a row that sees no key."""

    def map(self, change) -> Trace:
        """The same trace with `change` applied to each stage's tensor."""
        return Trace(self.page_size, **{name: change(getattr(self, name)) for name in STAGES})


assert tuple(f.name for f in fields(Trace))[1:] == STAGES  # the two lists are one


def safe(row_max: torch.Tensor) -> torch.Tensor:
    """0 where `row_max` is -inf (the row saw no key yet), else `row_max`: keeps -inf - (-inf) out of the exponent."""
    return row_max.masked_fill(row_max == -math.inf, 0.0)


def visible(problem: Problem, rows: slice, columns: slice, device) -> torch.Tensor | None:
    """Which keys a query may see: bool ``[rows, columns]``, or None when all. Bottom-right aligned causal mask."""
    import torch

    if not problem.causal:
        return None
    row = torch.arange(rows.start, rows.stop, device=device)
    column = torch.arange(columns.start, columns.stop, device=device)
    return column[None, :] <= row[:, None] + (problem.seqlen_k - problem.seqlen_q)


def kv_head_index(problem: Problem, device) -> torch.Tensor:
    """Flat K/V head ``b*Hkv + h_kv`` of each flat query head ``b*Hq + h``, int64 ``[B*Hq]``.

    Grouped heads: ``Hq / Hkv`` query heads in a row share one K/V head.
    """
    import torch

    flat = torch.arange(problem.batch * problem.num_heads_q, device=device)
    batch, head = flat // problem.num_heads_q, flat % problem.num_heads_q
    return batch * problem.num_heads_kv + head // (problem.num_heads_q // problem.num_heads_kv)


def pages(problem: Problem, page_size: int) -> list[slice]:
    """Key columns of each page; the last page may be shorter."""
    return [slice(j, min(j + page_size, problem.seqlen_k)) for j in range(0, problem.seqlen_k, page_size)]


def _scores(q, k, problem: Problem, rows: slice) -> torch.Tensor:
    """``[N, rows, Sk]`` masked scores of flat heads, in the dtype of `q` and `k`."""
    scores = (q @ k.transpose(-1, -2)).mul_(problem.scale)
    mask = visible(problem, rows, slice(0, problem.seqlen_k), q.device)
    return scores if mask is None else scores.masked_fill_(~mask, -math.inf)


def _chunks(problem: Problem, device_type: str) -> Iterator[tuple[slice, slice]]:
    """Slices of flat heads and of rows whose scores fit into CHUNK_SCORES."""
    budget = CHUNK_SCORES.get(device_type, CHUNK_SCORES["cpu"])
    total = problem.batch * problem.num_heads_q
    num_rows = max(1, min(problem.seqlen_q, budget // problem.seqlen_k))
    num_heads = max(1, min(total, budget // (num_rows * problem.seqlen_k)))
    for head in range(0, total, num_heads):
        for row in range(0, problem.seqlen_q, num_rows):
            yield slice(head, min(head + num_heads, total)), slice(row, min(row + num_rows, problem.seqlen_q))


def _attention(
    q, k, v, problem: Problem, compute, round_probs, round_scores=lambda scores: scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-pass softmax attention computed in dtype `compute`, chunk by chunk; `round_probs` is applied before P @ V."""
    import torch

    def flat(tensor):
        return tensor.reshape(-1, *tensor.shape[2:])

    q, k, v = flat(q), flat(k), flat(v)
    kv_head = kv_head_index(problem, q.device)
    out = torch.empty(q.shape, dtype=compute, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=compute, device=q.device)
    for heads, rows in _chunks(problem, q.device.type):
        k_chunk, v_chunk = k[kv_head[heads]].to(compute), v[kv_head[heads]].to(compute)
        probs = round_scores(_scores(q[heads, rows].to(compute), k_chunk, problem, rows))
        row_max = probs.amax(dim=-1, keepdim=True)
        probs = probs.sub_(safe(row_max)).exp_()
        row_sum = probs.sum(dim=-1, keepdim=True)
        # A row that sees no key has accum 0 and row_sum 0: dividing by 1 gives the 0 that is wanted.
        out[heads, rows] = (round_probs(probs) @ v_chunk) / row_sum.masked_fill(row_sum == 0, 1.0)
        lse[heads, rows] = (row_max + row_sum.log()).squeeze(-1)
    shape = (problem.batch, problem.num_heads_q, problem.seqlen_q)
    return out.view(*shape, problem.head_dim), lse.view(shape)


def attention(q, k, v, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention: ``softmax(scale * q k^T + mask) v`` in float64, on the tensors' device.

    Parameters
    ----------
    q, k, v
        ``[B, Hq, Sq, D]``, ``[B, Hkv, Sk, D]`` twice; any dtype and strides.

    Returns
    -------
    out, lse
        float64 ``[B, Hq, Sq, D]`` (0 for a row that sees no key) and ``[B, Hq, Sq]`` (natural logarithm, -inf there).
    """
    import torch

    return _attention(q, k, v, problem, torch.float64, lambda probs: probs)


def attention_same_precision(
    q, k, v, problem: Problem, *, round_scores: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same maths at the precision a good kernel has: its distance from `attention` sets the bound of a check.

    Products of `q.dtype` inputs accumulated in float32, softmax in float32, probs rounded to `q.dtype` before P @ V.
    With `round_scores` the scores are rounded to `q.dtype` too, as an unfused path does that stores them in 16 bits.

    Returns
    -------
    out, lse
        ``[B, Hq, Sq, D]`` in `q.dtype`, float32 ``[B, Hq, Sq]``.
    """
    import torch

    def rounded(tensor):
        return tensor.to(q.dtype).float()

    scores = {"round_scores": rounded} if round_scores else {}
    out, lse = _attention(q, k, v, problem, torch.float32, rounded, **scores)
    return out.to(q.dtype), lse


def _ratio(accum, row_sum):
    """``accum / row_sum`` over the last axis of `accum`, 0 where the row saw no key."""
    return accum / row_sum.masked_fill(row_sum == 0, 1.0).unsqueeze(-1)


def flat_trace(q, k, v, problem: Problem, page_size: int, row_max: torch.Tensor | None = None) -> Trace:
    """The page loop of flat heads in float64; with `row_max`, subtracting that instead of the running maximum.

    Parameters
    ----------
    q, k, v
        float64 ``[N, Sq, D]``, ``[N, Sk, D]`` twice: N heads, K and V already those of each query head.
    row_max
        ``[N, P, Sq]``: another backend's reference. Any is legal, so it is the one to share when stages are compared.

    Returns
    -------
    Trace
        Shapes of `Trace` with ``[N]`` in place of ``[B, Hq]``.
    """
    import torch

    columns = pages(problem, page_size)
    scores = _scores(q, k, problem, slice(0, problem.seqlen_q))
    if row_max is None:
        row_max = torch.stack([scores[..., c].amax(dim=-1) for c in columns], dim=1).cummax(dim=1).values
    before = torch.cat([torch.full_like(row_max[:, :1], -math.inf), row_max[:, :-1]], dim=1)
    rescale = torch.exp(before - safe(row_max))
    probs = torch.empty_like(scores)
    row_sum, accum = torch.empty_like(row_max), q.new_empty(*row_max.shape, problem.head_dim)
    total, sums = q.new_zeros(q.shape), q.new_zeros(q.shape[:2])
    for j, page in enumerate(columns):
        probs[..., page] = torch.exp(scores[..., page] - safe(row_max[:, j])[..., None])
        # Nothing has been seen before the first visible page, so its rescale multiplies zeros, whatever it is.
        sums = rescale[:, j] * sums + probs[..., page].sum(dim=-1)
        total = rescale[:, j, :, None] * total + probs[..., page] @ v[:, page]
        row_sum[:, j], accum[:, j] = sums, total
    return Trace(page_size, scores, row_max, rescale, probs, row_sum, accum,
                 _ratio(total, sums), row_max[:, -1] + sums.log())  # fmt: skip


def flat_stages_from(own: Trace, q, k, v, problem: Problem) -> Trace:
    """Each stage in float64 from the inputs that `own` gave to that stage, for flat heads (shapes as in `flat_trace`).

    `row_max` is the running maximum of `own.scores`: what an ordinary backend does, though any finite one is legal.
    """
    import torch

    columns = pages(problem, own.page_size)
    scores = _scores(q, k, problem, slice(0, problem.seqlen_q))
    running = torch.stack([own.scores[..., c].amax(dim=-1) for c in columns], dim=1).cummax(dim=1).values
    before = torch.cat([torch.full_like(own.row_max[:, :1], -math.inf), own.row_max[:, :-1]], dim=1)
    rescale = torch.exp(before - safe(own.row_max))
    probs, row_sum, accum = torch.empty_like(scores), torch.empty_like(running), own.accum.new_empty(own.accum.shape)
    for j, page in enumerate(columns):
        probs[..., page] = torch.exp(own.scores[..., page] - safe(own.row_max[:, j])[..., None])
        row_sum[:, j] = own.probs[..., page].sum(dim=-1)
        accum[:, j] = own.probs[..., page] @ v[:, page]
        if j:
            row_sum[:, j] += own.rescale[:, j] * own.row_sum[:, j - 1]
            accum[:, j] += own.rescale[:, j, :, None] * own.accum[:, j - 1]
    out = _ratio(own.accum[:, -1], own.row_sum[:, -1])
    return Trace(own.page_size, scores, running, rescale, probs, row_sum, accum, out,
                 own.row_max[:, -1] + own.row_sum[:, -1].log())  # fmt: skip


def flat_inputs(q, k, v, problem: Problem, heads: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 ``[N, S, D]`` copies of Q, K and V for a slice of the flat query heads."""
    kv_head = kv_head_index(problem, q.device)[heads]
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    return q[heads].double(), k[kv_head].double(), v[kv_head].double()


def _unflatten(flat: Trace, problem: Problem) -> Trace:
    return flat.map(lambda t: t.view(problem.batch, problem.num_heads_q, *t.shape[1:]))


def trace(q, k, v, problem: Problem, page_size: int | None = None) -> Trace:
    """Every stage of the page loop in float64, for pages of `page_size` keys (`problem.page_size` when None)."""
    everything = flat_inputs(q, k, v, problem, slice(None))
    return _unflatten(flat_trace(*everything, problem, page_size or problem.page_size), problem)


def stages_from(own: Trace, q, k, v, problem: Problem) -> Trace:
    """What each stage should hold, in float64, given the inputs that the traced backend itself fed to that stage.

    A wrong stage shows here alone; those after it, right for their wrong inputs, do not.
    """
    flat = own.map(lambda t: t.reshape(-1, *t.shape[2:]).double())
    return _unflatten(flat_stages_from(flat, *flat_inputs(q, k, v, problem, slice(None)), problem), problem)
