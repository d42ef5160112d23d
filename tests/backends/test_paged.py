"""Backends over pages: what they refuse, what their kernels are told, and which launches are kept."""

from __future__ import annotations

import pytest
import torch
from support.paged_tables import LENGTHS, cache_of, queries, two_selections
from support.recorded_driver import RecordedDriver, function_at, loaded

from flashcore import backends
from flashcore.backends import _paged, decode, hopper
from flashcore.backends._masks import FARTHEST, MASK_PARAMS, mask_params
from flashcore.backends._paged import compiled_for
from flashcore.backends._traces import TRACE, TraceBuffers
from flashcore.gpu import launching
from flashcore.numerics.masking import MaskTensors
from flashcore.paged_ops import paged_attention, paged_problem_of
from flashcore.paging import PagedKV, PagedKVCache, SinkWindow, paged_reference


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("name", "heads_q", "heads_kv", "tokens"),
    [("decode", 4, 1, 1), ("decode", 8, 8, 2), ("decode", 8, 2, 3), ("decode", 32, 2, 8), ("decode", 40, 1, 7),
     ("hopper-paged", 4, 2, 1), ("hopper-paged", 3, 3, 130), ("hopper-paged", 8, 2, 700),
     ("cublaslt-paged", 4, 2, 70)],
)  # fmt: skip
def test_paged_backends_against_float64(name, heads_q, heads_kv, tokens, page_size, head_dim):
    backend = backends.get(name)
    for number, causal in enumerate((True, False)):
        dtype = torch.bfloat16 if number else torch.float16
        cache = cache_of((*LENGTHS, page_size), heads_kv, head_dim, page_size, dtype, "cuda", drop=bool(number))
        q = queries(cache, heads_q, tokens, seed=number)
        problem = paged_problem_of(q, cache, causal)
        policies = (None, SinkWindow(1, 2)) if name == "decode" else (None,)
        for policy in policies:
            selection = policy and policy.select(q, cache)
            out, lse = backend.run_paged(q, cache, problem, selection)
            expected, expected_lse = paged_reference(q, cache, selection, causal=causal)
            # A few roundings of values of about 4, and of scores where the backend stores them in 16 bits.
            room = {torch.float16: 6e-3, torch.bfloat16: 4e-2}[dtype]
            assert float((out.double() - expected).abs().max()) < room
            empty = expected_lse.isinf()
            assert torch.equal(lse[empty], expected_lse[empty].float())
            lse_room = 3e-2 if backend.rounds_scores else 1e-3
            assert not empty.all() and float((lse - expected_lse)[~empty].abs().max()) < lse_room
            again = backend.run_paged(q, cache, problem, selection)
            assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode", "hopper-paged", "cublaslt-paged"])
@pytest.mark.parametrize("by_tokens", ["k", "v"])
def test_pools_of_k_and_v_that_lie_in_different_orders(by_tokens, name):
    cache = cache_of(LENGTHS, 2, 64, 32, torch.float16, "cuda")
    pools = {"k": cache.k_pool, "v": cache.v_pool}
    pools[by_tokens] = pools[by_tokens].transpose(1, 2).contiguous().transpose(1, 2)
    apart = PagedKV.from_tables(*pools.values(), cache.page_table, cache.lengths)
    q = queries(cache, 4, 3)
    out, _ = backends.get(name).run_paged(q, apart, paged_problem_of(q, apart, True))
    expected, _ = paged_reference(q, cache, causal=True)
    assert float((out.double() - expected).abs().max()) < 6e-3


def test_launches_are_kept_apart_by_all_that_they_take_from_a_selection(monkeypatch, driver_memory):
    """The caching allocator hands out the same addresses again: an address alone says nothing of the shape."""
    keys = []
    monkeypatch.setattr(_paged, "current_stream", lambda device: 0)
    monkeypatch.setattr(_paged, "kept", lambda key, make, good: keys.append(key) or Nothing())
    cache = cache_of((500,), 2, 64, 64, torch.float16, "cpu")
    q = queries(cache, 4, 1)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    wide, narrow = two_selections("cpu")
    assert wide.pages.data_ptr() == narrow.pages.data_ptr()
    for selection in (None, wide, narrow, wide):
        backends.get("decode").attend(q, cache, paged_problem_of(q, cache), selection, out, lse)
    assert len(set(keys)) == 3 and keys[1] == keys[3]


class Nothing:
    def launch(self):
        pass


def test_launches_are_kept_apart_by_where_a_sink_lies(monkeypatch, driver_memory):
    keys = []
    monkeypatch.setattr(_paged, "current_stream", lambda device: 0)
    monkeypatch.setattr(_paged, "kept", lambda key, make, good: keys.append(key) or Nothing())
    cache = cache_of((500,), 2, 64, 64, torch.float16, "cpu")
    q = queries(cache, 4, 1)
    problem, outputs = paged_problem_of(q, cache).with_(sink=True), (torch.empty_like(q), torch.empty(q.shape[:3]))
    for backend in ("decode", "hopper-paged"):
        keys.clear()
        one, other = (MaskTensors(sink=torch.zeros(4)) for _ in range(2))
        for masks in (one, other, one):
            backends.get(backend).attend(q, cache, problem, None, *outputs, masks=masks)
        assert len(set(keys)) == 2 and keys[0] == keys[2]


