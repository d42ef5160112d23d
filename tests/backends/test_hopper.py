"""Backend `hopper`: which entry function it picks, what it passes, and the worst for a stale reference."""

from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch
from support.hopper_tiles import MULTIPROCESSORS, loaded_for

from flashcore import backends
from flashcore.backends import hopper
from flashcore.backends._cuda import PARAMS
from flashcore.backends._tensor_maps import MAP_BYTES
from flashcore.bisection.faults import catalogue
from flashcore.bisection.faults.planting import PLAIN
from flashcore.gpu import build
from flashcore.measure import check
from flashcore.measure.check import check_attention
from flashcore.numerics import reference
from flashcore.ops import problem_of
from flashcore.problem import PRESETS, Problem, square

BOTH = ("hopper", "hopper-unsplit")
VARIANTS = list(itertools.product((64, 128), ("float16", "bfloat16")))


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
