"""The kernel of `SinkWindow`: what it takes, and on a GPU the very pages that torch's operations select."""

from __future__ import annotations

import random
import re

import pytest
import torch
from support.gpu_tools import nothing_synchronises

from flashcore.gpu import build
from flashcore.gpu.profiling import graph_us
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.paging import PAGE_SIZES, PagedKV, PageSelection, SinkWindow, _window
from flashcore.paging._window import ENTRY, KERNEL, MOST_ROWS, PARAMS, packed, takes
from flashcore.paging.selection import query_pages
from flashcore.paging.stability import check_selection

DEVICE = "cuda"
HUGE = 10**12
"""Pages that no table has and no 32-bit integer counts."""


def tables(table: torch.Tensor, lengths: torch.Tensor, *, heads: int, page_size: int, head_dim: int = 64) -> PagedKV:
    """A cache without keys: the policy looks at none."""
    pool = torch.empty(1 << 20, heads, page_size, head_dim, dtype=torch.float16, device="meta")
    cache = PagedKV(pool, pool, table, lengths)
    cache.device = table.device
    return cache


def queries(cache: PagedKV, tokens: int, group: int = 1) -> torch.Tensor:
    shape = (cache.batch, cache.num_heads_kv * group, tokens, cache.head_dim)
    return torch.empty(shape, dtype=cache.dtype, device=cache.device)


def case(seed: int, device: str, **fixed) -> tuple[torch.Tensor, PagedKV, SinkWindow]:
    """Queries, a cache and a policy, all that can vary chosen by the seed."""
    dice = random.Random(seed)
    options = {
        "page_size": dice.choice(PAGE_SIZES), "heads": dice.choice((1, 2, 3, 8, 13)), "group": dice.choice((1, 4)),
        "tokens": dice.choice((1, 1, 2, 8, 17, 200, 1000)), "batch": dice.choice((1, 2, 5, 33)),
        "max_pages": dice.choice((1, 2, 5, 32, 33, 127, 128, 129, 300, 1000)), "head_dim": dice.choice((8, 64, 128)),
        "sink_pages": dice.choice((0, 1, 1, 2, 31, 32, 33, 140, HUGE)),
        "window_pages": dice.choice((1, 1, 2, 8, 31, 33, 140, HUGE)),
        "holes": dice.choice((0.0, 0.0, 0.2, 0.9, 1.0)), "beyond": dice.choice((0, 0, 3)),
    } | fixed  # fmt: skip
    at = type("Options", (), options)
    torch.manual_seed(seed)
    table = torch.randint(0, dice.choice((2, 1 << 20)), (at.batch, at.max_pages + at.beyond), dtype=torch.int32)
    table[torch.rand(table.shape) < at.holes] = dice.choice((-1, -7, -(2**31)))
    capacity = at.max_pages * at.page_size
    few = min(capacity, at.tokens + 3)
    lengths = [dice.choice((0, 1, capacity, dice.randrange(few), dice.randrange(capacity + 1),
                            dice.randrange(at.max_pages + 1) * at.page_size)) for _ in range(at.batch)]  # fmt: skip
    cache = tables(table.to(device)[:, : at.max_pages], torch.tensor(lengths, dtype=torch.int32, device=device),
                   heads=at.heads, page_size=at.page_size, head_dim=at.head_dim)  # fmt: skip
    return queries(cache, at.tokens, at.group), cache, SinkWindow(at.sink_pages, at.window_pages)


def width_of(policy: SinkWindow, q: torch.Tensor, cache: PagedKV) -> int:
    """As `SinkWindow.select` has it."""
    most = policy.sink_pages + policy.window_pages - 1 + query_pages(q.shape[2], cache.page_size)
    return min(cache.max_pages, most)


def by_kernel(policy: SinkWindow, q: torch.Tensor, cache: PagedKV) -> PageSelection:
    asked = {"sink_pages": policy.sink_pages, "window_pages": policy.window_pages}
    with poisoned_outputs():
        found = _window.selected(cache, q.shape[2], width_of(policy, q, cache), **asked)
    assert found is not None, "this case is the kernel's to do"
    return found


