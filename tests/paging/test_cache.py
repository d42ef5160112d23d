"""PagedKVCache: what was appended is what lies there; sharing copies on write; errors are typed and change nothing."""

from __future__ import annotations

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.gpu_tools import nothing_synchronises
from support.paged_caches import held, make, tokens

from flashcore.errors import (
    FlashCoreError,
    InvalidProblem,
    PageTableError,
    PagingError,
    PoolExhausted,
    SequenceGone,
    SequenceTooLong,
)
from flashcore.paging import append_tokens, bounds_of_pool, gather


def state(cache):
    """Everything that a call could change: pools, tables, bounds, books."""
    tensors = [cache.k_pool, cache.v_pool, cache.page_table, cache.lengths, cache.key_bounds]
    books = [(s, cache.length(s), cache.pages(s)) for s in cache.sequences]
    return [t.clone() for t in tensors], books, cache.stats()


def assert_same(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_prompt_and_then_single_tokens(page_size, dtype):
    cache = make(page_size=page_size, dtype=dtype)
    sequence = cache.add()
    prompt = tokens(page_size + 7, dtype=dtype)
    cache.append(*prompt, [sequence])
    singles = [tokens(1, dtype=dtype) for _ in range(page_size)]
    for k, v in singles:
        cache.append(k, v)
    expected = [torch.cat([prompt[i], *(s[i] for s in singles)], dim=2)[0] for i in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(held(cache, sequence), expected, strict=True))
    assert cache.length(sequence) == cache.max_length == 2 * page_size + 7 == int(cache.lengths[sequence.row])
    assert cache.stats().pages_used == 3
    cache.check()


def test_several_sequences_of_different_lengths_in_one_call():
    cache = make()
    first, _, third = cache.add(), cache.add(), cache.add()
    k, v = tokens(20, sequences=2)
    k[1, :, 5:] = torch.nan  # padding, which no page may see
    cache.append(k, v, [third, first], tokens=[20, 5])
    assert torch.equal(held(cache, third)[0], k[0]) and torch.equal(held(cache, first)[1], v[1, :, :5])
    assert cache.lengths.tolist() == [5, 0, 20, 0]
    assert not cache.k_pool.isnan().any() and not cache.key_bounds.isnan().any()
    cache.append(*tokens(3, sequences=2), [first, third], tokens=[0, 3])
    assert cache.lengths.tolist() == [5, 0, 23, 0]


def test_strided_keys_are_taken_as_they_are():
    cache = make()
    sequence = cache.add()
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tokens(21))
    cache.append(k, v)
    assert not k.is_contiguous() and torch.equal(held(cache, sequence)[0], k[0])


def test_gradients_do_not_reach_the_pool():
    cache = make()
    cache.add()
    k, v = tokens(3)
    cache.append(k.requires_grad_(), v)
    assert not cache.k_pool.requires_grad and not cache.key_bounds.requires_grad


def test_a_fork_shares_pages_and_copies_the_partial_one_on_write():
    cache = make()
    parent = cache.add()
    k, v = tokens(40)
    cache.append(k, v)
    child = cache.fork(parent)
    assert cache.pages(child) == cache.pages(parent)
    cache.pages(child).clear()  # a list of the caller's own
    assert (cache.stats().pages_used, cache.stats().pages_shared) == (3, 3)
    more = tokens(1, sequences=2)
    cache.append(*more, [parent, child])
    assert cache.pages(child)[:2] == cache.pages(parent)[:2] and cache.pages(child)[2] != cache.pages(parent)[2]
    assert (cache.stats().pages_used, cache.stats().pages_shared) == (4, 2)
    for sequence, own in ((parent, more[0][0]), (child, more[0][1])):
        assert torch.equal(held(cache, sequence)[0], torch.cat([k[0], own], dim=1))
    assert cache.free(parent) == 1 and cache.stats().pages_shared == 0
    assert torch.equal(held(cache, child)[0][:, :40], k[0])
    assert cache.free(child) == 3 and cache.stats().pages_used == 0
    cache.check()


def test_a_fork_at_a_page_boundary_copies_nothing():
    cache = make()
    parent = cache.add()
    cache.append(*tokens(32))
    child = cache.fork(parent)
    cache.append(*tokens(1, sequences=2))
    assert cache.pages(parent)[:2] == cache.pages(child)[:2] and cache.stats().pages_used == 4


