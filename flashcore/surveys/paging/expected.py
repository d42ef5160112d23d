"""What attention over pages has to give, and how far off a backend may be: the bounds of `flashcore.measure.check`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashcore.measure.check import LSE_BOUND, correctness_of
from flashcore.numerics import ambient
from flashcore.numerics.reference import safe
from flashcore.numerics.tolerance import UNIT_FLOAT32, compare
from flashcore.paging import PagedKV, PageSelection, gather, paged_reference
from flashcore.paging.reference import seen_keys
from flashcore.records import Correctness


@dataclass(frozen=True)
class Expected:
    """Exact results of one call, and bounds."""

    out: torch.Tensor
    """float64 ``[batch, num_heads_q, q_tokens, head_dim]``."""
    lse: torch.Tensor
    """float64 ``[batch, num_heads_q, q_tokens]``."""
    dtype: torch.dtype
    out_atol: float
    lse_atol: float

    def judge(self, out: torch.Tensor, lse: torch.Tensor | None) -> tuple[Correctness, str | None]:
        """Every element of a backend's results, and what is wrong with them in a sentence."""
        wanted = {"out": (out, self.out.shape, self.dtype), "lse": (lse, self.lse.shape, torch.float32)}
        for name, (tensor, shape, dtype) in wanted.items():
            if tensor is not None and (tensor.shape, tensor.dtype) != (shape, dtype):
                words = f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}"
                return Correctness(passed=False, checked=0, num_bad=0, max_abs_error=math.inf, bound=0.0), words
        found = compare(out, self.out, atol=self.out_atol, rtol=torch.finfo(self.dtype).eps)
        found_lse = None if lse is None else compare(lse, self.lse, atol=self.lse_atol, rtol=4 * UNIT_FLOAT32)
        judged = correctness_of(found, found_lse)
        if judged.passed:
            return judged, None
        name, first = ("out", found) if not found.passed else ("lse", found_lse)
        return judged, f"{name}: {first.sentence()}"


@ambient.judging
def expect(
    q: torch.Tensor,
    cache: PagedKV,
    selection: PageSelection | None = None,
    *,
    causal: bool = True,
    round_scores: bool = False,
    exact: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Expected:
    """Exact results in float64, and bounds from the same maths at the precision of `q`.

    As in `flashcore.measure.check.make_case`: twice the largest error that this maths makes, and what a rounding of
    the scores to float32 does to an exponent.

    Parameters
    ----------
    round_scores
        Whether the backend stores its scores in 16 bits, by design.
    exact
        ``(out, lse)`` worked out otherwise; None for `paged_reference`.
    """
    out, lse = exact or paged_reference(q, cache, selection, causal=causal)
    near_out, near_lse, longest_key, largest_value = same_precision(
        q, cache, selection, causal=causal, round_scores=round_scores
    )
    longest_query = float(q.float().norm(dim=-1).max())
    delta = UNIT_FLOAT32 / math.sqrt(cache.head_dim) * longest_query * longest_key
    lse_error = torch.where(lse.isfinite(), (near_lse - lse).abs(), 0.0).max()
    return Expected(
        out, lse, q.dtype,
        out_atol=2 * float((near_out - out).abs().max()) + 2 * delta * largest_value,
        lse_atol=LSE_BOUND + 2 * float(lse_error) + delta,
    )  # fmt: skip


@ambient.judging
def same_precision(
    q: torch.Tensor, cache: PagedKV, selection: PageSelection | None, *, causal: bool, round_scores: bool
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """`out` and `lse` as a good kernel rounds them, and the longest key and largest value that lie in the pages.

    float32 scores and softmax, probabilities rounded to the dtype of `q` before they meet V.
    """
    heads, group = cache.num_heads_kv, q.shape[1] // cache.num_heads_kv
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -math.inf, device=q.device)
    chosen = None if selection is None else selection.mask(cache.max_pages)
    longest, largest = 0.0, 0.0
    for row in range(cache.batch):
        k, v, present = (t.float() if t.is_floating_point() else t for t in gather(cache, row))
        if k.shape[1] == 0:
            continue
        seen = seen_keys(cache, present, None if chosen is None else chosen[row], q.shape[2], causal=causal)
        rows = q[row].float().reshape(heads, group, q.shape[2], -1)
        scores = (rows @ k[:, None].mT).mul_(1 / math.sqrt(cache.head_dim))
        scores = scores.to(q.dtype).float() if round_scores else scores
        scores = scores.masked_fill_(~seen[:, None], -math.inf)
        row_max = scores.amax(dim=-1, keepdim=True)
        probs = scores.sub_(safe(row_max)).exp_()
        row_sum = probs.sum(dim=-1, keepdim=True)
        sums = probs.to(q.dtype).float() @ v[:, None]
        out[row] = (sums / row_sum.masked_fill(row_sum == 0, 1.0)).flatten(0, 1).to(q.dtype)
        lse[row] = (row_max + row_sum.log()).squeeze(-1).flatten(0, 1)
        longest, largest = max(longest, float(k.norm(dim=-1).max())), max(largest, float(v.abs().max()))
    return out, lse, longest, largest


@ambient.judging
def by_positions(
    q: torch.Tensor, cache: PagedKV, selection: PageSelection | None, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention in float64 over the keys that each query sees, picked one by one from the pools.

    It shares no line with `paged_reference`, which is what it is there to check.
    """
    table, lengths = cache.page_table.tolist(), cache.lengths.tolist()
    batch, heads_q, tokens, _ = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64, device=q.device)
    size, group = cache.page_size, heads_q // cache.num_heads_kv
    for row in range(batch):
        for head in range(cache.num_heads_kv):
            pages = range(-(-lengths[row] // size))
            if selection is not None:
                count = int(selection.counts[row, head])
                pages = [p for p in selection.pages[row, head].tolist()[:count] if p in pages]
            keys = [p * size + i for p in pages if table[row][p] >= 0 for i in range(size)]
            keys = [key for key in keys if key < lengths[row]]
            if not keys:
                continue
            position = torch.tensor(keys, device=q.device)
            page = torch.tensor([table[row][key // size] for key in keys], device=q.device)
            k, v = (pool[page, head, position % size].double() for pool in (cache.k_pool, cache.v_pool))
            mine = slice(head * group, (head + 1) * group)
            scores = q[row, mine].double() @ k.T / math.sqrt(cache.head_dim)
            if causal:
                last = lengths[row] - tokens + torch.arange(tokens, device=q.device)
                scores = scores.masked_fill(position > last[:, None], -math.inf)
            lse[row, mine] = scores.logsumexp(dim=-1)
            out[row, mine] = (scores.softmax(dim=-1) @ v).nan_to_num(nan=0.0)  # a query that sees no key
    return out, lse
