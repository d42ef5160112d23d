"""The ops over pages: what torch asks of an op, and a decode step that compiles whole."""

from __future__ import annotations

import pytest
import torch
from support import compiling

import flashcore
from flashcore import paged_ops
from flashcore.errors import InvalidProblem, PageTableError
from flashcore.library import paged
from flashcore.paging import AllPages, PagedKV, PagedKVCache, SinkWindow, TopK, append_tokens, paginate

POLICIES = {
    "none": None,
    "window": SinkWindow(1, 2),
    "top-k": TopK(pages=3),
    "share": TopK(share=0.5),
    "all": AllPages(),
}


@pytest.fixture(autouse=True)
def _compiled_anew():
    compiling.forget()
    yield
    compiling.forget()


def cache_of(lengths=(70, 33), device="cpu") -> PagedKVCache:
    cache = PagedKVCache(
        num_pages=24, batch=len(lengths), num_heads_kv=2, head_dim=64, max_pages=10, page_size=16, device=device
    )
    handles = [cache.add() for _ in lengths]
    for handle, length in zip(handles, lengths, strict=True):
        cache.append(*(torch.randn(1, 2, length, 64, device=device).half() for _ in range(2)), [handle])
    return cache


def tables(cache):
    return cache.k_pool, cache.v_pool, cache.page_table, cache.lengths


def step(q, k, v, cache, policy):
    """A decode step: the newest token goes in, and attends."""
    cache.write(k, v)
    return flashcore.paged_attention(q * 2, cache, policy=policy, return_lse=True)


@pytest.mark.slow
def test_a_compiled_call_tells_the_op_of_dropped_pages_and_is_compiled_anew_at_the_first(monkeypatch):
    told, compute = [], paged_ops._compute

    def recorded(q, cache, *rest):
        told.append(cache.holes)
        return compute(q, cache, *rest)

    monkeypatch.setattr(paged_ops, "_compute", recorded)
    cache, q = cache_of(), torch.randn(2, 4, 1, 64).half()
    compiled = torch.compile(lambda q: flashcore.paged_attention(q, cache), fullgraph=True, backend="eager")
    compiled(q)
    cache.drop(cache.sequences[0], [0, 1])
    torch.testing.assert_close(compiled(q), flashcore.paged_attention(q, cache))
    assert told == [False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_decode_step_compiles_whole_and_not_again_as_the_cache_grows(policy):
    ours, theirs = cache_of(), cache_of()
    for pool, other in zip(tables(ours), tables(theirs), strict=True):
        other.copy_(pool)
    theirs.key_bounds.copy_(ours.key_bounds)
    counter = compiling.counter()
    compiled = torch.compile(lambda q, k, v: step(q, k, v, ours, POLICIES[policy]), fullgraph=True, backend=counter)
    for _ in range(3):
        ours.reserve(1), theirs.reserve(1)
        q, (k, v) = torch.randn(2, 4, 1, 64).half(), torch.randn(2, 2, 2, 1, 64).half()
        for got, expected in zip(compiled(q, k, v), step(q, k, v, theirs, POLICIES[policy]), strict=True):
            assert torch.equal(got, expected) and got.stride() == expected.stride()
        ours.advance(1), theirs.advance(1)
    assert counter.frame_count == 1 and ours.lengths.tolist() == [73, 36] == theirs.lengths.tolist()
    assert torch.equal(ours.key_bounds, theirs.key_bounds)
    ours.check()


@pytest.mark.slow
def test_opcheck():
    cache = cache_of()
    cache.reserve(1)
    q, (k, v) = torch.randn(2, 4, 1, 64).half(), torch.randn(2, 2, 2, 1, 64).half()
    chosen = TopK(pages=2).select(q, cache)
    torch.library.opcheck(paged.paged_attention, (q, *tables(cache)))
    torch.library.opcheck(
        paged.paged_attention, (q, *tables(cache), chosen.pages, chosen.counts, True, 0.2, True, "auto", True)
    )
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0])
    torch.library.opcheck(paged.masked_paged_attention, (q, *tables(cache), sink))
    torch.library.opcheck(
        paged.masked_paged_attention,
        (q, *tables(cache), None, chosen.pages, chosen.counts, True, 0.2, 20, -1, 5.0, True, "auto", True),
    )
    torch.library.opcheck(paged.select_top_k, (q, *tables(cache), cache.key_bounds, 4, 2))
    torch.library.opcheck(paged.select_window, (q, *tables(cache), 4, 1, 2))
    torch.library.opcheck(paged.append_tokens, (k, v, *tables(cache), None, None, cache.key_bounds))
    torch.library.opcheck(
        paged.append_tokens, (k[:1], v[:1], *tables(cache), torch.tensor([1]), torch.tensor([1]), None)
    )


