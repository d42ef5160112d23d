"""Ops over K and V in pages: attention, writing new tokens, and choosing pages by bounds or by a window.

A page table and its lengths are tensors that the ops read on the device, so that a compiled or captured step sees
those of each call. What the tables may hold, and what each op computes, is said where it is implemented:
`flashcore.paged_ops` and `flashcore.paging`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashcore.errors import InvalidProblem
from flashcore.library._namespace import define, differentiate, implement
from flashcore.library.masked import check_sink

TABLES = "Tensor k_pool, Tensor v_pool, Tensor page_table, Tensor lengths"


def _fake_attention(
    q, k_pool, v_pool, page_table, lengths, pages=None, counts=None, causal=True, softmax_scale=None,
    return_lse=False, backend="auto", lengths_fit=False, batch_invariant=False, holes=False,
):  # fmt: skip
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse


paged_attention = define(
    "paged_attention",
    f"(Tensor q, {TABLES}, Tensor? pages=None, Tensor? counts=None, bool causal=True, float? softmax_scale=None, "
    "bool return_lse=False, str backend='auto', bool lengths_fit=False, bool batch_invariant=False, "
    "bool holes=False) -> (Tensor out, Tensor lse)",
    _fake_attention,
)
"""As `flashcore.paged_attention`; `pages` and `counts` are those of a selection, None for all pages."""


def _fake_masked(
    q, k_pool, v_pool, page_table, lengths, sink=None, pages=None, counts=None, causal=True, softmax_scale=None,
    window_left=-1, window_right=-1, softcap=None, return_lse=False, backend="auto", lengths_fit=False,
    batch_invariant=False,
):  # fmt: skip
    check_sink(sink, q.shape[1], q.device)
    return _fake_attention(q, k_pool, v_pool, page_table, lengths, return_lse=return_lse)


masked_paged_attention = define(
    "masked_paged_attention",
    f"(Tensor q, {TABLES}, Tensor? sink=None, Tensor? pages=None, Tensor? counts=None, bool causal=True, "
    "float? softmax_scale=None, int window_left=-1, int window_right=-1, float? softcap=None, bool return_lse=False, "
    "str backend='auto', bool lengths_fit=False, bool batch_invariant=False) -> (Tensor out, Tensor lse)",
    _fake_masked,
)
"""As `flashcore.paged_attention` with a window, a softcap or a sink: an op of its own, as `masked_attention` is."""


def _refuse(ctx, *grads):
    raise InvalidProblem(
        "Gradients of attention over pages were asked for, and FlashCore computes its forward pass only; call it under "
        "torch.no_grad(), or call flashcore.attention on dense keys and values."
    )


differentiate(paged_attention, _refuse)
differentiate(masked_paged_attention, _refuse)


def _fake_append(k_new, v_new, k_pool, v_pool, page_table, lengths, rows=None, counts=None, key_bounds=None):
    return None


append_tokens = define(
    "append_tokens",
    "(Tensor k_new, Tensor v_new, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor page_table, Tensor(c!) lengths, "
    "Tensor? rows=None, Tensor? counts=None, Tensor(d!)? key_bounds=None) -> ()",
    _fake_append,
)
"""As `flashcore.paging.append_tokens`: it writes into the pools, the lengths and, where given, the key bounds."""


def _selection(q, k_pool, page_table, width):
    shape = (page_table.shape[0], k_pool.shape[1])
    return (page_table.new_empty((*shape, width), dtype=torch.int32), page_table.new_empty(shape, dtype=torch.int32))


def _fake_top_k(q, k_pool, v_pool, page_table, lengths, key_bounds, width, pages=None, share=None, sink_pages=0):
    return _selection(q, k_pool, page_table, width)


select_top_k = define(
    "select_top_k",
    f"(Tensor q, {TABLES}, Tensor key_bounds, SymInt width, int? pages=None, float? share=None, int sink_pages=0) "
    "-> (Tensor pages, Tensor counts)",
    _fake_top_k,
)
"""As `flashcore.paging.TopK`; `width` is the room for the pages of a sequence and KV head."""


def _fake_window(q, k_pool, v_pool, page_table, lengths, width, sink_pages, window_pages):
    return _selection(q, k_pool, page_table, width)


select_window = define(
    "select_window",
    f"(Tensor q, {TABLES}, SymInt width, int sink_pages, int window_pages) -> (Tensor pages, Tensor counts)",
    _fake_window,
)
"""As `flashcore.paging.SinkWindow`."""


def computed_by(op: torch._ops.OpOverload, function: Callable) -> None:
    """Say what computes one of these ops; it is called by the names of the op's arguments."""
    implement(op, function)
