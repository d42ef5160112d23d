"""Backend `hopper`: which entry function it picks, how tiles are dealt out, and the worst for a stale reference."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import random
import shutil
import struct
import subprocess

import pytest
import torch

from flashcore import backends
from flashcore.backends import _tensor_maps, hopper
from flashcore.backends._cuda import PARAMS
from flashcore.backends._tensor_maps import MAP_BYTES, tensor_map
from flashcore.errors import LaunchError
from flashcore.faults import catalogue
from flashcore.faults.planting import PLAIN
from flashcore.gpu import build
from flashcore.gpu.launching import LoadedKernel
from flashcore.measure import check
from flashcore.measure.check import check_attention
from flashcore.numerics import reference
from flashcore.ops import problem_of
from flashcore.problem import PRESETS, Problem, square

MULTIPROCESSORS = 132
BOTH = ("hopper", "hopper-unsplit")
VARIANTS = list(itertools.product((64, 128), ("float16", "bfloat16")))


@pytest.fixture
def on_an_h200(monkeypatch):
    """As on a GPU of that many multiprocessors."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: MULTIPROCESSORS)


def loaded_for(problem: Problem, *, split: bool = False) -> LoadedKernel:
    """The launch shape that the kernel exports for a problem, without a GPU to load it on."""
    if split:
        chains = 4 if problem.head_dim == 64 else 3
        tile_m, tile_n, threads = 64, 64, 128 * chains
    else:
        asked = dict(backends.get("hopper").defines(problem, 0))
        warpgroups = asked.get("FLASHCORE_NUM_CONSUMERS", 4 if problem.head_dim == 64 else 3)
        tile_m, tile_n, threads = 64 * warpgroups, asked.get("FLASHCORE_TILE_N", 64), 128 * (warpgroups + 1)
        chains = 1
    fields = {"module": None, "tile_m": tile_m, "tile_n": tile_n, "threads": threads, "shared_bytes": 200 * 1024}
    return LoadedKernel(**fields, num_splits=chains, overlaps_launch=int(split))


# ------------------------------------------------------------------------------------------------ which entry function


def test_keys_are_split_while_every_small_tile_has_a_multiprocessor(on_an_h200):
    chosen, unsplit = (backends.get(name) for name in BOTH)
    assert chosen.entry(PLAIN, 0) == chosen.entry(PRESETS["latency"], 0) == hopper.SPLIT
    assert chosen.entry(PRESETS["report"], 0) == "attention_hopper"
    tiles = [(1, 132, 64), (2, 66, 1), (4, 3, 64 * 11), (1, 1, 64 * 132)]
    for batch, heads, seqlen in tiles:
        assert chosen.entry(square(batch, heads, seqlen, 64), 0) == hopper.SPLIT
        assert chosen.entry(square(batch, heads, seqlen + 64, 64), 0) == "attention_hopper"
        assert unsplit.entry(square(batch, heads, seqlen, 64), 0) == "attention_hopper"
    assert chosen.entry(square(1, 132, 65, 64), 0) == "attention_hopper", "one row more is a tile more"
    assert not unsplit.swept and unsplit.kernel == chosen.kernel


def test_the_grid_is_a_block_a_tile_or_a_block_a_multiprocessor(on_an_h200):
    chosen = backends.get("hopper")
    few = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=100, seqlen_k=200, head_dim=64)
    assert chosen.blocks(few, loaded_for(few, split=True), 0) == (2, 4, 2)
    assert chosen.blocks(few, loaded_for(few), 0) == (8, 1, 1)
    report = PRESETS["report"]
    assert chosen.blocks(report, loaded_for(report), 0) == (MULTIPROCESSORS, 1, 1)


def test_tiles_of_two_warpgroups_while_all_of_them_fit_at_once(on_an_h200):
    chosen, unsplit = (backends.get(name) for name in BOTH)
    for head_dim in (64, 128):
        few = (("FLASHCORE_NUM_CONSUMERS", 2), ("FLASHCORE_TILE_N", head_dim))
        assert chosen.defines(square(1, 16, 1024, head_dim), 0) == few
        assert chosen.defines(square(1, 132, 128, head_dim), 0) == few
        for many in (square(1, 132, 129, head_dim), square(1, 133, 128, head_dim), square(16, 16, 2048, head_dim)):
            assert chosen.defines(many, 0) == ()
        assert unsplit.defines(square(1, 16, 1024, head_dim), 0) == ()


# ------------------------------------------------------------------------------------------------ who gets which tile