def test_the_last_of_the_sharers_to_write_keeps_the_page():
    cache = make(num_pages=3)
    parent = cache.add()
    cache.append(*tokens(5))
    cache.fork(parent)
    cache.fork(parent)
    page = cache.pages(parent)[0]
    cache.append(*tokens(1, sequences=3))  # two copies fit into the pool, three would not
    assert sorted(cache.pages(s)[0] for s in cache.sequences) == [0, 1, 2]
    assert cache.pages(cache.sequences[-1]) == [page]


def test_a_fork_of_a_prefix():
    cache = make()
    parent = cache.add()
    k, v = tokens(40)
    cache.append(k, v)
    child = cache.fork(parent, tokens=20)
    k_child, v_child = tokens(4)
    cache.append(k_child, v_child, [child])
    assert torch.equal(held(cache, child)[1], torch.cat([v[0, :, :20], v_child[0]], dim=1))
    assert torch.equal(held(cache, parent)[1], v[0])
    with pytest.raises(PageTableError, match="has 40 tokens; its first 41 cannot be kept"):
        cache.fork(parent, tokens=41)


def test_dropping_pages_leaves_holes_and_keeps_the_last():
    cache = make()
    sequence = cache.add()
    k, v = tokens(50)
    cache.append(k, v)
    first_pages = cache.pages(sequence)[:2]
    cache.drop(sequence, [0, 1])
    cache.drop(sequence, range(2))  # again: nothing to do
    assert cache.pages(sequence)[:2] == [-1, -1] and cache.page_table[0, :3].tolist()[:2] == [-1, -1]
    assert cache.stats().pages_used == 2 and cache.length(sequence) == 50
    k_held, _, present = gather(cache, 0)
    assert present.tolist() == [False] * 32 + [True] * 18 and torch.equal(k_held[:, 32:], k[0, :, 32:])
    assert cache.stats().tokens_resident == 18 and cache.stats().tokens == 50
    other = cache.add()
    cache.append(*tokens(32), [other])
    assert sorted(cache.pages(other)) == sorted(first_pages)
    for page in (3, 4):
        with pytest.raises(PageTableError, match=f"cannot drop page {page}: it has 4 pages and keeps the last one"):
            cache.drop(sequence, [page])
    with pytest.raises(PageTableError, match="has dropped the page of token 19"):
        cache.truncate(sequence, 20)
    cache.check()


def test_a_cache_says_that_it_has_holes_from_the_first_dropped_page_on():
    cache = make()
    sequence = cache.add()
    cache.append(*tokens(50))
    cache.drop(sequence, [])
    assert not cache.holes and not cache.view([sequence]).holes
    cache.drop(sequence, [1])
    assert cache.holes and cache.view([sequence]).holes


def test_a_shared_page_outlives_a_drop():
    cache = make()
    parent = cache.add()
    k, v = tokens(40)
    cache.append(k, v)
    child = cache.fork(parent)
    cache.drop(parent, [0])
    assert cache.stats().pages_used == 3 and torch.equal(held(cache, child)[0], k[0])


def test_truncating_forgets_tokens_and_gives_pages_back():
    cache = make()
    sequence = cache.add()
    k, v = tokens(40)
    cache.append(k, v)
    cache.reserve(60)
    assert cache.stats().pages_used == 7 and cache.stats().fragmentation == pytest.approx(1 - 40 / 112)
    cache.truncate(sequence, 17)
    assert cache.stats().pages_used == 2 and cache.lengths[0] == 17
    k_new, v_new = tokens(2)
    cache.append(k_new, v_new)
    assert torch.equal(held(cache, sequence)[0], torch.cat([k[0, :, :17], k_new[0]], dim=1))
    cache.truncate(sequence, 0)
    assert cache.stats().pages_used == 0
    cache.check()


def test_rows_are_used_again_and_old_handles_are_refused():
    cache = make(batch=1)
    old = cache.add()
    cache.append(*tokens(3))
    cache.free(old)
    new = cache.add()
    assert new.row == old.row and new != old
    before = state(cache)
    for use in (
        lambda: cache.append(*tokens(1), [old]), lambda: cache.reserve(1, [old]), lambda: cache.advance(1, [old]),
        lambda: cache.fork(old), lambda: cache.free(old), lambda: cache.drop(old, [0]), lambda: cache.truncate(old, 0),
        lambda: cache.length(old), lambda: cache.view([old]), lambda: cache.length(make().add()),
    ):  # fmt: skip
        with pytest.raises(SequenceGone, match="was freed, or belongs to another cache; use a handle"):
            use()
    assert_same(before, state(cache))


