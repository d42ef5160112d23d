"""Keys that lie in pages, as a tensor: any operation sees the numbers, and a kernel of ours the pages."""

from __future__ import annotations

import pytest
import torch

from flashcore import paged_ops
from flashcore.errors import UnknownName
from flashcore.integrations.pages import InPages, reader_of
from flashcore.paging import PagedKV

LENGTH = 37


@pytest.fixture
def stored():
    """Keys and values of two sequences, and the pages that hold them, out of order."""
    k, v = torch.randn(2, 2, 2, 48, 8).bfloat16()
    order = torch.tensor([[4, 0, 2], [1, 5, 3]])
    pools = []
    for dense in (k, v):
        pool = torch.empty(6, 2, 16, 8, dtype=torch.bfloat16)
        pool[order] = dense.unflatten(2, (3, 16)).transpose(1, 2)
        pools.append(pool)
    pages = PagedKV(*pools, order.int(), torch.full((2,), LENGTH, dtype=torch.int32), lengths_fit=True)
    return k[:, :, :LENGTH], v[:, :, :LENGTH], pages


def test_whoever_knows_no_pages_gets_the_numbers(stored):
    k, v, pages = stored
    keys, values = InPages(pages, pages.k_pool, LENGTH), InPages(pages, pages.v_pool, LENGTH)
    assert keys.shape == k.shape and keys.dtype == k.dtype and "[2, 2, 37, 8]" in repr(keys)
    assert torch.equal(keys.dense(), k) and torch.equal(values[:, 1], v[:, 1])
    q = torch.randn(2, 2, 5, 8).bfloat16()
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert type(out) is torch.Tensor and type(torch.cat([keys, k])) is torch.Tensor


def test_who_reads_the_pages(stored, monkeypatch):
    q, pages = torch.randn(2, 4, 1, 8).bfloat16(), stored[2]
    assert reader_of(q, pages, "reference") == "reference"
    assert reader_of(q, pages, "sdpa-math") is None, "it reads no page table"
    assert reader_of(q, pages, "auto") is None, "on a CPU the reference, which is no kernel of ours"
    decode = paged_ops.backends.get("decode")
    asked = []
    monkeypatch.setattr(paged_ops, "picked_for", lambda *given, **masks: asked.append(masks) or decode)
    assert reader_of(q, pages, "auto", window_left=3, sink=torch.zeros(4)) == "decode"
    assert asked == [{"window_left": 3, "softcap": None, "sink": True}]
    for name, window, cap, sink in (("reference", 3, 2.0, torch.zeros(4)), ("cublaslt-paged", -1, None, None)):
        assert reader_of(q, pages, name, window_left=window, softcap=cap, sink=sink) == name
    for masks in ({"window_left": 3}, {"softcap": 2.0}, {"sink": torch.zeros(4)}):
        assert reader_of(q, pages, "cublaslt-paged", **masks) is None, "it reads pages, and takes no mask"
    with pytest.raises(UnknownName):
        reader_of(q, pages, "no-such")


def test_where_bits_of_every_batch_are_asked_for_pages_are_read_by_who_promises_them(stored, monkeypatch):
    q, pages = torch.randn(2, 4, 1, 8).bfloat16(), stored[2]
    monkeypatch.setenv("FLASHCORE_BATCH_INVARIANT", "1")
    assert reader_of(q, pages, "auto") == "cpu"
    monkeypatch.setattr(paged_ops, "AUTO_ORDER", {"cpu": ("reference",)})
    paged_ops._choose.cache_clear()
    assert reader_of(q, pages, "auto") is None, "then attention over a dense copy keeps the promise"
