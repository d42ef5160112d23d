"""FlashAttention's functions: its meaning in float64, for the shapes that its users rely on, whoever computes them."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from support import compiling

from flashcore import ops, paged_ops
from flashcore.backends.others import flash
from flashcore.compat import flash_attn
from flashcore.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flashcore.errors import InvalidProblem, Unsupported


def exact(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, first=0):
    """One sequence ``[S, H, D]`` in float64, from the words of FlashAttention's documentation; `out` and `lse`."""
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    apart = torch.arange(k.shape[1]) - (torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1])
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[:, None, None] * apart.abs()
    left, right = window_size
    hidden = (apart > 0) & causal | (apart > right) & (right >= 0) | (-apart > left) & (left >= 0)
    hidden = hidden | (torch.arange(k.shape[1]) < first)
    scores = scores.masked_fill(hidden, -math.inf)
    out = scores.softmax(-1).nan_to_num(0.0) @ v if k.shape[1] else torch.zeros_like(q)
    return out.transpose(0, 1), scores.logsumexp(-1) if k.shape[1] else torch.full(q.shape[:2], -math.inf).double()


def near(got, expected, dtype):
    bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=bound, atol=bound)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": -0.2, "causal": True},
    "window": {"window_size": (3, 2)},
    "causal window": {"window_size": (4, -1), "causal": True},
    "left only": {"window_size": (2, -1)},
    "window that is a causal mask": {"window_size": (-1, 0)},
    "window wider than all": {"window_size": (900, 900), "causal": True},
    "cap": {"softcap": 2.0, "causal": True},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]), "causal": True},
    "all": {"softcap": 3.0, "window_size": (5, 0), "alibi_slopes": torch.rand(4), "softmax_scale": 0.7},
}
LENGTHS = [(9, 9), (1, 13), (5, 12), (12, 5), (1, 1)]

# -------------------------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_dense_batch(name, lengths):
    rows, keys = lengths
    for dtype, heads in ((torch.float32, (4, 4)), (torch.float16, (4, 2)), (torch.bfloat16, (4, 1))):
        q = torch.randn(2, rows, heads[0], 16, dtype=dtype)
        k, v = torch.randn(2, 2, keys, heads[1], 16, dtype=dtype)
        out, lse, probs = flash_attn_func(q, k, v, **OPTIONS[name], return_attn_probs=True)
        assert out.shape == q.shape and out.is_contiguous() and out.dtype == dtype and probs.numel() == 0
        near(flash_attn_func(q, k, v, **OPTIONS[name], deterministic=True), out.double(), dtype)
        for nth in range(2):
            expected, expected_lse = exact(q[nth], k[nth], v[nth], **OPTIONS[name])
            near(out[nth], expected, dtype)
            torch.testing.assert_close(lse[nth].double(), expected_lse, rtol=1e-4, atol=1e-4)


def test_what_a_kernel_of_ours_computes_it_is_asked_to(monkeypatch):
    seen = []

    def ours(q, k, v, **options):
        seen.append((tuple(q.shape), tuple(k.shape), options))
        return torch.zeros_like(q)

    monkeypatch.setattr(ops, "attention", ours)
    monkeypatch.setattr(ops, "kernel_takes", lambda *asked, **options: False)
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16)
    plain = {"softmax_scale": None, "return_lse": False}
    for name in ("plain", "causal", "window that is a causal mask", "window wider than all"):
        assert not flash_attn_func(q, k, k, **OPTIONS[name]).any()
    shapes = (2, 4, 5, 16), (2, 2, 7, 16)
    assert seen == [(*shapes, {**plain, "causal": causal}) for causal in (False, True, True, True)]
    assert flash_attn_func(q, k, k, window_size=(2, 0)).any() and len(seen) == 4, "no kernel takes a window"
    monkeypatch.setattr(ops, "kernel_takes", lambda *asked, **options: True)
    assert not flash_attn_func(q, k, k, window_size=(2, 0)).any()
    flash_attn_func(q, k, k, softcap=3.0, window_size=(2, 1), softmax_scale=0.5)
    assert seen[4:] == [
        (*shapes, {**plain, "causal": True, "window_left": 2, "window_right": 0}),
        (
            *shapes,
            {**plain, "causal": False, "window_left": 2, "window_right": 1, "softcap": 3.0, "softmax_scale": 0.5},
        ),
    ]
    assert flash_attn_func(q, k, k, alibi_slopes=torch.ones(4)).any() and len(seen) == 6, "nor has ours slopes"


