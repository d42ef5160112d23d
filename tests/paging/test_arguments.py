"""What a caller may pass to a paged cache, and the one sentence that says what was wrong with the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.paged_caches import make

from flashcore.errors import InvalidProblem, PageTableError
from flashcore.paging import PagedKV, arguments


@pytest.mark.parametrize(("options", "words"), [
    ({"page_size": 48}, "page_size is 48; it has to be one of 16, 32, 64, 128, 256"),
    ({"dtype": torch.float32}, "dtype is torch.float32; a cache holds torch.float16 or torch.bfloat16"),
    ({"num_pages": 0}, "num_pages is 0"),
    ({"batch": 2.5}, "batch is 2.5; it has to be a whole number"),
    ({"max_pages": 2**31}, "max_pages is 2147483648"),
    ({"num_pages": True}, "num_pages is True; it has to be a whole number"),
    ({"page_size": 16.0}, "page_size is 16.0; it has to be a whole number"),
    ({"key_bounds": "no"}, "key_bounds has to be True or False; got 'no'"),
])  # fmt: skip
def test_bad_sizes(options, words):
    with pytest.raises(InvalidProblem, match=words):
        make(**options)


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


@pytest.mark.parametrize(("change", "words"), [
    (lambda q: q[0], r"q is \[4, 1, 8\]"),
    (lambda q: q.float(), "q is torch.float32 on cpu, and the cache is torch.float16"),
    (lambda q: q.to("meta"), "on meta"),
    (lambda q: q[:1], r"q has batch 1 and head_dim 8, and the cache has 2 and 8.*cache.view\(sequences\)"),
    (lambda q: q[..., :4], r"q has batch 2 and head_dim 4, and the cache has 2 and 8"),
    (lambda q: q[:, :3], r"num_heads_q \(3\) must be a multiple of num_heads_kv \(2\)"),
    (lambda q: q.tolist(), "q is list"),
])  # fmt: skip
def test_wrong_queries(tables, change, words):
    with pytest.raises(InvalidProblem, match=words):
        PagedKV.from_tables(*tables).check_query(change(torch.zeros(2, 4, 1, 8, dtype=torch.float16)))


@pytest.mark.parametrize(("value", "number"), [(0, 0), (7, 7), (np.int64(3), 3), (torch.tensor(5), 5)])
def test_whole_numbers_of_any_kind(value, number):
    found = arguments.whole("tokens", value)
    assert found == number and type(found) is int


@pytest.mark.parametrize("value", [1.0, "3", None, [2], torch.tensor(1.0)])
def test_what_is_no_whole_number(value):
    with pytest.raises(InvalidProblem, match="tokens is .*; it has to be a whole number"):
        arguments.whole("tokens", value)


def test_sizes_of_any_kind_make_a_cache_of_plain_ones():
    cache = make(num_pages=np.int64(4), batch=torch.tensor(2), page_size=np.int32(16), max_pages=np.uint8(3))
    assert cache.page_table.shape == (2, 3) and type(cache.page_size) is type(cache.batch) is int


@pytest.mark.parametrize("count", [np.int64(4), np.array(4), torch.tensor(4)])
def test_a_count_of_any_kind_is_one_for_all(count):
    assert arguments.counts_of(count, 2) == [4, 4]
    with pytest.raises(InvalidProblem, match="tokens is None; it has to be a whole number"):
        arguments.counts_of(None, 2)


def test_a_list_is_not_one_value():
    assert arguments.listed("pages", range(2)) == [0, 1]
    with pytest.raises(InvalidProblem, match=r"^pages is 3; pass a list\.$"):
        arguments.listed("pages", 3)


def test_one_count_for_all_or_a_list():
    assert arguments.counts_of(4, 3) == [4, 4, 4] and arguments.counts_of((0, 2), 2) == [0, 2]
    assert arguments.counts_of(4, 0) == [] == arguments.counts_of([], 0)
    with pytest.raises(InvalidProblem, match="tokens has 2 numbers for 3 sequences"):
        arguments.counts_of([1, 2], 3)
    with pytest.raises(InvalidProblem, match="tokens is -1; it has to be at least 0"):
        arguments.counts_of(-1, 2)


def test_the_largest_size_is_taken_and_one_more_is_not():
    sizes = arguments.checked_sizes({"num_pages": np.int64(1), "batch": 2**31 - 1}, np.int32(256), torch.bfloat16)
    assert sizes == (1, 2**31 - 1, 256) and {type(size) for size in sizes} == {int}
    with pytest.raises(InvalidProblem, match="batch is 2147483648; it has to be a whole number from 1 to 2"):
        arguments.checked_sizes({"num_pages": 1, "batch": 2**31}, 256, torch.bfloat16)


def test_a_column_of_one_page_may_have_any_stride(tables):
    """Its stride is never used, and views of larger tables come with one."""
    k_pool, v_pool, page_table, lengths = tables
    arguments.check_table(page_table[:, ::4], lengths[:2], k_pool.device)
    with pytest.raises(PageTableError, match="page_table has stride 2 in its last dimension"):
        arguments.check_table(page_table[:, ::2], lengths, k_pool.device)
    with pytest.raises(PageTableError, match=r"lengths is \[0\]; it has to be a tensor \[batch\]"):
        arguments.check_table(page_table, lengths[:0], k_pool.device)
