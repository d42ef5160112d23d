"""Who gets which tile of the Hopper kernel: every row once, and about as much work for every block."""

from __future__ import annotations

import functools
import itertools
import random
import shutil
import subprocess

import numpy as np
import pytest
from support.hopper_tiles import MULTIPROCESSORS, loaded_for

from flashcore import backends
from flashcore.backends._dealing import LAST_SECTION, largest_load, sections, tile_pages
from flashcore.gpu import build
from flashcore.problem import PRESETS, Problem, square


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
@pytest.mark.compiler
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


# ------------------------------------------------------------------------------------------------ by hand


def test_the_pages_of_tiles_by_hand():
    problem = square(1, 1, 200, 64)
    assert tile_pages(problem, 64, 64).tolist() == [4, 4, 4, 4]
    causal = problem.with_(causal=True)
    # Tiles end at row 208, a multiple of 16, and lie 64 rows apart: the last rows are 199, 143, 79 and 15.
    assert tile_pages(causal, 64, 64).tolist() == [4, 3, 2, 1]
    assert tile_pages(causal.with_(seqlen_k=500), 64, 64).tolist() == [8, 7, 6, 5], "300 keys more for every row"
    assert tile_pages(causal.with_(seqlen_k=100), 64, 64).tolist() == [2, 1, 0, 0], "the first 100 rows see no key"
    assert tile_pages(square(1, 1, 1, 64, causal=True), 128, 64).tolist() == [1]


def test_loads_by_hand():
    """Three heads of tiles with 3 and 1 pages, on two blocks, forth and back: a tile costs one page more."""
    pages = np.array([3, 1])
    # Head by head: rounds 4 2 | 4 2 | 4 2, each second one backwards: 4 + 2 + 4 and 2 + 4 + 2.
    assert largest_load(pages, 3, 2, 0) == 10
    # One section, heavy to light: 4 4 | 4 2 | 2 2 gives 4 + 2 + 2 and 4 + 4 + 2.
    assert largest_load(pages, 3, 2, 1) == 10
    # Two sections of the six: 4 4 2 2 in the first two rounds, then 4 2.
    assert largest_load(pages, 3, 2, 2) == 10
    assert largest_load(pages, 3, 6, 0) == 4, "one tile a block"
    assert largest_load(pages, 3, 1, 0) == 18, "one block gets it all"
    assert largest_load(np.array([5]), 4, 3, 0) == 12, "the fourth tile goes to a block that has one"


def test_without_a_mask_all_tiles_are_alike_and_need_no_sections():
    for seqlen in (64, 1000, 16384):
        assert sections(square(2, 16, seqlen, 64), 256, 64, MULTIPROCESSORS) == 0


@pytest.mark.parametrize("seqlen", [512, 2048, 8192])
def test_sections_never_make_the_deal_of_a_causal_mask_less_even(seqlen):
    problem = square(4, 16, seqlen, 128, causal=True)
    chosen, pages = sections(problem, 192, 64, MULTIPROCESSORS), tile_pages(problem, 192, 64)
    loads = {n: largest_load(pages, 64, MULTIPROCESSORS, n) for n in (0, chosen)}
    assert loads[chosen] <= 1.005 * loads[0]
    rounds = -(-len(pages) * 64 // MULTIPROCESSORS)
    assert chosen == 0 or 0 < rounds - 2 * (chosen - 1) <= LAST_SECTION, "every section has rounds"