@pytest.mark.parametrize("name", [name for name in OPTIONS if "slopes" not in name and name != "all"])
def test_masks_by_ours_mean_the_same(name, monkeypatch):
    """As where a kernel takes them: a dense batch, a ragged one, and a cache, by `flashcore.attention` and its like."""
    monkeypatch.setattr(ops, "kernel_takes", lambda *asked, **options: True)
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16)
    out, lse, _ = flash_attn_func(q, k, v, **OPTIONS[name], return_attn_probs=True)
    packed = (torch.randn(9, heads, 16) for heads in (4, 2, 2))
    packed_q, packed_k, packed_v = packed
    bounds = (starts([4, 5]).long(), starts([3, 6]), 5, 6)
    ragged, ragged_lse, _ = flash_attn_varlen_func(
        packed_q, packed_k, packed_v, *bounds, **OPTIONS[name], return_attn_probs=True
    )
    k_cache, v_cache = cached([20, 7], dtype=torch.float32, head_dim=16)
    seqlens = torch.tensor([20, 7], dtype=torch.int32)
    over_cache = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, **OPTIONS[name])
    for nth, (rows, keys) in enumerate(((slice(0, 4), slice(0, 3)), (slice(4, 9), slice(3, 9)))):
        expected, expected_lse = exact(q[nth], k[nth], v[nth], **OPTIONS[name])
        near(out[nth], expected, torch.float32)
        torch.testing.assert_close(lse[nth].double(), expected_lse, rtol=1e-4, atol=1e-4)
        expected, expected_lse = exact(packed_q[rows], packed_k[keys], packed_v[keys], **OPTIONS[name])
        near(ragged[rows], expected, torch.float32)
        torch.testing.assert_close(ragged_lse[:, rows].double(), expected_lse, rtol=1e-4, atol=1e-4)
        tokens = int(seqlens[nth])
        expected, _ = exact(q[nth], k_cache[nth, :tokens], v_cache[nth, :tokens], **OPTIONS[name])
        near(over_cache[nth], expected, torch.float32)


def test_gradients_and_dropout():
    q, k, v = (torch.randn(2, 6, 4, 16, requires_grad=True) for _ in range(3))
    for name in ("causal", "all"):
        weights = torch.randn(2, 6, 4, 16)
        got = torch.autograd.grad(flash_attn_func(q, k, v, **OPTIONS[name]), (q, k, v), weights)
        true = torch.stack([exact(*(t[nth] for t in (q, k, v)), **OPTIONS[name])[0] for nth in range(2)])
        for one, expected in zip(got, torch.autograd.grad(true, (q, k, v), weights.double()), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    dropped = flash_attn_func(q, k, torch.ones_like(v), dropout_p=0.5)
    assert dropped.std() > 0.1
    with pytest.raises(Unsupported, match="no probabilities as dropout left them"):
        flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)


def test_nothing_to_attend_to():
    q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 0, 4, 16)
    out, lse, _ = flash_attn_func(q, k, k, return_attn_probs=True)
    assert not out.any() and (lse == -math.inf).all() and flash_attn_func(q[:, :0], q, q).shape == (2, 0, 4, 16)


# ------------------------------------------------------------------------------------------------------------- ragged

RAGGED = [([3, 7, 1], [3, 7, 1]), ([1, 1, 1, 1], [5, 9, 2, 17]), ([0, 4, 0], [6, 4, 0]), ([4, 4], [8, 8]),
          ([9, 2], [4, 0]), ([5], [5]), ([1, 40, 0, 2, 1], [2, 37, 3, 0, 1])]  # fmt: skip


def starts(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("name", ["plain", "causal", "causal window", "cap", "slopes", "all"])
@pytest.mark.parametrize("lengths", RAGGED, ids=str)
def test_a_ragged_batch(name, lengths):
    rows, keys = lengths
    for dtype in (torch.float32, torch.float16):
        q = torch.randn(sum(rows), 4, 16, dtype=dtype)
        k, v = torch.randn(2, sum(keys), 2, 16, dtype=dtype)
        bounds = (starts(rows), starts(keys), max(rows), max(keys))
        out, lse, _ = flash_attn_varlen_func(q, k, v, *bounds, **OPTIONS[name], return_attn_probs=True)
        near(flash_attn_varlen_func(q, k, v, *bounds, **OPTIONS[name]), out.double(), dtype)
        assert out.shape == q.shape and lse.shape == (4, sum(rows))
        pieces = zip(q.split(rows), k.split(keys), v.split(keys), strict=True)
        for piece, a, b in zip(pieces, out.split(rows), lse.split(rows, 1), strict=True):
            expected, expected_lse = exact(*piece, **OPTIONS[name])
            near(a, expected, dtype)
            torch.testing.assert_close(b.double(), expected_lse, rtol=1e-4, atol=1e-4)


def test_a_ragged_batch_of_equal_lengths_is_a_dense_one(monkeypatch):
    seen = []
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **b: seen.append(tuple(a[0].shape)) or attention(*a, **b))
    q = torch.randn(12, 4, 16)
    flash_attn_varlen_func(q, q, q, starts([4, 4, 4]), starts([4, 4, 4]), 4, 4, causal=True)
    flash_attn_varlen_func(q, q, q, starts([4, 5, 3]), starts([4, 5, 3]), 5, 5, causal=True)
    assert seen == [(3, 4, 4, 16)]