@pytest.mark.parametrize(("name", "before"), [("decode", 5), ("hopper-paged", 7)])
def test_masks_are_told_behind_all_else_and_room_for_stages_comes_last(
    monkeypatch, on_an_h200, driver_memory, name, before
):
    """`before` arguments come first: the last of them `DecodeParams`, or `PagedParams`."""
    shape = loaded(tile_m=64, tile_n=64)
    cache = cache_of((500, 40), 2, 64, 64, torch.float16, "cpu")
    q, sink = queries(cache, 4, 3), torch.zeros(4)
    plain, backend = paged_problem_of(q, cache), backends.get(name)
    problem = plain.with_(window_left=70, softcap=2.0, sink=True)
    masks = MaskTensors(sink=sink)
    buffers = TraceBuffers.make(problem, 64, 64, torch.device("cpu"))
    for module in (_paged, hopper):
        monkeypatch.setattr(module, "tensor_map", lambda *given, name, **options: name.encode())
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_paged, "current_stream", lambda device: 7)
    monkeypatch.setattr(_paged, "entry_point", lambda *given: function_at(0xABC))
    monkeypatch.setattr(type(backend), "load", lambda self, problem, device, trace: loads.append(problem) or shape)
    monkeypatch.setattr(launching, "_kept", {})
    monkeypatch.setattr(launching, "_launch_kernel", lambda: driver.call)
    outputs = torch.empty_like(q), torch.empty(q.shape[:3])
    loads = []

    def launched(problem, masks, buffers, sizes):
        """The arguments of one launch behind the first ones."""
        driver.sizes, driver.launches = [0] * before + sizes, []
        backend.attend(q, cache, problem, None, *outputs, buffers, masks)
        [launch] = driver.launches
        return launch.arguments[before:]

    driver = RecordedDriver([])
    packed = mask_params(problem, masks, 0.125)
    assert MASK_PARAMS.unpack(packed)[0] == sink.data_ptr() and MASK_PARAMS.unpack(packed)[10:12] == (70, 0)
    assert launched(problem, masks, None, [MASK_PARAMS.size]) == [packed]
    assert launched(problem, masks, buffers, [MASK_PARAMS.size, TRACE.size]) == [packed, buffers.packed()]
    assert launched(plain, None, buffers, [TRACE.size]) == [buffers.packed()], "a plain call is told of no mask"
    assert loads == [problem, problem, plain]
    assert launched(problem, masks, None, [MASK_PARAMS.size]) == [packed] and len(loads) == 3, "kept"
    launched(plain, None, None, [])
    # Where pages may be dropped, a row that has seen no key yet must not subtract 0: a window over all keys sees to it.
    cache.holes = True
    [told] = launched(plain, None, None, [MASK_PARAMS.size])
    assert MASK_PARAMS.unpack(told)[0] == 0 and MASK_PARAMS.unpack(told)[10:13] == (FARTHEST, 0, 0.0)
    assert loads[3:] == [plain, plain.with_(window_left=FARTHEST)]
    assert launched(problem, masks, None, [MASK_PARAMS.size]) == [packed] and loads[5:] == [problem]


def test_what_a_kernel_is_compiled_for_changes_where_pages_may_be_dropped_and_nothing_else_tells_unseen_rows():
    cache = cache_of((500,), 2, 64, 64, torch.float16, "cpu")
    problem = paged_problem_of(queries(cache, 4, 3), cache)
    assert compiled_for(problem, cache) is problem
    cache.holes = True
    for causal in (True, False):
        changed = compiled_for(problem.with_(causal=causal), cache)
        assert changed == problem.with_(causal=causal, window_left=FARTHEST)
        assert changed.visible_pairs() == problem.with_(causal=causal).visible_pairs()
        for name in ("decode", "hopper-paged"):
            assert backends.get(name).why_not_paged(changed) is None
            macros = (dict(backends.get(name).defines(one, 0)) for one in (problem, changed))
            assert ["FLASHCORE_MASKS" in defines for defines in macros] == [False, True]
    for fields in ({"sink": True}, {"softcap": 2.0}, {"window_left": 3}, {"batch_invariant": True}):
        masked = problem.with_(**fields)
        assert compiled_for(masked, cache) is masked


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype", "far"), [(64, torch.float16, 25.0), (128, torch.bfloat16, 150.0)])
@pytest.mark.parametrize(("name", "tokens"), [("decode", 1), ("decode", 4), ("hopper-paged", 200)])
def test_scores_far_below_zero_count_behind_dropped_pages(name, tokens, head_dim, dtype, far):
    """Sequences long enough that a block of `decode` takes several units of one."""
    length, heads, size = 4000, 8, 16
    cache = PagedKVCache(num_pages=8 * 250, batch=8, num_heads_kv=heads, head_dim=head_dim, max_pages=250,
                         page_size=size, dtype=dtype)  # fmt: skip
    generator = torch.Generator(device="cuda").manual_seed(0)

    def around(mean, *shape):
        return (torch.randn(shape, generator=generator, device="cuda") * 0.3 + mean).to(dtype)

    mean = (far / head_dim**0.5) ** 0.5
    v = torch.randn(8, heads, length, head_dim, generator=generator, device="cuda").to(dtype)
    sequences = [cache.add() for _ in range(8)]
    cache.append(around(-mean, 8, heads, length, head_dim), v)
    for sequence in sequences:
        cache.drop(sequence, range(120))
    q = around(mean, 8, heads, tokens, head_dim)
    expected, expected_lse = paged_reference(q, cache)
    assert float(expected_lse.max()) < -far / 2
    out, lse = paged_attention(q, cache, backend=name, return_lse=True)
    room = {torch.float16: 6e-3, torch.bfloat16: 4e-2}[dtype]
    assert float((out.double() - expected).abs().max()) < room and float((lse - expected_lse).abs().max()) < 2e-3


