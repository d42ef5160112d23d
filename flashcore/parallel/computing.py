"""The two plans of attention over ranks: keys and values travel, and the kernel is called on what has come."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist

from flashcore import ops
from flashcore.numerics import ambient
from flashcore.parallel.joining import join
from flashcore.parallel.plan import Call, Zigzag, length, owned
from flashcore.parallel.ranks import Ranks, travel


class Result:
    """The rows of one rank, put together from calls of the kernel in the order in which they are made."""

    def __init__(self, q: torch.Tensor, calls: Sequence[Call], scale: float | None, with_lse: bool, backend: str):
        self.q, self.scale, self.backend = q, scale, backend
        rows = sorted(call.rows for call in calls)
        self.joins = any(one[1] > other[0] for one, other in pairwise(rows))
        """Whether rows have more than one call, so that results are joined in float32."""
        self.with_lse = with_lse or self.joins
        self.out = torch.empty_like(q, dtype=torch.float32 if self.joins else q.dtype)
        self.lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if self.with_lse else None
        self.begun: list[tuple[int, int]] = []
        """Rows that hold a result."""
        if self.joins or sum(map(length, rows)) < q.shape[2]:  # there are rows that a first call leaves as they are
            self.out.zero_()
            if self.lse is not None:
                self.lse.fill_(-torch.inf)

    def computed(self, calls: Sequence[Call], keys: torch.Tensor, values: torch.Tensor) -> list[tuple]:
        """Call the kernel on keys and values ``[batch, num_heads_kv, rows, head_dim]`` of a buffer: rows, out, lse."""
        found = []
        for call in calls:
            rows, seen = slice(*call.rows), slice(*call.keys)
            got = ops.attention(
                self.q[:, :, rows], keys[:, :, seen], values[:, :, seen], causal=call.causal, softmax_scale=self.scale,
                backend=self.backend, return_lse=self.with_lse,
            )  # fmt: skip
            found.append((call.rows, *(got if self.with_lse else (got, None))))
        return found

    def take(self, found: Sequence[tuple]) -> None:
        """Put what the kernel gave in its place, or join it with what is there."""
        for (start, stop), out, lse in found:
            rows = slice(start, stop)
            if any(start < end and begin < stop for begin, end in self.begun):
                join(self.out[:, :, rows], self.lse[:, :, rows], out, lse)
            else:
                self.out[:, :, rows] = out
                if lse is not None:
                    self.lse[:, :, rows] = lse
            self.begun.append((start, stop))

    def whole(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = self.out if self.out.dtype == self.q.dtype else torch.empty_like(self.q).copy_(self.out)
        return out, self.lse


class Rows:
    """Room for keys and values: ``[rows, batch, heads, head_dim]`` twice, so that any rows of it lie together."""

    def __init__(self, like: torch.Tensor, rows: int, dtype: torch.dtype | None = None):
        shape = (rows, like.shape[0], like.shape[1], like.shape[3])
        self.both = [torch.empty(shape, dtype=dtype or like.dtype, device=like.device) for _ in range(2)]

    def put(self, at: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Copy ``[batch, heads, rows, head_dim]`` in, from row `at` on."""
        for mine, given in zip(self.both, (k, v), strict=True):
            mine[at : at + given.shape[2]] = given.permute(2, 0, 1, 3)

    def part(self, start: int, stop: int) -> list[torch.Tensor]:
        """Some rows, to be sent or received."""
        return [mine[start:stop] for mine in self.both]

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as the kernel takes them."""
        return tuple(mine.permute(1, 2, 0, 3) for mine in self.both)


@ambient.shielded
def computed_by_plan(q, k, v, ranks: Ranks, cut: Zigzag, plan: str, scale: float | None, with_lse: bool, backend: str):
    """`out` and, with `with_lse`, `lse` of this rank's rows; all arguments are checked, and the ranks agree."""
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        return (gathered if plan == "gather" else in_a_ring)(q, k, v, ranks, cut, scale, with_lse, backend).whole()


def fetched(k: torch.Tensor, v: torch.Tensor, ranks: Ranks, cut: Zigzag) -> Rows:
    """All keys and values that this rank's queries see, at their places in the sequence; everything is sent at once."""
    mine = owned(ranks.rank, ranks.size)
    room = Rows(k, cut.key_chunks[max(*mine, *cut.wanted(ranks.rank))][1])
    at = 0
    for chunk in mine:
        start, stop = cut.key_chunks[chunk]
        room.put(start, k[:, :, at : at + stop - start], v[:, :, at : at + stop - start])
        at += stop - start
    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    sent = {rank: parts(room, cut, ranks.rank, rank) for rank in others}
    wait(travel(ranks, sent, {rank: parts(room, cut, rank, ranks.rank) for rank in others}))
    return room


def parts(room: Rows, cut: Zigzag, owner: int, other: int) -> list[torch.Tensor]:
    """Where a buffer holds what one rank owns and another sees."""
    return [tensor for chunk in cut.sent(owner, other) for tensor in room.part(*cut.key_chunks[chunk])]


def gathered(q, k, v, ranks: Ranks, cut: Zigzag, *options) -> Result:
    """The kernel begins when all has come."""
    room, calls = fetched(k, v, ranks, cut), cut.gathered(ranks.rank).calls
    result = Result(q, calls, *options)
    for call in calls:
        result.take(result.computed([call], *room.views()))
    return result


def in_a_ring(q, k, v, ranks: Ranks, cut: Zigzag, *options) -> Result:
    """Shard by shard, in two buffers by turns.

    Joining stands between the start of a transfer and the next call of the kernel. The kernel takes the whole GPU until
    it ends; a transfer that began after it would wait for it, and keep another rank waiting, which has given up
    multiprocessors to its end of the transfer. What joins is made of short blocks, between which the transfer begins.
    """
    mine = Rows(k, k.shape[2])
    mine.put(0, k, v)
    early, late = owned(ranks.rank, ranks.size)
    first = length(cut.key_chunks[early])
    places = {early: (0, first), late: (first, k.shape[2])}
    home = cut.at_home(ranks.rank)
    rounds = [cut.arriving(ranks.rank, step) for step in range(1, ranks.size)]
    buffers = [Rows(k, 2 * length(cut.key_chunks[0])) for _ in rounds[:2]]

    def start(step: int) -> list[dist.Work]:
        to, sender = (ranks.rank + step) % ranks.size, (ranks.rank - step) % ranks.size
        sent = [tensor for chunk in cut.sent(ranks.rank, to) for tensor in mine.part(*places[chunk])]
        received, at = [], 0
        for chunk in rounds[step - 1].wanted:
            received += buffers[step % len(buffers)].part(at, at + length(cut.key_chunks[chunk]))
            at += length(cut.key_chunks[chunk])
        return travel(ranks, {to: sent}, {sender: received})

    moves = start(1)
    result = Result(q, [*home, *(call for one in rounds for call in one.calls)], *options)
    found = result.computed(home, *mine.views())
    for step, one in enumerate(rounds, start=1):
        wait(moves)
        moves = start(step + 1) if step < len(rounds) else []
        result.take(found)
        found = result.computed(one.calls, *buffers[step % len(buffers)].views())
    result.take(found)
    return result


def wait(moves: Sequence[dist.Work]) -> None:
    """Let what follows wait for transfers: on a GPU the current stream, else the host."""
    for move in moves:
        move.wait()
