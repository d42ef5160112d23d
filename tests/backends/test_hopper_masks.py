"""Masks in backend `hopper`: what its kernel is told, which tiles it lists, and on a GPU every mask against float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import shutil

import numpy as np
import pytest
import torch
from support.hopper_masks import HostKernel
from support.hopper_tiles import MULTIPROCESSORS, loaded_for
from support.recorded_driver import RecordedDriver, function_at

from flashcore import backends
from flashcore.backends import _cuda, hopper
from flashcore.backends._cuda import PARAMS
from flashcore.backends._masks import FARTHEST, MASK_PARAMS
from flashcore.backends._tensor_maps import MAP_BYTES
from flashcore.backends.hopper import most_tiles
from flashcore.bisection.bisecting import bisect
from flashcore.errors import Unsupported
from flashcore.gpu import build, launching, options
from flashcore.measure import check
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs, make_masks
from flashcore.numerics.masking import mask_tensors
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.numerics.tolerance import compare
from flashcore.problem import Problem

BOTH = ("hopper", "hopper-unsplit")
SOME = Problem(batch=3, num_heads_q=4, num_heads_kv=2, seqlen_q=150, seqlen_k=333, head_dim=64)
EVERYTHING = {"window_left": 100, "softcap": 5.0, "sink": True}
LENGTHS = ("right", "left", "ragged")
FIELDS = (
    "sink", "cu_seqlens_q", "cu_seqlens_k", "seqlens_q", "seqlens_k", "tiles", "num_tiles", "sequences", "most_tiles",
    "padded_left", "window_left", "window_right", "softcap", "scale_by_cap", *(f"series{i}" for i in range(4)),
    "near_square", "small0", "small1", "small_square",
)  # fmt: skip
"""Of `MaskParams`, in order."""


def told(packed: bytes) -> dict[str, float]:
    """A packed `MaskParams`, by name."""
    return dict(zip(FIELDS, MASK_PARAMS.unpack(packed), strict=True))


# ------------------------------------------------------------------------------------------------ what is told


def test_what_a_problem_asks_for_is_compiled_in_and_nothing_else(on_an_h200):
    for name in BOTH:
        chosen = backends.get(name)
        for problem, bits in (
            (SOME, None), (SOME.with_(causal=True), None), (SOME.with_(window_right=0), 1),
            (SOME.with_(softcap=1.0), 2), (SOME.with_(sink=True), 4),
            *((SOME.with_(lengths=lengths), 8) for lengths in LENGTHS),
            (SOME.with_(**EVERYTHING), 7), (SOME.with_(lengths="ragged", **EVERYTHING), 15),
        ):  # fmt: skip
            assert dict(chosen.defines(problem, 0)).get(options.MASKS) == bits
            assert bits is None or chosen.entry(problem, 0) == "attention_hopper", "split keys take no masks"
    assert backends.get("hopper").entry(SOME, 0) == hopper.SPLIT


def test_a_listed_tile_has_room_for_every_head_and_tile_that_the_backend_takes():
    text = build.kernel_source("attention_hopper")
    head, nth = re.search(r"ListedTile \{\s+int sequence;\s+unsigned head : (\d+), nth : (\d+);", text).groups()
    assert (1 << int(head), 1 << int(nth)) == (hopper.MOST_HEADS, hopper.MOST_TILES)
    assert int(head) + int(nth) == 32 and hopper.TILE_INTS == 2


@pytest.mark.parametrize("name", BOTH)
def test_more_than_a_list_can_name_is_refused_where_there_is_one(name):
    chosen = backends.get(name)
    heads, rows = SOME.with_(num_heads_q=4096, num_heads_kv=1), SOME.with_(seqlen_q=128 << 20)
    for lengths in LENGTHS:
        for problem in (heads, rows):
            assert chosen.why_not(problem.with_(lengths=lengths)) is None
        more = heads.with_(num_heads_q=4097, lengths=lengths)
        assert chosen.why_not(more) == "with lengths it takes at most 4096 query heads"
        assert chosen.why_not(more.with_(lengths="", sink=True)) is None
        more = rows.with_(seqlen_q=rows.seqlen_q + 1, lengths=lengths)
        assert chosen.why_not(more) == "with lengths it takes at most 134217728 query rows a sequence"
        assert chosen.why_not(more.with_(lengths="")) is None
        assert chosen.why_not(more.with_(head_dim=96)).startswith("head_dim 96"), "the first reason is the backend's"
    with pytest.raises(Unsupported, match="at most 4096 query heads"):
        backends.with_methods(chosen, {"availability": lambda self: backends.AVAILABLE}).require(
            heads.with_(num_heads_q=5000, lengths="left")
        )


# ------------------------------------------------------------------------------------------------ room behind lse


def test_there_is_room_for_the_tiles_of_any_lengths():
    rng = random.Random(0)
    for _ in range(500):
        tile_m, heads, batch = rng.choice((128, 192, 256)), rng.choice((1, 3, 64)), rng.randint(1, 40)
        most = rng.choice((1, 100, 128, 256, 1000, 5000))
        lengths = [rng.choice((0, 1, tile_m, most, rng.randint(0, most))) for _ in range(batch)]
        lengths = [min(length, most) for length in lengths]
        rows = max(1, sum(lengths) + rng.choice((0, 0, 3)))
        problem = SOME.with_(batch=batch, num_heads_q=heads, num_heads_kv=1, seqlen_q=most)
        tiles = sum(-(-length // tile_m) for length in lengths) * heads
        ragged, padded = torch.empty(1, heads, rows, 0), torch.empty(batch, heads, most, 0)
        for lengths_are, q in (("ragged", ragged), ("right", padded), ("left", padded)):
            problem = problem.with_(lengths=lengths_are)
            assert tiles <= most_tiles(q, problem, tile_m)
            # The list, how many there are, and how many were taken, in what `outputs_for` sets apart.
            room = backends.get("hopper").room(q, problem)
            assert hopper.TILE_INTS * most_tiles(q, problem, tile_m) + 2 <= room
    assert backends.get("hopper").room(padded, SOME.with_(**EVERYTHING)) == 0


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 3, 5, 64), (1, 4, 33, 128)])
def test_the_room_behind_lse_is_aligned_and_part_of_its_memory(shape):
    q = torch.empty(shape, dtype=torch.float16).transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = launching.outputs_for(q, 37)
    assert out.shape == q.shape and out.stride() == q.stride() and lse.shape == shape[:3] and lse.is_contiguous()
    begin, end = lse.data_ptr(), lse.data_ptr() + 4 * lse.numel()
    assert end <= launching.behind(lse) < end + 16 and launching.behind(lse) % 16 == 0
    assert launching.behind(lse) + 4 * 37 <= begin + lse.untyped_storage().nbytes()
    with poisoned_outputs():
        assert all(bool(tensor.isnan().all()) for tensor in launching.outputs_for(q, 37))
    assert launching.outputs_for(q)[1].untyped_storage().nbytes() == 4 * lse.numel(), "no room where none is asked for"


# ------------------------------------------------------------------------------------------------ launches

MAIN_AT, PLAN_AT = 0xA, 0xB


@pytest.fixture
def machine(monkeypatch, on_an_h200):
    """A GPU that records each launch of the kernel and of the one that lists its tiles."""
    masked = [PARAMS.size, *[MAP_BYTES] * 4, 4, MASK_PARAMS.size]
    driver = RecordedDriver({MAIN_AT: masked, PLAN_AT: [PARAMS.size, MASK_PARAMS.size]})
    driver.loads, driver.stream = [], 7

    def load(kernel, head_dim, dtype, trace, source, device, defines, entry):
        driver.loads.append((kernel, entry, dict(defines)))
        shape = loaded_for(SOME.with_(head_dim=head_dim, seqlen_q=5000))
        if entry == hopper.PLAN:
            return dataclasses.replace(shape, threads=256, shared_bytes=0)
        return dataclasses.replace(shape, overlaps_launch=int(dict(defines)[options.MASKS] & 8 > 0))

    def entry_point(loaded, name, device):
        return function_at(PLAN_AT if name == hopper.PLAN else MAIN_AT)

    monkeypatch.setattr(launching, "_launch_kernel", lambda: driver.call)
    monkeypatch.setattr(launching, "_kept", {})
    monkeypatch.setattr(hopper, "tensor_map", lambda *a, name, **k: name.encode().ljust(MAP_BYTES))
    for module in (_cuda, hopper):
        monkeypatch.setattr(module, "load_kernel", load)
        monkeypatch.setattr(module, "entry_point", entry_point)
    monkeypatch.setattr(_cuda, "current_stream", lambda device: driver.stream)
    return driver


def call(problem: Problem):
    """Q, K, V and mask tensors of a problem."""
    masks = make_masks(problem)
    return *make_inputs(problem, masks=masks), masks


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_tiles_are_listed_ahead_of_the_kernel(machine, lengths):
    problem = SOME.with_(lengths=lengths, window_right=9, **EVERYTHING)
    q, k, v, masks = call(problem)
    out, lse = backends.get("hopper-unsplit").run(q, k, v, problem, masks=masks)
    plan, main = machine.launches
    assert (plan.function, main.function) == (PLAN_AT, MAIN_AT) and plan.stream == main.stream == 7
    tiles = most_tiles(q, problem, 256)
    blocks = -(-tiles // 256)
    assert plan.grid == (blocks if lengths == "ragged" else max(blocks, hopper.CLEARING_BLOCKS), 1, 1)
    assert plan.block == (256, 1, 1) and plan.shared == 0
    assert main.grid == (min(tiles, MULTIPROCESSORS), 1, 1)
    assert plan.attributes == [], "it starts when all ahead of it have ended"
    assert main.attributes == [(launching.PROGRAMMATIC_STREAM_SERIALIZATION, 1)], "it waits for the list by itself"
    assert plan.arguments == [main.arguments[0], main.arguments[6]], "both are told the same"
    found = told(main.arguments[6])
    given = dict(masks.named())
    for name in ("sink", "cu_seqlens_q", "cu_seqlens_k", "seqlens_q", "seqlens_k"):
        assert found[name] == (given[name].data_ptr() if name in given else 0)
    assert found["tiles"] == launching.behind(lse) and found["num_tiles"] == found["tiles"] + 8 * tiles
    assert found["num_tiles"] + 8 <= lse.data_ptr() + lse.untyped_storage().nbytes()
    assert (found["sequences"], found["most_tiles"]) == (3, tiles)
    assert found["padded_left"] == (lengths == "left")
    assert (found["window_left"], found["window_right"], found["softcap"]) == (100, 9, 5.0)
    shape = PARAMS.unpack(main.arguments[0])[17:22]
    rows = q.shape[2], k.shape[2]
    assert shape == ((1 if lengths == "ragged" else 3), 4, 2, *rows), "a ragged batch is one of all rows"
    assert [entry for _, entry, _ in machine.loads] == ["attention_hopper", hopper.PLAN]
    assert all(defines == {options.MASKS: 15} for *_, defines in machine.loads)


def test_without_lengths_nothing_is_listed(machine):
    problem = SOME.with_(causal=True, **EVERYTHING)
    q, k, v, masks = call(problem)
    _, lse = backends.get("hopper-unsplit").run(q, k, v, problem, masks=masks)
    (main,) = machine.launches
    found = told(main.arguments[6])
    assert found["sink"] == masks.sink.data_ptr() and (found["window_left"], found["window_right"]) == (100, 0)
    pointers = ("cu_seqlens_q", "cu_seqlens_k", "seqlens_q", "seqlens_k", "tiles", "num_tiles")
    assert {found[name] for name in pointers} == {0} and found["sequences"] == found["most_tiles"] == 0
    assert main.attributes == [] and lse.untyped_storage().nbytes() == 4 * lse.numel()
    assert main.grid == (12, 1, 1), "a tile of 256 rows for each head"


def test_a_window_wider_than_positions_are_is_one_that_reaches_everything(machine):
    problem = SOME.with_(window_left=1 << 40, window_right=1 << 31)
    backends.get("hopper-unsplit").run(*make_inputs(problem), problem)
    found = told(machine.launches[0].arguments[6])
    assert found["window_left"] == found["window_right"] == FARTHEST
    assert FARTHEST + (1 << 30) - 1 < 1 << 31, "a position and a limit are an int together"


def test_tiles_in_a_window_are_alike_and_need_no_sections(on_an_h200):
    chosen = backends.get("hopper")
    problem = SOME.with_(batch=4, num_heads_q=16, num_heads_kv=16, seqlen_q=8192, seqlen_k=8192, causal=True)
    assert chosen.sections(problem, loaded_for(problem), 0) > 0
    assert chosen.sections(problem.with_(sink=True), loaded_for(problem), 0) > 0
    assert chosen.sections(problem.with_(window_left=1024), loaded_for(problem), 0) == 0
    assert chosen.sections(problem.with_(causal=False, window_right=0), loaded_for(problem), 0) == 0


def test_other_mask_tensors_and_other_shapes_are_another_launch(machine):
    """Of the same memory too: a ragged batch of other lengths may lie where one lay before."""
    problem = SOME.with_(lengths="ragged", sink=True)
    q, k, v, masks = call(problem)
    out, lse = launching.outputs_for(q, backends.get("hopper-unsplit").room(q, problem))
    chosen = backends.get("hopper-unsplit")

    def launches(*tensors, masks=masks, problem=problem) -> int:
        before = len(machine.loads)
        chosen._launch(*tensors, out, lse, problem, masks)
        return (len(machine.loads) - before) // 2  # of the kernel and of the list

    assert launches(q, k, v) == 1 and launches(q, k, v) == 0, "a repeated call is kept"
    for name, tensor in masks.named():
        other = dataclasses.replace(masks, **{name: tensor.clone()})
        assert launches(q, k, v, masks=other) == 1 and launches(q, k, v, masks=other) == 0, name
    assert launches(q[:, :, :-1], k, v) == 1 and launches(q, k[:, :, :-1], v[:, :, :-1]) == 1
    assert q[:, :, :-1].data_ptr() == q.data_ptr() and q[:, :, :-1].stride() == q.stride()
    for changed in ({"window_left": 5}, {"softcap": 3.0}, {"seqlen_k": 400}, {"causal": True}):
        assert launches(q, k, v, problem=problem.with_(**changed)) == 1, changed
    assert launches(q, k, v) == 0
    machine.launches.clear()
    masks.cu_seqlens_q.fill_(0)
    chosen._launch(q, k, v, out, lse, problem, masks)
    assert [launch.function for launch in machine.launches] == [PLAN_AT, MAIN_AT], "a kept launch lists tiles anew"


# ------------------------------------------------------------------------------------- the kernel's text, on the host

needs_a_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler for the host")
TILE_M, TILE_N = 256, 64


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> HostKernel:
    """The kernel's text about masks, compiled for the host."""
    return HostKernel.compile(tmp_path_factory.mktemp("masks"), TILE_M)