MASKS = [
    {"window_left": 31}, {"window_left": 0}, {"window_left": 200, "softcap": 3.0, "sink": True}, {"sink": True},
    {"window_left": 100, "window_right": 1, "causal": False}, {"softcap": 30.0, "causal": False},
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize(
    ("name", "heads_q", "heads_kv", "tokens"),
    [("decode", 4, 1, 1), ("decode", 8, 8, 2), ("decode", 32, 2, 8), ("decode", 40, 1, 7),
     ("hopper-paged", 4, 2, 1), ("hopper-paged", 3, 3, 130), ("hopper-paged", 8, 2, 700)],
)  # fmt: skip
def test_masks_over_pages_against_float64(name, heads_q, heads_kv, tokens, page_size, head_dim):
    backend = backends.get(name)
    for number, fields in enumerate(MASKS):
        dtype = (torch.float16, torch.bfloat16)[number % 2]
        cache = cache_of((*LENGTHS, page_size), heads_kv, head_dim, page_size, dtype, "cuda", drop=number > 2)
        q = queries(cache, heads_q, tokens, seed=number)
        problem = paged_problem_of(q, cache).with_(**fields)
        sink = torch.randn(heads_q, device="cuda") * 3 if problem.sink else None
        given = {} if sink is None else {"masks": MaskTensors(sink=sink)}
        for policy in (None, SinkWindow(1, 2)) if name == "decode" else (None,):
            selection = policy and policy.select(q, cache)
            out, lse = backend.run_paged(q, cache, problem, selection, **given)
            options = {"causal": problem.causal, "window_left": problem.window_left, "softcap": problem.softcap}
            expected, expected_lse = paged_reference(
                q, cache, selection, window_right=problem.window_right, sink=sink, **options
            )
            assert float((out.double() - expected).abs().max()) < {torch.float16: 6e-3, torch.bfloat16: 4e-2}[dtype]
            empty = expected_lse.isinf()
            assert torch.equal(lse[empty], expected_lse[empty].float())
            assert not empty.all() and float((lse - expected_lse)[~empty].abs().max()) < 2e-3
            again = backend.run_paged(q, cache, problem, selection, **given)
            assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode", "hopper-paged"])
def test_pages_before_every_window_are_not_read(name):
    """What lies there is NaN, and so is the memory that its entries of the table would lead to."""
    cache = cache_of((1000, 640), 2, 64, 16, torch.float16, "cuda")
    q = queries(cache, 8, 2)
    problem = paged_problem_of(q, cache).with_(window_left=100)
    expected = backends.get(name).run_paged(q, cache, problem)
    for row, length in enumerate((1000, 640)):
        hidden = cache.page_table[row, : (length - 2 - 100) // 128 * 8].long()  # whole units of either kernel
        cache.k_pool[hidden], cache.v_pool[hidden] = float("nan"), float("nan")
    for got, wanted in zip(backends.get(name).run_paged(q, cache, problem), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
def test_a_selection_of_another_width_at_the_same_address_is_read_anew():
    cache = cache_of((500,), 2, 64, 64, torch.float16, "cuda")
    q = queries(cache, 4, 1)
    wide, narrow = two_selections("cuda")
    for selection in (wide, narrow):
        selection.pages.fill_(-1)
        selection.pages[0, 0, :2] = torch.tensor([0, 7])
        selection.pages[0, 1, :2] = torch.tensor([3, 7])
        out = torch.empty_like(q), torch.empty(q.shape[:3], device="cuda")
        for _ in range(2):
            backends.get("decode").attend(q, cache, paged_problem_of(q, cache), selection, *out)
        expected, _ = paged_reference(q, cache, selection)
        assert (out[0].double() - expected).abs().max() < 2e-3
