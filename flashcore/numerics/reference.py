"""Attention in float64, whole and stage by stage: what every backend is judged against.

All functions work on the device of their tensors and in pieces, so that a large problem on a GPU is checked there.
Shapes: B batch, Hq and Hkv heads, Sq queries, Sk keys, D head_dim, P pages of `page_size` keys, C chains of pages.

Chains
------
A chain is an online softmax over some of the pages, one after the other. An ordinary kernel has one, over all pages. A
split-KV kernel has several, each over pages of its own, and combines them at the end. With p the page that page j
continues, and what stands before a chain's first page row_max -inf and sums 0::

    rescale_j = exp(row_max_p - safe(row_max_j))
    row_sum_j = rescale_j * row_sum_p + sum(probs_j)
    accum_j   = rescale_j * accum_p   + probs_j @ v_j

and with c running over the last page of every chain::

    shared   = max_c row_max_c
    weight_c = exp(row_max_c - safe(shared))
    out      = sum_c weight_c * accum_c / sum_c weight_c * row_sum_c      (0 for a row that sees no key)
    lse      = shared + ln(sum_c weight_c * row_sum_c)                    (-inf for a row that sees no key)

Masks
-----
Scores are ``scale * q k^T``, then ``softcap * tanh(scores / softcap)`` under a softcap, and -inf where a key is hidden
by `causal`, a window or lengths (`visible`). A sink takes part at the end alone, as one more chain: its row_max is the
sink, its row_sum 1 and its accum 0, in every real row. So `row_sum` of a trace is without it, and a row that sees no
key gives 0 and the sink.

Where sequences have lengths, all but `attention` count rows and keys from a sequence's first real one, as
`masking.right_aligned` lays them; a ragged batch is then one of padded sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from flashcore.errors import FlashCoreError
from flashcore.numerics import ambient, masking
from flashcore.problem import Problem

if TYPE_CHECKING:
    import torch

    from flashcore.numerics.masking import MaskTensors

STAGES = ("scores", "row_max", "rescale", "probs", "row_sum", "accum", "out", "lse")
"""The stages of attention over key pages, in dataflow order."""

CHUNK_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Scores held at once: 8 MB of float64 on a CPU (its caches), 512 MB on a GPU (a few such temporaries fit easily)."""


@dataclass(frozen=True)
class Trace:
    """What a backend really computed at each stage, natural logarithm throughout.

    ``safe(m)`` is 0 where m is -inf, else m. Page j holds keys ``j*page_size`` to ``(j+1)*page_size - 1``, and p stands
    for the page that it continues: j-1 unless `previous` says otherwise.
    A page that a backend skips is a no-op: scores -inf, probs 0, the other stages carried over from page p.

    Where sequences have lengths, row i and key j are the i-th and the j-th real ones of their sequence, however it is
    padded, also in `out` and `lse`; shapes are those of the padded problem, in a ragged batch with `seqlen_q` and
    `seqlen_k` of the problem. A row past the end of its sequence sees no key.
    """

    page_size: int
    scores: torch.Tensor
    """``[B, Hq, Sq, Sk]``: ``softmax_scale * q @ k^T``, after a softcap, -inf where masked."""
    row_max: torch.Tensor
    """``[B, Hq, P, Sq]``: the reference after page j; the running maximum, or any value that keeps probs finite."""
    rescale: torch.Tensor
    """``[B, Hq, P, Sq]``: ``exp(row_max_p - safe(row_max_j))``; row_max_p is -inf where a chain begins."""
    probs: torch.Tensor
    """``[B, Hq, Sq, Sk]``: ``exp(scores_j - safe(row_max_j))``."""
    row_sum: torch.Tensor
    """``[B, Hq, P, Sq]``: ``rescale_j * row_sum_p + sum(probs_j)``; a sink is not in it."""
    accum: torch.Tensor
    """``[B, Hq, P, Sq, D]``: ``rescale_j * accum_p + probs_j @ v_j``."""
    out: torch.Tensor
    """``[B, Hq, Sq, D]``: ``accum / row_sum`` after the last page, chains and sink combined; 0 where a row sees no key.
    """
    lse: torch.Tensor
    """``[B, Hq, Sq]``: ``row_max + ln(row_sum)`` after the last page, chains and sink combined; -inf where a row sees
    neither key nor sink."""
    previous: tuple[int, ...] | None = None
    """For each page the page whose state it continues, -1 where a chain begins; None: each continues the one before."""

    def __post_init__(self):
        if self.previous is not None:
            links(self.previous, len(self.previous))

    def map(self, change) -> Trace:
        """The same trace with `change` applied to each stage's tensor."""
        return Trace(self.page_size, **{name: change(getattr(self, name)) for name in STAGES}, previous=self.previous)