def test_longest_lengths_of_a_ragged_batch_may_be_as_long_as_a_server_likes():
    """Room is made for the tokens that are there; without it this would ask for terabytes."""
    rows, keys = RAGGED[0]
    q, k = torch.randn(sum(rows), 4, 16), torch.randn(sum(keys), 2, 16)
    bounds, pool = (starts(rows), starts(keys)), torch.randn(9, 16, 2, 16)
    pages = torch.arange(len(rows), dtype=torch.int32)[:, None]
    for tensors, more in (((q, k, k), {}), ((q, pool, pool), {"block_table": pages})):
        for options in ({}, {"alibi_slopes": torch.rand(4)}):
            expected = flash_attn_varlen_func(*tensors, *bounds, max(rows), max(keys), **options, **more)
            found = flash_attn_varlen_func(*tensors, *bounds, 2**40, 2**31, **options, **more)
            torch.testing.assert_close(found, expected)


def test_a_ragged_batch_keeps_sequences_apart():
    """NaN in one sequence reaches no other, though all lie in one tensor."""
    rows = [3, 4, 2]
    q, k, v = (torch.randn(9, 2, 16) for _ in range(3))
    k[3:7] = v[3:7] = math.nan
    out = flash_attn_varlen_func(q, k, v, starts(rows), starts(rows), 4, 4, window_size=(2, 2))
    assert out[3:7].isnan().all() and not out[:3].isnan().any() and not out[7:].isnan().any()


@pytest.mark.parametrize("page_size", [4, 16])
def test_a_ragged_batch_over_pages(page_size):
    keys, rows = [9, 17, 3], [2, 5, 3]
    pools = torch.randn(2, 20, page_size, 2, 16)
    each = -(-max(keys) // page_size)
    table = torch.randperm(20)[: 3 * each].view(3, each).int() if 3 * each <= 20 else None
    q = torch.randn(sum(rows), 4, 16)
    out = flash_attn_varlen_func(
        q, *pools, starts(rows), starts(keys), max(rows), max(keys), causal=True, block_table=table
    )
    for nth, (one, got) in enumerate(zip(q.split(rows), out.split(rows), strict=True)):
        key, value = (pool[table[nth].long()].flatten(0, 1)[: keys[nth]] for pool in pools)
        near(got, exact(one, key, value, causal=True)[0], torch.float32)


def test_gradients_of_a_ragged_batch():
    rows = [3, 5, 2]
    q, k, v = (torch.randn(10, 2, 16, requires_grad=True) for _ in range(3))
    out = flash_attn_varlen_func(q, k, v, starts(rows), starts(rows), 5, 5, causal=True)
    true = torch.cat([exact(*one, causal=True)[0] for one in zip(*(t.split(rows) for t in (q, k, v)), strict=True)])
    weights = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), weights)
    for one, expected in zip(got, torch.autograd.grad(true, (q, k, v), weights.double()), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True])
