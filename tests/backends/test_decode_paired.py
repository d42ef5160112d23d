"""Backend `decode-paired`: how it cuts a call, what its kernel is told, and where `auto` takes it."""

from __future__ import annotations

import math

import pytest
import torch
from support.paged_tables import queries

import flashcore
from flashcore import backends, paged_ops
from flashcore.backends import decode
from flashcore.backends import decode_paired as module
from flashcore.gpu import rooms
from flashcore.paging import PagedKV, TopK, paged_reference, paginate
from flashcore.problem import Problem
from flashcore.surveys.paging.plan import SHAPES, decoder

PROBLEM = Problem(
    batch=3, num_heads_q=8, num_heads_kv=2, seqlen_q=2, seqlen_k=500, head_dim=64, causal=True, page_size=64
)


@pytest.fixture
def paired():
    return backends.get("decode-paired")


def test_it_is_decode_without_the_mode_that_it_does_not_keep(paired):
    asked = PROBLEM.with_(batch_invariant=True)
    assert paired.why_not_paged(PROBLEM) is None and paired.why_not_paged(PROBLEM, selected=True) is None
    assert paired.why_not_paged(PROBLEM.with_(window_left=9, softcap=2.0, sink=True)) is None
    assert "decode" in paired.why_not_paged(asked) and backends.get("decode").why_not_paged(asked) is None
    assert paired.variant_of == "decode" and paired.kernel != backends.get("decode").kernel


@pytest.mark.parametrize("name, ahead", [("NVIDIA H200", True), ("NVIDIA H100 80GB HBM3", False), (None, False)])
def test_auto_takes_it_where_it_was_measured_ahead(paired, monkeypatch, name, ahead):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "device_name", lambda device: name)
    assert paired.pays(PROBLEM) is ahead and backends.get("decode").pays(PROBLEM)
    assert decoder() == ("decode-paired" if ahead else "decode")
    able = ("decode-paired", "decode", "hopper-paged")
    monkeypatch.setattr(paged_ops, "first_of", lambda names, device, takes: next(
        one for one in map(backends.get, able) if takes(one)
    ))  # fmt: skip
    capped = PROBLEM.with_(head_dim=128, softcap=5.0)
    for problem, best in ((PROBLEM, decoder()), (PROBLEM.with_(batch_invariant=True), "decode"), (capped, "decode")):
        assert paged_ops._choose.__wrapped__(problem, torch.device("cuda"), "auto", False).id == best
    assert paged_ops._choose.__wrapped__(
        PROBLEM.with_(seqlen_q=9), torch.device("cuda"), "auto", False
    ).id == "hopper-paged"  # fmt: skip


def test_its_kernel_is_told_of_parts_for_two_blocks_a_multiprocessor(paired, monkeypatch):
    asked = []

    def room(size, device, stream, *, counters, own):
        asked.append((size, counters, own))
        return rooms.Room(4096, 8192)

    monkeypatch.setattr(decode, "room_for", room)
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 132)
    for name in ("params", "pool_map", "paged_params"):
        monkeypatch.setattr(type(paired), name, lambda *arguments, **options: b"")
    problem = SHAPES[4]  # 256 sequences of 8 K/V heads with 8 query heads each
    cache = PagedKV(*(torch.empty(1, 8, 128, 128, dtype=torch.float16) for _ in "kv"),
                    torch.zeros(256, 4, dtype=torch.int32), torch.full((256,), 512, dtype=torch.int32))  # fmt: skip
    shape = type("Shape", (), {"tile_n": 64, "num_splits": 1})
    q = torch.empty(256, 64, 1, 128, dtype=torch.float16)
    packed, blocks, _ = paired.paged_arguments(q, cache, problem, None, None, None, shape, 0, False)
    assert blocks == 264 and module.DECODE.unpack(packed[-1]) == (4096, 8192, 8, 1)
    assert asked == [((256 * 8 + 264) * 8 * (128 + 4) * 4, 256 * 8, False)]
    traced = paired.paged_arguments(q, cache, problem, None, None, None, shape, 0, True)
    assert traced[1] == 256 * 8 * paired.traced_parts(problem, 64), "a traced head has blocks of its own"


