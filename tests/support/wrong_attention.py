"""A zoo of small attention functions in torch, each with one bug of a kind that people reported, and what it is called.

`ZOO` maps a name to the function and to what a diagnosis of it has to say; `RIGHT` holds right ones, written otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

TILE = 64


@dataclass(frozen=True)
class Wrong:
    """A function with a bug in it."""

    function: Callable
    named: str
    """What one of the hypotheses is called; empty where none can explain it, and its stage has to be named."""
    stage: str


ZOO: dict[str, Wrong] = {}
RIGHT: dict[str, Callable] = {}


def _wrong(named: str, stage: str):
    def keep(function: Callable) -> Callable:
        ZOO[function.__name__] = Wrong(function, named, stage)
        return function

    return keep


def _right(function: Callable) -> Callable:
    RIGHT[function.__name__] = function
    return function


# --- parts ---


def parts(q, k, v, *, by_remainder: bool = False):
    """float32, one K and V head for each query head, and the usual scale."""
    group = q.shape[1] // k.shape[1]
    k, v = (
        (t.repeat(1, group, 1, 1) if by_remainder else t.repeat_interleave(group, 1)).float().to(q.device)
        for t in (k, v)
    )
    return q.float(), k, v, 1.0 / math.sqrt(q.shape[-1])


def positions(scores):
    rows = torch.arange(scores.shape[-2], device=scores.device)[:, None]
    return rows, torch.arange(scores.shape[-1], device=scores.device)[None]


def masked(scores, offset: int):
    row, key = positions(scores)
    return scores.masked_fill(key > row + offset, -math.inf)


def finish(scores, v, dtype):
    return (torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v).to(dtype)


def online(q, k, v, *, accum=lambda right, j: right, row_sum=lambda right, j: right, keep=lambda accum: accum):
    """The page loop; `accum` and `row_sum` may give another rescale factor, `keep` what is kept of the accumulator."""
    a, b, c, scale = parts(q, k, v)
    maximum = a.new_full(a.shape[:3], -math.inf)
    total, out = a.new_zeros(a.shape[:3]), torch.zeros_like(a)
    for j, start in enumerate(range(0, k.shape[2], TILE)):
        scores = a @ b[:, :, start : start + TILE].mT * scale
        now = torch.maximum(maximum, scores.amax(-1))
        right, probs = (maximum - now).exp(), (scores - now[..., None]).exp()
        total = total * row_sum(right, j) + probs.sum(-1)
        out = keep(out * accum(right, j)[..., None] + probs.to(q.dtype).float() @ c[:, :, start : start + TILE])
        maximum = now
    return (out / total[..., None]).to(q.dtype)


# --- right ---


@_right
def two_pass(q, k, v, causal=False, softmax_scale=None):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * (scale if softmax_scale is None else softmax_scale)
    return finish(masked(scores, k.shape[2] - q.shape[2]) if causal else scores, c, q.dtype)


@_right
def page_loop(q, k, v):
    return online(q, k, v)


@_right
def sdpa(q, k, v, *, is_causal=False, scale=None):
    mask = None
    if is_causal:
        shape = q.shape[2], k.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


# --- masks ---


@_wrong("top-left mask", "scores")
def top_left(q, k, v, causal=False):
    a, b, c, scale = parts(q, k, v)
    return finish(masked(a @ b.mT * scale, 0) if causal else a @ b.mT * scale, c, q.dtype)


@_wrong("diagonal off by one", "scores")
def one_key_too_many(q, k, v, causal=False):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    return finish(masked(scores, k.shape[2] - q.shape[2] + 1) if causal else scores, c, q.dtype)


@_wrong("diagonal off by one", "scores")
def itself_hidden(q, k, v, causal=False):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    return finish(masked(scores, k.shape[2] - q.shape[2] - 1) if causal else scores, c, q.dtype)


@_wrong("no mask", "scores")
def mask_forgotten(q, k, v, causal=False):
    return two_pass(q, k, v)


@_wrong("masked scores set to 0", "scores")
def mask_that_multiplies(q, k, v, causal=False):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    if causal:
        scores = scores * (masked(torch.zeros_like(scores), k.shape[2] - q.shape[2]) == 0)
    return finish(scores, c, q.dtype)


@_wrong("mask by whole tiles", "scores")
def mask_of_tiles(q, k, v, causal=False):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    row, key = positions(scores)
    if causal:
        scores = scores.masked_fill(key // 32 * 32 > row + k.shape[2] - q.shape[2], -math.inf)
    return finish(scores, c, q.dtype)


@_wrong("window not asked for", "scores")
def a_window(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    row, key = positions(scores)
    return finish(scores.masked_fill(key < row + k.shape[2] - q.shape[2] - 63, -math.inf), c, q.dtype)


# --- scores ---


def roots_of_scores(q, k, v):
    """Scores that nothing has a name for."""
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    return finish(scores.sign() * scores.abs().sqrt(), c, q.dtype)


@_wrong("scale missing", "scores")
def no_scale(q, k, v):
    a, b, c, _ = parts(q, k, v)
    return finish(a @ b.mT, c, q.dtype)


@_wrong("scale twice", "scores")
def scaled_twice(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return finish(a @ b.mT * scale * scale, c, q.dtype)


@_wrong("scale of another head_dim", "scores")
def padded_scale(q, k, v):
    a, b, c, _ = parts(q, k, v)
    return finish(a @ b.mT / math.sqrt(2 * q.shape[-1]), c, q.dtype)


@_wrong("softmax_scale ignored", "scores")
def scale_not_taken(q, k, v, softmax_scale=None):
    return two_pass(q, k, v)


@_wrong("base 2 for e", "probs")
def base_two(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    probs = (scores - scores.amax(-1, keepdim=True)).exp2()
    return ((probs @ c) / probs.sum(-1, keepdim=True)).to(q.dtype)


@_wrong("part of head_dim left out", "scores")
def half_of_the_columns(q, k, v):
    a, b, c, scale = parts(q, k, v)
    half = q.shape[-1] // 2
    return finish(a[..., :half] @ b[..., :half].mT * scale, c, q.dtype)


@_wrong("columns of head_dim in another order", "scores")
def swizzled(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return finish(a @ b.roll(8, -1).mT * scale, c, q.dtype)


@_wrong("scores in 16 bits", "scores")
def scores_in_half(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return finish((a @ b.mT).half().float() * scale, c, q.dtype)


@_wrong("Q of another row", "scores")
def rows_shifted(q, k, v):
    return two_pass(q.roll(1, 2), k, v)


@_wrong("scores without influence", "scores")
def mean_of_v(q, k, v):
    return two_pass(q * 0, k, v)


@_wrong("V of a page missing", "accum")
def nothing_but_zeros(q, k, v):
    return torch.zeros_like(q)


# --- heads ---


@_wrong("K of another head", "scores")
def heads_by_remainder(q, k, v):
    a, b, c, scale = parts(q, k, v, by_remainder=True)
    return finish(a @ b.mT * scale, c, q.dtype)


@_wrong("V of another head", "accum")
def heads_of_v_shifted(q, k, v):
    return two_pass(q, k, v.roll(1, 1)) if k.shape[1] > 1 else two_pass(q, k, v)


@_wrong("K of another batch", "scores")
def one_batch_for_all(q, k, v):
    return two_pass(q, k[:1].expand_as(k), v)


@_wrong("result of another head", "out")
def heads_written_backwards(q, k, v):
    return two_pass(q, k, v).flip(1)


# --- keys and pages ---


@_wrong("last partial page dropped", "scores")
def tail_dropped(q, k, v):
    whole = k.shape[2] // TILE * TILE or k.shape[2]
    return two_pass(q, k[:, :, :whole], v[:, :, :whole])


@_wrong("last partial page taken as whole", "row_sum")
def tail_padded(q, k, v):
    more = -k.shape[2] % TILE
    return two_pass(q, *(torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (k, v)))


def _pages(t, first: int, second: int):
    return t if t.shape[2] < 2 * TILE else torch.cat(
        [t[:, :, n * TILE : (n + 1) * TILE] for n in (first, second)] + [t[:, :, 2 * TILE :]], dim=2)  # fmt: skip


@_wrong("pages swapped", "scores")
def k_pages_swapped(q, k, v):
    return two_pass(q, _pages(k, 1, 0), v)


@_wrong("K of another page", "scores")
def k_page_read_twice(q, k, v):
    return two_pass(q, _pages(k, 0, 0), v)


@_wrong("V of another page", "accum")
def stale_v(q, k, v):
    return two_pass(q, k, _pages(v, 0, 0))


@_wrong("a page read twice", "scores")
def page_read_twice(q, k, v):
    return two_pass(q, _pages(k, 0, 0), _pages(v, 0, 0))


# --- the loop ---


@_wrong("accum not rescaled", "accum")
def accum_not_rescaled(q, k, v):
    return online(q, k, v, accum=lambda right, j: torch.ones_like(right))


@_wrong("row_sum not rescaled", "row_sum")
def row_sum_not_rescaled(q, k, v):
    return online(q, k, v, row_sum=lambda right, j: torch.ones_like(right))


@_wrong("neither rescaled", "rescale")
def nothing_rescaled(q, k, v):
    one = lambda right, j: torch.ones_like(right)  # noqa: E731
    return online(q, k, v, accum=one, row_sum=one)


@_wrong("accum not rescaled", "accum")
def one_page_not_rescaled(q, k, v):
    return online(q, k, v, accum=lambda right, j: torch.ones_like(right) if j == 2 else right)


@_wrong("no maximum subtracted", "probs")
def no_maximum(q, k, v):
    a, b, c, scale = parts(q, k, v)
    probs = (a @ b.mT * scale).exp()
    return ((probs @ c) / probs.sum(-1, keepdim=True)).to(q.dtype)


@_wrong("maximum not reduced over lanes", "probs")
def four_lanes(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    probs = torch.empty_like(scores)
    for lane in range(4):
        mine = scores[..., lane::4]
        probs[..., lane::4] = (mine - mine.amax(-1, keepdim=True)).exp() if mine.shape[-1] else mine
    return ((probs @ c) / probs.sum(-1, keepdim=True)).to(q.dtype)


@_wrong("accumulation in 16 bits", "accum")
def accum_in_half(q, k, v):
    return online(q, k, v, keep=lambda accum: accum.half().float())


@_wrong("not normalised", "out")
def not_divided(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    return ((scores - scores.amax(-1, keepdim=True)).exp() @ c).to(q.dtype)


# --- other formulas, other tensors ---


@_wrong("sigmoid in place of softmax", "probs")
def sigmoid(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return (torch.sigmoid(a @ b.mT * scale) @ c).to(q.dtype)


@_wrong("sigmoid less log(keys) in place of softmax", "probs")
def sigmoid_with_its_bias(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return (torch.sigmoid(a @ b.mT * scale - math.log(k.shape[2])) @ c).to(q.dtype)


@_wrong("softmax over the wrong axis", "row_sum")
def softmax_over_rows(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return (torch.softmax(a @ b.mT * scale, dim=-2) @ c).to(q.dtype)


@_wrong("softmax over the wrong axis", "row_sum")
def softmax_over_heads(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return (torch.softmax(a @ b.mT * scale, dim=1) @ c).to(q.dtype)


@_wrong("softmax twice in place of softmax", "probs")
def softmax_twice(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return finish(torch.softmax(a @ b.mT * scale, dim=-1), c, q.dtype)


@_wrong("scores in place of softmax", "probs")
def no_softmax(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return (a @ b.mT * scale @ c).to(q.dtype)


@_wrong("relu in place of softmax", "probs")
def relu_over_the_number_of_keys(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return ((a @ b.mT * scale).relu() @ c / k.shape[2]).to(q.dtype)


@_wrong("log of the softmax in place of softmax", "probs")
def log_softmax(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return (torch.log_softmax(a @ b.mT * scale, dim=-1) @ c).to(q.dtype)


@_wrong("linear in place of softmax", "probs")
def linear_attention(q, k, v):
    a, b, c, _ = parts(q, k, v)
    weights = (torch.nn.functional.elu(a) + 1) @ (torch.nn.functional.elu(b) + 1).mT
    return (weights @ c / weights.sum(-1, keepdim=True)).to(q.dtype)


@_wrong("another tensor taken", "scores")
def keys_and_values_exchanged(q, k, v):
    return two_pass(q, v, k)


@_wrong("another tensor taken", "accum")
def keys_for_values(q, k, v):
    return two_pass(q, k, k)


@_wrong("Q added to the output", "out")
def with_a_residual(q, k, v):
    return two_pass(q, k, v) + q


@_wrong("normed before the products", "scores")
def normed(q, k, v):
    a, b, c, scale = parts(q, k, v)
    a, b = (t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for t in (a, b))
    return finish(a @ b.mT * scale, c, q.dtype)


@_wrong("elements at other places", "scores")
def rotated_in_pairs(q, k, v):
    def turned(t):
        half = t.shape[-1] // 2
        speed = 10000.0 ** (-torch.arange(half, device=t.device) / half)
        angle = torch.arange(t.shape[2], device=t.device)[:, None] * speed
        x, y = t[..., ::2], t[..., 1::2]
        return torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1).flatten(-2)

    a, b, c, scale = parts(q, k, v)
    return finish(turned(a) @ turned(b).mT * scale, c, q.dtype)


@_wrong("scale twice", "scores")
def scaled_twice_and_pages_swapped(q, k, v):
    a, b, c, scale = parts(q, _pages(k, 1, 0), v)
    return finish(a @ b.mT * scale * scale, c, q.dtype)


# --- offsets of 16 bits, and 8 bits ---


def _wrapped(t, count: int):
    return t.flatten()[torch.arange(t.numel(), device=t.device) % count].view(t.shape)


@_wrong("offsets that wrap", "scores")
def offsets_of_16_bits(q, k, v):
    return two_pass(_wrapped(q.contiguous(), 65536), k, v)


@_wrong("offsets that wrap", "accum")
def offsets_of_15_bits(q, k, v):
    return two_pass(q, k, _wrapped(v.contiguous(), 32768))


@_wrong("offsets that wrap", "out")
def written_at_16_bits(q, k, v):
    right = two_pass(q, k, v).contiguous()
    out = torch.zeros_like(right).flatten()
    for part in right.flatten().split(65536):
        out[: len(part)] = part
    return out.view(q.shape)


@_wrong("K in fewer bits", "scores")
def k_in_8_bits(q, k, v):
    return two_pass(q, k.to(torch.float8_e4m3fn).to(k.dtype), v)


@_wrong("K and V in fewer bits", "accum")
def whole_numbers_of_8_bits(q, k, v):
    def rounded(t):
        step = t.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        return ((t.float() / step).round() * step).to(t.dtype)

    return two_pass(q, rounded(k), rounded(v))


@_wrong("products in fewer bits", "accum")
def products_of_ten_bits(q, k, v):
    """As by TF32, which shows where numbers have more."""

    def cut(t):
        return ((t.float().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    a, b, c, scale = parts(q, k, v)
    return (cut(torch.softmax(cut(a) @ cut(b).mT * scale, -1)) @ cut(c)).to(q.dtype)


# --- lots, masks of numbers, and a maximum ---


@_wrong("dropout left on", "probs")
def dropout_of_weights(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return (torch.nn.functional.dropout(torch.softmax(a @ b.mT * scale, -1), 0.1) @ c).to(q.dtype)


@_wrong("dropout left on", "out")
def dropout_of_the_output(q, k, v):
    return torch.nn.functional.dropout(two_pass(q, k, v), 0.2)


def _added(q, k, v, number: float, causal: bool):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    hidden = masked(torch.zeros_like(scores), k.shape[2] - q.shape[2]) < 0
    return finish(scores + number * hidden if causal else scores, c, q.dtype)


@_wrong("mask too small", "scores")
def ten_thousand_subtracted(q, k, v, causal=False):
    return _added(q, k, v, -1e4, causal)


@_wrong("mask too small", "scores")
def a_hundred_subtracted(q, k, v, causal=False):
    return _added(q, k, v, -100.0, causal)


@_wrong("mask too small", "scores")
def masked_before_the_scale(q, k, v, causal=False):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT
    if causal:
        scores = scores.masked_fill(masked(torch.zeros_like(scores), k.shape[2] - q.shape[2]) < 0, -1000.0)
    return finish(scores * scale, c, q.dtype)


@_wrong("cap after the mask", "scores")
def capped_after_the_mask(q, k, v, causal=False):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    scores = masked(scores, k.shape[2] - q.shape[2]) if causal else scores
    return finish(30 * torch.tanh(scores / 30), c, q.dtype)


@_wrong("negative scores set to 0", "scores")
def relu_of_scores(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return finish((a @ b.mT * scale).relu(), c, q.dtype)


@_wrong("maximum starts too high", "row_max")
def maximum_from_zero(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    probs = (scores - scores.amax(-1, keepdim=True).clamp_min(0)).exp()
    return (probs @ c / probs.sum(-1, keepdim=True)).nan_to_num(0.0).to(q.dtype)


def _late(right):
    return torch.where(right > 2.0**-8, torch.ones_like(right), right)


@_wrong("accum not rescaled below 2^8", "accum")
def rescaled_late_accum(q, k, v):
    return online(q, k, v, accum=lambda right, j: _late(right))


@_wrong("neither rescaled below 2^8", "rescale")
def rescaled_late(q, k, v):
    return online(q, k, v, accum=lambda right, j: _late(right), row_sum=lambda right, j: _late(right))


@_wrong("output of some heads multiplied", "out")
def a_head_of_another_size(q, k, v):
    out = two_pass(q, k, v)
    out[:, -1] *= 2
    return out


@_wrong("divided along the columns", "row_sum")
def divided_along_the_columns(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    probs = (scores - scores.amax(-1, keepdim=True)).exp()
    out, total, width = probs @ c, probs.sum(-1), q.shape[-1]
    each = total[..., None].expand_as(out).clone()
    for first in range(0, q.shape[2] - width + 1, width):
        each[:, :, first : first + width] = total[:, :, None, first : first + width]
    return (out / each).to(q.dtype)


@_wrong("output cut off", "out")
def out_cut_off(q, k, v):
    return two_pass(q, k, v).clamp(-0.5, 0.5)


@_wrong("Q of another row", "scores")
def last_rows_of_tiles_doubled(q, k, v):
    place = torch.arange(q.shape[2], device=q.device)
    return two_pass(q, k, v)[:, :, torch.where(place % TILE == TILE - 1, place - 1, place)]


@_wrong("another tensor taken", "scores")
def exchanged_and_not_scaled(q, k, v):
    """Two bugs that hide each other."""
    a, b, c, _ = parts(q, v, k)
    return finish(a @ b.mT, c, q.dtype)


@_wrong("softcap not asked for", "scores")
def capped_and_the_tail_dropped(q, k, v):
    a, b, c, scale = parts(q, k, v)
    whole = k.shape[2] // TILE * TILE or k.shape[2]
    return finish((20 * torch.tanh(a @ b.mT * scale / 20))[..., :whole], c[:, :, :whole], q.dtype)


# --- memory ---


@_wrong("uninitialised memory", "out")
def last_rows_not_written(q, k, v):
    out = torch.empty_like(q)
    whole = q.shape[2] // TILE * TILE or q.shape[2]
    out[:, :, :whole] = two_pass(q, k, v)[:, :, :whole]
    return out


@_wrong("strides ignored", "scores")
def contiguous_taken_for_granted(q, k, v):
    def flat(t):
        return torch.as_strided(t, t.shape, torch.empty(t.shape, device="meta").stride(), t.storage_offset())

    return two_pass(flat(q), flat(k), flat(v))


@_wrong("", "accum")
def a_race(q, k, v):
    out = two_pass(q, k, v)
    out[:, :, torch.randint(0, q.shape[2], (5,), device=q.device)] *= 0.5
    return out


@_wrong("scores shifted", "scores")
def one_score(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    scores[-1, -1, -1, -1] += 0.25
    return finish(scores, c, q.dtype)


# --- masks, by tiles and by their values ---


@_wrong("tiles skipped", "scores")
def a_tile_too_few(q, k, v, causal=False):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    if causal:
        offset = k.shape[2] - q.shape[2]
        row, key = positions(scores)
        last = ((row // TILE * TILE + TILE + offset) // TILE * TILE - TILE).clamp_min(TILE)
        scores = masked(scores, offset).masked_fill(key >= last, -math.inf)
    return finish(scores, c, q.dtype)


@_wrong("mask within tiles", "scores")
def places_within_tiles(q, k, v, causal=False):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    row, key = positions(scores)
    if causal:
        scores = scores.masked_fill((key % TILE > row % TILE) | (key // TILE > row // TILE), -math.inf)
    return finish(scores, c, q.dtype)


@_wrong("window not asked for", "scores")
def window_on_both_sides(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    row, key = positions(scores)
    return finish(scores.masked_fill((key - row - k.shape[2] + q.shape[2]).abs() > 40, -math.inf), c, q.dtype)


@_wrong("hidden keys in row_sum", "row_sum")
def masked_after_the_softmax(q, k, v, causal=False):
    a, b, c, scale = parts(q, k, v)
    probs = torch.softmax(a @ b.mT * scale, dim=-1)
    if causal:
        probs = probs * (masked(torch.zeros_like(probs), k.shape[2] - q.shape[2]) == 0)
    return (probs @ c).to(q.dtype)


@_wrong("mask too small", "scores")
def masked_by_a_small_number(q, k, v, causal=False):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    if causal:
        scores = scores.masked_fill(masked(torch.zeros_like(scores), k.shape[2] - q.shape[2]) < 0, -100.0)
    return finish(scores, c, q.dtype)


# --- scores that are bent, shifted, or multiplied in places ---


@_wrong("softcap not asked for", "scores")
def capped(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return finish(30.0 * torch.tanh(a @ b.mT * scale / 30.0), c, q.dtype)


@_wrong("scores cut off", "scores")
def cut_off(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return finish((a @ b.mT * scale).clamp(-8, 8), c, q.dtype)


@_wrong("bias by distance", "scores")
def biased_by_distance(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    row, key = positions(scores)
    return finish(scores - 0.02 * (row + k.shape[2] - q.shape[2] - key).abs(), c, q.dtype)


@_wrong("scale of some keys", "scores")
def scaled_on_the_first_page(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT
    scores[..., :TILE] *= scale
    return finish(scores, c, q.dtype)


@_wrong("scale of some heads", "scores")
def last_head_not_scaled(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    scores[:, -1] /= scale
    return finish(scores, c, q.dtype)


@_wrong("scaled Q in 16 bits", "scores")
def scaled_before_the_products(q, k, v):
    _, b, c, scale = parts(q, k, v)
    log2 = (q * (scale / math.log(2))).float() @ b.mT
    return finish(log2 * math.log(2), c, q.dtype)


@_wrong("a constant in few digits", "scores")
def few_digits(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return finish(a @ b.mT * scale * 1.44 * math.log(2), c, q.dtype)


@_wrong("overflow set to 0", "scores")
def overflow_hidden(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = (a @ b.mT).half().float()
    return finish(torch.where(scores.isfinite(), scores, 0.0) * scale, c, q.dtype)


@_wrong("elements at other places", "scores")
def k_reshaped(q, k, v):
    a, b, c, scale = parts(q, k, v)
    return finish(a @ b.contiguous().view(*b.shape[:2], b.shape[3], b.shape[2]) * scale, c, q.dtype)


@_wrong("elements at other places", "accum")
def tiles_of_v_transposed(q, k, v):
    v = v.clone()
    for first in range(0, v.shape[2] - v.shape[3] + 1, v.shape[3]):
        v[:, :, first : first + v.shape[3]] = v[:, :, first : first + v.shape[3]].mT.clone()
    return two_pass(q, k, v)


@_wrong("elements at other places", "out")
def written_as_bshd(q, k, v):
    return two_pass(q, k, v).transpose(1, 2).contiguous().view(q.shape)


# --- the loop, its factors, and parts that are added up ---


@_wrong("factor twice", "rescale")
def factors_squared(q, k, v):
    return online(q, k, v, accum=lambda right, j: right**2, row_sum=lambda right, j: right**2)


@_wrong("accum factor twice", "accum")
def accum_factor_squared(q, k, v):
    return online(q, k, v, accum=lambda right, j: right**2)


def _in_parts(q, k, v, weigh, size=50):
    """Attention over parts of the keys; `weigh` gets the sums, row sums and maxima of all parts."""
    a, b, c, scale = parts(q, k, v)
    found = []
    for start in range(0, k.shape[2], size):
        scores = a @ b[:, :, start : start + size].mT * scale
        maximum = scores.amax(-1, keepdim=True)
        probs = (scores - maximum).exp()
        found.append((probs @ c[:, :, start : start + size], probs.sum(-1, keepdim=True), maximum))
    return weigh(*(torch.stack(each) for each in zip(*found, strict=True))).to(q.dtype)


@_wrong("parts not weighed", "out")
def parts_added_as_they_are(q, k, v):
    return _in_parts(q, k, v, lambda sums, totals, maxima: sums.sum(0) / totals.sum(0))


@_wrong("parts weighed by their maximum", "out")
def parts_without_their_sums(q, k, v):
    return _in_parts(q, k, v, lambda sums, totals, maxima: (torch.softmax(maxima, 0) * sums / totals).sum(0))


@_wrong("state carried over", "row_sum")
def sums_carried_over(q, k, v):
    a, b, c, scale = parts(q, k, v)
    out, maximum, total = torch.zeros_like(a), None, None
    for first in range(0, q.shape[2], TILE):
        scores = a[:, :, first : first + TILE] @ b.mT * scale
        now, rows = scores.amax(-1), scores.shape[2]
        if maximum is None:
            maximum, total = torch.full_like(now, -math.inf), torch.zeros_like(now)
        new = torch.maximum(maximum[:, :, :rows], now)
        probs = (scores - new[..., None]).exp()
        total = total[:, :, :rows] * (maximum[:, :, :rows] - new).exp() + probs.sum(-1)
        out[:, :, first : first + TILE] = probs @ c / total[..., None]
        maximum = new
    return out.to(q.dtype)


# --- the output ---


@_wrong("columns left 0", "out")
def last_columns_left(q, k, v):
    out = two_pass(q, k, v)
    out[..., -8:] = 0
    return out


@_wrong("columns of V in another order", "accum")
def halves_of_v_swapped(q, k, v):
    return two_pass(q, k, v.roll(v.shape[-1] // 2, -1))


@_wrong("rows left 0", "out")
def last_row_left(q, k, v):
    out = two_pass(q, k, v)
    out[:, :, -1] = 0
    return out


@_wrong("output multiplied", "out")
def a_tenth_too_much(q, k, v):
    return two_pass(q, k, v) * 1.1


@_wrong("a number added to the output", "out")
def one_element(q, k, v):
    out = two_pass(q, k, v)
    out[-1, -1, -1, -1] += 0.125
    return out


@_wrong("a constant in row_sum", "row_sum")
def a_large_epsilon(q, k, v):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    probs = (scores - scores.amax(-1, keepdim=True)).exp()
    return (probs @ c / (probs.sum(-1, keepdim=True) + 0.5)).to(q.dtype)


@_wrong("output in fewer bits", "out")
def through_bfloat16(q, k, v):
    return two_pass(q, k, v).bfloat16().to(q.dtype)


@_wrong("V in fewer bits", "accum")
def v_in_8_bits(q, k, v):
    return two_pass(q, k, v.to(torch.float8_e4m3fn).to(v.dtype))


@_wrong("row_sum in fewer bits", "row_sum")
def row_sum_in_bfloat16(q, k, v):
    return online(q, k, v, row_sum=lambda right, j: right.bfloat16().float())


# --- what is kept between calls ---


def keeps_k(q, k, v, kept={}):  # noqa: B006
    return two_pass(q, kept.setdefault((k.shape, k.dtype), k.clone()), v)


def adds_to_the_last(q, k, v, kept={}):  # noqa: B006
    total = kept.setdefault((q.shape, q.dtype), torch.zeros(q.shape, device=q.device))
    return total.add_(two_pass(q, k, v).float()).to(q.dtype)


def first_call_halved(q, k, v, kept=set()):  # noqa: B006
    new = (q.shape, q.dtype) not in kept
    kept.add((q.shape, q.dtype))
    return two_pass(q, k, v) * (0.5 if new else 1.0)


# --- no answer at all ---


def raises(q, k, v):
    raise RuntimeError("no kernel image\nis available")


def hangs(q, k, v):
    while True:
        pass


def changes_q(q, k, v):
    out = two_pass(q, k, v)
    q.mul_(0.5)
    return out


def wrong_shape(q, k, v):
    return two_pass(q, k, v).transpose(1, 2)


def wrong_dtype(q, k, v):
    return two_pass(q, k, v).float()


def nothing(q, k, v):
    return None


def contiguous_only(q, k, v):
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        raise ValueError("tensors must be contiguous")
    return two_pass(q, k, v)


def two_bugs(q, k, v, causal=False):
    """Heads by remainder, the scale twice, and a top-left mask: three, in truth."""
    a, b, c, scale = parts(q, k, v, by_remainder=True)
    scores = a @ b.mT * scale * scale
    return finish(masked(scores, 0) if causal else scores, c, q.dtype)


def with_lse(q, k, v, return_lse=False, base=math.e):
    a, b, c, scale = parts(q, k, v)
    scores = a @ b.mT * scale
    lse = torch.logsumexp(scores, dim=-1) / math.log(base)
    return (finish(scores, c, q.dtype), lse) if return_lse else finish(scores, c, q.dtype)