def test_compiled_whole_and_not_again_for_each_length(ragged):
    def dense_call(q, k, v, bounds):
        return flash_attn_func(q, k, v, causal=True, window_size=(3, 0))

    def ragged_call(q, k, v, bounds):
        return flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, 32, 32, causal=True)

    compiling.forget()
    call, counter = ragged_call if ragged else dense_call, compiling.counter()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for rows in (6, 11):
        given = (torch.randn(2, rows, 4, 16), *torch.randn(2, 2, rows, 2, 16), starts([rows - 4, 4]))
        torch.testing.assert_close(compiled(*given), call(*given), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    compiling.forget()


# -------------------------------------------------------------------------------------------------------------- cache


def cached(lengths, *, capacity=32, heads=2, dtype=torch.float16, rows=None, head_dim=64):
    """A cache with NaN wherever no token is."""
    shape = (len(lengths) if rows is None else rows, capacity, heads, head_dim)
    caches = torch.full((2, *shape), math.nan, dtype=dtype)
    for row, length in enumerate(lengths):
        caches[:, row, :length] = torch.randn(2, length, heads, head_dim).to(dtype)
    return caches[0], caches[1]


@pytest.mark.parametrize("name", ["plain", "causal", "causal window", "cap", "slopes"])
@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_dense_cache(name, new, tokens):
    lengths = [20, 7, 29]
    for dtype in (torch.float16, torch.float32):
        k_cache, v_cache = cached(lengths, dtype=dtype)
        before, seqlens = k_cache.clone(), torch.tensor(lengths, dtype=torch.int32)
        q = torch.randn(3, tokens, 4, 64).to(dtype)
        fresh = torch.randn(2, 3, new, 2, 64).to(dtype) if new else (None, None)
        out, lse = flash_attn_with_kvcache(
            q, k_cache, v_cache, *fresh, cache_seqlens=seqlens, **OPTIONS[name], return_softmax_lse=True
        )
        assert seqlens.tolist() == lengths and out.shape == q.shape
        for row, length in enumerate(lengths):
            if new:
                assert torch.equal(k_cache[row, length : length + new], fresh[0][row])
            assert torch.equal(k_cache[row, :length], before[row, :length])
            assert k_cache[row, length + new :].isnan().all()
            whole = length + new
            expected, expected_lse = exact(q[row], k_cache[row, :whole], v_cache[row, :whole], **OPTIONS[name])
            near(out[row], expected, dtype)
            torch.testing.assert_close(lse[row].double(), expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["causal", "causal window"])
@pytest.mark.parametrize("page_size", [16, 24])
def test_a_cache_in_pages(name, page_size):
    """Pages of 16 our kernels read; those of 24 nobody has a kernel for."""
    lengths, each = [37, 16, 3], 3
    pools = torch.full((2, 12, page_size, 2, 64), math.nan, dtype=torch.float16)
    table = torch.randperm(12)[:9].view(3, each).int()
    for row, length in enumerate(lengths):
        for position in range(length):
            pools[:, table[row, position // page_size], position % page_size] = torch.randn(2, 2, 64).half()
    q, (k, v) = torch.randn(3, 2, 4, 64).half(), torch.randn(2, 3, 2, 2, 64).half()
    out = flash_attn_with_kvcache(
        q, *pools, k, v, cache_seqlens=torch.tensor(lengths, dtype=torch.int32), block_table=table, **OPTIONS[name]
    )
    for row, length in enumerate(lengths):
        keys, values = (pool[table[row].long()].flatten(0, 1)[: length + 2] for pool in pools)
        assert torch.equal(keys[length:], k[row]) and torch.equal(values[length:], v[row])
        near(out[row], exact(q[row], keys, values, **OPTIONS[name])[0], torch.float16)


def test_our_kernels_read_a_dense_cache_as_pages_without_a_copy(monkeypatch):
    seen = []
    attention = paged_ops.paged_attention

    def paged(q, cache, **options):
        seen.append((cache.page_size, cache.k_pool.data_ptr(), cache.page_table.tolist()))
        return attention(q, cache, **options)

    monkeypatch.setattr(paged_ops, "paged_attention", paged)
    k_cache, v_cache = cached([20, 7, 29], rows=5)
    chosen = torch.tensor([2, 0], dtype=torch.int32)
    q = torch.randn(2, 1, 4, 64).half()
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=torch.tensor([29, 20], dtype=torch.int32), cache_batch_idx=chosen
    )
    assert seen == [(32, k_cache.data_ptr(), [[2], [0]])]
    for row, place in enumerate(chosen.tolist()):
        length = [20, 7, 29][place]
        near(out[row], exact(q[row], k_cache[place, :length], v_cache[place, :length])[0], torch.float16)


@pytest.mark.parametrize("options", [
    {"window_size": (9, 0)}, {"window_size": (4, 1)}, {"softcap": 2.0, "causal": True},
    {"window_size": (16, -1), "softcap": 1.5, "causal": True},
])  # fmt: skip
def test_windows_and_softcaps_over_a_cache_are_told_to_whoever_reads_its_pages(monkeypatch, options):
    told = []
    attention = paged_ops.paged_attention
    monkeypatch.setattr(paged_ops, "paged_attention", lambda q, cache, **more: told.append(more) or attention(
        q, cache, **more
    ))  # fmt: skip
    lengths = [20, 7, 29]
    k_cache, v_cache = cached(lengths)
    q = torch.randn(3, 2, 4, 64).half()
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=torch.tensor(lengths, dtype=torch.int32), return_softmax_lse=True, **options
    )
    [more] = told
    left, right = options.get("window_size", (-1, -1))
    assert more["causal"] == (options.get("causal", False) or right == 0) and more.get("softcap") == options.get(
        "softcap"
    )
    assert more.get("window_left", -1) == left and (more["causal"] or more.get("window_right", -1) == right)
    for row, length in enumerate(lengths):
        expected, expected_lse = exact(q[row], k_cache[row, :length], v_cache[row, :length], **options)
        near(out[row], expected, torch.float16)
        torch.testing.assert_close(lse[row].double(), expected_lse, rtol=1e-3, atol=1e-3)


def test_what_no_kernel_over_pages_takes_goes_on_to_the_others(monkeypatch):
    """Slopes of ALiBi and padding on the left; and on a GPU a head_dim, or a mask, that our kernels do not take."""
    k_cache, v_cache = cached([20, 7])
    q, lengths = torch.randn(2, 1, 4, 64).half(), torch.tensor([20, 7], dtype=torch.int32)
    asked = []
    monkeypatch.setattr(paged_ops, "paged_attention", lambda *given, **more: 1 / 0)
    for options in ({"alibi_slopes": torch.rand(4)}, {"cache_leftpad": torch.tensor([2, 0], dtype=torch.int32)}):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, softcap=2.0, causal=True, **options)
    cache = flash_attn._Cache(q, k_cache, v_cache, lengths, None, None, None)
    on_gpu = SimpleNamespace(
        is_cuda=True, shape=q.shape, dtype=q.dtype, device=SimpleNamespace(type="cuda", index=None)
    )
    for takes in (True, False):
        monkeypatch.setattr(paged_ops, "kernel_takes", lambda *given, takes=takes: asked.append(given) or takes)
        capped = flash_attn._masking(True, (5, 0), 2.0, None, 0.0, 1, 32)
        assert cache._in_pages(on_gpu, capped) is takes
    assert asked[0] == ("cuda", 0, torch.float16, 64, 16, ("window", "softcap"))


