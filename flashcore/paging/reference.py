"""Attention over a paged cache in float64, one sequence after the other: what every paged kernel is judged against."""

from __future__ import annotations

import math

import torch

from flashcore.library import masked
from flashcore.numerics import ambient, plain
from flashcore.numerics.reference import safe
from flashcore.paging.checks import debugging
from flashcore.paging.selection import PageSelection
from flashcore.paging.tables import PagedKV


@ambient.judging
def gather(cache: PagedKV, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One sequence's keys and values in the order of their positions. Waits for the device.

    Returns
    -------
    k, v : ``[num_heads_kv, length, head_dim]`` in the dtype of the cache
    present : ``[length]`` bool
        False where the page was dropped; k and v are 0 there. They are 0 as well, and present, where the table names a
        page outside the pool: what the copy engine makes of it.
    """
    length = int(cache.within_table().lengths[row])
    table = cache.page_table[row, : -(-length // cache.page_size)].long()
    present = (table >= 0).repeat_interleave(cache.page_size)[:length]
    in_pool = ((table >= 0) & (table < cache.num_pages)).repeat_interleave(cache.page_size)[:length]

    def dense(pool: torch.Tensor) -> torch.Tensor:
        rows = pool[table.clamp(0, cache.num_pages - 1)].transpose(0, 1).flatten(1, 2)[:, :length]
        return rows.masked_fill(~in_pool[:, None], 0.0)

    return dense(cache.k_pool), dense(cache.v_pool), present


def seen_keys(
    cache: PagedKV, present: torch.Tensor, chosen: torch.Tensor | None, tokens: int, *, causal: bool,
    window_left: int = -1, window_right: int = -1,
) -> torch.Tensor:  # fmt: skip
    """Which of one sequence's keys each of its last `tokens` queries sees, bool ``[num_heads_kv, tokens, length]``.

    `present` is that of `gather`; `chosen`, ``[num_heads_kv, max_pages]``, says which pages are selected, None for all.
    The window is that of `paged_reference`.
    """
    length = present.shape[0]
    seen = present.expand(cache.num_heads_kv, tokens, length)
    if chosen is not None:
        seen = seen & chosen.repeat_interleave(cache.page_size, dim=1)[:, None, :length]
    position = torch.arange(length - tokens, length, device=present.device)[:, None]
    key = torch.arange(length, device=present.device)
    if causal:
        seen = seen & (key <= position)
    if window_right >= 0:
        seen = seen & (key <= position + window_right)
    if window_left >= 0:
        seen = seen & (key >= position - window_left)
    return seen


def paged_reference(
    q: torch.Tensor,
    cache: PagedKV,
    selection: PageSelection | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scale * q k^T + mask) v`` over the pages selected, in float64 on the device of the tensors.

    Parameters
    ----------
    q
        ``[batch, num_heads_q, q_tokens, head_dim]``: row i is the query at position ``length - q_tokens + i``.
    selection
        Pages to attend to; None for all. A dropped page is passed over in any case.
    causal
        A query sees keys up to its own position (bottom-right aligned); False: all keys.
    softmax_scale
        None for ``1/sqrt(head_dim)``.
    window_left, window_right
        A query sees keys from `window_left` before its own position to `window_right` after it; -1 for no limit. Of a
        selection it sees what lies in both.
    softcap
        Above 0: a score s becomes ``softcap * tanh(s / softcap)``, before any mask.
    sink
        Floats ``[num_heads_q]``: the score of one more key of each head, whose value is 0.

    Returns
    -------
    out : float64 ``[batch, num_heads_q, q_tokens, head_dim]``
        0 in rows that see no key.
    lse : float64 ``[batch, num_heads_q, q_tokens]``
        Natural logarithm of the softmax denominator, -inf in rows that see neither key nor sink.

    Raises
    ------
    InvalidProblem, PageTableError
        `q`, the sink or the selection does not fit the cache; a window or a softcap that makes no sense.
    """
    # Before anything is shielded: inside, gradients would be off, and a scale that asks for them would look plain.
    scale, causal = plain.softmax_scale(softmax_scale), plain.flag("causal", causal)
    window, softcap = masked.window(causal, window_left, window_right), masked.softcap(softcap)
    return _reference(q, cache, selection, scale, causal, window, softcap, sink)


@ambient.judging
def _reference(
    q: torch.Tensor, cache: PagedKV, selection: PageSelection | None, scale: float | None, causal: bool,
    window: tuple[int, int], softcap: float | None, sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    cache.check_query(q)
    masked.check_sink(sink, q.shape[1], q.device)
    if debugging():
        cache.check()
    cache = cache.within_table()
    scale = 1.0 / math.sqrt(cache.head_dim) if scale is None else scale
    if selection is not None:
        selection.check(cache)
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64, device=q.device)
    if sink is not None:
        lse[:] = sink.detach().double()[:, None]
    chosen = None if selection is None else selection.mask(cache.max_pages)
    for row in range(cache.batch):
        k, v, present = gather(cache, row)
        if k.shape[1] == 0:
            continue
        seen = seen_keys(
            cache, present, None if chosen is None else chosen[row], q.shape[2], causal=causal, window_left=window[0],
            window_right=window[1],
        )  # fmt: skip
        for head in range(cache.num_heads_kv):
            group = slice(head * q.shape[1] // cache.num_heads_kv, (head + 1) * q.shape[1] // cache.num_heads_kv)
            scores = (q[row, group].double() @ k[head].double().T).mul_(scale)
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            scores.masked_fill_(~seen[head], -math.inf)
            row_max = scores.amax(dim=-1, keepdim=True)
            if sink is not None:
                score = sink[group].detach().double()[:, None, None]
                row_max = row_max.maximum(score)
            probs = scores.sub_(safe(row_max)).exp_()
            row_sum = probs.sum(dim=-1, keepdim=True)
            if sink is not None:
                row_sum += (score - safe(row_max)).exp()
            # A value that no query sees may be anything: 0 * Inf would be NaN.
            values = v[head].double().masked_fill(~seen[head].any(dim=0)[:, None], 0.0)
            out[row, group] = (probs @ values) / row_sum.masked_fill(row_sum == 0, 1.0)
            lse[row, group] = (row_max + row_sum.log()).squeeze(-1)
    return out, lse
