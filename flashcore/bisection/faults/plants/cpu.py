"""Bugs planted in backend `cpu`: wrong stages in place of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

from flashcore.bisection.faults.planting import Override
from flashcore.bisection.faults.plants.host import Plants
from flashcore.numerics import masking, reference


def _stages(**methods: Callable) -> Override:
    return Override(methods)


def _base(name: str) -> Callable:
    from flashcore.backends.cpu import CpuBackend

    return getattr(CpuBackend, name)


def _after(name: str, change: Callable) -> Override:
    """The cpu backend's own method, and then `change(result, *arguments)` of what it gave."""

    def method(self, *arguments):
        return change(_base(name)(self, *arguments), *arguments)

    return Override({name: method})


def _half(tensor):
    import torch

    return tensor.to(torch.float16).float()


def _kv_modulo(self, tensor, problem):
    return tensor.float().repeat(1, problem.num_heads_q // problem.num_heads_kv, 1, 1)


def _no_mask(self, q, k, problem, page):
    return _base("scores")(self, q, k, problem.with_(causal=False), page)


def _swizzled(self, q, k, problem, page):
    return _base("scores")(self, q, k.roll(8, dims=-1), problem, page)


def _last_row_unwritten(result, accum, row_sum, row_max):
    out, lse = result
    out[..., -1, :] = math.nan
    return out, lse


def _broadcast_k(self, q, k, problem, page):
    return _base("scores")(self, q, k[:, :1].expand_as(k), problem, page)


def _unscaled_half(self, q, k, problem, page):
    scores = _half(q @ k.transpose(-1, -2)) * problem.scale
    mask = reference.visible(problem, slice(0, problem.seqlen_q), page, q.device)
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


def _laundered_half(self, q, k, problem, page):
    return _unscaled_half(self, q, k, problem, page).nan_to_num(nan=0.0, posinf=0.0, neginf=-math.inf)


def _stale_cells(scores, q, k, problem, page):
    """Of each 64 x 64 block only the first 16 x 16 cells are stored; the others hold what another head left there."""
    import torch

    rows, columns = torch.arange(scores.shape[2]) % 64 < 16, torch.arange(scores.shape[3]) % 64 < 16
    return torch.where(rows[:, None] & columns[None, :], scores, scores.roll(1, dims=1))


def _batch_in_bytes(self, q, k, problem, page):
    """Sequence b reads the K of sequence 2b, as far as there is one."""
    import torch

    return _base("scores")(self, q, k[(2 * torch.arange(problem.batch)) % problem.batch], problem, page)


def _page_too_early(self, q, k, problem, page):
    """Some rows of the page have not arrived yet; which ones, nobody knows."""
    import torch

    anywhere = torch.Generator()
    anywhere.seed()  # from the system: unlike the run before
    return _base("scores")(self, q, k * (torch.rand(k.shape[2], generator=anywhere) < 0.5)[:, None], problem, page)


def _late(scores, q, k, problem, page):
    if page.stop == problem.seqlen_k:
        scores[-1, -1, -1, -1] += 0.25
    return scores


def _tail(scores, q, k, problem, page):
    """The diagonal one key too far: the first masked key of each row is seen."""
    if not problem.causal:
        return scores
    looser = problem.with_(causal=False)
    import torch

    from flashcore.backends import get

    everything = _base("scores")(get("cpu"), q, k, looser, page)

    row = torch.arange(problem.seqlen_q)[:, None] + problem.seqlen_k - problem.seqlen_q + 1
    column = torch.arange(page.start, page.stop)[None, :]
    return torch.where(row == column, everything, scores)


def _stale_row_max(self, scores, row_max):
    """The first page's maximum, until a page's sum passes a guard: one for bfloat16, which is none for float16."""
    import torch

    top = scores.amax(dim=-1)
    stale = torch.where(row_max == -math.inf, top, row_max)
    fits = (scores - reference.safe(stale)[..., None]).exp().sum(dim=-1) < GUARD_OF_BFLOAT16
    return torch.where(fits, stale, row_max.maximum(top))


def _v_by_strides_of_k(self, q, k, v, problem, kept):
    return _base("_loop")(self, q, k, v.as_strided(v.shape, k.stride()), problem, kept)


def _with_other(**changes: Callable) -> Override:
    """Scores of a problem in which these fields are what each function makes of them."""

    def scores(self, q, k, problem, page):
        changed = {name: change(getattr(problem, name)) for name, change in changes.items()}
        return _base("scores")(self, q, k, problem.with_(**changed), page)

    return Override({"scores": scores})


def _cut_page_hidden(scores, q, k, problem, page):
    """A page that the left edge of a row's window cuts is taken for one that lies before it."""
    import torch

    row = torch.arange(problem.seqlen_q)[:, None]
    edge = row + problem.seqlen_k - problem.seqlen_q - problem.window_left
    return scores.masked_fill((page.start < edge) & (edge < page.stop), -math.inf)


def _cap_after_mask(self, q, k, problem, page):
    return reference.capped(_base("scores")(self, q, k, problem.with_(softcap=None), page), problem)


def _cap_before_scale(self, q, k, problem, page):
    return _base("scores")(self, q, k, problem.with_(softmax_scale=1.0), page).mul_(problem.scale)


def _sink_changed(change: Callable) -> Override:
    return Override({"with_sink": lambda self, a, s, m, sink: _base("with_sink")(self, a, s, m, change(sink))})


def _sink_unweighed(self, accum, row_sum, row_max, sink):
    """The sink's exponential, added to a sum that was taken against the row's maximum."""
    return accum, row_sum + sink.exp(), row_max


def _sink_needs_a_key(result, accum, row_sum, row_max, sink):
    import torch

    return result[0], torch.where(row_sum == 0, row_sum, result[1]), torch.where(row_sum == 0, row_max, result[2])


def _right_padding(self, q, k, v, problem, masks):
    return masking.right_aligned(q, k, v, problem.with_(lengths="right"), masks)


def _one_row_early(self, q, k, v, problem, masks):
    return masking.right_aligned(q, k.roll(1, dims=2), v, problem, masks)


def _padded_offset(self, scores, problem, page, lengths):
    """The causal mask aligned by the lengths of the padded tensors; what is past a sequence stays hidden."""
    scores = _base("hidden")(self, scores, problem.with_(causal=False), page, lengths)
    mask = reference.visible(problem, slice(0, problem.seqlen_q), page, scores.device)
    return scores.masked_fill(~mask, -math.inf)


GUARD_OF_BFLOAT16 = 2.0**64
CPU: Plants = {
    "F1": _stages(row_sum=lambda self, s, r, p: r * s[..., :1] + p.sum(dim=-1)),
    "F2": _stages(
        rescale=lambda self, before, m: (before - m).exp(),
        probs=lambda self, s, m: (s - m[..., None]).exp(),
    ),
    "F3": _stages(initial_accum=lambda self, q: q.new_full(q.shape, math.nan)),
    "F6": _stages(scores=_unscaled_half),
    "F7": _stages(scores=_laundered_half),
    "F8": _after("scores", _stale_cells),
    "F9": _stages(scores=_no_mask),
    "F11": _stages(scores=_batch_in_bytes),
    "F12": _stages(scores=_broadcast_k),
    "F15": _after("scores", _late),
    "G1": _stages(scores=_page_too_early),
    "G2": _after("row_sum", lambda total, before, r, p: total + (1.0 if p.shape[-1] < 64 else 0.0)),
    "G3": _after("scores", _tail),
    "G4": _stages(scores=_swizzled),
    "G48": _stages(row_max=_stale_row_max),
    "G50": _stages(_loop=_v_by_strides_of_k),
    "G5": _stages(page_of_v=lambda self, v, pages, j: v[..., : pages[j].stop - pages[j].start, :]),
    "G6": _after("scores", lambda scores, q, k, problem, page: scores * problem.scale),
    "G8": _stages(kv_of_head=_kv_modulo),
    "G9": _after("accum", lambda accum, *_: _half(accum)),
    "G10": _stages(row_sum=lambda self, s, r, p: s + p.sum(dim=-1)),
    "G11": _stages(
        accum=lambda self, a, r, p, v: (r[..., None] * a if bool((r != 1).all()) else a) + p.float() @ v
    ),
    "G12": _stages(accum=lambda self, a, r, p, v: r.roll(1, dims=-1)[..., None] * a + p.float() @ v),
    "G13": _stages(
        rescale=lambda self, before, m: (before - reference.safe(m)).exp2(),
        probs=lambda self, s, m: (s - reference.safe(m)[..., None]).exp2(),
    ),
    "G14": _after("finish", lambda result, a, s, m: (result[0], m + s.log2())),
    "G15": _after("finish", _last_row_unwritten),
    "G53": _with_other(window_left=lambda left: left + 1),
    "G54": _with_other(window_right=lambda right: right + 1),
    "G55": _after("scores", _cut_page_hidden),
    "G56": _stages(scores=_cap_after_mask),
    "G57": _with_other(softcap=lambda cap: None),
    "G58": _stages(scores=_cap_before_scale),
    "G59": _stages(with_sink=lambda self, a, s, m, sink: (a, s, m)),
    "G60": _sink_changed(lambda sink: sink.roll(1, dims=1)),
    "G61": _sink_changed(lambda sink: sink / 8),
    "G62": _stages(with_sink=_sink_unweighed),
    "G63": _after("with_sink", _sink_needs_a_key),
    "G64": _after("lengths", lambda pair, *_: tuple(n.roll(1, dims=0) for n in pair)),
    "G65": _stages(aligned=_right_padding),
    "G66": _stages(hidden=_padded_offset),
    "G67": _after("lengths", lambda pair, problem, masks: (pair[0], pair[1] + 1)),
    "G68": _stages(aligned=_one_row_early),
    "G16": _after("scores", lambda s, q, k, problem, page: s if s.shape[-1] == 64 else s.fill_(-math.inf)),
}  # fmt: skip
