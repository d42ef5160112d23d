"""Attention with what no kernel of ours computes (windows, caps, sinks, biases, lengths), in torch's operations.

The last resort where no peer is installed that can do the same: scores are stored, some rows at a time, in float32 (in
float64 for float64). Gradients flow through it by torch.autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashcore.errors import InvalidProblem
from flashcore.library import traced
from flashcore.numerics import ambient, plain, seen
from flashcore.numerics.masking import alike, some_sequences
from flashcore.problem import LARGEST

CHUNK_SCORES = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Scores held at once, a few times over: 16 MB each on a CPU, 512 MB on a GPU."""


@dataclass(frozen=True)
class Masking:
    """What stands between a query and its keys, besides the product of the two.

    With ``offset`` the number of keys less the number of queries (of each sequence, where lengths are given), the query
    in row i stands at position ``i + offset``: everything here is aligned bottom right. Scores become
    ``softcap * tanh(scale * q k^T / softcap) - slope * |i + offset - j| + bias``, and -inf where a key is hidden.
    """

    causal: bool = False
    window_left: int = -1
    """Keys before its own position that a query sees; -1 for all."""
    window_right: int = -1
    softcap: float = 0.0
    """0 for none."""
    slopes: torch.Tensor | None = None
    """ALiBi: float ``[Hq]`` or ``[B, Hq]``."""
    sink: torch.Tensor | None = None
    """``[Hq]``: the score of one more key of each head, whose value is 0."""
    bias: torch.Tensor | None = None
    """Added to the scores: any float tensor that broadcasts to ``[B, Hq, Sq, Sk]``."""
    seen: torch.Tensor | None = None
    """True where a key may be seen: a bool tensor that broadcasts alike."""
    lengths_q: torch.Tensor | None = None
    """``[B]``: rows of each sequence that are real; the rest give 0."""
    lengths_k: torch.Tensor | None = None
    at_end: bool = False
    """Whether the last rows are the real ones, not the first; not with `slopes`."""
    first_k: torch.Tensor | None = None
    """``[B]``: the first key of each sequence that is real."""
    dropout: float = 0.0
    """Of the probabilities."""

    def __post_init__(self):
        for name in ("window_left", "window_right"):
            object.__setattr__(self, name, plain.integer(name, getattr(self, name)))
            if getattr(self, name) < -1:
                raise InvalidProblem(f"{name} is {getattr(self, name)}; it has to be at least 0, or -1 for no limit.")
        object.__setattr__(self, "softcap", checked_softcap(self.softcap))
        dropout = plain.number("dropout", self.dropout)
        if dropout is None or not 0 <= dropout < 1:
            raise InvalidProblem(f"dropout is {plain.shown(self.dropout)}; it has to be at least 0, and below 1.")


def checked_softcap(softcap) -> float:
    """A softcap as a float above 0, or 0.0 for none; `InvalidProblem` for anything else."""
    number = plain.number("softcap", softcap)
    if number is None:
        return 0.0
    if not 0 <= number <= LARGEST:  # also of NaN, and in a form that torch's compiler follows
        raise InvalidProblem(f"softcap is {number}; it has to be above 0, or 0 for none, and finite in float32.")
    return number


