"""The tensors that masks need beside Q, K and V: sinks, lengths and places of sequences; checked, packed, unpacked.

What they mean stands in `flashcore.problem.Problem` and, as numbers, in `flashcore.numerics.reference`. Whatever the
layout (padding on the right, on the left, or sequences end to end), stages are looked at with each sequence's real rows
first: `right_aligned` brings Q, K and V there, `put_back` brings results from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from flashcore.errors import InvalidProblem
from flashcore.problem import Problem

if TYPE_CHECKING:  # torch takes seconds to import, and listing backends needs none of it
    import torch


@dataclass(frozen=True, eq=False)
class MaskTensors:
    """What a problem's masks need besides the problem; each None unless that problem asks for it.

    All lie on the device of Q, contiguous. A backend on a GPU never reads them on the host. `mask_tensors` makes
    checked ones.
    """

    sink: torch.Tensor | None = None
    """float32 ``[num_heads_q]``: the score of each head's sink; -inf is that of a head without one."""
    seqlens_q: torch.Tensor | None = None
    """int32 ``[batch]``: real queries of each sequence; None where all rows are."""
    seqlens_k: torch.Tensor | None = None
    """int32 ``[batch]``: real keys of each sequence; None where all rows are."""
    cu_seqlens_q: torch.Tensor | None = None
    """int32 ``[batch + 1]``: sequence b owns the rows from entry b up to entry b + 1 of `q`."""
    cu_seqlens_k: torch.Tensor | None = None
    """int32 ``[batch + 1]``: the same of `k` and `v`."""

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that there are, by name."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field.name, tensor


def changed(masks: MaskTensors, change: Callable[[torch.Tensor], torch.Tensor]) -> MaskTensors:
    """Mask tensors with `change` applied to each that there is."""
    return replace(masks, **{name: change(tensor) for name, tensor in masks.named()})


def needs_tensors(problem: Problem) -> bool:
    """Whether a problem's masks need numbers that are no part of it."""
    return problem.sink or problem.lengths != ""


