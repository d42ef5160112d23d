"""The selection kernel: what it compiles to, what it takes, and on a GPU the pages that torch's operations select."""

from __future__ import annotations

import random
import re

import pytest
import torch
from support.gpu_tools import nothing_synchronises
from support.sampling import sampled

from flashcore.bisection.faults.planting import Source
from flashcore.bisection.faults.plants.page_selection import RACY_BASE
from flashcore.gpu import build
from flashcore.gpu.profiling import graph_us
from flashcore.paging import PagedKV, PageSelection, TopK, _selecting
from flashcore.paging._selecting import KERNEL, MOST_PAGES, MOST_ROWS, PARAMS, packed, takes
from flashcore.paging.stability import check_selection

DEVICE = "cuda"
VARIANTS = build.variants(KERNEL)
UNIT_ROUNDOFF = 2.0**-24
"""Of float32, in which scores are added up."""


def case(seed: int, device: str, *, whole: bool, **fixed) -> tuple[torch.Tensor, PagedKV, TopK]:
    """Queries, a cache and a policy, all that can vary chosen by the seed.

    With `whole`, queries and bounds are small whole numbers: every order of adding up gives the same score, and many
    pages tie.
    """
    dice = random.Random(seed)
    options = {
        "dtype": dice.choice((torch.float16, torch.bfloat16)), "head_dim": dice.choice((64, 128)),
        "page_size": dice.choice((16, 32, 64, 128, 256)), "heads": dice.choice((1, 2, 3, 8)),
        "group": dice.choice((1, 2, 4, 16)), "tokens": dice.choice((1, 1, 2, 8)), "batch": dice.choice((1, 2, 5)),
        "max_pages": dice.choice((1, 5, 32, 33, 100, 300)), "layout": dice.choice(("bhsd", "bshd")),
        "policy": dice.choice((TopK(pages=1), TopK(pages=7), TopK(pages=16, sink_pages=2), TopK(pages=1000),
                               TopK(share=0.1), TopK(share=0.3, sink_pages=1), TopK(share=1.0),
                               TopK(pages=2, sink_pages=9))),
        "odd_keys": dice.random() < 0.3, "holes": dice.random() < 0.5,
    } | fixed  # fmt: skip
    at = type("Options", (), options)
    torch.manual_seed(seed)
    num_pages = at.batch * at.max_pages + 1

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape).float() if whole else torch.randn(shape)

    bounds = numbers(num_pages, at.heads, 2, at.head_dim).sort(dim=2).values.to(device, at.dtype)
    table = torch.randperm(num_pages)[: at.batch * at.max_pages].view(at.batch, at.max_pages).to(torch.int32)
    capacity = at.max_pages * at.page_size
    lengths = [dice.choice((capacity, dice.randrange(capacity + 1), dice.randrange(min(20, capacity) + 1)))
               for _ in range(at.batch)]  # fmt: skip
    if at.holes:
        table[torch.rand(table.shape) < 0.2] = -1
    if at.odd_keys:
        for value in (torch.nan, torch.inf, -torch.inf):
            pages = torch.randint(0, num_pages, (1 + num_pages // 20,), device=device)
            bounds[pages, :, dice.randrange(2), dice.randrange(at.head_dim)] = value
    q = numbers(at.batch, at.heads * at.group, at.tokens, at.head_dim).to(device, at.dtype)
    if at.layout == "bshd":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    pool = torch.empty(num_pages, at.heads, at.page_size, at.head_dim, dtype=at.dtype, device="meta")
    cache = PagedKV(pool, pool, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device),
                    key_bounds=bounds)  # fmt: skip
    cache.device = bounds.device  # no key is looked at, and none is made
    return q, cache, at.policy


def width_of(policy: TopK, q: torch.Tensor, cache: PagedKV) -> int:
    """As `TopK.select` has it."""
    query_pages = (q.shape[2] + cache.page_size - 2) // cache.page_size + 1
    return min(cache.max_pages, max(policy._most(cache), policy.sink_pages + query_pages))


def by_kernel(policy: TopK, q: torch.Tensor, cache: PagedKV) -> PageSelection:
    asked = {"most": policy.pages, "share": policy.share, "sink_pages": policy.sink_pages}
    found = _selecting.selected(q, cache, width_of(policy, q, cache), **asked, source=policy.source)
    assert found is not None, "this case is the kernel's to do"
    return found


def by_torch(policy: TopK, q: torch.Tensor, cache: PagedKV) -> PageSelection:
    return policy._select_in_torch(q, cache, width_of(policy, q, cache))


def assert_same(got: PageSelection, expected: PageSelection, what: object = "") -> None:
    assert torch.equal(got.counts, expected.counts), f"{what}: counts"
    assert torch.equal(got.pages, expected.pages), f"{what}: pages"


def bounds_and_roundoff(q: torch.Tensor, cache: PagedKV, sequence: int, head: int):
    """Of each page: its score in float64, and by how much a sum in float32, in any order, may differ from it."""
    group = q.shape[1] // cache.num_heads_kv
    rows = q[sequence, head * group : (head + 1) * group].double().flatten(0, 1)
    least, largest = cache.key_bounds[cache.page_table[sequence].clamp(min=0).long(), head].double().unbind(1)
    scores = rows.clamp(min=0) @ largest.T + rows.clamp(max=0) @ least.T
    terms = rows.clamp(min=0).abs() @ largest.abs().T + rows.clamp(max=0).abs() @ least.abs().T
    return scores.amax(dim=0), 2 * q.shape[3] * UNIT_ROUNDOFF * terms.amax(dim=0)


def assert_same_but_for_rounding(got: PageSelection, expected: PageSelection, q, cache, what: object = "") -> int:
    """Pages may be others where their scores differ by rounding alone. Returns how many were."""
    got.check(cache)
    assert torch.equal(got.counts, expected.counts), f"{what}: counts"
    swapped = 0
    for sequence, head in (got.pages != expected.pages).any(dim=-1).nonzero().tolist():
        count = int(got.counts[sequence, head])
        mine, theirs = (set(s.pages[sequence, head, :count].tolist()) for s in (got, expected))
        assert len(mine) == len(theirs) == count and bool((got.pages[sequence, head, count:] == -1).all()), what
        scores, roundoff = bounds_and_roundoff(q, cache, sequence, head)
        instead, dropped = sorted(mine - theirs), sorted(theirs - mine)
        assert bool((cache.page_table[sequence, instead] >= 0).all()), f"{what}: a page that was dropped"
        most, least = (scores + roundoff)[instead].amin(), (scores - roundoff)[dropped].amax()
        assert most >= least, f"{what}: sequence {sequence}, head {head}: {instead} instead of {dropped}"
        swapped += len(instead)
    return swapped


# ------------------------------------------------------------------------------------------------ without a GPU


@pytest.mark.compiler
@pytest.mark.parametrize(("head_dim", "dtype"), sampled(VARIANTS))
def test_it_compiles_without_spills(head_dim, dtype):
    cubin = build.compile_kernel(KERNEL, head_dim=head_dim, dtype=dtype)
    assert cubin.spill_bytes == 0 and cubin.warnings == []
    assert cubin.registers <= 120, "four blocks of 128 threads to a multiprocessor"
    if cubin.sass is not None:
        assert cubin.sass["LDL"] == cubin.sass["STL"] == 0
        assert "LDG.E.128" in build.disassemble(cubin.path), "16 bytes a lane"


@pytest.mark.compiler
def test_the_host_packs_what_the_kernel_reads():
    source = build.kernel_source(KERNEL)
    source += f'static_assert(sizeof(SelectionParams) == {PARAMS.size}, "the host packs another struct");\n'
    build.compile_kernel(KERNEL, head_dim=64, dtype="float16", source=source)


def test_the_limits_are_those_of_the_kernel():
    text = build.kernel_path(KERNEL).read_text()
    for name, value in (("MOST_PAGES", MOST_PAGES), ("MOST_ROWS", MOST_ROWS), ("MOST_THREADS", 512)):
        assert int(re.search(rf"constexpr int {name} = (\d+);", text)[1]) == value


def test_every_field_is_packed():
    q, cache, _ = case(1, "cpu", whole=True, head_dim=64, heads=2, group=4, tokens=2, batch=3, max_pages=5,
                       page_size=32, layout="bshd")  # fmt: skip
    pages, counts = torch.empty(3, 2, 4, dtype=torch.int32), torch.empty(3, 2, dtype=torch.int32)
    fields = PARAMS.unpack(packed(q, cache, pages, counts, most=None, share=0.3, sink_pages=2))
    tensors = (q, cache.key_bounds, cache.page_table, cache.lengths, pages, counts)
    assert fields[:6] == tuple(t.data_ptr() for t in tensors)
    assert fields[6:9] == (2 * 8 * 64, 64, 8 * 64) and fields[9:12] == (2 * 2 * 64, 2 * 64, 64)
    assert fields[12:] == (5, 0.3, 5, 2, 4, 2, 16, 32, 5, 4)
    by_number = PARAMS.unpack(packed(q, cache, pages, counts, most=10**12, share=None, sink_pages=10**12))
    assert by_number[13:16] == (1.0, 5, 5)


def test_what_it_takes():
    for seed in range(40):
        q, cache, _ = case(seed, "cpu", whole=True)
        assert takes(q, cache), seed


@pytest.mark.parametrize("change", [
    lambda q, cache: (q, setattr(cache, "key_bounds", None)),
    lambda q, cache: (q, setattr(cache, "key_bounds", cache.key_bounds.transpose(2, 3).contiguous().transpose(2, 3))),
    lambda q, cache: (q, setattr(cache, "max_pages", MOST_PAGES + 1)),
    lambda q, cache: (q, setattr(cache, "head_dim", 32)),
    lambda q, cache: (q, setattr(cache, "page_table", cache.page_table.long())),
    lambda q, cache: (q, setattr(cache, "lengths", cache.lengths.to("meta"))),
    lambda q, cache: (q.repeat(1, 1, 65, 1), None),
    lambda q, cache: (torch.cat([q, q[..., :4]], dim=3)[..., :64], None),
    lambda q, cache: (q.float(), None),
])  # fmt: skip
def test_what_is_left_to_torch(change):
    q, cache, _ = case(1, "cpu", whole=True, head_dim=64, heads=2, group=2, tokens=1, batch=2, max_pages=5)
    assert takes(q, cache)
    q, _ = change(q, cache)
    assert not takes(q, cache)


@pytest.mark.slow
def test_without_a_gpu_torch_does_it():
    for seed in range(10):
        q, cache, policy = case(seed, "cpu", whole=True)
        assert_same(policy.select(q, cache), by_torch(policy, q, cache))
        policy.select(q, cache).check(cache)


@pytest.mark.slow
def test_of_pages_with_the_same_score_the_first_are_selected():
    q, cache, _ = case(2, "cpu", whole=True, head_dim=64, heads=2, batch=2, max_pages=100, tokens=1, page_size=16,
                       holes=False, odd_keys=False)  # fmt: skip
    cache.key_bounds.fill_(1.0)
    cache.lengths.fill_(1600)
    assert TopK(pages=6, sink_pages=1).select(q, cache).pages[1, 1].tolist() == [0, 1, 2, 3, 4, 99]


@pytest.mark.parametrize(
    ("pages", "blocks", "warps"), [(32, 512, 4), (256, 8, 16), (8, 8, 4), (64, 8, 8), (64, 300, 5)]
)
def test_how_many_warps_a_block_has(pages, blocks, warps):
    assert _selecting._warps(pages, blocks, at_once=132, pages_a_warp=8, most=16) == warps


# ------------------------------------------------------------------------------------------------ a racy list (F13)


def racy() -> str:
    return Source(RACY_BASE).text(KERNEL)


@pytest.mark.compiler
def test_the_racy_base_can_be_planted():
    cubin = build.compile_kernel(KERNEL, head_dim=64, dtype="float16", source=racy())
    right = build.compile_kernel(KERNEL, head_dim=64, dtype="float16")
    assert cubin.path != right.path and cubin.warnings == []


@pytest.mark.gpu
def test_the_racy_base_is_found_and_the_kernel_itself_is_stable():
    q, cache, _ = case(4, DEVICE, whole=False, head_dim=64, dtype=torch.float16, heads=2, group=4, tokens=1, batch=2,
                       max_pages=256, page_size=16, holes=False, odd_keys=False)  # fmt: skip
    cache.lengths.fill_(256 * 16)
    assert check_selection(TopK(pages=100), q, cache).ok
    planted = type("Planted", (TopK,), {"source": racy()})(pages=100)
    found = check_selection(planted, q, cache)
    assert not found.ok and found.runs_that_differ > 0 and found.invalid is not None, found


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_whole_numbers_give_the_same_pages_ties_and_all(first):
    for seed in range(first, first + 20):
        q, cache, policy = case(seed, DEVICE, whole=True)
        assert_same(by_kernel(policy, q, cache), by_torch(policy, q, cache), f"case {seed}, {policy}")


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, 100, 20))
def test_any_numbers_give_the_same_pages_but_for_rounding(first):
    for seed in range(first, first + 20):
        q, cache, policy = case(seed, DEVICE, whole=False, odd_keys=False)
        assert_same_but_for_rounding(by_kernel(policy, q, cache), by_torch(policy, q, cache), q, cache,
                                     f"case {seed}, {policy}")  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_thousands_of_pages(head_dim):
    for seed, (pages, policy) in enumerate(
        ((8192, TopK(share=0.25)), (8192, TopK(pages=3)), (MOST_PAGES, TopK(pages=2000)))
    ):
        q, cache, _ = case(seed, DEVICE, whole=True, head_dim=head_dim, heads=2, batch=1, max_pages=pages, page_size=16)
        cache.lengths.fill_(pages * 16 - 5)
        assert_same(by_kernel(policy, q, cache), by_torch(policy, q, cache), f"{pages} pages, {policy}")