def by_torch(policy: SinkWindow, q: torch.Tensor, cache: PagedKV) -> PageSelection:
    return policy._select_in_torch(cache, q.shape[2], width_of(policy, q, cache))


def one_by_one(policy: SinkWindow, q: torch.Tensor, cache: PagedKV) -> list[list[int]]:
    """The pages of each sequence, found one position and one page at a time."""
    found = []
    for row, length in zip(cache.page_table.tolist(), cache.lengths.tolist(), strict=True):
        first_query = max(0, length - q.shape[2]) // cache.page_size
        held = [page for page in range(cache.max_pages) if page * cache.page_size < length and row[page] >= 0]
        found.append([p for p in held if p < policy.sink_pages or first_query - p < policy.window_pages])
    return found


def assert_same(got: PageSelection, expected: PageSelection, what: object = "") -> None:
    assert torch.equal(got.counts, expected.counts), f"{what}: counts"
    assert torch.equal(got.pages, expected.pages), f"{what}: pages"


# ------------------------------------------------------------------------------------------------ without a GPU


@pytest.mark.compiler
def test_the_host_packs_what_the_kernel_reads():
    source = build.kernel_source(KERNEL)
    source += f'static_assert(sizeof(WindowParams) == {PARAMS.size}, "the host packs another struct");\n'
    build.compile_kernel(KERNEL, head_dim=64, dtype="float16", source=source)


@pytest.mark.compiler
def test_it_is_the_same_in_every_variant():
    """So that it is loaded from one of them, whatever head_dim and dtype the cache has."""
    bodies = set()
    for head_dim, dtype in build.variants(KERNEL):
        text = build.disassemble(build.compile_kernel(KERNEL, head_dim=head_dim, dtype=dtype).path)
        if text is None:
            pytest.skip("nvdisasm is not installed")
        begin = text.index(f".section\t.text.{ENTRY},")
        body = text[begin : text.index(".section", begin + 1)]
        # Labels are numbered through the file.
        bodies.add(tuple(re.sub(r"\.L_x_\d+", "", line) for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(\S.*;)", body)))
    assert len(bodies) == 1 and len(bodies.pop()) > 100


def test_every_field_is_packed():
    q, cache, _ = case(1, "cpu", heads=3, tokens=2, batch=4, max_pages=5, page_size=32, beyond=3)
    pages, counts = torch.empty(4, 3, 4, dtype=torch.int32), torch.empty(4, 3, dtype=torch.int32)
    fields = PARAMS.unpack(packed(cache, q.shape[2], pages, counts, sink_pages=1, window_pages=2))
    assert fields[:4] == tuple(t.data_ptr() for t in (cache.page_table, cache.lengths, pages, counts))
    assert fields[4:] == (8, 1, 2, 12, 3, 2, 32, 5, 4)
    huge = PARAMS.unpack(packed(cache, q.shape[2], pages, counts, sink_pages=HUGE, window_pages=HUGE))
    assert huge[5:7] == (5, 5)


def test_what_it_takes():
    for seed in range(40):
        assert takes(case(seed, "cpu")[1]), seed


@pytest.mark.parametrize("change", [
    lambda cache: setattr(cache, "page_table", cache.page_table.long()),
    lambda cache: setattr(cache, "page_table", cache.page_table.T.contiguous().T),
    lambda cache: setattr(cache, "page_table", cache.page_table.to("meta")),
    lambda cache: setattr(cache, "lengths", cache.lengths.long()),
    lambda cache: setattr(cache, "lengths", cache.lengths.repeat_interleave(2)[::2]),
    lambda cache: setattr(cache, "lengths", cache.lengths.to("meta")),
    lambda cache: setattr(cache, "num_heads_kv", MOST_ROWS),
])  # fmt: skip
def test_what_is_left_to_torch(change):
    _, cache, _ = case(1, "cpu", heads=2, batch=2, max_pages=5)
    assert takes(cache)
    change(cache)
    assert not takes(cache)


@pytest.mark.slow
def test_without_a_gpu_torch_does_it():
    for seed in range(100):
        q, cache, policy = case(seed, "cpu")
        found = policy.select(q, cache)
        found.check(cache)
        assert found.pages.shape == (cache.batch, cache.num_heads_kv, width_of(policy, q, cache))
        for row, expected in enumerate(one_by_one(policy, q, cache)):
            filled = expected + [-1] * (found.pages.shape[-1] - len(expected))
            assert found.counts[row].tolist() == [len(expected)] * cache.num_heads_kv, seed
            assert found.pages[row].tolist() == [filled] * cache.num_heads_kv, seed


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, 300, 50))
def test_the_same_pages_as_torch(first):
    for seed in range(first, first + 50):
        q, cache, policy = case(seed, DEVICE)
        found = by_kernel(policy, q, cache)
        found.check(cache)
        assert_same(found, by_torch(policy, q, cache), f"case {seed}, {policy}")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 7, 100_000])