def test_a_traced_chain_goes_on_from_unit_to_unit_of_one_block(paired):
    shape = type("Shape", (), {"tile_n": 128, "num_splits": 1})
    assert paired.chains(PROBLEM.with_(seqlen_k=1024), shape) == (-1, 0, 1, 2, -1, 4, 5, 6)
    assert paired.chains(PROBLEM.with_(seqlen_k=100), shape) == (-1,)


# --------------------------------------------------------------------------------------------------------- on a GPU


def _judge(q, cache, **options):
    out, lse = flashcore.paged_attention(q, cache, backend="decode-paired", return_lse=True, **options)
    expected, expected_lse = paged_reference(q, cache, **options)
    seen = expected_lse > -math.inf
    assert float((out.double() - expected).abs().max()) < 4e-3 * max(1.0, float(expected.abs().max()))
    assert torch.equal(lse.isinf(), ~seen) and float((lse.double() - expected_lse)[seen].abs().max()) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("heads, group", [(1, 1), (2, 4), (8, 8), (1, 9)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_shares_of_heads_and_whole_ones(head_dim, heads, group, tokens):
    """Short sequences are heads that a block has alone, long ones are cut into many parts."""
    for batch, seqlen, page_size in ((1, 20_000, 64), (300, 70, 16), (40, 700, 128)):
        k, v = (torch.randn(batch, heads, seqlen, head_dim, device="cuda").half() for _ in "kv")
        cache = paginate(k, v, page_size)
        cache.lengths.copy_(torch.randint(0, seqlen + 1, (batch,), device="cuda"))
        _judge(queries(cache, heads * group, tokens), cache)


@pytest.mark.gpu
def test_more_heads_than_one_launch_lays_out():
    k, v = (torch.randn(900, 8, 40, 64, device="cuda").half() for _ in range(2))
    cache = paginate(k, v, 16)
    _judge(queries(cache, 8, 1), cache)


@pytest.mark.gpu
def test_the_same_call_gives_the_same_bits_and_calls_of_other_sizes_do_not_disturb_it():
    k, v = (torch.randn(7, 4, 3000, 128, device="cuda").half() for _ in range(2))
    whole = paginate(k, v, 64)
    cache = PagedKV.from_tables(whole.k_pool, whole.v_pool, whole.page_table, whole.lengths, key_bounds=True)
    q = queries(cache, 16, 1)
    first = flashcore.paged_attention(q, cache, backend="decode-paired")
    for batch in (1, 3, 7):
        part = PagedKV(cache.k_pool, cache.v_pool, cache.page_table[:batch], cache.lengths[:batch])
        _judge(q[:batch], part)
        assert torch.equal(flashcore.paged_attention(q, cache, backend="decode-paired"), first)
    chosen = flashcore.paged_attention(q, cache, backend="decode-paired", policy=TopK(share=1.0))
    assert float((chosen.double() - first.double()).abs().max()) < 2e-3


@pytest.mark.gpu
def test_masks_where_heads_are_cut_and_where_they_are_not():
    sink = torch.randn(8, device="cuda") * 3
    for batch, seqlen in ((1, 9000), (200, 90)):
        k, v = (torch.randn(batch, 2, seqlen, 64, device="cuda").half() for _ in "kv")
        cache = paginate(k, v, 64)
        cache.lengths.copy_(torch.randint(0, seqlen + 1, (batch,), device="cuda"))
        for options in ({"sink": sink}, {"softcap": 3.0}, {"window_left": 60, "sink": sink, "softcap": 9.0}):
            _judge(queries(cache, 8, 2), cache, **options)


def test_a_sink_is_told_as_any_mask_is(paired):
    assert paired.defines(PROBLEM.with_(sink=True), 0) == backends.get("decode").defines(PROBLEM.with_(sink=True), 0)
