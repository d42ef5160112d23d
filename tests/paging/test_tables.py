"""Tables made elsewhere are taken as they are, and each thing that can be wrong with them is one typed sentence."""

from __future__ import annotations

import pytest
import torch

from flashcore.errors import InvalidProblem, PagesOverlap, PageTableError, SequenceTooLong
from flashcore.paging import PagedKV, PagedKVCache, append_tokens, gather, paged_reference

HEADS, DIM, SIZE = 2, 8, 16


@pytest.fixture
def tables():
    """Pools of 6 pages, and two sequences of 20 and 33 tokens that share their first page."""
    k_pool, v_pool = torch.randn(2, 6, HEADS, SIZE, DIM).half().unbind(0)
    page_table = torch.tensor(
        [[5, 0, 0, 0], [5, 3, 1, 77]], dtype=torch.int32
    )  # 77 lies past the end: it means nothing
    return k_pool, v_pool, page_table, torch.tensor([20, 33], dtype=torch.int32)


def test_nothing_is_copied(tables):
    kv = PagedKVCache.from_tables(*tables)
    assert type(kv) is PagedKV and kv.max_length == 64
    assert all(a is b for a, b in zip((kv.k_pool, kv.v_pool, kv.page_table, kv.lengths), tables, strict=True))
    k, v, present = gather(kv, 1)
    assert torch.equal(k[:, :16], tables[0][5]) and torch.equal(k[:, 16:32], tables[0][3]) and present.all()
    assert torch.equal(v[:, 32:], tables[1][1][:, :1])
    assert not any(hasattr(kv, name) for name in ("append", "fork", "free", "drop"))
    kv.check()


@pytest.mark.parametrize("layout", ["flashinfer-nhd", "flashinfer-hnd", "vllm"])
def test_layouts_of_others(tables, layout):
    k_pool, v_pool, page_table, lengths = tables
    expected = [gather(PagedKV.from_tables(*tables), row)[:2] for row in range(2)]
    if layout == "flashinfer-hnd":
        both = torch.stack([k_pool, v_pool], dim=1)
        kv = PagedKV.from_tables(both[:, 0], both[:, 1], page_table, lengths)
    else:
        dim = 1 if layout == "flashinfer-nhd" else 0
        both = torch.stack([p.transpose(1, 2).contiguous() for p in (k_pool, v_pool)], dim=dim)
        kv = PagedKV.from_tables(both.select(dim, 0), both.select(dim, 1), page_table, lengths, layout="nhd")
    assert (kv.page_size, kv.num_heads_kv) == (SIZE, HEADS) and kv.k_pool.data_ptr() == both.data_ptr()
    for row in range(2):
        assert all(torch.equal(a, b) for a, b in zip(gather(kv, row)[:2], expected[row], strict=True))


def test_append_into_tables_of_others(tables):
    """Their owner has put the pages there: the next token of row 0 goes to page 0, of row 1 to page 1."""
    nhd = [pool.transpose(1, 2).contiguous() for pool in tables[:2]]
    kv = PagedKV.from_tables(*nhd, *tables[2:], layout="nhd", key_bounds=True)
    before = [gather(kv, row)[:2] for row in range(2)]
    kv.check(tokens=1)
    k, v = torch.randn(2, 2, HEADS, 3, DIM).half().unbind(0)
    append_tokens(k, v, kv.k_pool, kv.v_pool, kv.page_table, kv.lengths, key_bounds=kv.key_bounds)
    assert tables[3].tolist() == [23, 36]
    for row in range(2):
        for got, old, new in zip(gather(kv, row)[:2], before[row], (k[row], v[row]), strict=True):
            assert torch.equal(got, torch.cat([old, new], dim=1))
    kept = kv.key_bounds.clone()
    kv.refresh_bounds()
    assert torch.equal(kept, kv.key_bounds)


@pytest.mark.parametrize(("change", "words"), [
    (lambda k, v, t, n: (k, v, t.long(), n), r"page_table is torch.int64; convert it with page_table.to"),
    (lambda k, v, t, n: (k, v, t, n.float()), "lengths is torch.float32"),
    (lambda k, v, t, n: (k, v, t.to("meta"), n), "page_table lies on meta and the pools on cpu; move it there"),
    (lambda k, v, t, n: (k, v, t, n.to("meta")), "lengths lies on meta"),
    (lambda k, v, t, n: (k, v, t[0], n), r"page_table is \[4\]; it has to be a tensor \[batch, max_pages\]"),
    (lambda k, v, t, n: (k, v, t.tolist(), n), "page_table is list"),
    (lambda k, v, t, n: (k, v, t[:1], n), "page_table has 1 rows and lengths has 2"),
    (lambda k, v, t, n: (k, v, t.T.contiguous().T, n), "page_table has stride 2 in its last dimension"),
    (lambda k, v, t, n: (k.float(), v.float(), t, n), "k_pool is torch.float32; a cache holds torch.float16 or"),
    (lambda k, v, t, n: (k, v[:5], t, n), r"v_pool is torch.float16 \[5, 2, 16, 8\] on cpu; they have to be alike"),
    (lambda k, v, t, n: (k[0], v, t, n), r"k_pool is \[2, 16, 8\]; it has to be a tensor of four dimensions"),
    (lambda k, v, t, n: (k.mT.contiguous().mT, v, t, n), "last dimension of k_pool is not contiguous"),
    (lambda k, v, t, n: (k.transpose(1, 2), v.transpose(1, 2), t, n), "pages of 2 tokens in layout 'hnd'"),
])  # fmt: skip
def test_wrong_tensors(tables, change, words):
    with pytest.raises(PageTableError, match=words) as caught:
        PagedKV.from_tables(*change(*tables))
    assert "\n" not in str(caught.value)