def test_rows_padding_and_one_length_for_all():
    k_cache, v_cache = cached([30, 30], dtype=torch.float32)
    q = torch.randn(2, 2, 4, 64)
    first = torch.tensor([0, 11], dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=30, cache_leftpad=first, causal=True)
    for row in range(2):
        expected, _ = exact(q[row], k_cache[row, :30], v_cache[row, :30], causal=True, first=int(first[row]))
        near(out[row], expected, torch.float32)
    full_k, full_v = torch.randn(2, 2, 32, 2, 64)
    out = flash_attn_with_kvcache(q, full_k, full_v)
    near(out[1], exact(q[1], full_k[1], full_v[1])[0], torch.float32)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_rotation(interleaved, causal):
    """As complex numbers: a pair is turned by the angle of its position."""
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    k_cache, v_cache = cached([5, 9], dtype=torch.float32)
    q, (k, v) = torch.randn(2, 3, 4, 64), torch.randn(2, 2, 3, 2, 64)
    angles = torch.outer(torch.arange(32.0), 100.0 ** -(torch.arange(16) / 16))

    def turned(tensor, positions):
        front, rest = tensor[..., :32].double(), tensor[..., 32:].double()
        pairs = front.unflatten(-1, (16, 2)) if interleaved else front.unflatten(-1, (2, 16)).mT
        turned = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles.double()[positions])[:, None]
        pairs = torch.view_as_real(turned)
        return torch.cat([(pairs if interleaved else pairs.mT).flatten(-2), rest], -1)

    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, angles.cos(), angles.sin(), lengths, causal=causal, rotary_interleaved=interleaved
    )
    for row, length in enumerate(lengths.tolist()):
        positions = torch.arange(length, length + 3)
        near(k_cache[row, length : length + 3], turned(k[row], positions), torch.float32)
        keys = torch.cat([k_cache[row, :length].double(), turned(k[row], positions)])
        queries = turned(q[row], positions if causal else torch.full((3,), length))
        near(out[row], exact(queries, keys, v_cache[row, : length + 3], causal=causal)[0], torch.float32)