def check_heads(name: str, tensor, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    """Raise `InvalidProblem` unless this is a float tensor of one of these shapes, on that device."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tuple(tensor.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise InvalidProblem(f"{name} is {plain.shown(tensor)}; it has to be a float tensor {wanted}, a number a head.")
    if tensor.device != device:
        raise InvalidProblem(f"{name} lies on {tensor.device} and q on {device}; move it there.")


def visible(masking: Masking, batch: slice, rows: slice, seqlen_q: int, seqlen_k: int, device) -> torch.Tensor | None:
    """Which keys a query sees by lengths, causal mask and window: bool ``[B or 1, 1, rows, Sk]``; None for all."""
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    column = torch.arange(seqlen_k, device=device)
    lengths_q, lengths_k = (
        None if lengths is None else lengths[batch].view(-1, 1, 1, 1)
        for lengths in (masking.lengths_q, masking.lengths_k)
    )
    not_seen = seen.hidden(
        row, column, seqlen_q, seqlen_k, left=masking.window_left,
        right=0 if masking.causal else masking.window_right, lengths_q=lengths_q, lengths_k=lengths_k,
        at_end=masking.at_end,
    )  # fmt: skip
    parts = [] if not_seen is None else [~not_seen]
    if masking.first_k is not None:
        parts.append(column >= masking.first_k[batch].long().view(-1, 1, 1, 1))
    if masking.seen is not None:
        parts.append(_part(masking.seen, batch, rows))
    if not parts:
        return None
    found = parts[0]
    for part in parts[1:]:
        found = found & part
    return found.view(*(1,) * (4 - found.dim()), *found.shape)


def _part(tensor: torch.Tensor, batch: slice, rows: slice) -> torch.Tensor:
    """Some batches and rows of what broadcasts to ``[B, Hq, Sq, Sk]``."""
    tensor = tensor.view(*(1,) * (4 - tensor.dim()), *tensor.shape)
    tensor = tensor if tensor.shape[0] == 1 else tensor[batch]
    return tensor if tensor.shape[2] == 1 else tensor[:, :, rows]


def _distances(masking: Masking, batch: slice, rows: slice, seqlen_q: int, seqlen_k: int, device) -> torch.Tensor:
    """``|i + offset - j|``, ``[B or 1, 1, rows, Sk]``."""
    num_q, num_k = (
        size if lengths is None else lengths[batch].long().view(-1, 1, 1, 1)
        for size, lengths in ((seqlen_q, masking.lengths_q), (seqlen_k, masking.lengths_k))
    )
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    found = (row + (num_k - num_q) - torch.arange(seqlen_k, device=device)).abs()
    return found.view(*(1,) * (4 - found.dim()), *found.shape)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking, softmax_scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scores) v`` with all that `masking` says.

    Parameters
    ----------
    q, k, v
        ``[B, Hq, Sq, D]``, ``[B, Hkv, Sk, D]`` and ``[B, Hkv, Sk, Dv]``, one floating dtype; Hq a multiple of Hkv.
    softmax_scale
        None for ``1/sqrt(D)``.

    Returns
    -------
    out, lse
        ``[B, Hq, Sq, Dv]`` in the dtype of `q`, and ``[B, Hq, Sq]`` in float32 (float64 for float64): 0 and -inf in
        rows that see no key.

    Raises
    ------
    InvalidProblem
        `sink` or `slopes` of another shape, dtype or device.
    """
    compute = _attention if traced() else _shielded
    return compute(q, k, v, masking, softmax_scale)


def _attention(q, k, v, masking: Masking, softmax_scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention`, whatever is set around the call."""
    batch, heads, seqlen_q, head_dim = q.shape
    group, seqlen_k = heads // k.shape[1], k.shape[2]
    if masking.slopes is not None:
        check_heads("slopes", masking.slopes, ((heads,), (batch, heads)), q.device)
    if masking.sink is not None:
        check_heads("sink", masking.sink, ((heads,),), q.device)
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    if seqlen_q == 0 or seqlen_k == 0 or batch == 0:
        lse = q.new_full(q.shape[:3], -math.inf, dtype=compute)
        if masking.sink is not None:  # the only key that there is
            lse = masking.sink.to(compute).view(1, -1, 1).expand_as(lse).clone()
            if masking.lengths_q is not None:
                lse.masked_fill_(seen.unreal(masking.lengths_q, seqlen_q, masking.at_end)[:, None], -math.inf)
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    if traced():  # whole: a loop would be unrolled for these very lengths, and compiled anew for others
        keys, values = (t.to(compute).repeat_interleave(group, 1) for t in (k, v))
        out, lse = _rows(q, keys, values, masking, scale, slice(0, batch), slice(0, seqlen_q), seqlen_q)
        return out.to(q.dtype), lse
    budget = CHUNK_SCORES.get(q.device.type, CHUNK_SCORES["cpu"])
    num_rows = max(1, min(seqlen_q, budget // (heads * seqlen_k)))
    num_batch = max(1, min(batch, budget // (heads * num_rows * seqlen_k)))
    parts = []
    for start in range(0, batch, num_batch):
        some = slice(start, min(start + num_batch, batch))
        keys, values = (t[some].to(compute).repeat_interleave(group, 1) for t in (k, v))
        found = [
            _rows(q, keys, values, masking, scale, some, slice(row, min(row + num_rows, seqlen_q)), seqlen_q)
            for row in range(0, seqlen_q, num_rows)
        ]
        parts.append(found[0] if len(found) == 1 else [torch.cat(one, 2) for one in zip(*found, strict=True)])
    out, lse = parts[0] if len(parts) == 1 else [torch.cat(one) for one in zip(*parts, strict=True)]
    return out.to(q.dtype), lse


_shielded = ambient.shielded(_attention)
"""The same with autocast and the like kept out of it: what is float32 here stays so."""


def _rows(q, keys, values, masking: Masking, scale: float, batch: slice, rows: slice, seqlen_q: int):
    """`attention` of some batches and rows, in the dtype of `keys`."""
    seqlen_k, device = keys.shape[2], q.device
    scores = (q[batch, :, rows].to(keys.dtype) @ keys.mT) * scale
    if masking.softcap:
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    if masking.slopes is not None:
        slopes = masking.slopes.to(keys.dtype)
        slopes = (slopes[batch] if slopes.dim() == 2 else slopes[None])[..., None, None]
        scores = scores - slopes * _distances(masking, batch, rows, seqlen_q, seqlen_k, device)
    if masking.bias is not None:
        scores = scores + _part(masking.bias, batch, rows).to(keys.dtype)
    sees = visible(masking, batch, rows, seqlen_q, seqlen_k, device)
    if sees is not None:
        scores = scores.masked_fill(~sees, -math.inf)
    if masking.sink is not None:
        sink = masking.sink.to(keys.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    # Of a row of -inf neither the softmax nor its derivative is a number: it is taken from zeros, and then left out.
    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    if masking.lengths_q is not None:  # a sink is seen by real rows only
        unreal = seen.unreal(masking.lengths_q[batch], seqlen_q, masking.at_end)[:, None, rows]
        lse = lse.masked_fill(unreal, -math.inf)
    probs = scores.softmax(-1).masked_fill(empty, 0.0)[..., :seqlen_k]
    if masking.dropout:
        probs = torch.nn.functional.dropout(probs, masking.dropout)
    return probs @ values, lse


# ------------------------------------------------------------------------------------------------------------- ragged


def ragged(
    q, k, v, starts_q, starts_k, rows: int, keys: int, masking: Masking, softmax_scale: float | None = None,
    block_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`attention` of sequences that lie one after the other, as a padded batch. Nothing is read from the device.

    Parameters
    ----------
    q, k, v
        ``[total_q, Hq, D]`` and ``[total_k, Hkv, D]`` twice; with `block_table` the latter are pools
        ``[num_pages, page_size, Hkv, D]``.
    starts_q, starts_k
        ``[B + 1]`` integers: where each sequence begins, and where the last one ends.
    rows, keys
        At least the longest sequence's length.
    block_table
        ``[B, pages]``: the pages of each sequence.

    Returns
    -------
    out, lse
        ``[total_q, Hq, D]``, and ``[Hq, total_q]``: 0 and -inf in rows that see no key or belong to no sequence.
    """
    groups = alike(starts_q, starts_k) if q.device.type == "cpu" and not traced() else []
    if len(groups) > 1:
        return _in_groups(q, k, v, starts_q, starts_k, masking, softmax_scale, block_table, groups)
    padded_q = seen.padded(q, starts_q, rows)
    if block_table is None:
        padded_k, padded_v = seen.padded(k, starts_k, keys), seen.padded(v, starts_k, keys)
    else:
        padded_k, padded_v = (of_pages(pool, block_table)[:, :keys] for pool in (k, v))
    masking = Masking(**{**vars(masking), "lengths_q": starts_q.diff(), "lengths_k": starts_k.diff()})
    out, lse = attention(*(t.transpose(1, 2) for t in (padded_q, padded_k, padded_v)), masking, softmax_scale)
    out = seen.packed(out.transpose(1, 2), starts_q, q.shape[0])
    return out, seen.packed(lse.transpose(1, 2), starts_q, q.shape[0], -math.inf).T


def _in_groups(q, k, v, starts_q, starts_k, masking: Masking, softmax_scale, block_table, groups: list[list[int]]):
    """`ragged`, some sequences of like length at a time."""
    places, outs, lses = [], [], []
    for group in groups:
        rows, of_q, longest_q = some_sequences(starts_q, group)
        keys, of_k, longest_k = some_sequences(starts_k, group)
        slopes = masking.slopes[group] if masking.slopes is not None and masking.slopes.dim() == 2 else masking.slopes
        tensors = (k[keys], v[keys]) if block_table is None else (k, v)
        table = None if block_table is None else block_table[group]
        out, lse = ragged(
            q[rows], *tensors, of_q, of_k, longest_q, longest_k, Masking(**{**vars(masking), "slopes": slopes}),
            softmax_scale, table,
        )  # fmt: skip
        places.append(rows), outs.append(out), lses.append(lse)
    place, out, lse = torch.cat(places), torch.cat(outs), torch.cat(lses, 1)
    # What no sequence owns stays 0, and -inf.
    return (
        out.new_zeros(q.shape[0], *out.shape[1:]).index_copy(0, place, out),
        lse.new_full((lse.shape[0], q.shape[0]), -math.inf).index_copy(1, place, lse),
    )


def of_pages(pool: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``[B, pages * page_size, H, D]``: the pages of each sequence in a row, zeros for what is no page."""
    inside = (table >= 0) & (table < pool.shape[0])
    found = pool[table.long().clamp(0, pool.shape[0] - 1)].masked_fill(~inside[..., None, None, None], 0.0)
    return found.flatten(1, 2)
