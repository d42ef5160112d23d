"""Tokens written into pages in torch: into tables of others too, and never where a table is wrong."""

from __future__ import annotations

import random

import pytest
import torch
from support.paged_caches import DIM, HEADS

from flashcore.errors import InvalidProblem, PageTableError
from flashcore.paging import PagedKV, append_tokens, copy_pages, gather


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


def test_a_wrong_table_never_harms_the_pool(tables):
    tables[2][:] = torch.tensor([[5, 99, 0, 0], [5, 3, -1, 0]])
    k_before = tables[0].clone()
    new = torch.ones(2, HEADS, 2, DIM, dtype=torch.float16)
    append_tokens(new, new, *tables)
    assert torch.equal(tables[0], k_before) and tables[3].tolist() == [20, 33]
    tables[3][0] = 63  # one token fits, two do not: neither is written
    append_tokens(new, new, *tables)
    assert torch.equal(tables[0], k_before) and tables[3].tolist() == [63, 33]


def one_by_one(k_new, v_new, tensors, rows, counts):
    """`append_tokens` in Python, a token at a time."""
    k_pool, v_pool, page_table, lengths = (t.clone() for t in tensors)
    num_pages, _, size, _ = k_pool.shape
    for nth, row in enumerate(range(len(lengths)) if rows is None else rows.tolist()):
        start, count = int(lengths[row]), k_new.shape[2] if counts is None else int(counts[nth])
        columns = [(start + i) // size for i in range(count)]
        pages = [int(page_table[row, c]) if c < page_table.shape[1] else -1 for c in columns]
        if not all(0 <= page < num_pages for page in pages):
            continue
        for i, page in enumerate(pages):
            k_pool[page, :, (start + i) % size], v_pool[page, :, (start + i) % size] = (
                k_new[nth, :, i],
                v_new[nth, :, i],
            )
        lengths[row] += count
    return k_pool, v_pool, page_table, lengths


@pytest.mark.parametrize("seed", range(12))
def test_any_append_is_that_of_one_token_after_the_other(seed):
    """Rows in any order or none named, counts or none, pages that are missing, lengths at any place in a page."""
    dice = random.Random(seed)
    batch, columns, count = dice.choice((1, 3, 5)), dice.choice((1, 4)), dice.choice((1, 2, 17, 40))
    pool = torch.randn(2, batch * columns + 1, HEADS, 16, DIM).half()
    table = torch.randperm(batch * columns + 1)[: batch * columns].view(batch, columns).int()
    for _ in range(dice.randrange(3)):
        table[dice.randrange(batch), dice.randrange(columns)] = dice.choice((-1, -9, 2**30, batch * columns + 1))
    lengths = torch.tensor([dice.randrange(columns * 16 + 1) for _ in range(batch)], dtype=torch.int32)
    used = dice.randrange(1, batch + 1) if seed % 2 else batch
    rows = torch.randperm(batch)[:used].to(dice.choice((torch.int32, torch.int64))) if seed % 2 else None
    counts = torch.tensor([dice.randrange(count + 1) for _ in range(used)]) if seed % 3 else None
    k_new, v_new = torch.randn(2, used, HEADS, count, DIM).half().unbind(0)
    tensors = [*pool.unbind(0), table, lengths]
    expected = one_by_one(k_new, v_new, tensors, rows, counts)
    append_tokens(k_new, v_new, *tensors, rows=rows, counts=counts)
    for name, got, wanted in zip(("k_pool", "v_pool", "page_table", "lengths"), tensors, expected, strict=True):
        assert torch.equal(got, wanted), name


def test_padding_is_never_written_and_no_token_at_all_changes_nothing(tables):
    before = [t.clone() for t in tables]
    new = torch.full((2, HEADS, 3, DIM), torch.nan, dtype=torch.float16)
    bounds = torch.zeros(6, HEADS, 2, DIM, dtype=torch.float16)
    append_tokens(new, new, *tables, counts=torch.tensor([0, 0]), key_bounds=bounds)
    assert all(torch.equal(a, b) for a, b in zip(before, tables, strict=True)) and not bounds.any()
    new[1, :, 0] = 1.0
    append_tokens(new, new, *tables, counts=torch.tensor([0, 1]))
    assert tables[3].tolist() == [20, 34] and not tables[0].isnan().any() and (tables[0][1, :, 1] == 1).all()


def test_no_gradient_is_recorded(tables):
    new = torch.ones(2, HEADS, 1, DIM, dtype=torch.float16, requires_grad=True)
    append_tokens(new, new, *tables)
    assert not tables[0].requires_grad and not tables[1].requires_grad


def test_whole_pages_are_copied_within_each_pool():
    first, second = torch.arange(12.0).view(4, 3), torch.arange(8).view(4, 1, 2)
    wanted = first.clone(), second.clone()
    copy_pages([first, second], torch.tensor([0, 3]), torch.tensor([2, 1]))
    for pool, before in zip((first, second), wanted, strict=True):
        assert torch.equal(pool, before[[0, 3, 0, 3]])


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"k_new": None}, InvalidProblem, "^k is NoneType, and the cache is torch.float16 on cpu"),
    ({"v_new": torch.zeros(2, HEADS, 3, DIM)}, InvalidProblem, "^v is torch.float32 on cpu"),
    ({"lengths": [20, 33]}, PageTableError, "^lengths is list"),
    ({"k_pool": torch.zeros(6, HEADS, 16, DIM)}, PageTableError, "^k_pool is torch.float32"),
    ({"rows": torch.tensor([0])}, InvalidProblem, r"^k is \[2, .*; it has to be \[1 sequences"),
    ({"counts": torch.tensor([9, 1])}, InvalidProblem, r"^counts\[0\] is 9; it has to be from 0 to the 3 tokens"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence_and_writes_nothing(tables, change, error, words):
    new = torch.ones(2, HEADS, 3, DIM, dtype=torch.float16)
    names = ("k_pool", "v_pool", "page_table", "lengths")
    given = {"k_new": new, "v_new": new, **dict(zip(names, tables, strict=True)), **change}
    before = [t.clone() for t in tables]
    with pytest.raises(error, match=words):
        append_tokens(**given)
    assert all(torch.equal(a, b) for a, b in zip(before, tables, strict=True))


def test_a_mapped_axis_is_refused(tables):
    new = torch.ones(3, 2, HEADS, 1, DIM, dtype=torch.float16)
    with pytest.raises(InvalidProblem, match="^k or v is mapped by torch.vmap"):
        torch.func.vmap(lambda one: append_tokens(one, one, *tables) or one)(new)