# ------------------------------------------------------------------------------------------------------------- peers


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Tensors of the CPU that say they lie on a GPU, and stand-ins for the packages that are installed there."""
    installed = {}

    class Gpu(torch.Tensor):
        is_cuda = True

    def functions(name, index):
        return tuple(found for module in installed.values() for key, *found in [module] if key == name)

    monkeypatch.setattr(flash, "functions", functions)
    monkeypatch.setattr(ops, "kernel_takes", lambda *asked, **options: False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return installed, lambda *shape: torch.randn(shape).half().as_subclass(Gpu)


def test_a_peer_gets_only_what_it_knows(on_a_gpu):
    installed, make = on_a_gpu
    seen = []

    def third(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
        seen.append(("third", softmax_scale, causal, window_size, softcap))
        return torch.zeros_like(q)

    def second(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
               alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
        seen.append(("second", alibi_slopes is not None, deterministic, return_attn_probs))
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.inf)
        return (torch.ones_like(q), lse, None) if return_attn_probs else torch.ones_like(q)

    for name, function in (("third", third), ("second", second)):
        parameters = frozenset(inspect.signature(function).parameters)
        installed[name] = ("flash_attn_func", function, flash.HALVES, parameters)
    q = make(1, 4, 2, 64)
    assert not flash_attn_func(q, q, q, softcap=5.0, window_size=(2, 1), softmax_scale=0.5).any()
    flash_attn_func(q, q, q, alibi_slopes=torch.ones(2), deterministic=True)
    lse = flash_attn_func(q, q, q, alibi_slopes=torch.ones(2), return_attn_probs=True)[1]
    assert (lse == -math.inf).all(), "what a row without a key has here"
    assert seen == [("third", 0.5, False, (2, 1), 5.0), ("second", True, True, False), ("second", True, False, True)]
    flash_attn_func(q, q, q, softcap=5.0, softmax_scale=-0.5)
    assert len(seen) == 3, "a scale below 0 is not for them"


def test_torchs_own_is_called_with_what_it_takes(on_a_gpu, monkeypatch):
    _, make = on_a_gpu
    seen = []

    def forward(q, k, v, starts_q, starts_k, rows, keys, dropout, causal, debug, **options):
        seen.append((starts_q is not None, rows, keys, dropout, causal, debug, options))
        return torch.zeros_like(q), torch.full((q.shape[-2], q.shape[0]), math.inf), None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    q, k = make(2, 5, 4, 64), make(2, 7, 4, 64)
    flash_attn_func(q, k, k, window_size=(3, 1), softmax_scale=-2.0)
    packed, bounds = make(9, 4, 64), (starts([3, 6]), starts([3, 6]), 6, 6)
    lse = flash_attn_varlen_func(packed, packed, packed, *bounds, causal=True, return_attn_probs=True)[1]
    assert lse.shape == (4, 9) and (lse == -math.inf).all()
    assert seen == [
        (False, 5, 7, 0.0, False, False, {"scale": 2.0, "window_size_left": 3, "window_size_right": 1}),
        (True, 6, 6, 0.0, True, False, {"scale": 0.125}),
    ]
    flash_attn_func(q, k, k, softcap=3.0)
    assert len(seen) == 2, "it has no softcap"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_set_around_a_call_changes_nothing_of_it(dtype):
    """A cache in float16 under autocast to bfloat16: torch's cat would take it for a mix of the two, and fail."""
    q, cache = torch.randn(2, 1, 4, 64, dtype=dtype), torch.randn(2, 32, 2, 64, dtype=dtype)
    new, angles = torch.randn(2, 1, 2, 64, dtype=dtype), torch.rand(33, 16, dtype=dtype)
    rows = torch.randn(9, 4, 64, dtype=dtype)

    def calls():
        yield flash_attn_func(q, cache, cache, softcap=3.0, window_size=(9, 0))
        yield flash_attn_varlen_func(rows, rows, rows, *GOOD, alibi_slopes=torch.ones(4), causal=True)
        yield from flash_attn_with_kvcache(
            q, cache.clone(), cache.clone(), new, new, angles, angles, 5, causal=True, return_softmax_lse=True
        )

    expected = list(calls())
    with torch.autocast("cpu", torch.bfloat16):
        found = list(calls())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


# --------------------------------------------------------------------------------------------------------- bad input

