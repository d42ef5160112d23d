"""The append kernel: what it compiles to, what it takes, and on a GPU bit for bit what torch's operations do."""

from __future__ import annotations

import random
import statistics

import pytest
import torch
from support.gpu_tools import nothing_synchronises
from support.sampling import sampled

from flashcore.gpu import build
from flashcore.paging import PagedKVCache, _appending, append_tokens, bounds_of_pool, gather, writing
from flashcore.paging._appending import KERNEL, PARAMS, packed, takes

DEVICE = "cuda"
NAMES = ("k_new", "v_new", "k_pool", "v_pool", "page_table", "lengths", "rows", "counts", "key_bounds")
CHANGED = ("k_pool", "v_pool", "lengths", "key_bounds")
VARIANTS = build.variants(KERNEL)


def case(seed: int, device: str, **fixed) -> dict:
    """Tensors to append with, all that can vary chosen by the seed: shapes, strides, holes, rows, counts, odd keys."""
    dice = random.Random(seed)
    options = {
        "dtype": dice.choice((torch.float16, torch.bfloat16)), "head_dim": dice.choice((64, 128)),
        "page_size": dice.choice((16, 32, 64, 128, 256)), "heads": dice.choice((1, 2, 3, 8)),
        "batch": dice.choice((1, 2, 5, 9)), "max_pages": dice.choice((1, 3, 6)),
        "tokens": dice.choice((1, 1, 2, 40, 300)), "layout": dice.choice(("hnd", "nhd", "interleaved")),
        "strides": dice.choice(("own", "bshd", "wide", "one head")),
        "rows": dice.choice((None, torch.int32, torch.int64)), "counts": dice.choice((None, torch.int32, torch.int64)),
        "bounds": dice.random() < 0.8, "odd_keys": dice.random() < 0.3, "broken": dice.random() < 0.5,
    } | fixed  # fmt: skip
    at = type("Options", (), options)
    torch.manual_seed(seed)
    num_pages = at.batch * at.max_pages + 2

    def memory(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(device, at.dtype)

    if at.layout == "hnd":
        pools = [memory(num_pages, at.heads, at.page_size, at.head_dim) for _ in range(2)]
    elif at.layout == "nhd":
        pools = [memory(num_pages, at.page_size, at.heads, at.head_dim).transpose(1, 2) for _ in range(2)]
    else:
        pools = list(memory(num_pages, 2, at.heads, at.page_size, at.head_dim).unbind(1))
    both = torch.randn(num_pages, at.heads, 2, at.head_dim).sort(dim=2).values
    table = torch.randperm(num_pages)[: at.batch * at.max_pages].view(at.batch, at.max_pages)
    capacity = at.max_pages * at.page_size
    lengths = [dice.choice((0, at.page_size, dice.randrange(capacity + 1), max(0, capacity - at.tokens)))
               for _ in range(at.batch)]  # fmt: skip
    if at.broken:
        for _ in range(at.batch):
            table[dice.randrange(at.batch), dice.randrange(at.max_pages)] = dice.choice((-1, -7, num_pages, 2**30))
    used = dice.randrange(1, at.batch + 1) if at.rows else at.batch
    shapes = {"own": (used, at.heads, at.tokens, at.head_dim), "bshd": (used, at.tokens, at.heads, at.head_dim),
              "wide": (used, at.heads, at.tokens, at.head_dim + 8),
              "one head": (used, 1, at.tokens, at.head_dim)}  # fmt: skip
    new = [memory(*shapes[at.strides]) for _ in range(2)]
    if at.odd_keys:
        keys = new[0].flatten(0, 2)
        for value in (torch.nan, torch.inf, -torch.inf, -0.0):
            keys[dice.randrange(len(keys)), ::5] = value
    views = {"bshd": lambda t: t.transpose(1, 2), "wide": lambda t: t[..., : at.head_dim],
             "one head": lambda t: t.expand(-1, at.heads, -1, -1)}  # fmt: skip
    new = [views.get(at.strides, lambda t: t)(t) for t in new]
    rows = None if at.rows is None else torch.randperm(at.batch)[:used].to(device, at.rows)
    counts = None
    if at.counts is not None:
        counts = torch.tensor([dice.randrange(at.tokens + 1) for _ in range(used)]).to(device, at.counts)
    tensors = (
        *new, *pools, table.to(device, torch.int32),
        torch.tensor(lengths, dtype=torch.int32, device=device), rows, counts,
        both.to(device, at.dtype) if at.bounds else None,
    )  # fmt: skip
    return dict(zip(NAMES, tensors, strict=True))


def copied(tensors: dict) -> dict:
    """The same, with memory of its own for what is changed."""
    return {name: t.clone() if name in CHANGED and t is not None else t for name, t in tensors.items()}


def by_kernel(tensors: dict) -> None:
    assert _appending.launched(*tensors.values()), "this case is the kernel's to do"


def by_torch(tensors: dict) -> None:
    writing._append_in_torch(*tensors.values())


def assert_same(got: dict, expected: dict, what: object = "") -> None:
    """The same bits in the pools, the same numbers in bounds and lengths."""
    for name in ("k_pool", "v_pool"):
        assert torch.equal(got[name].view(torch.int16), expected[name].view(torch.int16)), f"{what}: {name}"
    assert torch.equal(got["lengths"], expected["lengths"]), f"{what}: lengths"
    if expected["key_bounds"] is not None:
        torch.testing.assert_close(got["key_bounds"], expected["key_bounds"], rtol=0, atol=0, equal_nan=True,
                                   msg=lambda words: f"{what}: key_bounds: {words}")  # fmt: skip


# ------------------------------------------------------------------------------------------------ without a GPU


@pytest.mark.compiler
@pytest.mark.parametrize(("head_dim", "dtype"), sampled(VARIANTS))
def test_it_compiles_without_spills(head_dim, dtype):
    cubin = build.compile_kernel(KERNEL, head_dim=head_dim, dtype=dtype)
    assert cubin.spill_bytes == 0 and cubin.warnings == [] and cubin.registers <= 64
    if cubin.sass is not None:
        assert cubin.sass["LDL"] == cubin.sass["STL"] == 0
        text = build.disassemble(cubin.path)
        assert f".text.{KERNEL} " in text and f".text.{KERNEL}_advance " in text
        assert "STG.E.128" in text, "16 bytes a thread"


@pytest.mark.compiler
def test_the_host_packs_what_the_kernel_reads():
    source = build.kernel_source(KERNEL)
    source += f'static_assert(sizeof(AppendParams) == {PARAMS.size}, "the host packs another struct");\n'
    build.compile_kernel(KERNEL, head_dim=64, dtype="float16", source=source)


def test_every_field_is_packed():
    tensors = case(3, "cpu", head_dim=64, page_size=32, heads=2, batch=5, max_pages=3, tokens=4, layout="nhd",
                   strides="bshd", rows=torch.int64, counts=torch.int32, bounds=True)  # fmt: skip
    fields = PARAMS.unpack(packed(*tensors.values()))
    order = ("k_new", "v_new", "k_pool", "v_pool", "key_bounds", "page_table", "lengths", "rows", "counts")
    assert fields[:9] == tuple(tensors[name].data_ptr() for name in order)
    assert fields[9:15] == (4 * 2 * 64, 64, 2 * 64) * 2
    assert fields[15:21] == (32 * 2 * 64, 64, 2 * 64) * 2
    assert fields[21:24] == (2 * 2 * 64, 2 * 64, 64)
    assert fields[24:] == (3, 2, 1, 5, 3, 17, 32, 4)
    bare = PARAMS.unpack(packed(*{**tensors, "rows": None, "counts": None, "key_bounds": None}.values()))
    assert bare[4] == bare[7] == bare[8] == 0 and bare[21:24] == (0, 0, 0) and bare[25:27] == (0, 0)


@pytest.mark.parametrize("seed", range(40))
def test_what_it_takes(seed):
    assert takes(*case(seed, "cpu").values())


PLAIN = {"head_dim": 64, "page_size": 16, "heads": 2, "batch": 3, "max_pages": 2, "tokens": 2, "layout": "hnd",
         "strides": "own", "rows": torch.int64, "counts": torch.int64, "bounds": True, "odd_keys": False}  # fmt: skip


@pytest.mark.parametrize("change", [
    lambda t: {"k_new": t["k_new"].float()},
    lambda t: {"k_new": t["k_new"][..., :63]},
    lambda t: {"v_new": t["v_new"][:, :, :1]},
    lambda t: {"k_new": t["k_new"][:, :, :0], "v_new": t["v_new"][:, :, :0]},
    lambda t: {"k_new": t["k_new"].transpose(2, 3).contiguous().transpose(2, 3)},
    lambda t: {"v_new": torch.cat([t["v_new"], t["v_new"][..., :4]], dim=3)[..., :64]},
    lambda t: {"k_new": torch.empty(t["k_new"].numel() + 1, dtype=t["k_new"].dtype)[1:].view(t["k_new"].shape)},
    lambda t: {"page_table": t["page_table"].long()},
    lambda t: {"page_table": t["page_table"].T.contiguous().T},
    lambda t: {"lengths": t["lengths"][:1]},
    lambda t: {"rows": t["rows"].to(torch.uint8)},
    lambda t: {"rows": None, "k_new": t["k_new"][:1], "v_new": t["v_new"][:1], "counts": None},
    lambda t: {"counts": t["counts"][None]},
    lambda t: {"counts": t["counts"].to("meta")},
    lambda t: {"key_bounds": t["key_bounds"].float()},
    lambda t: {"key_bounds": t["key_bounds"][:-1]},
    lambda t: {name: t[name][:, :, :15] for name in ("k_pool", "v_pool")},
    lambda t: {name: t[name][..., :32] for name in ("k_new", "v_new", "k_pool", "v_pool", "key_bounds")},
])  # fmt: skip
def test_what_is_left_to_torch(change):
    tensors = case(1, "cpu", **PLAIN)
    assert takes(*tensors.values())
    assert not takes(*{**tensors, **change(tensors)}.values())


def test_without_a_gpu_torch_does_it(monkeypatch):
    tensors = case(2, "cpu", **{**PLAIN, "rows": None, "broken": False})
    expected = copied(tensors)
    by_torch(expected)
    called = []
    monkeypatch.setattr(writing, "_append_in_torch", lambda *t, real=writing._append_in_torch: called.append(real(*t)))
    given = dict(tensors)
    new_and_tables = [given.pop(name) for name in NAMES[:6]]
    append_tokens(*new_and_tables, **given)
    assert len(called) == 1
    assert_same(tensors, expected)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_it_does_what_torch_does(first):
    for seed in range(first, first + 20):
        expected = case(seed, DEVICE)
        got = copied(expected)
        by_torch(expected)
        by_kernel(got)
        assert_same(got, expected, f"case {seed}")


@pytest.mark.gpu
def test_token_after_token_over_page_boundaries():
    for seed, page_size in enumerate((16, 64, 256)):
        expected = case(seed, DEVICE, tokens=7, page_size=page_size, batch=5, max_pages=6, broken=False, odd_keys=False,
                        rows=None, bounds=True)  # fmt: skip
        expected["lengths"].zero_()
        got = copied(expected)
        for _ in range(40):
            expected["k_new"].normal_()
            by_torch(expected)
            by_kernel(got)
        assert_same(got, expected, page_size)


@pytest.mark.gpu
def test_a_long_prompt():
    for dtype in (torch.float16, torch.bfloat16):
        expected = case(1, DEVICE, tokens=5000, page_size=16, batch=2, max_pages=320, heads=8, head_dim=128,
                        dtype=dtype, rows=None, counts=None, bounds=True, broken=False, strides="bshd")  # fmt: skip
        expected["lengths"].copy_(torch.tensor([3, 0], dtype=torch.int32))
        got = copied(expected)
        by_torch(expected)
        by_kernel(got)
        assert got["lengths"].tolist() == [5003, 5000]
        assert_same(got, expected, dtype)


@pytest.mark.gpu
def test_a_row_whose_tokens_do_not_all_fit_is_passed_over_whole():
    tensors = case(5, DEVICE, **{**PLAIN, "tokens": 20, "broken": False, "rows": None, "counts": None})
    tensors["lengths"].copy_(torch.tensor([10, 13, 0], dtype=torch.int32))  # the second ends past the last column
    tensors["page_table"][2, 1] = -1
    before = copied(tensors)
    by_kernel(tensors)
    assert tensors["lengths"].tolist() == [30, 13, 0]
    untouched = [int(page) for page in tensors["page_table"][1]] + [int(tensors["page_table"][2, 0])]
    for name in ("k_pool", "v_pool", "key_bounds"):
        assert torch.equal(tensors[name][untouched], before[name][untouched])


@pytest.mark.gpu
def test_a_captured_append_replays():
    """As in decoding: each replay reads the lengths and the counts that lie there."""
    got = case(9, DEVICE, **{**PLAIN, "tokens": 3, "max_pages": 6, "broken": False})
    got["lengths"].zero_()
    expected = copied(got)
    by_kernel(got)  # compiles; a graph captures the kernel only when it is there
    by_torch(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        by_kernel(got)
    for step in range(20):
        got["k_new"].normal_()
        got["counts"].fill_(step % 4)
        graph.replay()
        by_torch(expected)
    assert_same(got, expected)


@pytest.mark.gpu
def test_append_tokens_and_the_cache_use_it(monkeypatch):
    def never(*tensors):
        raise AssertionError("this is the kernel's to do")

    monkeypatch.setattr(writing, "_append_in_torch", never)
    cache = PagedKVCache(num_pages=40, batch=4, num_heads_kv=2, head_dim=64, page_size=16, device=DEVICE)
    handles = [cache.add() for _ in range(3)]
    k, v = torch.randn(2, 3, 2, 50, 64, device=DEVICE, dtype=torch.float16).unbind(0)
    with nothing_synchronises():
        cache.append(k, v, tokens=[50, 3, 17])
        child = cache.fork(handles[0])
        cache.append(k[:2, :, :1], v[:2, :, :1], [child, handles[1]])
    cache.check()
    assert torch.equal(gather(cache, child.row)[0], torch.cat([k[0], k[0, :, :1]], dim=1))
    assert torch.equal(gather(cache, handles[1].row)[1], torch.cat([v[1, :, :3], v[1, :, :1]], dim=1))
    pages = [page for handle in (child, *handles) for page in cache.pages(handle)]
    assert torch.equal(bounds_of_pool(cache)[pages], cache.key_bounds[pages])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4096])
def test_how_long_it_takes(tokens):
    """Prints the time of one append of one layer, from graph replays; no bound, since the machine may be shared."""
    tensors = case(0, DEVICE, dtype=torch.float16, head_dim=128, page_size=128, heads=8, batch=64 if tokens == 1 else 1,
                   max_pages=64, tokens=tokens, layout="hnd", strides="bshd", rows=None, counts=None, bounds=True,
                   odd_keys=False, broken=False)  # fmt: skip
    tensors["lengths"].fill_(100)
    by_kernel(tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            by_kernel(tensors)
    times = []
    for _ in range(21):
        tensors["lengths"].fill_(100)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / 20)
    print(
        f"\npaged_append, {tensors['lengths'].shape[0]} sequences of {tokens} tokens: {statistics.median(times):.2f} us"
    )
