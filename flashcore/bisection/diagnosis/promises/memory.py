"""Ask from tensors that are views of larger pieces of memory, at any address, with any strides."""

from __future__ import annotations

import math

import torch

from flashcore.bisection.diagnosis.calling import Candidate, same_bits
from flashcore.bisection.diagnosis.promises.asking import (
    Asked,
    ask_on,
    case_of,
    inputs,
    plain,
    rows_that_see,
    what_is_wrong,
)
from flashcore.errors import UnknownName

ROOM_ROWS = 256
"""Rows of NaN before and after a tensor: no kernel reads a larger tile."""


def past_the_end(candidate: Candidate, asked: Asked) -> str | None:
    """NaN in all memory around the tensors."""
    return _from_views(candidate, asked, math.nan)


def past_the_end_plain(candidate: Candidate, asked: Asked) -> str | None:
    """The same views with zeros around, where they are not contiguous: strides have a promise of their own."""
    return plain(candidate, asked) if asked.key == "around" else _from_views(candidate, asked, 0.0)


def misaligned(candidate: Candidate, asked: Asked) -> str | None:
    """One tensor, or all, one element past an aligned address."""
    return _from_views(candidate, asked, 0.0, "qkv" if asked.key == "all" else asked.key)


def strides(candidate: Candidate, asked: Asked) -> str | None:
    """Strides that are no multiple of anything, or 0."""
    if asked.key != "expanded":
        return _from_views(candidate, asked, 0.0)
    problem = asked.problem
    q, k, v = inputs(candidate, problem)
    return ask_on(candidate, problem, (q, k[:1].expand_as(k), v[:1].expand_as(v)), as_given=True)


def orders(candidate: Candidate, asked: Asked) -> str | None:
    """The same numbers in another order of memory."""
    problem = asked.problem
    layout = asked.key
    if layout == "other":
        layout = "bshd" if candidate.layout == "bhsd" else "bhsd"
    return ask_on(candidate, problem, inputs(candidate, problem, layout=layout), as_given=True)


def _from_views(candidate: Candidate, asked: Asked, fill: float, names: str = "qkv") -> str | None:
    """Judge a call on views of larger pieces of memory, and look whether it wrote beside them."""
    problem = asked.problem
    given = dict(zip("qkv", inputs(candidate, problem), strict=True))
    case = case_of(candidate, *given.values(), problem)
    rooms = {}
    kind = "one element late" if asked.key in ("q", "k", "v", "all") else asked.key
    for name in names:
        given[name], rooms[name] = _laid_out(candidate, given[name], kind, fill)
    before = {name: room.clone() for name, room in rooms.items()}
    answer, changed = candidate.ask(*given.values(), problem, as_given=True)
    for name, room in rooms.items():
        if not changed and not same_bits(room, before[name]):
            return f"it writes into memory beside its input {name}"
    return what_is_wrong(answer, case, rows=rows_that_see(problem, case.q.device))


def _laid_out(candidate: Candidate, tensor: torch.Tensor, key: str, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor as a view of a larger piece of memory, as the key says, and that piece."""
    own = _in_order(candidate, tensor)
    rows = 2 if candidate.layout == "bhsd" else 1
    head_dim = own.shape[-1]
    if key == "around":
        inside, room = _flat_room(own, ROOM_ROWS * head_dim, ROOM_ROWS * head_dim, fill)
    elif key == "rows":
        inside, room = _wide_room(own, rows, ROOM_ROWS, ROOM_ROWS, fill)
    elif key == "columns":
        inside, room = _wide_room(own, 3, 8, 8, fill)
    elif key == "odd rows":
        inside, room = _wide_room(own, 3, 0, 3, fill)
    elif key == "odd heads":
        shape = own.shape
        steps = (shape[1] * (shape[2] * head_dim + 5) + 7, shape[2] * head_dim + 5, head_dim, 1)
        room = own.new_full((1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)),), fill)
        inside = room.as_strided(shape, steps).copy_(own)
    elif key == "one element late":
        inside, room = _flat_room(own, 1, 8, fill)
    else:
        raise UnknownName("layout in memory", key, ["around", "rows", "columns", "odd rows", "odd heads"])
    return _in_order(candidate, inside), room


def _in_order(candidate: Candidate, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the layout of the function, from that of attention, and the other way round."""
    return tensor if candidate.layout == "bhsd" else tensor.transpose(1, 2)


def _flat_room(tensor: torch.Tensor, before: int, after: int, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous copy inside a longer piece of memory, and that piece."""
    room = tensor.new_full((before + tensor.numel() + after,), fill)
    inside = room[before : before + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor), room


def _wide_room(tensor: torch.Tensor, dim: int, before: int, after: int, fill: float):
    """A copy inside a tensor that is longer in one dimension, and that tensor."""
    shape = list(tensor.shape)
    shape[dim] += before + after
    room = tensor.new_full(shape, fill)
    inside = room.narrow(dim, before, tensor.shape[dim])
    return inside.copy_(tensor), room