Q, K = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16)
PACKED = torch.randn(9, 4, 16)
GOOD = (starts([3, 6]), starts([3, 6]), 6, 6)
NEW, ANGLES, POOL = (Q[:, :1, :2], Q[:, :1, :2]), torch.rand(9, 4), torch.randn(3, 16, 4, 16)


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: flash_attn_func(Q[0], K, K), r"^q has shape \[5, 4, 16\]; it has to be \[batch, seqlen, num_heads"),
    (lambda: flash_attn_func("q", K, K), "^q is 'q'; it has to be a dense tensor of floats"),
    (lambda: flash_attn_func(Q, K.half(), K), "^k is torch.float16 on cpu and q is torch.float32"),
    (lambda: flash_attn_func(Q, K, K[:, :6]), "differ in shape"),
    (lambda: flash_attn_func(Q[:, :, :3], K, K), r"^num_heads_q \(3\) must be a multiple of num_heads_kv \(2\)"),
    (lambda: flash_attn_func(Q[:1], K, K), "^q has batch 1, and k and v have 2"),
    (lambda: flash_attn_func(Q[..., :8], K, K), "^k has head_dim 16 and q has 8"),
    (lambda: flash_attn_func(Q.mT.contiguous().mT, K, K), r"not contiguous; pass q.contiguous\(\)"),
    (lambda: flash_attn_func(Q, K, K, causal="yes"), "^causal has to be True or False"),
    (lambda: flash_attn_func(Q, K, K, window_size=3), r"^window_size is 3; it has to be \(left, right\)"),
    (lambda: flash_attn_func(Q, K, K, softcap=-1), "^softcap is -1.0"),
    (lambda: flash_attn_func(Q, K, K, softmax_scale=math.inf), "^softmax_scale must be finite"),
    (lambda: flash_attn_func(Q, K, K, dropout_p=1.5), "^dropout_p is 1.5; it has to be at least 0"),
    (lambda: flash_attn_func(Q, K, K, dropout_p=None), "^dropout_p is None; it has to be at least 0"),
    (lambda: flash_attn_func(Q, K, K, softcap=1e39), "^softcap is 1e.39; .* finite in float32"),
    (lambda: flash_attn_func(Q, K, K, window_size=(True, False)), "^window_size is True; it has to be a whole number"),
    (lambda: flash_attn_func(Q[..., :0], K[..., :0], K[..., :0]), r"^q has shape .*; it needs a head and a head_dim"),
    (lambda: flash_attn_func(Q[:, :, :0], K, K, window_size=(1, 1)), "it needs a head and a head_dim"),
    (lambda: flash_attn_func(Q, K, K, alibi_slopes=torch.ones(3)), "^alibi_slopes is a torch.float32 tensor"),
    (lambda: flash_attn_func(Q, K, K, deterministic=1), "^deterministic has to be True or False"),
    (lambda: flash_attn_varlen_func(Q, Q, Q, *GOOD), r"^q has shape .* \[tokens, num_heads, head_dim\]"),
    (lambda: flash_attn_varlen_func(PACKED, PACKED, PACKED, [0, 3, 9], *GOOD[1:]), r"^cu_seqlens_q is \[0, 3, 9\]"),
    (lambda: flash_attn_varlen_func(PACKED, PACKED, PACKED, GOOD[0], starts([9]), 6, 9), "^cu_seqlens_k is a"),
    (lambda: flash_attn_varlen_func(PACKED, PACKED, PACKED, GOOD[0].float(), *GOOD[1:]), "int32 tensor"),
    (lambda: flash_attn_varlen_func(PACKED, PACKED, PACKED, starts([6, -3]), *GOOD[1:]), "begin with 0 and never fall"),
    (lambda: flash_attn_varlen_func(PACKED, PACKED, PACKED, starts([3, 5]), *GOOD[1:]), "ends with 8, and there are 9"),
    (lambda: flash_attn_varlen_func(PACKED, PACKED, PACKED, *GOOD[:2], 5, 6), "^max_seqlen_q is 5, and a sequence"),
    (lambda: flash_attn_varlen_func(PACKED, PACKED, PACKED, *GOOD[:2], 6.5, 6), "^max_seqlen_q is 6.5"),
    (lambda: flash_attn_with_kvcache(Q, K, K, cache_seqlens=8), "^cache_seqlens go from 8 to 8, and with 0 new"),
    (lambda: flash_attn_with_kvcache(Q, K, K, Q[:, :1, :2], Q[:, :1, :2], cache_seqlens=7), "with 1 new tokens"),
    (lambda: flash_attn_with_kvcache(Q, K, K, Q[:, :1, :2], cache_seqlens=2), "come together; pass both"),
    (lambda: flash_attn_with_kvcache(Q, K, K, Q[:, :1], Q[:, :1], cache_seqlens=2), r"have to be \[2, tokens, 2, 16\]"),
    (lambda: flash_attn_with_kvcache(Q[:1], K, K), "^q has batch 1 and k_cache 2 rows; pass cache_batch_idx"),
    (lambda: flash_attn_with_kvcache(Q, K, K, cache_batch_idx=starts([1]), block_table=torch.zeros(2, 1).int()),
     "pass one of them"),
    (lambda: flash_attn_with_kvcache(Q, K, K, rotary_cos=torch.ones(9, 4)), "^rotary_cos and rotary_sin come together"),
    (lambda: flash_attn_with_kvcache(Q, K, K, rotary_cos=torch.ones(9, 4), rotary_sin=torch.ones(9, 4)), "without k"),
    (lambda: flash_attn_with_kvcache(Q.clone().requires_grad_(), K, K), "computes no gradients"),
    (lambda: flash_attn_with_kvcache(Q, K.numpy(), K), "^k_cache is a numpy array"),
    (lambda: flash_attn_with_kvcache(Q, K, K, cache_seqlens=True), "^cache_seqlens is True; it has to be a whole"),
    (lambda: flash_attn_with_kvcache(Q, K, K, rotary_interleaved="no"), "^rotary_interleaved has to be True or False"),
    (lambda: flash_attn_with_kvcache(Q, K, K, cache_batch_idx=ints(0, 2)), r"^cache_batch_idx\[1\] is 2, and k_cache"),
    (lambda: flash_attn_with_kvcache(Q, K, K, cache_batch_idx=ints(-1, 1)), r"^cache_batch_idx\[0\] is -1"),
    (lambda: flash_attn_with_kvcache(Q, K, K, *NEW, cache_seqlens=2, cache_batch_idx=ints(1, 1)), "two sequences"),
    (lambda: flash_attn_with_kvcache(Q, K, K, cache_leftpad=ints(-1, 0)), "^cache_leftpad has -1; it has to be at le"),
    (lambda: flash_attn_with_kvcache(Q, K, K, block_table=[[0]]), r"^block_table is \[\[0\]\]; .* tensor \[2, pages"),
    (lambda: flash_attn_with_kvcache(Q, K, K, block_table=ints(0, 2)[:, None]), r"^block_table\[1, 0\] is 2, and "),
    (lambda: flash_attn_with_kvcache(Q, K, K, *NEW, cache_seqlens=0, block_table=ints(0, -1)[:, None]), "1, 0. is -1"),
    (lambda: flash_attn_varlen_func(PACKED, PACKED, PACKED, *GOOD, block_table=ints(0, 1)[:, None]),
     r"^k has shape \[9, 4, 16\]; it has to be \[num_pages, page_size, num_heads, head_dim\] with a block_table"),
    (lambda: flash_attn_varlen_func(PACKED, POOL, POOL, *GOOD, block_table=ints(0, 3)[:, None]),
     r"^block_table\[1, 0\] is 3, and the pool has pages 0 to 2; a sequence has tokens there"),
    (lambda: flash_attn_varlen_func(PACKED, POOL, POOL, *GOOD, block_table=3), r"^block_table is 3; .* \[2, pages\]"),
    (lambda: flash_attn_with_kvcache(Q, K, K, *NEW, *[ANGLES.to("meta")] * 2, 2), "lie on meta and meta, and k on cpu"),
    (lambda: flash_attn_with_kvcache(Q, K, K, *NEW, *[ANGLES.int()] * 2, 2), "have to be alike, floats"),
    (lambda: flash_attn_with_kvcache(Q, K, K, *NEW, ANGLES, [1], 2), "have to be alike, floats"),
])  # fmt: skip
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(InvalidProblem, match=words) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(("call", "mapped", "words"), [
    (lambda c: flash_attn_varlen_func(PACKED, PACKED, PACKED, c, c, 6, 6), starts([3, 6]), "^cu_seqlens_q is mapped"),
    (lambda c: flash_attn_with_kvcache(Q, K, K, cache_seqlens=c), ints(3, 5), "^cache_seqlens is mapped by torch.vmap"),
    (lambda new: flash_attn_with_kvcache(Q, K, K, new, new, cache_seqlens=2), NEW[0], "what is written to it is map"),
])  # fmt: skip
def test_what_vmap_cannot_map_is_one_sentence(call, mapped, words):
    with pytest.raises(InvalidProblem, match=words):
        torch.func.vmap(call)(mapped.expand(3, *mapped.shape))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("name", OPTIONS)