def mask_tensors(
    problem: Problem,
    device: torch.device | str,
    *,
    sink: torch.Tensor | None = None,
    seqlens_q: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> MaskTensors | None:
    """The tensors of a problem's masks, checked without a look at their numbers; None where it needs none.

    Parameters
    ----------
    problem
        What they belong to.
    device
        Of Q.
    sink, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k
        As in `MaskTensors`.

    Raises
    ------
    InvalidProblem
        One is missing that the problem needs, one is given that it does not ask for, or one is no tensor, or of the
        wrong shape, dtype, device or stride.
    """
    masks = MaskTensors(sink, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k)
    check(masks, problem, device)
    return masks if needs_tensors(problem) else None


def check(masks: MaskTensors | None, problem: Problem, device: torch.device | str) -> None:
    """Raise `InvalidProblem` unless these are the mask tensors of that problem on that device (see `mask_tensors`)."""
    import torch

    if masks is None and not needs_tensors(problem):
        return
    given = {} if masks is None else dict(masks.named())
    padded, ragged = ("seqlens_q", "seqlens_k"), ("cu_seqlens_q", "cu_seqlens_k")
    asked = {"sink"} if problem.sink else set()
    asked |= set(padded if problem.lengths in ("right", "left") else ragged if problem.lengths else ())
    for name in given:
        if name not in asked:
            raise InvalidProblem(f"{name} is given, and {problem.label()} has no use for it; {_USE[name]}.")
    missing = sorted(asked - set(given) - set(padded))
    if missing:
        raise InvalidProblem(f"{problem.label()} needs {missing[0]}, which is missing; {_USE[missing[0]]}.")
    if asked & set(padded) and not any(name in given for name in padded):
        raise InvalidProblem(f"{problem.label()} needs seqlens_q, seqlens_k or both, and neither is given.")
    for name, tensor in given.items():
        if name == "sink":
            _check_one(name, tensor, torch.float32, problem.num_heads_q, "a score for each query head", device)
        elif name in padded:
            _check_one(name, tensor, torch.int32, problem.batch, "a length for each sequence", device)
        else:
            _check_one(name, tensor, torch.int32, problem.batch + 1, "where each sequence begins, and the end", device)


_USE = {
    "sink": "sinks belong to a problem with sink=True",
    "seqlens_q": "lengths belong to a problem with lengths='right' or 'left'",
    "seqlens_k": "lengths belong to a problem with lengths='right' or 'left'",
    "cu_seqlens_q": "places of sequences belong to a problem with lengths='ragged'",
    "cu_seqlens_k": "places of sequences belong to a problem with lengths='ragged'",
}


def _check_one(name: str, tensor, dtype: torch.dtype, size: int, what: str, device) -> None:
    import torch

    from flashcore.numerics import plain

    kind = f"a contiguous {str(dtype).removeprefix('torch.')} tensor [{size}], {what}"
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != (size,):
        raise InvalidProblem(f"{name} is {plain.shown(tensor)}; it has to be {kind}.")
    if tensor.layout is not torch.strided or (size > 1 and tensor.stride(0) != 1):
        raise InvalidProblem(f"{name} is {plain.shown(tensor)} whose numbers do not lie in a row; it has to be {kind}.")
    if tensor.device != _numbered(device):
        raise InvalidProblem(f"{name} lies on {tensor.device} and q on {device}; move it there.")


def _numbered(device: torch.device | str) -> torch.device:
    """The device with the number that tensors on it have."""
    import torch

    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_values(
    masks: MaskTensors | None, problem: Problem, rows_q: int, rows_k: int, longest: tuple[int, int] | None = None
) -> None:
    """Raise `InvalidProblem` unless the numbers make sense. It reads them: on a GPU the host waits, so not in a call.

    Parameters
    ----------
    rows_q, rows_k
        Rows that `q`, and `k` and `v` have: the padded lengths, or all rows of a ragged batch.
    longest
        ``max_seqlen_q, max_seqlen_k`` of a call, where one has them; None for what the problem says.

    Raises
    ------
    InvalidProblem
        A length is below 0 or beyond the tensor; `cu_seqlens` do not begin with 0, fall, end beyond the tensor, or
        leave a sequence more rows than the problem's `seqlen_q` or `seqlen_k`; a sink is NaN or +inf.
    """
    given = {} if masks is None else {name: tensor.tolist() for name, tensor in masks.named()}
    for head, score in enumerate(given.get("sink", ())):
        if not score < float("inf"):  # also of NaN
            raise InvalidProblem(f"sink[{head}] is {score}; a sink is a finite number, or -inf for none.")
    most_q, most_k = longest or (problem.seqlen_q, problem.seqlen_k)
    for name, rows, most in (("q", rows_q, most_q), ("k", rows_k, most_k)):
        for sequence, length in enumerate(given.get(f"seqlens_{name}", ())):
            if not 0 <= length <= rows:
                raise InvalidProblem(
                    f"seqlens_{name}[{sequence}] is {length}; it has to be from 0 to the {rows} rows of {name}."
                )
        places = given.get(f"cu_seqlens_{name}")
        if places is None:
            continue
        if places[0] != 0:
            raise InvalidProblem(f"cu_seqlens_{name} begins with {places[0]}; the first sequence begins at row 0.")
        for sequence, (first, end) in enumerate(zip(places, places[1:], strict=False)):
            if end < first:
                raise InvalidProblem(f"cu_seqlens_{name} falls from {first} to {end} at sequence {sequence}; "
                                     "it has to rise or stay.")  # fmt: skip
            if end - first > most and longest is not None:
                raise InvalidProblem(
                    f"max_seqlen_{name} is {most}, and cu_seqlens_{name} gives sequence {sequence} {end - first} rows; "
                    "pass the longest length, or more."
                )
            if end - first > most:
                raise InvalidProblem(
                    f"cu_seqlens_{name} gives sequence {sequence} {end - first} rows, and seqlen_{name} of the "
                    f"problem, the most that one may have, is {most}."
                )
        if places[-1] > rows:
            raise InvalidProblem(f"cu_seqlens_{name} ends at row {places[-1]}, and {name} has {rows} rows.")


def check_call(masks: MaskTensors | None, problem: Problem, q: torch.Tensor, k: torch.Tensor) -> None:
    """`check`, and of tensors in the host's memory `check_values` too: what a backend asks before it computes."""
    check(masks, problem, q.device)
    if q.device.type == "cpu":
        check_values(masks, problem, q.shape[2], k.shape[2])


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the real rows of each sequence lie: sequence b has `count[b]`, from row `first[b]` of tensor `index[b]`."""

    count: torch.Tensor
    """int64 ``[batch]``."""
    first: torch.Tensor
    """int64 ``[batch]``."""
    index: torch.Tensor
    """int64 ``[batch]``: the batch index in the tensor, which under ``ragged`` is 0 for all."""


def rows_of(problem: Problem, masks: MaskTensors | None, name: str, device) -> Rows:
    """The real rows of ``q`` or ``k`` (`name`), computed on the device."""
    import torch

    batch = torch.arange(problem.batch, device=device)
    padded = problem.seqlen_q if name == "q" else problem.seqlen_k
    if problem.lengths == "ragged":
        places = getattr(masks, f"cu_seqlens_{name}").long()
        return Rows(places.diff(), places[:-1], torch.zeros_like(batch))
    lengths = getattr(masks, f"seqlens_{name}") if problem.lengths else None
    count = torch.full_like(batch, padded) if lengths is None else lengths.long()
    first = padded - count if problem.lengths == "left" else torch.zeros_like(count)
    return Rows(count, first, batch)


def right_aligned(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, masks: MaskTensors | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Problem, MaskTensors | None]:
    """The same attention with every sequence's real rows first, ``[batch, heads, seqlen, head_dim]``, and 0 after them.

    Returns
    -------
    q, k, v, problem, masks
        Those given where `problem` has no lengths. Otherwise copies under ``lengths="right"`` with both lengths in
        `masks`, whose padding is 0, so that nothing in it (NaN) reaches a product.
    """
    if not problem.lengths:
        return q, k, v, problem, masks
    of_q, of_k = (rows_of(problem, masks, name, q.device) for name in ("q", "k"))
    lengths = {"seqlens_q": of_q.count.int(), "seqlens_k": of_k.count.int()}
    moved = replace(masks, **lengths, cu_seqlens_q=None, cu_seqlens_k=None)
    return (
        _picked(q, of_q, problem.seqlen_q), _picked(k, of_k, problem.seqlen_k), _picked(v, of_k, problem.seqlen_k),
        problem.with_(lengths="right"), moved,
    )  # fmt: skip


def _picked(tensor: torch.Tensor, rows: Rows, size: int) -> torch.Tensor:
    """``[batch, heads, size, ...]``: the real rows of each sequence, then 0."""
    import torch

    row = torch.arange(size, device=tensor.device)
    real = row < rows.count[:, None]
    if tensor.shape[2] == 0:
        return tensor.new_zeros(len(rows.count), tensor.shape[1], size, *tensor.shape[3:])
    source = torch.where(real, rows.first[:, None] + row, 0)
    picked = tensor[rows.index[:, None], :, source]  # [batch, size, heads, ...]
    picked = picked.masked_fill(~real.view(*real.shape, *(1,) * (picked.dim() - 2)), 0)
    return picked.transpose(1, 2).contiguous()


def aligned_results(
    out: torch.Tensor, lse: torch.Tensor | None, problem: Problem, masks: MaskTensors | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`out` and `lse` of a call with these masks, as `right_aligned` lays rows: 0 and -inf where a row is not real.

    What a backend left in rows that are not real is not in the result.
    """
    import torch

    if not problem.lengths:
        return out, lse
    rows = rows_of(problem, masks, "q", out.device)
    moved = _picked(out, rows, problem.seqlen_q)
    if lse is None:
        return moved, None
    past = torch.arange(problem.seqlen_q, device=out.device) >= rows.count[:, None]
    return moved, _picked(lse, rows, problem.seqlen_q).masked_fill_(past[:, None], float("-inf"))


def put_back(
    out: torch.Tensor, lse: torch.Tensor, like: torch.Tensor, problem: Problem, masks: MaskTensors | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of `right_aligned` inputs where the rows of `like` (Q as it was given) are; 0 and -inf in other rows."""
    import torch

    if not problem.lengths:
        return out, lse
    rows = rows_of(problem, masks, "q", out.device)
    row = torch.arange(problem.seqlen_q, device=out.device)
    sequence, at = (row < rows.count[:, None]).nonzero(as_tuple=True)
    target = rows.index[sequence], slice(None), rows.first[sequence] + at
    moved = out.new_zeros(*like.shape[:3], out.shape[3])
    moved_lse = lse.new_full(like.shape[:3], float("-inf"))
    moved[target], moved_lse[target] = out[sequence, :, at], lse[sequence, :, at]
    return moved, moved_lse


def real_rows(like: torch.Tensor, problem: Problem, masks: MaskTensors | None, name: str = "q") -> torch.Tensor:
    """bool ``[like.shape[0], like.shape[2]]``: which rows of a tensor laid out as ``q`` (or ``k``) are real."""
    import torch

    rows = rows_of(problem, masks, name, like.device)
    row = torch.arange(like.shape[2], device=like.device)
    inside = (row >= rows.first[:, None]) & (row < (rows.first + rows.count)[:, None])
    return inside.any(0, keepdim=True) if problem.lengths == "ragged" else inside


WORTH = 2
"""How many times as many scores a ragged batch padded as a whole has to have, so that parts of it are padded apart."""


def alike(starts_q: torch.Tensor, starts_k: torch.Tensor) -> list[list[int]]:
    """Sequences of a ragged batch by like lengths, each list to be padded by itself; one list where that saves little.

    One long sequence among many short ones would otherwise have them all padded to its length. It reads the numbers, so
    it is for tensors in the host's memory.

    Parameters
    ----------
    starts_q, starts_k
        ``[batch + 1]`` integers: where each sequence begins, and the end.
    """
    sizes = list(zip(starts_q.diff().tolist(), starts_k.diff().tolist(), strict=True))
    found: dict[tuple[int, int], list[int]] = {}
    for nth, (rows, keys) in enumerate(sizes):
        found.setdefault((rows.bit_length(), keys.bit_length()), []).append(nth)

    def scores(group: list[int]) -> int:
        return len(group) * max(sizes[nth][0] for nth in group) * max(sizes[nth][1] for nth in group)

    everything = list(range(len(sizes)))
    apart = sum(map(scores, found.values()))
    return list(found.values()) if scores(everything) > WORTH * apart else [everything]


def some_sequences(starts: torch.Tensor, group: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of some sequences of a ragged batch: the rows that they own, where each begins among these, and the longest."""
    import torch

    bounds = starts.tolist()
    rows = torch.cat([torch.arange(bounds[nth], bounds[nth + 1]) for nth in group])
    lengths = [bounds[nth + 1] - bounds[nth] for nth in group]
    return rows, torch.tensor([0, *lengths]).cumsum(0).to(starts.dtype), max(lengths)