assert tuple(f.name for f in fields(Trace))[1:-1] == STAGES  # the two lists are one


def interleaved(num_pages: int, num_splits: int) -> tuple[int, ...]:
    """`Trace.previous` of `num_splits` chains that take turns: page j continues page ``j - num_splits``."""
    return tuple(max(j - num_splits, -1) for j in range(num_pages))


def contiguous(num_pages: int, pages_per_split: int) -> tuple[int, ...]:
    """`Trace.previous` of chains of `pages_per_split` pages in a row; the last chain may be shorter."""
    return tuple(j - 1 if j % pages_per_split else -1 for j in range(num_pages))


def links(previous: tuple[int, ...] | None, num_pages: int) -> tuple[int, ...]:
    """For each page the page that it continues, -1 where a chain begins; checked, and written out where it was None.

    Raises
    ------
    FlashCoreError
        There are more or fewer pages than that, a page continues one that does not precede it, or two continue one.
    """
    if previous is None:
        return tuple(range(-1, num_pages - 1))
    if len(previous) != num_pages:
        raise FlashCoreError(f"`previous` names the page that each of {len(previous)} pages continues; "
                             f"there are {num_pages} pages.")  # fmt: skip
    continued_by: dict[int, int] = {}
    for page, before in enumerate(previous):
        if not -1 <= before < page:
            raise FlashCoreError(f"`previous` lets page {page} continue page {before}; it has to be an earlier page, "
                                 "or -1 where a chain begins.")  # fmt: skip
        if before >= 0 and before in continued_by:
            raise FlashCoreError(f"`previous` lets page {page} continue page {before}, which page "
                                 f"{continued_by[before]} continues already.")  # fmt: skip
        continued_by[before] = page
    return tuple(previous)


def chains(chain: tuple[int, ...]) -> list[list[int]]:
    """The pages of every chain in their order, from `links`."""
    found: list[list[int]] = []
    of_page: list[list[int]] = []
    for page, before in enumerate(chain):
        if before < 0:
            found.append([])
        of_page.append(found[-1] if before < 0 else of_page[before])
        of_page[page].append(page)
    return found


def ends(chain: tuple[int, ...]) -> list[int]:
    """The last page of every chain, from `links`."""
    return [pages_of_one[-1] for pages_of_one in chains(chain)]


def safe(row_max: torch.Tensor) -> torch.Tensor:
    """0 where `row_max` is -inf (the row saw no key yet), else `row_max`: keeps -inf - (-inf) out of the exponent."""
    return row_max.masked_fill(row_max == -math.inf, 0.0)