def test_on_the_gpu(name, head_dim):
    options = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in OPTIONS[name].items()}
    rows, keys = [100, 1, 0, 300], [100, 200, 50, 280]
    q = torch.randn(sum(rows), 4, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, sum(keys), 2, head_dim, device="cuda", dtype=torch.bfloat16)
    bounds = (starts(rows).cuda(), starts(keys).cuda(), max(rows), max(keys))
    out, lse, _ = flash_attn_varlen_func(q, k, v, *bounds, **options, return_attn_probs=True)
    pieces = zip(q.cpu().split(rows), k.cpu().split(keys), v.cpu().split(keys), strict=True)
    for piece, got, got_lse in zip(pieces, out.cpu().split(rows), lse.cpu().split(rows, 1), strict=True):
        expected, expected_lse = exact(*piece, **OPTIONS[name])
        near(got, expected, torch.bfloat16)
        if "alibi_slopes" not in options:  # a constant of each row, which FlashAttention leaves out
            torch.testing.assert_close(got_lse.double(), expected_lse, rtol=1e-3, atol=1e-2)
    dense = flash_attn_func(q[None, :100], k[None, :100], v[None, :100], **options)
    near(dense[0].cpu(), exact(q[:100].cpu(), k[:100].cpu(), v[:100].cpu(), **OPTIONS[name])[0], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "causal", "causal window", "cap"])
def test_a_cache_on_the_gpu(name):
    lengths = [200, 70, 290]
    k_cache, v_cache = (t.cuda() for t in cached(lengths, capacity=512))
    q, (k, v) = torch.randn(3, 2, 4, 64).half().cuda(), torch.randn(2, 3, 2, 2, 64).half().cuda()
    seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, **OPTIONS[name])
    for row, length in enumerate(lengths):
        keys, values = k_cache[row, : length + 2].cpu(), v_cache[row, : length + 2].cpu()
        assert torch.equal(keys[length:], k[row].cpu())
        near(out[row].cpu(), exact(q[row].cpu(), keys, values, **OPTIONS[name])[0], torch.float16)