def test_exhaustion_changes_nothing():
    cache = make(num_pages=4, batch=2)
    parent = cache.add()
    cache.append(*tokens(40))
    child = cache.fork(parent)
    before = state(cache)
    with pytest.raises(PoolExhausted, match="takes 3 more pages and 1 of the cache's 4 are free.*Nothing was changed"):
        cache.append(*tokens(17, sequences=2), [parent, child])
    with pytest.raises(PoolExhausted, match="takes 2 more pages"):
        cache.reserve([0, 17])
    with pytest.raises(PoolExhausted, match="takes 1 more rows of the page table and 0 of the cache's 2 are free"):
        cache.add()
    with pytest.raises(PoolExhausted, match="rows"):
        cache.fork(parent)
    assert_same(before, state(cache))
    cache.append(*tokens(1, sequences=2))
    assert cache.stats().pages_used == 4


def test_too_long_for_the_table():
    cache = make(max_pages=2)
    sequence = cache.add()
    cache.append(*tokens(30))
    before = state(cache)
    with pytest.raises(
        SequenceTooLong, match="Row 0 would hold 33 tokens and its pages hold 32; make the cache with a l"
    ):
        cache.append(*tokens(3), [sequence])
    assert_same(before, state(cache))


@pytest.mark.parametrize(("call", "words"), [
    (lambda c, k, v: c.append(k.float(), v), "k is torch.float32 on cpu, and the cache is torch.float16"),
    (lambda c, k, v: c.append(k, v.to("meta")), "v is torch.float16 on meta"),
    (lambda c, k, v: c.append(k.numpy(), v), "k is ndarray"),
    (lambda c, k, v: c.append(k[:1], v), r"k is \[1, 2, 3, 8\]; it has to be \[2 sequences, 2 heads, tokens, 8\]"),
    (lambda c, k, v: c.append(k, v[:, :, :2]), r"v is \[2, 2, 2, 8\].*as many tokens"),
    (lambda c, k, v: c.append(k[0], v), r"k is \[2, 3, 8\]"),
    (lambda c, k, v: c.append(k[:, :, :0], v[:, :, :0]), "at least one"),
    (lambda c, k, v: c.append(k, v, [c.sequences[0]] * 2), r"Sequence \d+ \(row 0\) is given twice"),
    (lambda c, k, v: c.append(k, v, tokens=[3]), "1 numbers for 2 sequences"),
    (lambda c, k, v: c.append(k, v, tokens=[3, 4]), "asks for 4 tokens of a row, and k and v hold 3"),
    (lambda c, k, v: c.append(k, v, tokens=[3, -1]), "tokens is -1; it has to be at least 0"),
    (lambda c, k, v: c.append(k, v, tokens=[3, 1.5]), "tokens is 1.5; it has to be a whole number"),
    (lambda c, k, v: c.append(k, v, []), "begin one with add"),
    (lambda c, k, v: c.reserve(-1), "tokens is -1"),
    (lambda c, k, v: c.truncate(c.sequences[0], "all"), "length is 'all'"),
    (lambda c, k, v: c.drop(c.sequences[0], [0.5]), "a page is 0.5"),
    (lambda c, k, v: c.drop(c.sequences[0], 0), "pages is 0; pass a list"),
    (lambda c, k, v: c.reserve(None), "tokens is None; it has to be a whole number"),
    (lambda c, k, v: c.reserve(True), "tokens is True; it has to be a whole number"),
    (lambda c, k, v: c.append(k, v, c.sequences[0].row), "sequences is 0; pass a list"),
    (lambda c, k, v: c.view(1), "sequences is 1; pass a list"),
    (lambda c, k, v: c.write(k, v, rows=[0, 1]), r"rows is \[0, 1\]; it has to be an integer tensor"),
    (lambda c, k, v: c.write(k, v, rows=torch.zeros(2)), r"rows is a torch.float32 tensor .* an integer tensor \[2\]"),
    (lambda c, k, v: c.write(k, v, rows=torch.zeros(2, 1).int()), r"rows is a torch.int32 tensor \[2, 1\] on cpu"),
    (lambda c, k, v: c.write(k, v, rows=torch.tensor([1, 1])), "rows has 1 twice"),
    (lambda c, k, v: c.write(k, v, rows=torch.arange(2), counts=[1, 1]), r"counts is \[1, 1\]; it has to be an int"),
    (lambda c, k, v: c.write(k, v, rows=torch.arange(2), counts=torch.ones(1).int()), r"an integer tensor \[2\]"),
    (lambda c, k, v: c.write(k, v, rows=torch.arange(2), counts=torch.ones(2).bool()), "counts is a torch.bool tensor"),
    (lambda c, k, v: c.write(k, v, rows=torch.arange(2), counts=torch.tensor([4, 1])), r"counts\[0\] is 4; .* 3 to"),
    (lambda c, k, v: c.write(k, v, rows=torch.arange(2), counts=torch.tensor([1, -1])), r"counts\[1\] is -1; it has "),
    (lambda c, k, v: c.write(k, v, rows=torch.arange(2, device="meta")), "rows lies on meta, and the pools on cpu"),
])  # fmt: skip
def test_bad_calls_change_nothing(call, words):
    cache = make()
    cache.add(), cache.add()
    cache.append(*tokens(20, sequences=2))
    before = state(cache)
    with pytest.raises(InvalidProblem, match=words) as caught:
        call(cache, *tokens(3, sequences=2))
    assert "\n" not in str(caught.value)
    assert_same(before, state(cache))