def test_the_ops_compute_what_the_calls_compute():
    cache = cache_of()
    q = torch.randn(2, 4, 3, 64).half()
    for policy in (SinkWindow(1, 2), TopK(share=0.5, sink_pages=1)):
        selection = policy.select(q, cache)
        width = selection.pages.shape[-1]
        if isinstance(policy, TopK):
            got = paged.select_top_k(q, *tables(cache), cache.key_bounds, width, None, 0.5, 1)
        else:
            got = paged.select_window(q, *tables(cache), width, 1, 2)
        assert torch.equal(got[0], selection.pages) and torch.equal(got[1], selection.counts)
        out, lse = paged.paged_attention(q, *tables(cache), *got, True, None, True)
        expected, expected_lse = flashcore.paged_attention(q, cache, policy=selection, return_lse=True)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert paged.paged_attention(q, *tables(cache))[1].shape == (0,)


MASKS = {"window_left": 20, "softcap": 4.0, "sink": torch.tensor([0.5, -1.0, 2.0, 0.0])}


@pytest.mark.slow
def test_a_masked_step_compiles_whole_and_not_again_as_the_cache_grows():
    cache = cache_of()
    counter = compiling.counter()

    def step(q, sink):
        return flashcore.paged_attention(q, cache, return_lse=True, **{**MASKS, "sink": sink})

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for _ in range(3):
        cache.append(*torch.randn(2, 2, 2, 1, 64).half())
        q, sink = torch.randn(2, 4, 1, 64).half(), torch.randn(4)
        for got, expected in zip(compiled(q, sink), step(q, sink), strict=True):
            assert torch.equal(got, expected) and got.stride() == expected.stride()
    assert counter.frame_count == 1


def test_the_masked_op_is_the_call_and_refuses_what_the_call_refuses():
    cache = cache_of()
    q = torch.randn(2, 4, 3, 64).half()
    expected, expected_lse = flashcore.paged_attention(q, cache, return_lse=True, **MASKS)
    out, lse = paged.masked_paged_attention(
        q, *tables(cache), MASKS["sink"], window_left=20, softcap=4.0, return_lse=True
    )
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert paged.masked_paged_attention(q, *tables(cache), MASKS["sink"])[1].shape == (0,)
    with pytest.raises(InvalidProblem, match="^sink is a torch.float32 tensor \\[3\\] on cpu; it has to be a float"):
        paged.masked_paged_attention(q, *tables(cache), torch.zeros(3))
    with pytest.raises(InvalidProblem, match="^softcap is -1.0; it has to be above 0"):
        paged.masked_paged_attention(q, *tables(cache), softcap=-1.0)
    with pytest.raises(InvalidProblem, match="^Gradients of attention over pages were asked for"):
        sink = torch.zeros(4, requires_grad=True)
        paged.masked_paged_attention(q, *tables(cache), sink)[0].sum().backward()


def test_out_lies_as_q_does():
    k, v = (torch.randn(2, 2, 40, 64).half() for _ in range(2))
    cache = paginate(k, v, 16)
    q = torch.randn(2, 3, 4, 64).half().transpose(1, 2)
    assert flashcore.paged_attention(q, cache).stride() == q.stride()


@pytest.mark.slow
def test_what_cannot_be_is_one_sentence():
    k, v = (torch.randn(2, 2, 40, 64).half() for _ in range(2))
    cache, q = paginate(k, v, 16), torch.randn(2, 4, 1, 64).half()
    with pytest.raises(InvalidProblem, match="^Gradients of attention over pages were asked for"):
        paged.paged_attention(q.requires_grad_(), *tables(cache))[0].sum().backward()
    bare = PagedKV(*tables(cache))
    compiled = torch.compile(lambda q: TopK(pages=2).select(q, bare).pages, backend="eager")
    with pytest.raises(PageTableError, match="keeps no key bounds"):
        compiled(q.detach())
    with pytest.raises(PageTableError, match="k_pool is torch.float32"):
        paged.paged_attention(q.detach(), *(t.float() for t in tables(cache)[:2]), *tables(cache)[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_a_decode_step_on_the_gpu_compiles_and_replays(policy):
    cache = cache_of((150, 120), "cuda")
    q, (k, v) = torch.randn(2, 4, 1, 64, device="cuda").half(), torch.randn(2, 2, 2, 1, 64, device="cuda").half()
    cache.reserve(1)
    compiled = torch.compile(lambda q: flashcore.paged_attention(q, cache, policy=POLICIES[policy]), fullgraph=True)
    append_tokens(k, v, *tables(cache), key_bounds=cache.key_bounds)
    expected = flashcore.paged_attention(q, cache, policy=POLICIES[policy])
    torch.testing.assert_close(compiled(q), expected, rtol=4e-3, atol=4e-3)
    torch.library.opcheck(paged.paged_attention, (q, *tables(cache)))