def seen(left: int, right: int, rows, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """Whether each of these rows sees each key, by the meaning of a window."""
    position = np.asarray(rows)[:, None] + seqlen_k - seqlen_q
    key = np.arange(seqlen_k)[None, :]
    sees = np.ones((len(rows), seqlen_k), bool)
    if left >= 0:
        sees &= key >= position - left
    if right >= 0:
        sees &= key <= position + right
    return sees


def random_spans(count: int) -> list[tuple[int, ...]]:
    """Windows, rows of a tile or a warpgroup, pages and lengths: some begin before row 0, some end after the last."""
    rng = random.Random(1)
    calls = []
    for _ in range(count):
        seqlen_q, seqlen_k = (rng.choice((0, 1, 5, 63, 64, 100, 200, 400, rng.randint(1, 500))) for _ in range(2))
        left, right = (rng.choice((-1, -1, 0, 1, 40, 63, 64, 100, 1000)) for _ in range(2))
        calls.append((left, right, rng.randint(-100, 400), rng.choice((0, 16, 64, 192, 256)), rng.choice((64, 128)),
                      seqlen_q, seqlen_k))  # fmt: skip
    return calls


@needs_a_compiler
@pytest.mark.compiler
def test_the_pages_of_some_rows_are_those_that_any_of_them_sees_and_whole_ones_are_whole(host):
    calls = random_spans(6000)
    full = partly = 0
    for call_, (first, end, whole_from, whole_end) in zip(calls, host.page_spans(calls), strict=True):
        left, right, first_row, rows, tile_n, seqlen_q, seqlen_k = call_
        real = range(max(0, first_row), min(first_row + rows, seqlen_q))
        sees = seen(left, right, real, seqlen_q, seqlen_k)
        keys = np.flatnonzero(sees.any(axis=0))
        if not len(keys):
            assert end == first, call_
            continue
        assert (first, end) == (keys[0] // tile_n, keys[-1] // tile_n + 1), call_
        for page in range(first, end):
            all_seen = (page + 1) * tile_n <= seqlen_k and sees[:, page * tile_n : (page + 1) * tile_n].all()
            if whole_from <= page < whole_end:
                assert all_seen, f"page {page} of {call_} needs a mask"
                full += 1
            elif len(real) == rows:
                assert not all_seen, f"page {page} of {call_} needs none"
                partly += 1
    assert min(full, partly) > 300


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences with lengths, as a kernel is told of them."""

    problem: Problem
    lengths_q: list[int]
    lengths_k: list[int]
    rows: tuple[int, int]
    """Of Q and of K, in the tensors."""
    gives_q: bool = True
    more_blocks: int = 0
    """Than the list needs."""

    @property
    def in_a_line(self) -> bool:
        return self.problem.lengths == "ragged"

    def call(self, places=None) -> tuple[int, ...]:
        """What the program on the host reads; `places` in place of the right ones."""
        p = self.problem
        shape = torch.empty(1 if self.in_a_line else p.batch, p.num_heads_q, self.rows[0], 0)
        most = most_tiles(shape, p, TILE_M)
        given = [self.lengths_q, self.lengths_k]
        if self.in_a_line:
            given = [[0, *itertools.accumulate(lengths)] for lengths in given]
        left, right = p.window
        blocks = -(-most // hopper.PLANNED_AT_ONCE) + self.more_blocks
        return (shape.shape[0], p.num_heads_q, *self.rows, int(p.causal), p.batch, left, right, int(self.in_a_line),
                int(self.gives_q), int(p.lengths == "left"), most, blocks,
                *itertools.chain(*(places or given)))  # fmt: skip

    def firsts(self) -> list[int]:
        """The first real row of Q of each sequence, in its tensor."""
        if self.in_a_line:
            return [0, *itertools.accumulate(self.lengths_q)][:-1]
        return [self.rows[0] - n if self.problem.lengths == "left" else 0 for n in self.lengths_q]


def random_batches(count: int) -> list[Batch]:
    rng = random.Random(2)
    found = []
    for number in range(count):
        lengths, causal = LENGTHS[number % 3], rng.random() < 0.5
        batch, heads = rng.choice(((1, 1), (3, 2), (7, 5), (40, 3), (2, 100), (300, 1)))
        most_q, most_k = rng.choice(((1, 90), (300, 300), (700, 100), (600, 1500))) if batch < 300 else (5, 70)
        if number < 3:  # more tiles than a section has
            batch, heads, most_q, most_k = 4, 100, 700, 900
        gives_q = lengths == "ragged" or rng.random() < 0.7
        of_q, of_k = (
            [rng.choice((0, 1, most, rng.randint(0, most))) for _ in range(batch)] for most in (most_q, most_k)
        )
        if not gives_q:
            of_q = [most_q] * batch
        rows = (max(1, sum(of_q) + 3), max(1, sum(of_k))) if lengths == "ragged" else (most_q, most_k)
        window = rng.choice(((-1, -1), (100, -1), (64, 64), (0, 0), (-1, 30)))
        problem = Problem(batch=batch, num_heads_q=heads, num_heads_kv=1, seqlen_q=most_q, seqlen_k=most_k, head_dim=64,
                          causal=causal, window_left=window[0], window_right=-1 if causal else window[1],
                          lengths=lengths)  # fmt: skip
        found.append(Batch(problem, of_q, of_k, rows, gives_q, rng.choice((0, 0, 3))))
    return found


def pages_of_tile(batch: Batch, sequence: int, nth: int) -> int:
    """Pages that the rows of a tile see: what it costs."""
    seqlen_q, seqlen_k = batch.lengths_q[sequence], batch.lengths_k[sequence]
    first = -(-seqlen_q // 16) * 16 - (nth + 1) * TILE_M if batch.problem.causal else nth * TILE_M
    real = range(max(0, first), min(first + TILE_M, seqlen_q))
    keys = np.flatnonzero(seen(*batch.problem.window, real, seqlen_q, seqlen_k).any(axis=0))
    return int(keys[-1] // TILE_N - keys[0] // TILE_N + 1) if len(keys) else 0


@needs_a_compiler
@pytest.mark.compiler
def test_every_tile_is_listed_once_section_by_section_from_heavy_to_light_and_other_rows_are_cleared(host):
    batches = random_batches(18)
    sections = 0
    for batch, listed in zip(batches, host.plans([b.call() for b in batches]), strict=True):
        heads, label = batch.problem.num_heads_q, batch.problem.label()
        in_order = [
            (sequence, head, nth)
            for sequence, length in enumerate(batch.lengths_q)
            for head in range(heads)
            for nth in range(-(-length // TILE_M))
        ]
        assert len(listed.tiles) == len(in_order) and listed.taken == 0, label
        weights = {(s, n): pages_of_tile(batch, s, n) for s, _, n in set(in_order)}
        for first in range(0, len(in_order), hopper.PLANNED_AT_ONCE):
            section = listed.tiles[first : first + hopper.PLANNED_AT_ONCE]
            assert sorted(section) == sorted(in_order[first : first + hopper.PLANNED_AT_ONCE]), label
            cost = [weights[sequence, nth] for sequence, _, nth in section]
            assert cost == sorted(cost, reverse=True), label
            sections += 1
        assert listed.behind == -7, "the list ends where its room does"
        cleared = np.array(list(listed.rows)).reshape(-1, heads, batch.rows[0])
        expected = np.full(cleared.shape, "0")
        for sequence, (first, length) in enumerate(zip(batch.firsts(), batch.lengths_q, strict=True)):
            expected[0 if batch.in_a_line else sequence, :, first : first + length] = "."
        assert (cleared == expected).all(), label
    assert sections > len(batches), "some lists have more than one section"


@needs_a_compiler
@pytest.mark.compiler
def test_lengths_that_make_no_sense_reach_neither_beyond_the_list_nor_beyond_the_tensors(host):
    """A caller on a GPU is not asked what its lengths are; whatever they hold, the kernel stays in its memory."""
    ragged = Batch(SOME.with_(lengths="ragged", seqlen_q=600), [600] * 3, [333] * 3, (1800, 999))
    padded = Batch(SOME.with_(lengths="left", seqlen_q=600), [600] * 3, [333] * 3, (600, 333))
    wild = [2**31 - 1, -5, 10**9]
    calls = [ragged.call(([0, 1800, 0, 1800], [0, 999, 0, 999])), ragged.call(([-7, *wild], [-7, *wild])),
             padded.call((wild, wild))]  # fmt: skip
    for batch, listed in zip((ragged, ragged, padded), host.plans(calls), strict=True):
        most = most_tiles(torch.empty(1 if batch.in_a_line else 3, 4, batch.rows[0], 0), batch.problem, TILE_M)
        assert len(listed.tiles) <= most and listed.behind == -7 and "?" not in listed.rows
        for sequence, head, nth in listed.tiles:
            assert 0 <= sequence < 3 and 0 <= head < 4 and 0 <= nth * TILE_M < batch.rows[0]


# ------------------------------------------------------------------------------------------------ on a GPU

MASKINGS = ("window", "softcap", "sink", "padded", "ragged", "everything", "everything ragged")
VARIANTS = [(head_dim, dtype) for head_dim in (64, 128) for dtype in ("float16", "bfloat16")]
CASES = 10
"""Random problems of each test, on each backend."""
MOST_SCORES = 3e7
"""Of the float64 reference, which holds some tensors of that size."""


def random_problem(rng: random.Random, masking: str, head_dim: int, dtype: str) -> Problem:
    """Odd lengths, groups of heads, scales of both signs, and these masks with numbers of every kind."""
    everything = masking.startswith("everything")
    sizes = (1, 7, 64, 100, 129, 200, 333, 512, 777, 1500)
    batch, group = rng.choice((1, 2, 5, 17)), rng.choice((1, 2, 4))
    seqlen_q, seqlen_k = rng.choice(sizes), rng.choice((*sizes, 2100))
    if rng.random() < 0.5:
        seqlen_k = seqlen_q
    heads_kv, causal = rng.choice((1, 2, 4)), rng.random() < 0.5
    if batch * heads_kv * group * seqlen_q * seqlen_k > MOST_SCORES:
        batch, heads_kv = 1, 1
    fields = {}
    if masking == "window" or everything:
        fields["window_left"] = rng.choice((-1, 0, 1, 5, 63, 64, 100, 128, 500, 3000))
        fields["window_right"] = -1 if causal else rng.choice((-1, 0, 1, 17, 64, 300))
        if fields["window_left"] == fields["window_right"] == -1:
            fields["window_left"] = 100
    if masking == "softcap" or everything:
        fields["softcap"] = rng.choice((1.0, 15.0, 30.0, 50.0))
    if masking in ("padded", "everything"):
        fields["lengths"] = rng.choice(("right", "left"))
    if masking in ("ragged", "everything ragged"):
        fields["lengths"] = "ragged"
    return Problem(
        batch=batch, num_heads_q=heads_kv * group, num_heads_kv=heads_kv, seqlen_q=seqlen_q, seqlen_k=seqlen_k,
        head_dim=head_dim, dtype=dtype, causal=causal, softmax_scale=rng.choice((None, None, 0.3, -0.2, 2.0)),
        sink=masking == "sink" or everything, **fields,
    )  # fmt: skip


def random_masks(rng: random.Random, problem: Problem):
    """Mask tensors on the GPU: some sequences are empty, some have no query or no key, some are whole."""
    given = {}
    if problem.sink:
        size = rng.choice((1, 5, 30))
        given["sink"] = torch.tensor([rng.gauss(0, size) for _ in range(problem.num_heads_q)], device="cuda")
    if problem.lengths:
        of_q, of_k = (
            [rng.choice((0, 1, most, rng.randint(0, most))) for _ in range(problem.batch)]
            for most in (problem.seqlen_q, problem.seqlen_k)
        )
        if problem.seqlen_q == problem.seqlen_k and rng.random() < 0.3:
            of_k = of_q
        if problem.lengths == "ragged":
            given |= places(of_q, of_k)
        elif rng.random() < 0.7:
            given |= {"seqlens_q": on_gpu(of_q), "seqlens_k": on_gpu(of_k)}
        else:
            given |= {"seqlens_k": on_gpu(of_k)}
    return mask_tensors(problem, "cuda", **given)


def on_gpu(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def places(of_q: list[int], of_k: list[int]) -> dict[str, torch.Tensor]:
    """Where sequences of these lengths begin and end, one behind the other."""
    pairs = (("cu_seqlens_q", of_q), ("cu_seqlens_k", of_k))
    return {name: on_gpu([0, *itertools.accumulate(lengths)]) for name, lengths in pairs}


def masked_inputs(problem: Problem, masks, *, seed: int = 0, layout: str = "bhsd"):
    """Q, K and V on the GPU; NaN in all rows that are not real, those behind the last sequence among them."""
    return make_inputs(problem, seed=seed, device="cuda", layout=layout, masks=masks)


def run(name: str, inputs, problem: Problem, masks):
    return backends.get(name).run(*inputs, problem, **backends.with_masks(masks))


def assert_near(name: str, problem: Problem, inputs, masks, results, what: str = "") -> None:
    """Every element within the bounds of a check, against float64; rows that are not real are 0 and -inf."""
    case = check.expected(
        *inputs, problem, round_scores=False, masks=masks, tanh_error=backends.get(name).tanh_error
    )  # fmt: skip
    assert case.bad_inputs is None
    out, lse = results
    label = f"{name} on {problem.label()}{what}"
    for tensor, expected, atol, rtol in (
        (out, case.out, case.out_atol, case.out_rtol),
        (lse, case.lse, case.lse_atol, case.lse_rtol),
    ):
        found = compare(tensor, expected, atol=atol, rtol=rtol)
        assert found.passed, f"{label}: {found.sentence()}"


def same(results, others) -> bool:
    return all(torch.equal(one, other) for one, other in zip(results, others, strict=True))


def by_default(cases):
    """Both head_dims of every masking, with the two dtypes taking turns; the rest `exhaustive`."""
    runs = {
        (m, VARIANTS[0 if (n + i) % 2 else 1][1], d) for n, m in enumerate(MASKINGS) for i, d in enumerate((64, 128))
    }
    return [
        pytest.param(m, d, t, marks=() if (m, t, d) in runs else pytest.mark.exhaustive, id=f"{m}-{d}-{t}")
        for m, d, t in cases
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("masking", "head_dim", "dtype"), by_default((m, d, t) for m in MASKINGS for d, t in VARIANTS))
def test_random_problems_under_every_mask_are_right_and_have_the_same_bits_each_time(masking, head_dim, dtype):
    rng = random.Random(f"{masking} {head_dim} {dtype}")
    for number in range(CASES):
        problem = random_problem(rng, masking, head_dim, dtype)
        masks = random_masks(rng, problem)
        layout = rng.choice(("bhsd", "bshd", "apart"))
        inputs = masked_inputs(problem, masks, seed=number, layout=layout)
        for name in BOTH:
            with poisoned_outputs():
                results = run(name, inputs, problem, masks)
            assert_near(name, problem, inputs, masks, results, f", case {number}, {layout}")
            assert results[0].stride() == torch.empty_like(inputs[0]).stride()
            assert same(results, run(name, inputs, problem, masks)), f"{name} on {problem.label()}: other bits"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_more_tiles_than_blocks_under_every_mask(head_dim, causal):
    """Blocks take tiles of sequences of all lengths, in whatever order they become free."""
    rng = random.Random(5)
    of_q = [rng.choice((0, 1, 64, 300, 700, rng.randint(1, 700))) for _ in range(24)]
    of_k = of_q if causal else [rng.randint(0, 700) for _ in of_q]
    problem = Problem(batch=24, num_heads_q=8, num_heads_kv=2, seqlen_q=700, seqlen_k=700, head_dim=head_dim,
                      causal=causal, sink=True, window_left=300, softcap=20.0)  # fmt: skip
    sink = torch.linspace(-3, 3, 8, device="cuda")
    lengths = {"seqlens_q": on_gpu(of_q), "seqlens_k": on_gpu(of_k)}
    for given, more in (("ragged", places(of_q, of_k)), ("right", lengths), ("left", lengths)):
        of_these = problem.with_(lengths=given)
        masks = mask_tensors(of_these, "cuda", sink=sink, **more)
        inputs = masked_inputs(of_these, masks)
        results = run("hopper", inputs, of_these, masks)
        assert_near("hopper", of_these, inputs, masks, results)
        assert all(same(results, run("hopper", inputs, of_these, masks)) for _ in range(5))


@pytest.mark.gpu
def test_a_ragged_batch_is_its_sequences_one_by_one():
    """To a rounding: rows of a warp raise their reference together, and the last one holds rows after a sequence."""
    of_q, of_k = [300, 0, 129, 64, 1], [300, 70, 500, 0, 333]
    problem = Problem(batch=5, num_heads_q=4, num_heads_kv=2, seqlen_q=300, seqlen_k=500, head_dim=64, causal=True,
                      window_left=200, lengths="ragged")  # fmt: skip
    masks = mask_tensors(problem, "cuda", **places(of_q, of_k))
    q, k, v = masked_inputs(problem, masks)
    out, lse = run("hopper-unsplit", (q, k, v), problem, masks)
    first_q = first_k = 0
    for num_q, num_k in zip(of_q, of_k, strict=True):
        rows, keys = slice(first_q, first_q + num_q), slice(first_k, first_k + num_k)
        if num_q and num_k:
            alone = problem.with_(batch=1)
            inputs = q[:, :, rows].clone(), k[:, :, keys].clone(), v[:, :, keys].clone()
            masks = mask_tensors(alone, "cuda", **places([num_q], [num_k]))
            got = run("hopper-unsplit", inputs, alone, masks)
            torch.testing.assert_close(got[0], out[:, :, rows], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(got[1], lse[:, :, rows], rtol=1e-5, atol=1e-5)
        first_q, first_k = rows.stop, keys.stop
    assert bool((out[:, :, first_q:] == 0).all()) and bool((lse[:, :, first_q:] == -math.inf).all())


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_may_change_between_replays_of_a_graph(lengths):
    """The graph holds addresses: whatever the tensors of lengths hold when it is replayed is what counts."""
    problem = Problem(batch=4, num_heads_q=8, num_heads_kv=2, seqlen_q=300, seqlen_k=300, head_dim=64, causal=True,
                      sink=True, lengths=lengths)  # fmt: skip
    some = [[300, 200, 100, 0], [1, 300, 0, 299], [0, 0, 0, 300], [300] * 4, [0] * 4]
    sink = torch.linspace(-2, 2, 8, device="cuda")

    def masks_of(n: int):
        ones, others = some[n], some[n][::-1]
        given = {"seqlens_q": on_gpu(ones), "seqlens_k": on_gpu(others)}
        return mask_tensors(problem, "cuda", sink=sink, **(places(ones, others) if lengths == "ragged" else given))

    shape = (1, 8, 1200, 64) if lengths == "ragged" else (4, 8, 300, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.float16)[:, :heads] for heads in (8, 2, 2))
    masks = masks_of(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run("hopper", (q, k, v), problem, masks)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run("hopper", (q, k, v), problem, masks)
    for n in (0, 1, 2, 3, 4, 1):
        for name, tensor in masks_of(n).named():
            getattr(masks, name).copy_(tensor)
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        assert_near("hopper", problem, (q, k, v), masks, (out, lse), f", lengths {some[n]}")
        assert same((out, lse), run("hopper", (q, k, v), problem, masks))


@pytest.mark.gpu
def test_calls_on_two_streams_have_a_list_of_tiles_each():
    problem = Problem(batch=6, num_heads_q=8, num_heads_kv=8, seqlen_q=700, seqlen_k=700, head_dim=64, causal=True,
                      lengths="ragged")  # fmt: skip
    of = ([700, 0, 650, 1, 300, 64], [10, 20, 700, 700, 5, 690])
    calls = []
    for number, lengths in enumerate(of):
        masks = mask_tensors(problem, "cuda", **places(lengths, lengths))
        inputs = masked_inputs(problem, masks, seed=number)
        calls.append((inputs, masks, run("hopper", inputs, problem, masks)))
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream, (inputs, masks, _) in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(run("hopper", inputs, problem, masks))
    torch.cuda.synchronize()
    for number, results in enumerate(found):
        assert same(results, calls[number % 2][2]), f"call {number}"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", [{"window_left": 40, "window_right": 25}, {"softcap": 1.5}, {"sink": True}, {"lengths": "right"},
             {"lengths": "left", **EVERYTHING}, {"lengths": "ragged", **EVERYTHING}], ids=lambda kind: " ".join(kind)
)  # fmt: skip
def test_every_stage_is_right_under_every_mask(kind):
    problem = Problem(batch=3, num_heads_q=4, num_heads_kv=2, seqlen_q=100, seqlen_k=200, head_dim=64, **kind)
    for name, causal in (("hopper", False), ("hopper-unsplit", "window_right" not in kind)):
        found = bisect(name, problem.with_(causal=causal))
        assert found.passed, f"{name}: {found.finding()}"


@pytest.mark.gpu
def test_a_row_that_sees_no_key_for_some_pages_takes_its_reference_from_the_first_that_it_sees():
    """All scores lie 60 units below zero, where a reference of 0 left by hidden pages would leave nothing of them.

    In a window of 8, most rows of a tile see none of its first page.
    """
    problem = Problem(batch=1, num_heads_q=2, num_heads_kv=1, seqlen_q=300, seqlen_k=300, head_dim=64, window_left=8,
                      causal=True, softmax_scale=0.125)  # fmt: skip
    q, k, v = masked_inputs(problem, None)
    q[..., -1], k[..., -1] = 8.0, -60.0
    for name in BOTH:
        for of_these in (problem, problem.with_(sink=True)):
            masks = (
                mask_tensors(of_these, "cuda", sink=torch.full((2,), -60.0, device="cuda")) if of_these.sink else None
            )
            assert_near(name, of_these, (q, k, v), masks, run(name, (q, k, v), of_these, masks))


@pytest.mark.gpu
@pytest.mark.parametrize("score", [-math.inf, -1e30, -100.0, 100.0, 1e30])
def test_sinks_far_below_and_far_above_all_scores(score):
    problem = Problem(batch=2, num_heads_q=2, num_heads_kv=1, seqlen_q=100, seqlen_k=70, head_dim=64, causal=True,
                      sink=True)  # fmt: skip
    sink = torch.tensor([score, 0.5], device="cuda")
    inputs, masks = masked_inputs(problem, None), mask_tensors(problem, "cuda", sink=sink)
    out, lse = run("hopper-unsplit", inputs, problem, masks)
    expected_out, expected_lse = reference.attention(*inputs, problem, masks)
    assert bool(((out.double() - expected_out).abs() <= 2e-3).all())
    near = (lse.double() - expected_lse).abs() <= 2e-3 + 1e-6 * expected_lse.abs()
    assert bool(torch.where(expected_lse.isfinite(), near, lse.double() == expected_lse).all())
