"""Tables made elsewhere may be wrong: they then mean the same to every backend that reads them, and harm nobody."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore import backends
from flashcore.errors import InvalidProblem, PageTableError
from flashcore.paged_ops import paged_attention, paged_problem_of
from flashcore.paging import (
    AllPages,
    PagedKV,
    PagedKVCache,
    SinkWindow,
    TopK,
    append_tokens,
    gather,
    page_scores,
    paged_reference,
    recalled,
)

HEADS, DIM, SIZE, COLUMNS = 2, 64, 16, 4
OUTSIDE = (6, 1 << 20, 2**31 - 1)
LONG = (COLUMNS * SIZE + 1, 1000, 2**31 - 1)
NEGATIVE = (-1, -17, -(2**31))


def tables(device="cpu"):
    """Pools of 6 pages, and three sequences, of which the middle one is going to be spoilt."""
    generator = torch.Generator().manual_seed(3)
    pools = [torch.randn(6, HEADS, SIZE, DIM, generator=generator).half() for _ in range(2)]
    table = torch.tensor([[5, 0, 1, 2], [3, 4, 1, 0], [2, 5, 0, 3]], dtype=torch.int32)
    return [t.to(device) for t in (*pools, table, torch.tensor([20, 49, 64], dtype=torch.int32))]


def query(tokens=2, device="cpu"):
    return torch.randn(3, 4, tokens, DIM, generator=torch.Generator().manual_seed(1)).half().to(device)


def spoilt(place, value, device="cpu"):
    """Tables with one number wrong: a length of the middle sequence, or an entry of its row that is read."""
    k, v, table, lengths = tables(device)
    if place == "length":
        lengths[1] = value
    else:
        table[1, 1] = value
    return k, v, table, lengths


def meant(place, value, device="cpu"):
    """Tables that are right and mean what the wrong ones do."""
    k, v, table, lengths = tables(device)
    if place == "length":
        lengths[1] = min(max(value, 0), COLUMNS * SIZE)
    elif value < 0:
        table[1, 1] = -1
    else:  # a page of zeros, as the copy engine fills in what is not in the pool
        k, v = (torch.cat([pool, torch.zeros_like(pool[:1])]) for pool in (k, v))
        table[1, 1] = 6
    return k, v, table, lengths


WRONG = [("length", n) for n in (*LONG, *NEGATIVE)] + [("page", n) for n in (*OUTSIDE, *NEGATIVE)]


@pytest.mark.parametrize(("place", "value"), WRONG)
@pytest.mark.parametrize("policy", [None, AllPages(), SinkWindow(1, 2), TopK(share=0.5)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_a_wrong_number_means_what_is_said_of_it(place, value, policy, causal):
    kv = PagedKV.from_tables(*spoilt(place, value), key_bounds=True)
    right = PagedKV.from_tables(*meant(place, value), key_bounds=True)
    if place == "page" and isinstance(policy, TopK):
        pytest.skip("which pages are chosen by bounds that no page has is nobody's promise")
    out, lse = paged_attention(query(), kv, policy=policy, causal=causal, return_lse=True)
    expected, expected_lse = paged_attention(query(), right, policy=policy, causal=causal, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert out.isfinite().all() and not lse.isnan().any()
    if place == "length" and value < 0:
        assert not out[1].any() and (lse[1] == -math.inf).all()


@pytest.mark.parametrize(("place", "value"), WRONG)
def test_whatever_reads_wrong_tables_survives(place, value):
    kv = PagedKV.from_tables(*spoilt(place, value), key_bounds=True)
    for row in range(3):
        k, v, present = gather(kv, row)
        assert k.shape == v.shape == (HEADS, present.shape[0], DIM) and present.shape[0] <= COLUMNS * SIZE
        assert k.isfinite().all() and v.isfinite().all()
    assert page_scores(query(), kv).shape == (3, HEADS, COLUMNS)
    for policy in (AllPages(), SinkWindow(1, 2), TopK(pages=2)):
        selection = policy.select(query(), kv)
        selection.check(kv.within_table())
        mass, error = recalled(query(), kv, selection)
        assert mass.shape == error.shape
    kv.refresh_bounds()


@pytest.mark.parametrize("value", [*LONG, *NEGATIVE])
def test_tokens_are_not_written_by_a_wrong_length(value):
    k, v, table, lengths = spoilt("length", value)
    before, new = k.clone(), torch.ones(3, HEADS, 1, DIM, dtype=torch.float16)
    table[0, 1], table[2] = 2, -1  # only the first sequence can write
    append_tokens(new, new, k, v, table, lengths)
    assert lengths.tolist() == [21, value, 64]
    assert (k != before).any(dim=-1).sum() == HEADS
    append_tokens(new[:1], new[:1], k, v, table, lengths, rows=torch.tensor([1]))
    assert lengths.tolist() == [21, value, 64]


def test_rows_that_the_table_does_not_have_are_passed_over():
    k, v, table, lengths = tables()
    table[0, 1] = 2
    new = torch.ones(3, HEADS, 1, DIM, dtype=torch.float16)
    append_tokens(new, new, k, v, table, lengths, rows=torch.tensor([-1, 0, 3]))
    assert lengths.tolist() == [21, 49, 64]


def test_lengths_are_looked_after_where_nobody_vouches_for_them():
    k, v, table, lengths = tables()
    kv = PagedKV.from_tables(k, v, table, lengths)
    again = kv.within_table()
    assert again.lengths is not lengths and torch.equal(again.lengths, lengths) and again.within_table() is again
    lengths[0] = 99
    assert kv.within_table().lengths.tolist() == [64, 49, 64], "what the owner changes later is seen"
    vouched = PagedKV.from_tables(k, v, table, lengths, lengths_fit=True)
    assert vouched.within_table() is vouched
    assert not again.holes and PagedKV.from_tables(k, v, table, lengths, holes=True).within_table().holes
    own = PagedKVCache(num_pages=4, batch=2, num_heads_kv=2, head_dim=64, device="cpu")
    assert own.within_table() is own
    sequence = own.add()
    assert own.view([sequence]).within_table().lengths_fit


def test_cublaslt_s_reading_of_the_table_refuses_a_page_outside_the_pool():
    """Its products are told addresses by the host, so that an entry outside the pool would be an access outside it."""
    backend = backends.get("cublaslt-paged")
    for value in OUTSIDE:
        kv = PagedKV.from_tables(*spoilt("page", value))
        problem = paged_problem_of(query(), kv)
        with pytest.raises(PageTableError, match=rf"page_table\[1, 1\] is {value} and the pool has pages 0 to 5"):
            backend._sequences(kv, problem, SIZE, SIZE)
    for value in (*LONG, *NEGATIVE):
        kv = PagedKV.from_tables(*spoilt("length", value))
        found = backend._sequences(kv, paged_problem_of(query(), kv), SIZE, SIZE)
        wanted = [20, max(0, min(value, 64)), 64]
        assert [sum(page.keys for page in pages) for _, pages in found] == wanted
        assert all(0 < page.keys <= SIZE for _, pages in found for page in pages)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_cache_without_a_gpu_says_what_to_do():
    with pytest.raises(
        InvalidProblem, match="device is 'cuda', and no CUDA GPU is visible to torch; pass device='cpu'"
    ):
        PagedKVCache(num_pages=4, batch=2, num_heads_kv=2, head_dim=64)
    for device in ("cuda:1", torch.device("cuda")):
        with pytest.raises(InvalidProblem, match="no CUDA GPU is visible to torch"):
            PagedKVCache(num_pages=4, batch=2, num_heads_kv=2, head_dim=64, device=device)


@pytest.mark.parametrize("device", ["gpu", 3.5, None, ["cpu"]])
def test_a_device_that_does_not_exist(device):
    with pytest.raises(InvalidProblem, match="^device is .* pass 'cpu', 'cuda' or 'meta'"):
        PagedKVCache(num_pages=4, batch=2, num_heads_kv=2, head_dim=64, device=device)


READS_ON_THE_DEVICE = ("decode", "decode-paired", "hopper-paged", "reference")


@pytest.mark.gpu
@pytest.mark.parametrize(("place", "value"), WRONG)
@pytest.mark.parametrize("name", [*READS_ON_THE_DEVICE, "cublaslt-paged"])
def test_wrong_tables_mean_the_same_on_the_gpu(name, place, value):
    kv = PagedKV.from_tables(*spoilt(place, value, "cuda"))
    for tokens, causal in ((1, True), (3, True), (3, False)):
        q = query(tokens, "cuda")
        if name == "cublaslt-paged" and place == "page" and value > 0:
            with pytest.raises(PageTableError, match="the pool has pages 0 to 5"):
                paged_attention(q, kv, backend=name, causal=causal)
            continue
        out, lse = paged_attention(q, kv, backend=name, causal=causal, return_lse=True)
        right = PagedKV.from_tables(*meant(place, value))
        expected, expected_lse = paged_reference(q.cpu(), right, causal=causal)
        assert float((out.cpu().double() - expected).abs().max()) < 4e-3
        seen = expected_lse.isfinite()
        assert torch.equal(lse.cpu().isfinite(), seen)
        assert float((lse.cpu() - expected_lse)[seen].abs().max()) < 3e-2
    torch.cuda.synchronize()
    assert torch.ones(1, device="cuda").item() == 1, "the context is alive"


@pytest.mark.gpu
@pytest.mark.parametrize(("place", "value"), WRONG)
def test_policies_choose_alike_from_wrong_tables_on_the_gpu(place, value):
    q = query(1, "cuda")
    kv = PagedKV.from_tables(*spoilt(place, value, "cuda"), key_bounds=True)
    on_cpu = PagedKV.from_tables(*spoilt(place, value), key_bounds=True)
    for policy in (AllPages(), SinkWindow(1, 2), TopK(pages=2)):
        found, wanted = policy.select(q, kv), policy.select(q.cpu(), on_cpu)
        assert torch.equal(found.mask(COLUMNS).cpu(), wanted.mask(COLUMNS)), policy
        out = paged_attention(q, kv, policy=policy, backend="decode")
        assert out.isfinite().all()
    k, v, table, lengths = spoilt(place, value, "cuda")
    new = torch.ones(3, HEADS, 1, DIM, dtype=torch.float16, device="cuda")
    append_tokens(new, new, k, v, table, lengths, rows=torch.tensor([-1, 1, 3], device="cuda"))
    torch.cuda.synchronize()