def test_wrong_options(tables):
    with pytest.raises(PageTableError, match="layout is 'bshd'"):
        PagedKV.from_tables(*tables, layout="bshd")
    with pytest.raises(PageTableError, match=r"key_bounds is torch.float16 \[6, 2, 8\].*\[6, 2, 2, 8\]"):
        PagedKV.from_tables(*tables, key_bounds=torch.zeros(6, 2, 8, dtype=torch.float16))


@pytest.mark.parametrize("number", [6, -2, 2**31 - 1])
def test_a_page_outside_the_pool(tables, number, monkeypatch):
    tables[2][1, 2] = number
    kv = PagedKV.from_tables(*tables)
    with pytest.raises(PageTableError, match=rf"page_table\[1, 2\] is {number} and the pool has pages 0 to 5"):
        kv.check()
    monkeypatch.setenv("FLASHCORE_DEBUG", "1")
    with pytest.raises(PageTableError, match="the pool has pages"):
        PagedKV.from_tables(*tables)
    with pytest.raises(PageTableError, match="the pool has pages"):
        paged_reference(torch.zeros(2, 2, 1, DIM).half(), kv)


@pytest.mark.parametrize("length", [65, -1])
def test_a_length_beyond_the_table(tables, length):
    tables[3][1] = length
    with pytest.raises(SequenceTooLong, match=f"Row 1 would hold {length} tokens and its pages hold 64"):
        PagedKV.from_tables(*tables).check()


def test_a_length_that_leaves_no_room(tables):
    kv = PagedKV.from_tables(*tables)
    with pytest.raises(SequenceTooLong, match="Row 1 would hold 65 tokens"):
        kv.check(tokens=32)


def test_overlapping_pages_are_wrong_only_where_they_are_written(tables, monkeypatch):
    tables[2][0, 1] = 1  # the partial last page of both
    kv = PagedKV.from_tables(*tables)
    kv.check()
    with pytest.raises(
        PagesOverlap, match="Row 0 writes its next tokens to page 1, which the page table names 2 times"
    ):
        kv.check(tokens=1)
    new = torch.ones(2, HEADS, 1, DIM, dtype=torch.float16)
    monkeypatch.setenv("FLASHCORE_DEBUG", "1")
    with pytest.raises(PagesOverlap):
        append_tokens(new, new, *tables)
    only_row_1 = torch.tensor([1])
    with pytest.raises(PagesOverlap, match="Row 1"):
        append_tokens(new[:1], new[:1], *tables, rows=only_row_1)
    assert tables[3].tolist() == [20, 33]


def test_a_page_ahead_that_another_reads(tables):
    tables[3][0] = 32  # the next token begins a new page, and the table names one that row 1 reads
    tables[2][0, 2] = 3
    kv = PagedKV.from_tables(*tables)
    kv.check()
    with pytest.raises(PagesOverlap, match="Row 0 writes its next tokens to page 3"):
        kv.check(tokens=1)


def test_a_page_ahead_that_is_not_there(tables):
    tables[2][1, 2] = 4
    tables[2][0, 1] = 0
    tables[2][0, 2] = -1
    kv = PagedKV.from_tables(*tables)
    kv.check(tokens=12)
    with pytest.raises(
        PageTableError, match=r"page_table\[0, 2\] is -1, and row 0 writes its next tokens there; reserve"
    ):
        kv.check(tokens=13)


def test_a_wrong_table_never_harms_the_pool(tables):
    tables[2][:] = torch.tensor([[5, 99, 0, 0], [5, 3, -1, 0]])
    k_before = tables[0].clone()
    new = torch.ones(2, HEADS, 2, DIM, dtype=torch.float16)
    append_tokens(new, new, *tables)
    assert torch.equal(tables[0], k_before) and tables[3].tolist() == [20, 33]
    tables[3][0] = 63  # one token fits, two do not: neither is written
    append_tokens(new, new, *tables)
    assert torch.equal(tables[0], k_before) and tables[3].tolist() == [63, 33]


@pytest.mark.parametrize(("change", "words"), [
    (lambda q: q[0], r"q is \[4, 1, 8\]"),
    (lambda q: q.float(), "q is torch.float32 on cpu, and the cache is torch.float16"),
    (lambda q: q.to("meta"), "on meta"),
    (lambda q: q[:1], r"q has batch 1 and head_dim 8, and the cache has 2 and 8.*cache.view\(sequences\)"),
    (lambda q: q[:, :3], r"num_heads_q \(3\) must be a multiple of num_heads_kv \(2\)"),
    (lambda q: q.tolist(), "q is list"),
])  # fmt: skip
def test_wrong_queries(tables, change, words):
    with pytest.raises(InvalidProblem, match=words):
        PagedKV.from_tables(*tables).check_query(change(torch.zeros(2, 4, 1, 8, dtype=torch.float16)))