def test_append_is_reserve_write_advance():
    """The three parts by themselves, with rows that hold no sequence riding along, as a captured graph runs them."""
    cache = make(batch=3)
    first, gone, third = cache.add(), cache.add(), cache.add()
    cache.append(*tokens(15, sequences=3))
    cache.free(gone)
    written = []
    for _ in range(4):
        k, v = tokens(1, sequences=3)
        cache.reserve(1)
        cache.write(k, v)
        cache.advance(1)
        cache.check(tokens=0)
        written.append(k)
    assert cache.lengths.tolist() == [19, 0, 19] and cache.page_table[1].tolist() == [-1] * 16
    for sequence in (first, third):
        expected = torch.cat([k[sequence.row] for k in written], dim=1)
        assert torch.equal(held(cache, sequence)[0][:, 15:], expected)


def test_writing_without_a_reserved_page_writes_nothing_and_advance_says_so():
    cache = make()
    cache.add(), cache.add()
    cache.append(*tokens(15, sequences=2))
    before = state(cache)
    k, v = tokens(2, sequences=4)
    cache.write(k, v)
    assert_same(before, state(cache))
    with pytest.raises(SequenceTooLong, match=r"would hold 17 tokens and its pages hold 16; call reserve\(\)"):
        cache.advance(2)
    assert_same(before, state(cache))


def test_advance_refuses_a_write_to_a_page_shared_meanwhile():
    cache = make()
    sequence = cache.add()
    cache.append(*tokens(5))
    cache.reserve(1)
    cache.fork(sequence)
    with pytest.raises(PageTableError, match="after a fork had shared it; call reserve"):
        cache.advance(1, [sequence])
    cache.reserve(1, [sequence])
    cache.write(*tokens(1), rows=torch.tensor([sequence.row]))
    cache.advance(1, [sequence])
    cache.check()


def test_check_tells_when_device_and_books_part():
    cache = make()
    cache.add()
    cache.append(*tokens(5))
    cache.write(*tokens(1, sequences=4))
    with pytest.raises(PageTableError, match=r"lengths\[0\] is 6 on the device and 5 in the cache's books.*advance"):
        cache.check()
    cache.advance(1)
    cache.check()
    cache.page_table[0, 0] = 3
    with pytest.raises(PageTableError, match=r"page_table\[0\] on the device is not what"):
        cache.check()


def test_debug_mode_checks_after_each_step(monkeypatch):
    cache = make()
    cache.add()
    cache.append(*tokens(5))
    cache.lengths[0] = 4
    cache.append(*tokens(1))
    monkeypatch.setenv("FLASHCORE_DEBUG", "1")
    with pytest.raises(PageTableError, match=r"lengths\[0\] is 6 on the device and 7"):
        cache.append(*tokens(1))


def test_a_view_of_some_sequences():
    cache = make()
    handles = [cache.add() for _ in range(3)]
    cache.append(*tokens(20, sequences=3), tokens=[5, 20, 7])
    view = cache.view([handles[2], handles[0]])
    assert view.lengths.tolist() == [7, 5] and view.max_length == 7 and view.k_pool is cache.k_pool
    assert torch.equal(gather(view, 1)[0], held(cache, handles[0])[0])