@pytest.mark.gpu
def test_the_most_query_rows():
    for group, tokens in ((16, 8), (128, 1), (1, 128)):
        q, cache, _ = case(group, DEVICE, whole=True, group=group, tokens=tokens, heads=2, batch=2, max_pages=100)
        assert_same(by_kernel(TopK(pages=9), q, cache), by_torch(TopK(pages=9), q, cache), f"{group} x {tokens}")


@pytest.mark.gpu
def test_all_pages_tie():
    q, cache, _ = case(2, DEVICE, whole=True, heads=2, batch=3, max_pages=300, odd_keys=False)
    for value in (0.0, 2.0, -0.0):
        cache.key_bounds.fill_(value)
        for policy in (TopK(pages=40), TopK(share=0.5, sink_pages=3)):
            assert_same(by_kernel(policy, q, cache), by_torch(policy, q, cache), f"{value}, {policy}")


@pytest.mark.gpu
def test_a_captured_selection_replays_with_the_lengths_of_the_day():
    q, cache, _ = case(3, DEVICE, whole=True, heads=2, batch=4, max_pages=100, tokens=1, page_size=16)
    policy = TopK(share=0.2, sink_pages=1)
    by_kernel(policy, q, cache)  # compiles; a graph captures the kernel only when it is there
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by_kernel(policy, q, cache)
    for length in (0, 1, 17, 800, 1600):
        cache.lengths.fill_(length)
        q.copy_(torch.randint(-3, 4, q.shape, device=q.device))
        graph.replay()
        assert_same(captured, by_torch(policy, q, cache), length)


@pytest.mark.gpu
def test_the_policy_uses_it_and_nothing_synchronises(monkeypatch):
    def never(self, q, cache, width):
        raise AssertionError("this is the kernel's to do")

    q, cache, policy = case(6, DEVICE, whole=True)
    policy.select(q, cache)
    monkeypatch.setattr(TopK, "_select_in_torch", never)
    with nothing_synchronises():
        found = policy.select(q, cache)
    found.check(cache)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "pages"), [(64, 32), (1, 256)])
def test_how_long_it_takes(batch, pages):
    """Prints the time of one selection, from graph replays; no bound, since the machine may be shared."""
    q, cache, _ = case(0, DEVICE, whole=False, dtype=torch.float16, head_dim=128, heads=8, group=4, tokens=1,
                       batch=batch, max_pages=pages, page_size=128, holes=False, odd_keys=False)  # fmt: skip
    cache.lengths.fill_(pages * 128)
    policy = TopK(share=0.25)
    taken = graph_us(lambda _: by_kernel(policy, q, cache), rounds=21)
    print(f"\npage_selection, {batch} sequences of {pages} pages: {taken:.2f} us")