@functools.lru_cache(maxsize=64)
def heavy_to_light(first: int, end: int, tiles: int) -> list[int]:
    """The tiles that `heavy_to_light` of attention_hopper.cu finds at positions 0, 1, ...; here by sorting."""
    return sorted(range(first, end), key=lambda number: (number % tiles, number // tiles))


def deal(problem: Problem, tile_m: int, blocks: int, sections: int, block: int, step: int):
    """What `deal` of attention_hopper.cu gives a block at a step: flat head, first row and end; None for no more."""
    warpgroups_a_tile = tile_m // 64
    tiles, heads = -(-problem.seqlen_q // tile_m), problem.num_heads_q * problem.batch
    last_round, left = divmod(tiles * heads, blocks)
    place, piece, piece_rows = block if step % 2 == 0 else blocks - 1 - block, 0, tile_m
    if step >= last_round:
        if step > last_round or left == 0:
            return None
        warpgroups = -(-warpgroups_a_tile // min(warpgroups_a_tile, blocks // left))
        place, piece = divmod(place, -(-warpgroups_a_tile // warpgroups))
        piece_rows = warpgroups * 64
        if place >= left:
            return None
    number = step * blocks + place
    if sections > 0:
        section = min(step // 2, sections - 1)
        first = section * 2 * blocks
        end = tiles * heads if section == sections - 1 else first + 2 * blocks
        number = heavy_to_light(first, end, tiles)[number - first]
    head, nth = divmod(number, tiles)
    first_row = -(-problem.seqlen_q // 16) * 16 - (nth + 1) * tile_m if problem.causal else nth * tile_m
    own_row = first_row + piece * piece_rows
    return head, own_row, min(first_row + tile_m, own_row + piece_rows)


@functools.cache
def hands(problem: Problem) -> list[list[tuple[int, int, int]]]:
    """The tiles of each block, in the order in which it works on them."""
    chosen, loaded = backends.get("hopper"), loaded_for(problem)
    blocks, sections = chosen.blocks(problem, loaded, 0)[0], chosen.sections(problem, loaded, 0)

    def hand(block: int) -> list[tuple[int, int, int]]:
        tiles = (deal(problem, loaded.tile_m, blocks, sections, block, step) for step in itertools.count())
        return list(itertools.takewhile(lambda tile: tile is not None, tiles))

    return [hand(block) for block in range(blocks)]


def pages_of(problem: Problem, end_row: int) -> int:
    """Pages that a tile sees whose rows end there: its work."""
    last = min(end_row, problem.seqlen_q) - 1
    seen = last + 1 + problem.seqlen_k - problem.seqlen_q if problem.causal else problem.seqlen_k
    return -(-max(0, min(seen, problem.seqlen_k)) // loaded_for(problem).tile_n)


def many_shapes() -> list[Problem]:
    rng = random.Random(0)
    lengths = [1, 64, 65, 192, 193, 256, 257, 500, 1000, 2048, 3000]
    return [
        square(
            rng.choice([1, 2, 3, 5, 16]), rng.choice([1, 2, 7, 8, 16, 33]), rng.choice(lengths), rng.choice([64, 128]),
            causal=rng.random() < 0.6,
        ).with_(seqlen_k=rng.choice(lengths))
        for _ in range(200)
    ] + [square(1, 133, 64, 64), square(1, 132, 64, 64), square(2, 16, 8192, 64), PRESETS["report"]]  # fmt: skip


def test_every_row_is_dealt_exactly_once(on_an_h200):
    for problem in many_shapes():
        rows: dict[int, list[range]] = {}
        for head, first_row, end_row in itertools.chain(*hands(problem)):
            if real := range(max(0, first_row), min(end_row, problem.seqlen_q)):
                rows.setdefault(head, []).append(real)
        assert rows.keys() == set(range(problem.batch * problem.num_heads_q)), problem.label()
        for of_head in rows.values():
            ordered = sorted(of_head, key=lambda r: r.start)
            joints = itertools.pairwise([0, *(edge for r in ordered for edge in (r.start, r.stop)), problem.seqlen_q])
            assert all(end == start for end, start in list(joints)[::2]), problem.label()


def test_under_a_causal_mask_what_no_whole_tile_holds_are_the_first_rows(on_an_h200):
    problem = square(16, 16, 1024, 128, causal=True)
    firsts = {first_row for _, first_row, _ in itertools.chain(*hands(problem))}
    assert firsts == {1024 - 192 * tile for tile in range(1, 7)} and min(firsts) == -128
    whole = square(16, 16, 1024, 128)
    assert {first_row for _, first_row, _ in itertools.chain(*hands(whole))} == {192 * tile for tile in range(6)}


@pytest.mark.parametrize(("left", "rows"), [(1, 64), (44, 64), (45, 128), (66, 128), (67, 192), (131, 192), (132, 192)])
def test_the_last_round_is_cut_so_that_every_block_gets_something(on_an_h200, left, rows):
    problem = square(1, MULTIPROCESSORS + left, 192, 128)
    lasts = [hand[1] for hand in hands(problem) if len(hand) > 1]
    assert {end - first for _, first, end in lasts} == ({rows, 64} if rows == 128 else {rows})
    assert len(lasts) == left * -(-192 // rows)


def test_a_block_that_has_no_more_tiles_never_gets_another(on_an_h200):
    """It ends at the first `false`; the turns forth and back must not leave one for later."""
    for problem in many_shapes()[::10]:
        chosen, loaded = backends.get("hopper"), loaded_for(problem)
        blocks, sections = chosen.blocks(problem, loaded, 0)[0], chosen.sections(problem, loaded, 0)
        for block in range(blocks):
            given = [deal(problem, loaded.tile_m, blocks, sections, block, step) is not None for step in range(200)]
            assert given == sorted(given, reverse=True)


@pytest.mark.slow
def test_the_deal_is_even(on_an_h200):
    """Where no row goes without keys, no block gets more than one heaviest tile above the mean."""
    for problem in many_shapes():
        if problem.causal and problem.seqlen_k < problem.seqlen_q:
            continue
        loads = [sum(pages_of(problem, end_row) + 1 for _, _, end_row in hand) for hand in hands(problem)]
        heaviest = pages_of(problem, problem.seqlen_q) + 1
        assert max(loads) - sum(loads) / len(loads) <= heaviest, problem.label()


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_the_deal_of_the_usual_workloads_is_within_a_twentieth_of_even(on_an_h200, head_dim, causal):
    for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
        problem = square(min(16, 32768 // seqlen), 16, seqlen, head_dim, causal=causal)
        loads = [sum((pages_of(problem, end) + 1) * (end - first) for _, first, end in hand) for hand in hands(problem)]
        assert max(loads) <= 1.05 * sum(loads) / len(loads), problem.label()


def test_there_are_no_sections_or_as_many_as_are_about_as_even_as_any(on_an_h200):
    from flashcore.backends._dealing import AS_EVEN, LAST_SECTION, largest_load, tile_pages

    chosen = backends.get("hopper")
    for problem in many_shapes():
        loaded = loaded_for(problem)
        sections, blocks = chosen.sections(problem, loaded, 0), chosen.blocks(problem, loaded, 0)[0]
        heads, pages = problem.batch * problem.num_heads_q, tile_pages(problem, loaded.tile_m, loaded.tile_n)
        rounds = -(-heads * len(pages) // blocks)
        tried = [n for n in range(1, rounds + 1) if 0 < rounds - 2 * (n - 1) <= LAST_SECTION]
        loads = {n: largest_load(pages, heads, blocks, n) for n in (0, *tried)}
        even = [n for n, load in loads.items() if load <= (1 + AS_EVEN) * min(loads.values())]
        assert sections == (0 if 0 in even or not problem.causal else even[-1])


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler for the host")
def test_the_kernel_finds_the_tile_at_each_position(tmp_path):
    """`heavy_to_light` is plain C++: compiled for the host, beside sorting."""
    text = build.kernel_source("attention_hopper")
    start = text.index("__device__ __forceinline__ int heavy_to_light")
    body = text[start : text.index("\n}\n", start) + 3].replace("__device__ __forceinline__ ", "")
    cases = [(first, end, tiles) for tiles in (1, 2, 3, 8, 11) for first in range(25) for end in range(first + 1, 60)]
    calls = "".join(f"show({first}, {end}, {tiles});\n" for first, end, tiles in cases)
    (tmp_path / "found.cpp").write_text(
        f"#include <algorithm>\n#include <cstdio>\nusing std::min, std::max;\n{body}"
        "void show(int first, int end, int tiles) {\n"
        '  for (int i = 0; i < end - first; ++i) std::printf("%d ", heavy_to_light(i, first, end, tiles));\n'
        '  std::printf("\\n");\n}\n'
        f"int main() {{\n{calls}}}\n"
    )
    subprocess.run(["c++", "-std=c++17", "-o", tmp_path / "found", tmp_path / "found.cpp"], check=True)
    found = subprocess.run([tmp_path / "found"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [[int(n) for n in line.split()] for line in found] == [heavy_to_light(*case) for case in cases]


def test_few_heads_are_under_way_at_a_time(on_an_h200):
    """What two rounds read of K and V fits in L2; the last section may have up to ten rounds."""
    problem = square(2, 16, 16384, 128, causal=True)
    rounds = list(zip(*(hand[:8] for hand in hands(problem)), strict=True))
    for pair in zip(rounds[::2], rounds[1::2], strict=True):
        assert len({head for head, _, _ in itertools.chain(*pair)}) <= 5


@pytest.mark.slow
def test_the_model_of_a_load_is_what_the_blocks_get(on_an_h200):
    from flashcore.backends._dealing import largest_load, tile_pages

    for problem in many_shapes():
        loaded, dealt = loaded_for(problem), hands(problem)
        chosen = backends.get("hopper")
        pages = tile_pages(problem, loaded.tile_m, loaded.tile_n)
        modelled = largest_load(
            pages, problem.batch * problem.num_heads_q, len(dealt), chosen.sections(problem, loaded, 0)
        )
        loads = [sum(pages_of(problem, end_row) + 1 for _, _, end_row in hand) for hand in dealt]
        cut = any(end - first < loaded.tile_m for _, first, end in itertools.chain(*dealt))
        assert max(loads) == modelled if not cut else max(loads) >= modelled - pages.max() - 1, problem.label()


# ------------------------------------------------------------------------------------------------ what is passed


def tensors(problem: Problem, device: str = "cpu"):
    dtype = getattr(torch, problem.dtype)
    q = torch.randn(problem.batch, problem.num_heads_q, problem.seqlen_q, problem.head_dim, device=device, dtype=dtype)
    kv_shape = (problem.batch, problem.num_heads_kv, problem.seqlen_k, problem.head_dim)
    k, v = (torch.randn(kv_shape, device=device, dtype=dtype) for _ in range(2))
    return q, k, v


@pytest.fixture
def told(monkeypatch, on_an_h200):
    """What each tensor map is made from, by name."""
    seen: dict[str, dict] = {}

    def recorded(address, shape, strides, *, rows, dtype, name):
        seen[name] = {
            "address": address,
            "shape": tuple(shape),
            "strides": tuple(strides),
            "rows": rows,
            "dtype": dtype,
        }
        return name.encode().ljust(MAP_BYTES)

    monkeypatch.setattr(hopper, "tensor_map", recorded)
    return seen


@pytest.mark.parametrize("split", [False, True])
def test_an_entry_function_is_told_params_maps_and_unsplit_the_sections(told, split):
    problem = PLAIN.with_(dtype="bfloat16")
    q, k, v = tensors(problem)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # a view of [B,S,H,D]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    loaded = loaded_for(problem, split=split)
    arguments = backends.get("hopper").arguments(q, k, v, out, lse, problem, loaded)
    maps = [MAP_BYTES] * (3 if split else 4)
    assert [len(a) for a in arguments] == [PARAMS.size, *maps] + ([] if split else [4])
    assert [a[:1] for a in arguments[1 : 1 + len(maps)]] == [b"q", b"k", b"v", b"o"][: len(maps)]
    if not split:
        assert struct.unpack("i", arguments[5]) == (0,)  # head by head, where all tiles are alike
    assert {name: one["rows"] for name, one in told.items()} == {
        "q": loaded.tile_m, "k": 64, "v": 64, **({} if split else {"out": 16})
    }  # fmt: skip
    assert told["k"]["strides"] == (200 * 2 * 64, 64, 2 * 64) and told["v"]["strides"] == (2 * 200 * 64, 200 * 64, 64)
    assert all(one["dtype"] == "bfloat16" for one in told.values())


@pytest.mark.parametrize("name", BOTH)
def test_wrong_strides_reach_the_map_of_k_and_no_other(told, name):
    problem, (q, k, v) = PLAIN, tensors(PLAIN)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    for fault, wrong in (("F11", (2 * 25600, 12800, 64)), ("F12", (25600, 0, 64))):
        catalogue.get(fault).plant(name).arguments(q, k, v, out, lse, problem, loaded_for(problem))
        assert told["k"]["strides"] == wrong and told["v"]["strides"] == (25600, 12800, 64)


class FakeMap:
    def __init__(self):
        self.bytes = ctypes.create_string_buffer(bytes(range(MAP_BYTES)), MAP_BYTES)

    def getPtr(self):  # noqa: N802  the driver's name
        return ctypes.addressof(self.bytes)


def test_a_tensor_map_is_asked_for_innermost_dimension_first_and_in_bytes(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    calls = []

    def encode(*arguments):
        calls.append(arguments)
        return driver.CUresult.CUDA_SUCCESS, FakeMap()

    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", encode)
    made = tensor_map(4096, (2, 4, 100, 128), (51200, 128, 512), rows=64, dtype="bfloat16")
    assert made == bytes(range(MAP_BYTES))
    kind, rank, address, sizes, steps, box = calls[0][:6]
    assert kind == driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 and (rank, address) == (4, 4096)
    assert [int(n) for n in sizes] == [128, 100, 4, 2] and [int(n) for n in steps] == [1024, 256, 102400]
    assert [int(n) for n in box] == [64, 64, 1, 1], "128 bytes of columns, the widest swizzle"
    # The stride of a dimension of one means nothing, and the driver would refuse one that is no multiple of 16 bytes.
    tensor_map(4096, (1, 1, 100, 64), (7, 3, 64), rows=64, dtype="float16")
    assert [int(n) for n in calls[1][4]] == [128, 128, 128]


def test_a_map_that_the_driver_refuses_is_an_error_that_names_the_tensor(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    refused = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", lambda *_: (refused, None))
    with pytest.raises(LaunchError, match=r"k of shape \(1, 2, 100, 64\) and strides \(12800, 6400, 64\)") as raised:
        tensor_map(8, (1, 2, 100, 64), (12800, 6400, 64), rows=64, dtype="float16", name="k")
    assert "CUDA_ERROR_INVALID_VALUE" in str(raised.value)


@pytest.fixture
def driver():
    """The driver's library, which describes tensors without a GPU as well."""
    bindings = pytest.importorskip("cuda.bindings.driver")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pytest.skip("libcuda is not installed")
    if int(bindings.cuInit(0)[0]):
        pytest.skip("the driver does not start here")
    return bindings


def test_what_the_driver_itself_takes_and_refuses(driver):
    shape, strides = (2, 4, 100, 64), (25600, 6400, 64)
    right = tensor_map(1 << 20, shape, strides, rows=256, dtype="float16")
    assert len(right) == MAP_BYTES and right != tensor_map(1 << 20, shape, strides, rows=256, dtype="bfloat16")
    bshd = tensor_map(1 << 20, shape, (25600, 64, 256), rows=64, dtype="float16")
    assert len(bshd) == MAP_BYTES, "strides may come in any order of size"
    wrong = [
        {"address": (1 << 20) + 8},  # no multiple of 16 bytes
        {"rows": 257},
        {"strides": (25600, 6400, 68)},  # rows that start at odd multiples of 8 bytes
        {"shape": (2, 4, 0, 64)},
    ]
    for change in wrong:
        given = {"address": 1 << 20, "shape": shape, "strides": strides, "rows": 64, "dtype": "float16", **change}
        with pytest.raises(LaunchError, match="cuTensorMapEncodeTiled"):
            _tensor_maps.tensor_map(given.pop("address"), given.pop("shape"), given.pop("strides"), **given)


# ------------------------------------------------------------------------------------------------ the stale reference
# Scores are made by construction: q[0] = 8 and k[0] = level with a scale of 1/8 give a score of `level` in natural
# units, and the other columns a little noise, with a standard deviation of NOISE^2 sqrt(D - 1) / 8, at most 0.09. A
# thread holds 16 of the 64 keys of a page for each of its two rows. The guard is the sum of their probs: 32768 =
# e^10.40 in float16, and 2^64 = e^44.36 in bfloat16.

SCALE = 0.125
NOISE = 0.25
PAGE = 64
LONG = {"seqlen_q": 150, "seqlen_k": 14 * PAGE + 5}
"""15 pages, the last of five keys: at least three in each of four chains. Three tiles of 64 rows, or one of 256."""


def grouped(head_dim: int, dtype: str, **fields) -> Problem:
    usual = {"batch": 1, "num_heads_q": 2, "num_heads_kv": 1, "softmax_scale": SCALE, **LONG}
    return Problem(head_dim=head_dim, dtype=dtype, **{**usual, **fields})


def leveled(problem: Problem, level, *, weight=1.0, noise: float = NOISE):
    """Q, K and V whose scores are `weight` of the row times `level` of the key, and noise."""
    q, k, v = tensors(problem, "cuda")
    q[..., 1:] *= noise
    k[..., 1:] *= noise
    q[..., 0] = torch.as_tensor(weight, device="cuda") / abs(problem.scale)
    k[..., 0] = torch.as_tensor(level, device="cuda", dtype=torch.float32)
    return q, k, v


def page_of_key(problem: Problem) -> torch.Tensor:
    return torch.arange(problem.seqlen_k, device="cuda") // PAGE


def raised(name: str, problem: Problem, inputs) -> torch.Tensor:
    """Where a row's reference was raised, bool ``[heads, later pages, rows]``, and which pages those are.

    A page is later that is not the first of its chain.
    """
    trace = backends.get(name).trace(*inputs, problem)
    later = [j for j, before in enumerate(reference.links(trace.previous, trace.row_max.shape[2])) if before >= 0]
    assert trace.page_size == PAGE and len(later) >= 10
    return (trace.rescale != 1)[0][:, later], torch.tensor(later, device="cuda")


@pytest.fixture
def assert_right(monkeypatch):
    """Check both backends on given inputs as `check_attention` does, and that a second run gives the same bits."""

    def assert_right(problem: Problem, inputs, names=BOTH) -> None:
        monkeypatch.setattr(check, "make_inputs", lambda *_, **__: inputs)
        check.make_case.cache_clear()
        for name in names:
            trial = check_attention(name, problem)
            assert trial.status == "ok", f"{name} on {problem.label()}: {trial.reason}"
            first, again = (backends.get(name).run(*inputs, problem) for _ in range(2))
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]), f"{name}: other bits"

    yield assert_right
    check.make_case.cache_clear()


def test_the_guard_is_where_these_tests_think_it_is():
    """What the levels below are chosen by."""
    assert "LARGEST_PAGE_SUM = FLASHCORE_BF16 ? 1.8446744e19f : 32768.f;" in build.kernel_source("attention_hopper")
    for rise, limit in ((10.0, 32768.0), (44.0, 1.8446744e19)):
        assert math.exp(rise) + 15 < limit < math.exp(rise + 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_the_guard_fires_on_every_page(assert_right, head_dim, dtype):
    """A page lies 20 (float16) or 60 units above the one before: e^20 and e^60 are past the guard by far."""
    problem = grouped(head_dim, dtype)
    inputs = leveled(problem, page_of_key(problem) * (20 if dtype == "float16" else 60))
    for name in BOTH:
        assert raised(name, problem, inputs)[0].all()
    assert_right(problem, inputs)
    assert_right(problem.with_(causal=True), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_rises_that_overflow_float32(assert_right, head_dim, dtype):
    """100 units a page: e^100 is past float32 itself, so that a page's sum is Inf before it is done again."""
    problem = grouped(head_dim, dtype)
    inputs = leveled(problem, page_of_key(problem) * 100)
    for name in BOTH:
        assert raised(name, problem, inputs)[0].all()
    assert_right(problem, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_the_guard_fires_for_one_row_of_one_warp_only(assert_right, head_dim, dtype):
    """Row 37 alone has a weight: the other rows of its warp, 32 to 47, are taken along, and no other warp is."""
    problem = grouped(head_dim, dtype)
    weight = torch.zeros(problem.seqlen_q, device="cuda")
    weight[37] = 1.0
    inputs = leveled(problem, page_of_key(problem) * (20 if dtype == "float16" else 60), weight=weight)
    for name in BOTH:
        fired, _ = raised(name, problem, inputs)
        assert fired[..., 37].all() and not fired[..., :32].any() and not fired[..., 48:].any()
    assert_right(problem, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_the_guard_fires_on_the_last_page_only(assert_right, head_dim, dtype):
    """Its five keys lie 30 or 70 units above all others."""
    problem = grouped(head_dim, dtype)
    last = page_of_key(problem) == problem.seqlen_k // PAGE
    inputs = leveled(problem, last * (30 if dtype == "float16" else 70))
    for name in BOTH:
        fired, _ = raised(name, problem, inputs)
        assert fired[:, -1].all() and not fired[:, :-1].any()
    assert_right(problem, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_just_below_and_just_above_the_guard(assert_right, head_dim, dtype):
    """Without noise, one key of the last page above keys of score 0: its thread's sum is e^rise, and 1 to 15 more.

    float16: e^10 = 22026 stays below 32768, e^10.5 = 36316 does not. bfloat16: e^44 = 1.29e19 and e^44.5 = 2.12e19
    against 2^64 = 1.84e19.
    """
    below, above = (10.0, 10.5) if dtype == "float16" else (44.0, 44.5)
    problem = grouped(head_dim, dtype)
    key = torch.arange(problem.seqlen_k, device="cuda") == 14 * PAGE + 2
    for rise, fires in ((below, False), (above, True)):
        inputs = leveled(problem, key * rise, noise=0.0)
        for name in BOTH:
            fired, _ = raised(name, problem, inputs)
            assert bool(fired[:, -1].all()) == bool(fired.any()) == fires
        assert_right(problem, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_a_first_page_far_below_the_rest(assert_right, head_dim, dtype):
    """60 or 100 units: only the page that continues it raises the reference, and nothing of it is left."""
    problem = grouped(head_dim, dtype)
    inputs = leveled(problem, (page_of_key(problem) == 0) * (-60 if dtype == "float16" else -100))
    for name in BOTH:
        fired, _ = raised(name, problem, inputs)
        assert fired[:, 0].all() and not fired[:, 1:].any(), "the first of the later pages continues page 0"
    assert_right(problem, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
@pytest.mark.parametrize("lengths", [(200, 200), (200, 137), (129, 128), (300, 901)])
def test_a_first_page_of_which_key_0_alone_is_seen(assert_right, head_dim, dtype, lengths):
    """Row `seqlen_q - seqlen_k` sees key 0 alone, which lies 60 units off the rest; earlier rows see none."""
    problem = grouped(head_dim, dtype, causal=True, seqlen_q=lengths[0], seqlen_k=lengths[1])
    level = torch.zeros(problem.seqlen_k, device="cuda")
    level[0] = -60.0
    inputs = leveled(problem, level)
    assert_right(problem, inputs)
    assert_right(problem, leveled(problem, -level))


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_constant_rows_and_one_outlier(assert_right, head_dim, dtype):
    problem = grouped(head_dim, dtype)
    assert_right(problem, leveled(problem, torch.full((problem.seqlen_k,), 7.0), noise=0.0))
    for key in (0, 63, 64, 500, 767, problem.seqlen_k - 1):
        level = torch.zeros(problem.seqlen_k)
        level[key] = 25.0 if dtype == "float16" else 50.0
        assert_right(problem, leveled(problem, level))


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
@pytest.mark.parametrize("scale", [-SCALE, 0.0, 1e-30, -1e-30, 1e-6])
def test_negative_zero_and_tiny_scales(assert_right, head_dim, dtype, scale):
    """A negative scale turns a falling level into a rise; past zero the mask still has to hold."""
    problem = grouped(head_dim, dtype)
    inputs = leveled(problem, -20.0 * page_of_key(problem))
    for causal in (False, True):
        assert_right(problem.with_(softmax_scale=scale, causal=causal), inputs)


# ------------------------------------------------------------------------------------------------ NaN and infinities


def assert_propagates(problem: Problem, inputs) -> None:
    """NaN and infinities where float64 has them, and the rest as near as the same maths comes."""
    expected = reference.attention(*inputs, problem)
    near = reference.attention_same_precision(*inputs, problem)
    for name in BOTH:
        got = backends.get(name).run(*inputs, problem)
        for tensor, wanted, close in zip(got, expected, near, strict=True):
            finite = wanted.isfinite()
            assert torch.equal(tensor.isnan(), wanted.isnan()), f"{name}: NaN in other places"
            assert torch.equal(tensor[~finite].double().nan_to_num(1.5), wanted[~finite].nan_to_num(1.5))
            error, bound = (x[finite].double() - wanted[finite] for x in (tensor, close))
            if finite.any():
                rounding = torch.finfo(tensor.dtype).eps * wanted[finite].abs()
                assert (error.abs() <= 2 * bound.abs().max() + rounding + 2e-5).all(), name


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
@pytest.mark.parametrize("key", [3, 70, 900])
def test_nan_stays_nan_and_infinities_go_where_they_belong(head_dim, dtype, key):
    """A key on the first page, on one that is first in its chain or not, and in the tail: no guard calls it small."""
    problem = grouped(head_dim, dtype)
    for bad in (math.nan, math.inf, -math.inf):
        for which, at in (("q", (0, 1, 37, 5)), ("k", (0, 0, key, 5)), ("v", (0, 0, key, 5))):
            inputs = dict(zip("qkv", leveled(problem, torch.zeros(problem.seqlen_k), noise=1.0), strict=True))
            inputs[which][at] = bad
            assert_propagates(problem, tuple(inputs.values()))


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_a_nan_that_a_row_does_not_see_does_not_reach_it(head_dim, dtype):
    problem = grouped(head_dim, dtype, causal=True, seqlen_q=300, seqlen_k=300)
    q, k, v = leveled(problem, torch.zeros(problem.seqlen_k), noise=1.0)
    k[0, 0, 150, 3] = math.nan
    assert_propagates(problem, (q, k, v))
    for name in BOTH:
        out, lse = backends.get(name).run(q, k, v, problem)
        assert out[:, :, :150].isfinite().all() and out[:, :, 150:].isnan().all() and lse[:, :, 150:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_rows_whose_scores_are_all_minus_infinity_give_zero(head_dim, dtype):
    """k[0] is -Inf for every key: a row with a positive q[0] is as if it saw no key, one with a negative one is NaN."""
    problem = grouped(head_dim, dtype)
    weight = torch.ones(problem.seqlen_q, device="cuda")
    weight[100:] = -1.0
    inputs = leveled(problem, torch.full((problem.seqlen_k,), -math.inf), weight=weight)
    assert_propagates(problem, inputs)
    for name in BOTH:
        out, lse = backends.get(name).run(*inputs, problem)
        assert (out[:, :, :100] == 0).all() and (lse[:, :, :100] == -math.inf).all() and out[:, :, 100:].isnan().all()


# ------------------------------------------------------------------------------------------------ shapes and layouts


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float16"), (128, "bfloat16")])
def test_every_length_around_a_page_with_a_causal_mask(assert_right, head_dim, dtype):
    """Tails of rows and keys, rows without keys, and chains of pages that some rows of a tile see nothing of."""
    lengths = [1, 2, 63, 64, 65, 66, 127, 128, 129, 130]
    for seqlen_q, seqlen_k in itertools.product(lengths, lengths):
        problem = grouped(head_dim, dtype, causal=True, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        assert_right(problem, leveled(problem, torch.zeros(seqlen_k), noise=1.0))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads_q", "heads_kv"), [(1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (8, 2), (8, 4), (8, 8)])
def test_grouped_heads(assert_right, heads_q, heads_kv):
    for causal in (False, True):
        problem = Problem(batch=3, num_heads_q=heads_q, num_heads_kv=heads_kv, seqlen_q=70, seqlen_k=333, head_dim=64,
                          causal=causal)  # fmt: skip
        assert_right(problem, tensors(problem, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_views_are_read_as_what_they_show(assert_right, head_dim, dtype):
    """[B,S,H,D] memory, and K and V expanded over sequences or heads: strides in another order, and strides of zero."""
    problem = Problem(
        batch=3, num_heads_q=4, num_heads_kv=4, seqlen_q=100, seqlen_k=200, head_dim=head_dim, dtype=dtype
    )
    q, k, v = tensors(problem, "cuda")
    views = [
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)],
        [q, k[:1].expand_as(k), v[:1].expand_as(v)],
        [q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)],
        [q[:1].expand_as(q), k[:1, :1].expand_as(k), v[:1, :1].expand_as(v)],
    ]
    for view in views:
        assert problem_of(*view) == problem
        assert_right(problem, tuple(view))
        for name in BOTH:
            got = backends.get(name).run(*view, problem)
            expected = backends.get(name).run(*(t.contiguous() for t in view), problem)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
def test_several_tiles_a_block(assert_right, head_dim, dtype, causal):
    """More tiles than multiprocessors, with few keys: Q is read ahead, and rings go round from tile to tile.

    Lengths that are no multiple of a tile; and tiles of which some rows, or whole tiles, see no key.
    """
    for batch, heads, seqlen_q, seqlen_k in ((3, 50, 300, 70), (1, 400, 1, 65), (2, 140, 200, 1), (5, 40, 520, 300)):
        problem = Problem(batch=batch, num_heads_q=heads, num_heads_kv=heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k,
                          head_dim=head_dim, dtype=dtype, causal=causal)  # fmt: skip
        chosen = backends.get("hopper")
        assert chosen.entry(problem, 0) == "attention_hopper"
        blocks = chosen.blocks(problem, chosen.load(problem, torch.device("cuda", 0), trace=False), 0)[0]
        assert blocks < batch * heads * -(-seqlen_q // 256), "some block has a second tile"
        assert_right(problem, tensors(problem, "cuda"), ("hopper",))


@pytest.mark.gpu
def test_several_tiles_a_block_with_a_reference_that_is_raised_in_each(assert_right):
    """20 units a page: what one tile leaves behind in registers must not reach the next."""
    problem = grouped(64, "float16", num_heads_q=200, num_heads_kv=200, seqlen_q=64, seqlen_k=333)
    assert_right(problem, leveled(problem, page_of_key(problem) * 20), ("hopper",))


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
@pytest.mark.parametrize("left", [1, 33, 44, 60, 66, 100])
def test_narrower_tiles_of_the_last_round(assert_right, head_dim, dtype, left):
    """One tile a head, of which `left` go beyond the first round, under either mask and with rows left over."""
    for causal, seqlen_q in ((False, 190), (True, 150)):
        problem = Problem(batch=1, num_heads_q=MULTIPROCESSORS + left, num_heads_kv=1, seqlen_q=seqlen_q, seqlen_k=333,
                          head_dim=head_dim, dtype=dtype, causal=causal, softmax_scale=SCALE)  # fmt: skip
        assert_right(problem, leveled(problem, page_of_key(problem) * 20), ("hopper-unsplit",))


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
@pytest.mark.parametrize("seqlen_q", [1, 63, 191, 193, 257, 700])
@pytest.mark.parametrize("seqlen_k", [40, 257, 1000])
def test_tiles_that_begin_before_the_first_row(assert_right, head_dim, dtype, seqlen_q, seqlen_k):
    problem = Problem(batch=2, num_heads_q=6, num_heads_kv=3, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim,
                      dtype=dtype, causal=True, softmax_scale=SCALE)  # fmt: skip
    assert_right(problem, leveled(problem, page_of_key(problem) * 20), ("hopper-unsplit",))


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), VARIANTS)
@pytest.mark.parametrize("step", [0, 20])
def test_the_tile_for_few_tiles(assert_right, head_dim, dtype, step):
    """Two warpgroups: more tiles of 64 rows than multiprocessors, and no more of 128."""
    for causal in (False, True):
        problem = Problem(batch=2, num_heads_q=8, num_heads_kv=4, seqlen_q=900, seqlen_k=917, head_dim=head_dim,
                          dtype=dtype, causal=causal, softmax_scale=SCALE)  # fmt: skip
        chosen = backends.get("hopper")
        assert ("FLASHCORE_NUM_CONSUMERS", 2) in chosen.defines(problem, 0)
        assert chosen.entry(problem, 0) == "attention_hopper"
        assert_right(
            problem, leveled(problem, page_of_key(problem) * step, noise=1.0 if step == 0 else NOISE), ("hopper",)
        )