def test_threads_may_share_a_cache_each_with_sequences_of_its_own(monkeypatch):
    """As a server's requests do; whoever is slow over the books is waited for."""
    cache, prompts = make(batch=4, num_pages=32), [tokens(40) for _ in range(4)]
    free_row = cache._ledger._free_row
    monkeypatch.setattr(cache._ledger, "_free_row", lambda: (free_row(), time.sleep(0.02))[0])

    def request(number):
        sequence, given = cache.add(), prompts[number]
        for step in range(0, 40, 5):
            cache.append(*(t[:, :, step : step + 5] for t in given), [sequence])
        return sequence, given

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(request, range(4)))
    cache.check()
    assert {sequence.row for sequence, _ in found} == {0, 1, 2, 3}
    for sequence, given in found:
        assert all(torch.equal(kept, t[0]) for kept, t in zip(held(cache, sequence), given, strict=True))


def test_a_copy_of_a_cache_is_a_cache():
    cache = make()
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        sequence = copied.add()
        copied.append(*tokens(3), [sequence])
        assert copied.length(sequence) == 3 and not cache.sequences


def test_the_hot_path_never_waits_for_the_device():
    """On `meta` tensors have no values, so that any look at one raises."""
    cache = make(device="meta")
    cache.add()
    k, v = (t.to("meta") for t in tokens(20))
    cache.append(k, v)
    child = cache.fork(cache.sequences[0])
    cache.append(k[:, :, :1].expand(2, -1, -1, -1), v[:, :, :1].expand(2, -1, -1, -1), tokens=[1, 1])
    cache.drop(child, [0])
    cache.truncate(child, 17)
    cache.free(child)
    cache.check()
    rows, counts = torch.zeros(1, dtype=torch.int64, device="meta"), torch.ones(1, dtype=torch.int64, device="meta")
    append_tokens(k, v, cache.k_pool, cache.v_pool, cache.page_table, cache.lengths,
                  rows=rows, counts=counts, key_bounds=cache.key_bounds)  # fmt: skip
    with pytest.raises((RuntimeError, NotImplementedError)):
        cache.lengths[0].item()


def test_messages_carry_every_field():
    from flashcore import errors

    examples = [
        PoolExhausted("pages", 3, 1, 64, "free a sequence"), SequenceGone("Sequence 7 (row 2)"),
        SequenceTooLong(3, 900, 512, "raise max_pages"), errors.PagesOverlap(1, 17, 2),
    ]  # fmt: skip
    for error in examples:
        assert isinstance(error, PagingError) and isinstance(error, FlashCoreError)
        assert [name for name, value in vars(error).items() if str(value) not in str(error)] == []


@pytest.mark.gpu
def test_a_captured_write_replays():
    """The steps of decoding under a graph: reserve, replay, advance, over a page boundary and past a freed row."""
    torch.manual_seed(0)
    cache = make(num_pages=32, batch=4, device="cuda")
    handles = [cache.add() for _ in range(4)]
    cache.append(*(t.cuda() for t in tokens(14, sequences=4)))
    cache.free(handles[1])
    k, v = (t.cuda() for t in tokens(1, sequences=4))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cache.reserve(1)
        cache.write(k, v)
        cache.advance(1)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.write(k, v)
    written = [k.clone()]
    for _ in range(20):
        k.normal_()
        cache.reserve(1)
        graph.replay()
        cache.advance(1)
        written.append(k.clone())
    cache.check(tokens=0)
    for sequence in (handles[0], handles[2], handles[3]):
        expected = torch.cat([step[sequence.row] for step in written], dim=1)
        assert torch.equal(held(cache, sequence)[0][:, 14:], expected)
    torch.testing.assert_close(bounds_of_pool(cache)[cache.pages(handles[0])],
                               cache.key_bounds[cache.pages(handles[0])], rtol=0, atol=0)  # fmt: skip


@pytest.mark.gpu
def test_nothing_synchronises_on_the_gpu():
    cache = make(num_pages=32, batch=2, device="cuda")
    k, v = (t.cuda() for t in tokens(40, sequences=2))
    with nothing_synchronises():
        first = cache.add()
        cache.append(k[:1], v[:1])
        child = cache.fork(first)
        cache.append(k, v, tokens=[3, 40])
        cache.append(k[:, :, :1], v[:, :, :1])
        cache.drop(child, [0])
        cache.truncate(child, 60)
        cache.free(child)
    cache.check()