def visible(
    problem: Problem, rows: slice, columns: slice, device,
    lengths: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor | None:  # fmt: skip
    """Which keys a query may see: bool, or None when all. Causal mask, window and lengths, aligned bottom right.

    Parameters
    ----------
    rows, columns
        Queries and keys, counted from the first real one of their sequence.
    lengths
        Real queries and real keys of each sequence, int64 ``[...]`` each; None where all rows are real.

    Returns
    -------
    torch.Tensor or None
        ``[rows, columns]``, with `lengths` ``[..., rows, columns]``.
    """
    import torch

    left, right = problem.window
    if left < 0 and right < 0 and lengths is None:
        return None
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    column = torch.arange(columns.start, columns.stop, device=device)
    num_q, num_k = (problem.seqlen_q, problem.seqlen_k) if lengths is None else (n[..., None, None] for n in lengths)
    position = row + (num_k - num_q)
    parts = [] if lengths is None else [row < num_q, column < num_k]
    if right >= 0:
        parts.append(column <= position + right)
    if left >= 0:
        parts.append(column >= position - left)
    seen = parts[0]
    for part in parts[1:]:
        seen = seen & part
    return seen


def seen_columns(problem: Problem, rows: slice) -> slice:
    """Keys that some of these queries may see, where all rows of every sequence are real; all of them without a window.

    May be empty. It only saves work: what it leaves out, `visible` hides.
    """
    if problem.lengths or "window" not in problem.masks:
        return slice(0, problem.seqlen_k)
    (left, right), offset = problem.window, problem.seqlen_k - problem.seqlen_q
    first = max(rows.start + offset - left, 0) if left >= 0 else 0
    last = min(rows.stop + offset + right, problem.seqlen_k) if right >= 0 else problem.seqlen_k
    return slice(first, max(first, last))


def real(rows: slice, lengths: torch.Tensor) -> torch.Tensor:
    """bool ``[..., rows]``: which rows of sequences of these `lengths` ``[...]`` are real, where those come first."""
    import torch

    return torch.arange(rows.start, rows.stop, device=lengths.device) < lengths[..., None]


@dataclass(frozen=True, eq=False)
class FlatMasks:
    """The mask tensors of some flat heads, whose rows are laid as by `masking.right_aligned`."""

    lengths: tuple[torch.Tensor, torch.Tensor] | None = None
    """int64 ``[N]`` twice: real queries and real keys; None where all rows are."""
    sink: torch.Tensor | None = None
    """float64 ``[N]``; None where there is none."""

    def sink_of_rows(self, rows: slice) -> torch.Tensor | None:
        """``[N, rows]``: the sink of each row, -inf in one that is not real; None where there is none."""
        if self.sink is None:
            return None
        found = self.sink[:, None].expand(-1, rows.stop - rows.start)
        return found if self.lengths is None else found.masked_fill(~real(rows, self.lengths[0]), -math.inf)


def flat_masks(problem: Problem, masks: MaskTensors | None, heads: slice) -> FlatMasks:
    """The mask tensors of a slice of the flat query heads ``b*Hq + h``, from those that `right_aligned` gave."""
    import torch

    if masks is None:
        return FlatMasks()
    flat = torch.arange(*heads.indices(problem.batch * problem.num_heads_q), device=next(masks.named())[1].device)
    batch, head = flat // problem.num_heads_q, flat % problem.num_heads_q
    lengths = (masks.seqlens_q.long()[batch], masks.seqlens_k.long()[batch]) if problem.lengths else None
    return FlatMasks(lengths, masks.sink.double()[head] if problem.sink else None)


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


def capped(scores: torch.Tensor, problem: Problem) -> torch.Tensor:
    """`scores` after the softcap of the problem, in place where there is one."""
    if problem.softcap is None:
        return scores
    return scores.div_(problem.softcap).tanh_().mul_(problem.softcap)


def _scores(q, k, problem: Problem, rows: slice, columns: slice, masks: FlatMasks) -> torch.Tensor:
    """``[N, rows, columns]`` capped and masked scores of flat heads, in the dtype of `q` and `k`."""
    scores = capped((q @ k.transpose(-1, -2)).mul_(problem.scale), problem)
    mask = visible(problem, rows, columns, q.device, masks.lengths)
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
    q, k, v, problem: Problem, masks: MaskTensors | None, compute, round_probs, round_scores=lambda scores: scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-pass softmax attention computed in dtype `compute`, chunk by chunk; `round_probs` is applied before P @ V."""
    import torch

    def flat(tensor):
        return tensor.reshape(-1, *tensor.shape[2:])

    given, as_given, masks_given = q, problem, masks
    q, k, v, problem, masks = masking.right_aligned(q, k, v, problem, masks)
    q, k, v = flat(q), flat(k), flat(v)
    kv_head = kv_head_index(problem, q.device)
    out = torch.empty(q.shape, dtype=compute, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=compute, device=q.device)
    for heads, rows in _chunks(problem, q.device.type):
        of_heads, columns = flat_masks(problem, masks, heads), seen_columns(problem, rows)
        if columns.start == columns.stop:
            columns = slice(0, 1)  # a key that none of these rows sees
        k_chunk, v_chunk = (t[kv_head[heads], columns].to(compute) for t in (k, v))
        probs = round_scores(_scores(q[heads, rows].to(compute), k_chunk, problem, rows, columns, of_heads))
        row_max = probs.amax(dim=-1, keepdim=True)
        probs = probs.sub_(safe(row_max)).exp_()
        row_sum = probs.sum(dim=-1, keepdim=True)
        accum, sink = round_probs(probs) @ v_chunk, of_heads.sink_of_rows(rows)
        if sink is not None:
            accum, row_sum, row_max = _with_sink(accum, row_sum, row_max, sink.to(compute)[..., None])
        # A row that sees no key has accum 0 and row_sum 0: dividing by 1 gives the 0 that is wanted.
        out[heads, rows] = accum / row_sum.masked_fill(row_sum == 0, 1.0)
        lse[heads, rows] = (row_max + row_sum.log()).squeeze(-1)
    shape = (problem.batch, problem.num_heads_q, problem.seqlen_q)
    return masking.put_back(out.view(*shape, problem.head_dim), lse.view(shape), given, as_given, masks_given)


def _with_sink(accum, row_sum, row_max, sink):
    """The three of a softmax after a key of score `sink` and value 0 joined it; all broadcast against `accum`."""
    import torch

    shared = torch.maximum(row_max, sink)
    weight = torch.exp(row_max - safe(shared))
    return accum * weight, row_sum * weight + torch.exp(sink - safe(shared)), shared


@ambient.judging
def attention(q, k, v, problem: Problem, masks: MaskTensors | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention: ``softmax(scale * q k^T + mask) v`` in float64, on the tensors' device.

    Parameters
    ----------
    q, k, v
        ``[B, Hq, Sq, D]``, ``[B, Hkv, Sk, D]`` twice; any dtype and strides. Of a ragged batch
        ``[1, heads, total, D]``.
    masks
        Where the masks of `problem` need tensors.

    Returns
    -------
    out, lse
        float64, laid out as `q`: ``[B, Hq, Sq, D]`` (0 for a row that sees no key) and ``[B, Hq, Sq]`` (natural
        logarithm, -inf there, or the sink). Rows that are not real give 0 and -inf, whatever lies in them.
    """
    import torch

    return _attention(q, k, v, problem, masks, torch.float64, lambda probs: probs)


@ambient.judging
def attention_same_precision(
    q, k, v, problem: Problem, masks: MaskTensors | None = None, *, round_scores: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same maths at the precision a good kernel has: its distance from `attention` sets the bound of a check.

    Products of `q.dtype` inputs accumulated in float32, softmax in float32, probs rounded to `q.dtype` before P @ V.
    With `round_scores` the scores are rounded to `q.dtype` too, as an unfused path does that stores them in 16 bits.

    Returns
    -------
    out, lse
        In `q.dtype` and float32, shapes as in `attention`.
    """
    import torch

    def rounded(tensor):
        return tensor.to(q.dtype).float()

    scores = {"round_scores": rounded} if round_scores else {}
    out, lse = _attention(q, k, v, problem, masks, torch.float32, rounded, **scores)
    return out.to(q.dtype), lse


def before_page(state: torch.Tensor, chain: tuple[int, ...], nothing: float) -> torch.Tensor:
    """``[N, P, ...]``: each page's `state` as the page that it continues left it; `nothing` where a chain begins."""
    import torch

    padded = torch.cat([torch.full_like(state[:, :1], nothing), state], dim=1)
    return padded[:, [before + 1 for before in chain]]


def running_maximum(scores: torch.Tensor, columns: list[slice], chain: tuple[int, ...]) -> torch.Tensor:
    """``[N, P, Sq]``: the largest of `scores` ``[N, Sq, Sk]`` that each page's chain has seen up to and with it."""
    import torch

    running = torch.stack([scores[..., page].amax(dim=-1) for page in columns], dim=1)
    for pages_of_one in chains(chain):
        running[:, pages_of_one] = running[:, pages_of_one].cummax(dim=1).values
    return running


def combine_weights(
    row_max: torch.Tensor, last: list[int], sink: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the sums of each chain are multiplied by to be added up, and the reference that they then share.

    Parameters
    ----------
    row_max
        ``[N, P, Sq]``.
    last
        The last page of every chain (`ends`).
    sink
        ``[N, Sq]``: the score of the sink in each row; None where there is none.

    Returns
    -------
    weights, shared, sink_weight
        ``[N, C, Sq]``, ``exp(row_max_c - safe(shared))``, and ``[N, Sq]``, the largest row_max_c or the sink, and its
        weight (None where there is none). A chain that is alone, and without a sink, has nothing to be weighed against:
        its weight is 1 and the reference its own, whatever that is.
    """
    import torch

    row_max = row_max[:, last]
    if len(last) == 1 and sink is None:
        return torch.ones_like(row_max), row_max[:, 0], None
    shared = row_max.amax(dim=1)
    if sink is not None:
        shared = torch.maximum(shared, sink)
    sink_weight = None if sink is None else torch.exp(sink - safe(shared))
    return torch.exp(row_max - safe(shared)[:, None]), shared, sink_weight


def combined(sums: torch.Tensor, weights: torch.Tensor, last: Sequence[int]) -> torch.Tensor:
    """``[N, Sq, ...]``: what chains have in `sums` ``[N, P, Sq, ...]`` after their last pages, weighed and added up."""
    total = None
    for weight, page in zip(weights.unbind(dim=1), last, strict=True):
        part = sums[:, page] * (weight if sums.dim() == 3 else weight[..., None])
        total = part if total is None else total + part
    return total


def _results(row_max, row_sum, accum, last: list[int], sink) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `lse` of flat heads from the three stages that a chain hands on, and the sink of each row."""
    weights, shared, sink_weight = combine_weights(row_max, last, sink)
    total = combined(row_sum, weights, last)
    if sink_weight is not None:
        total = total + sink_weight
    return _ratio(combined(accum, weights, last), total), shared + total.log()


def _ratio(accum, row_sum):
    """``accum / row_sum`` over the last axis of `accum`, 0 where the row saw no key."""
    return accum / row_sum.masked_fill(row_sum == 0, 1.0).unsqueeze(-1)


@ambient.judging
def flat_trace(
    q, k, v, problem: Problem, page_size: int, row_max: torch.Tensor | None = None,
    previous: tuple[int, ...] | None = None, masks: FlatMasks | None = None,
) -> Trace:  # fmt: skip
    """The page loop of flat heads in float64; with `row_max`, subtracting that instead of the running maximum.

    Parameters
    ----------
    q, k, v
        float64 ``[N, Sq, D]``, ``[N, Sk, D]`` twice: N heads, K and V already those of each query head.
    row_max
        ``[N, P, Sq]``: another backend's reference. Any is legal, so it is the one to share when stages are compared.
    previous
        The chains of pages, as in `Trace`; the running maximum is that of each chain.
    masks
        The mask tensors of these heads (`flat_masks`), where the problem needs some.

    Returns
    -------
    Trace
        Shapes of `Trace` with ``[N]`` in place of ``[B, Hq]``.
    """
    import torch

    columns, masks = pages(problem, page_size), masks or FlatMasks()
    chain, rows = links(previous, len(columns)), slice(0, problem.seqlen_q)
    scores = _scores(q, k, problem, rows, slice(0, problem.seqlen_k), masks)
    if row_max is None:
        row_max = running_maximum(scores, columns, chain)
    rescale = torch.exp(before_page(row_max, chain, -math.inf) - safe(row_max))
    probs = torch.empty_like(scores)
    row_sum, accum = torch.empty_like(row_max), q.new_empty(*row_max.shape, problem.head_dim)
    no_sum, no_accum = q.new_zeros(q.shape[:2]), q.new_zeros(q.shape)
    for j, (page, p) in enumerate(zip(columns, chain, strict=True)):
        probs[..., page] = torch.exp(scores[..., page] - safe(row_max[:, j])[..., None])
        # Nothing has been seen before the first visible page, so its rescale multiplies zeros, whatever it is.
        sums, total = (no_sum, no_accum) if p < 0 else (row_sum[:, p], accum[:, p])
        row_sum[:, j] = rescale[:, j] * sums + probs[..., page].sum(dim=-1)
        accum[:, j] = rescale[:, j, :, None] * total + probs[..., page] @ v[:, page]
    out, lse = _results(row_max, row_sum, accum, ends(chain), masks.sink_of_rows(rows))
    return Trace(page_size, scores, row_max, rescale, probs, row_sum, accum, out, lse, previous)


@ambient.judging
def flat_stages_from(own: Trace, q, k, v, problem: Problem, masks: FlatMasks | None = None) -> Trace:
    """Each stage in float64 from the inputs that `own` gave to that stage, for flat heads (as in `flat_trace`).

    `row_max` is the running maximum of `own.scores` in each of its chains: what an ordinary backend does, though any
    finite one is legal.
    """
    import torch

    columns, masks = pages(problem, own.page_size), masks or FlatMasks()
    chain, rows = links(own.previous, len(columns)), slice(0, problem.seqlen_q)
    scores = _scores(q, k, problem, rows, slice(0, problem.seqlen_k), masks)
    running = running_maximum(own.scores, columns, chain)
    rescale = torch.exp(before_page(own.row_max, chain, -math.inf) - safe(own.row_max))
    probs, row_sum, accum = torch.empty_like(scores), torch.empty_like(running), own.accum.new_empty(own.accum.shape)
    for j, (page, p) in enumerate(zip(columns, chain, strict=True)):
        probs[..., page] = torch.exp(own.scores[..., page] - safe(own.row_max[:, j])[..., None])
        row_sum[:, j] = own.probs[..., page].sum(dim=-1)
        accum[:, j] = own.probs[..., page] @ v[:, page]
        if p >= 0:
            row_sum[:, j] += own.rescale[:, j] * own.row_sum[:, p]
            accum[:, j] += own.rescale[:, j, :, None] * own.accum[:, p]
    out, lse = _results(own.row_max, own.row_sum, own.accum, ends(chain), masks.sink_of_rows(rows))
    return Trace(own.page_size, scores, running, rescale, probs, row_sum, accum, out, lse, own.previous)


def flat_inputs(q, k, v, problem: Problem, heads: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 ``[N, S, D]`` copies of Q, K and V for a slice of the flat query heads.

    Those of a problem with lengths have to be laid as by `masking.right_aligned`.
    """
    kv_head = kv_head_index(problem, q.device)[heads]
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    return q[heads].double(), k[kv_head].double(), v[kv_head].double()


def _unflatten(flat: Trace, problem: Problem) -> Trace:
    return flat.map(lambda t: t.view(problem.batch, problem.num_heads_q, *t.shape[1:]))


@ambient.judging
def trace(
    q, k, v, problem: Problem, page_size: int | None = None, previous: tuple[int, ...] | None = None,
    masks: MaskTensors | None = None,
) -> Trace:  # fmt: skip
    """Every stage of the page loop in float64, for pages of `page_size` keys (`problem.page_size` when None).

    `previous` says which page continues which, as in `Trace`: one chain over all pages when None. `masks` as in
    `attention`; what it means for rows and keys stands at `Trace`.
    """
    q, k, v, problem, masks = masking.right_aligned(q, k, v, problem, masks)
    everything, every = flat_inputs(q, k, v, problem, slice(None)), flat_masks(problem, masks, slice(None))
    flat = flat_trace(*everything, problem, page_size or problem.page_size, previous=previous, masks=every)
    return _unflatten(flat, problem)


@ambient.judging
def stages_from(own: Trace, q, k, v, problem: Problem, masks: MaskTensors | None = None) -> Trace:
    """What each stage should hold, in float64, given the inputs that the traced backend itself fed to that stage.

    A wrong stage shows here alone; those after it, right for their wrong inputs, do not.
    """
    q, k, v, problem, masks = masking.right_aligned(q, k, v, problem, masks)
    flat = own.map(lambda t: t.reshape(-1, *t.shape[2:]).double())
    every = flat_masks(problem, masks, slice(None))
    return _unflatten(flat_stages_from(flat, *flat_inputs(q, k, v, problem, slice(None)), problem, every), problem)