def test_many_sequences_and_long_ones(batch):
    pages = 33 if batch > 7 else 20_000
    for policy in (SinkWindow(1, 8), SinkWindow(700, 7000), SinkWindow(HUGE, 1)):
        q, cache, _ = case(batch, DEVICE, batch=batch, max_pages=pages, page_size=16, heads=3, head_dim=8, tokens=1)
        assert_same(by_kernel(policy, q, cache), by_torch(policy, q, cache), f"{batch} sequences, {policy}")


@pytest.mark.gpu
def test_lengths_beyond_the_table_write_nothing_beyond_the_row():
    """Lengths that no check saw: pages of the table at most, and none after the row's end."""
    for policy in (SinkWindow(1, 2), SinkWindow(3, 9), SinkWindow(HUGE, HUGE)):
        q, cache, _ = case(5, DEVICE, batch=5, max_pages=12, page_size=16, heads=2, holes=0.0, tokens=1)
        cache.lengths.copy_(torch.tensor([193, 200, 5000, 2**31 - 300, -40]))
        assert_same(by_kernel(policy, q, cache), by_torch(policy, q, cache), policy)


@pytest.mark.gpu
def test_a_captured_selection_replays_with_the_lengths_of_the_day():
    q, cache, _ = case(3, DEVICE, batch=4, max_pages=100, page_size=16, heads=8, tokens=1, holes=0.2)
    policy = SinkWindow(2, 9)
    by_kernel(policy, q, cache)  # compiles; a graph captures the kernel only when it is there
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by_kernel(policy, q, cache)
    for length in (0, 1, 17, 800, 1600):
        cache.lengths.fill_(length)
        cache.page_table[:, length // 32] = -1
        graph.replay()
        assert_same(captured, by_torch(policy, q, cache), length)


@pytest.mark.gpu
def test_the_policy_uses_it_and_nothing_synchronises(monkeypatch):
    def never(self, cache, q_tokens, width):
        raise AssertionError("this is the kernel's to do")

    q, cache, policy = case(6, DEVICE)
    policy.select(q, cache)
    expected = by_torch(policy, q, cache)
    monkeypatch.setattr(SinkWindow, "_select_in_torch", never)
    with nothing_synchronises():
        found = policy.select(q, cache)
    assert_same(found, expected)
    assert check_selection(policy, q, cache).ok


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "pages"), [(64, 32), (1, 256)])
def test_how_long_it_takes(batch, pages):
    """Prints the time of one selection, from graph replays; no bound, since the machine may be shared."""
    q, cache, _ = case(0, DEVICE, batch=batch, max_pages=pages, page_size=128, heads=8, group=4, tokens=1, holes=0.0)
    cache.lengths.fill_(pages * 128)
    policy = SinkWindow(1, pages * 3 // 10)
    by_kernel(policy, q, cache)  # it is the kernel that `select` comes to
    taken = graph_us(lambda _: policy.select(q, cache), rounds=21)
    print(f"\n{ENTRY}, {batch} sequences of {pages} pages: {taken:.2f} us")
