"""Attention over a sequence cut over ranks: keys and values travel, and each rank calls the kernel for its rows."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flashcore import ops
from flashcore.errors import FlashCoreError, InvalidProblem, UnknownName
from flashcore.library.dense import DTYPES
from flashcore.numerics import ambient, plain, transforms
from flashcore.parallel.joining import join
from flashcore.parallel.plan import PLANS, Call, Zigzag, held, length, owned
from flashcore.parallel.ranks import (
    Ranks,
    check_length,
    check_shares,
    device_of,
    is_distributed,
    ranks_of,
    refuse_together,
    told,
    travel,
    why_not_there,
)

ALIKE = ("batch", "num_heads_q", "num_heads_kv", "head_dim", "dtype", "causal", "softmax_scale", "plan", "seqlen_q",
         "seqlen_k")  # fmt: skip
"""What has to be the same on all ranks, in the order in which a rank tells it."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mesh: DeviceMesh,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    plan: str = "gather",
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
):
    """`flashcore.attention` of sequences that are cut over the ranks of a mesh, as `shard` cuts them.

    Every rank of the mesh makes the same call with its own shards, and gets its own rows of the result. They are those
    that one card gives, within the kernel's bound; two runs give the same bits.

    Parameters
    ----------
    q
        ``[batch, num_heads_q, rows of this rank, head_dim]``, on a device of the mesh.
    k, v
        ``[batch, num_heads_kv, rows of this rank, head_dim]``.
    mesh
        Of one dimension; NCCL connects its GPUs, and gloo its CPUs.
    causal
        Query i of the whole sequence sees keys ``j <= i + seqlen_k - seqlen_q``.
    softmax_scale, backend
        As in `flashcore.attention`.
    return_lse
        Return ``(out, lse)``.
    plan
        ``gather``: each rank fetches all keys and values that its queries see, and joins nothing: the fastest, and
        rounded as on one card. ``ring``: it holds two shards of other ranks at a time, and joins partial results in
        float32 (see `flashcore.parallel.plan`).
    seqlen_q, seqlen_k
        Lengths of the whole sequences, where they are known: the ranks then tell each other nothing, and the host does
        not wait for the other ranks. Give both, on every rank. A first call on a mesh is checked all the same.

    Returns
    -------
    out : ``[batch, num_heads_q, rows of this rank, head_dim]``
        In the dtype of `q`, with the strides of ``torch.empty_like(q)``; 0 in rows that see no key.
    lse : float32 ``[batch, num_heads_q, rows of this rank]``, with `return_lse`
        -inf in rows that see no key.

    Raises
    ------
    InvalidProblem
        What `flashcore.attention` refuses; no process group, or a mesh without this process or of more dimensions; the
        tensors lie on another kind of device than the mesh; shards whose lengths do not fit together, or fewer rows
        than chunks; the ranks were called with different options; gradients are asked for. Where one rank refuses its
        own arguments, the others refuse too, and none waits for it.
    UnknownName
        No such plan or backend.
    """
    ranks = ranks_of(mesh)
    try:
        words = _described(q, k, v, ranks, causal, softmax_scale, return_lse, backend, plan, seqlen_q, seqlen_k)
        wrong = None
    except FlashCoreError as error:
        words, wrong = [0] * len(ALIKE), error
    met = ranks.have_met()
    if not met or seqlen_k is None:
        shares = [0, 0] if wrong is not None else [q.shape[2], k.shape[2]]
        said = told(ranks, device_of(ranks, q), [wrong is None, *words, *shares])
        if wrong is not None:
            raise wrong
        seqlen_q, seqlen_k = _agreed(said, ranks)
    elif wrong is not None:
        raise wrong
    else:
        seqlen_q, seqlen_k = words[-2:]
    if ranks.size == 1:
        return ops.attention(
            q, k, v, causal=causal, softmax_scale=softmax_scale, backend=backend, return_lse=return_lse
        )
    cut = Zigzag(seqlen_q, seqlen_k, ranks.size, bool(causal))
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        out, lse = _computed(q, k, v, ranks, cut, plan, plain.softmax_scale(softmax_scale), return_lse, backend)
    return (out, lse) if return_lse else out


def _described(
    q, k, v, ranks: Ranks, causal, softmax_scale, return_lse, backend, plan, seqlen_q, seqlen_k
) -> list[int]:
    """Check what one rank sees, and say it in whole numbers (`ALIKE`)."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if is_distributed(tensor):
            raise InvalidProblem(f"{name} is a DTensor; pass {name}.to_local(), the part that this rank holds.")
        if isinstance(tensor, torch.Tensor) and (wrong := why_not_there(ranks, name, tensor)) is not None:
            raise InvalidProblem(wrong)
    problem = ops.problem_of(q, k, v, causal, softmax_scale)
    transforms.refuse("q, k or v", q, k, v)
    plain.flag("return_lse", return_lse)
    plain.word("backend", backend)
    if plain.word("plan", plan) not in PLANS:
        raise UnknownName("plan", plan, list(PLANS))
    if (seqlen_q is None) != (seqlen_k is None):
        raise InvalidProblem("seqlen_q and seqlen_k are given together, or neither of them; one was given alone.")
    for name, tensor, seqlen in (("seqlen_q", q, seqlen_q), ("seqlen_k", k, seqlen_k)):
        if seqlen is None:
            continue
        seqlen = plain.integer(name, seqlen)
        check_length(name, seqlen, ranks)
        if tensor.shape[2] != held(seqlen, ranks.rank, ranks.size):
            raise InvalidProblem(
                f"Rank {ranks.rank} of {ranks.size} holds {held(seqlen, ranks.rank, ranks.size)} rows of a sequence of "
                f"{name}={seqlen}, and {name[-1]} has {tensor.shape[2]}; cut the whole with flashcore.parallel.shard "
                "over this mesh."
            )
    scale = int.from_bytes(struct.pack("<d", problem.scale), "little", signed=True)
    return [
        problem.batch, problem.num_heads_q, problem.num_heads_kv, problem.head_dim, list(DTYPES).index(q.dtype),
        problem.causal, scale, PLANS.index(plan), plain.integer("seqlen_q", seqlen_q or 0),
        plain.integer("seqlen_k", seqlen_k or 0),
    ]  # fmt: skip


def _agreed(said: Sequence[Sequence[int]], ranks: Ranks) -> tuple[int, int]:
    """The lengths of the whole sequences, from what all ranks said; `InvalidProblem` where they do not fit together."""
    refuse_together(said)
    for place, name in enumerate(ALIKE, start=1):
        for rank, words in enumerate(said):
            if words[place] != said[0][place]:
                raise InvalidProblem(
                    f"Ranks 0 and {rank} were called with different values of {name}; all ranks have to make the same "
                    "call."
                )
    if ranks.size == 1:
        return said[0][-2], said[0][-1]
    return check_shares("q", [words[-2] for words in said], ranks), check_shares("k", [w[-1] for w in said], ranks)


# ---------------------------------------------------------------------------------------------------------- computing


class _Result:
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


class _Rows:
    """Room for keys and values: ``[rows, batch, heads, head_dim]`` twice, so that any rows of it lie together."""

    def __init__(self, like: torch.Tensor, rows: int):
        shape = (rows, like.shape[0], like.shape[1], like.shape[3])
        self.both = [torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2)]

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
def _computed(q, k, v, ranks: Ranks, cut: Zigzag, plan: str, scale: float | None, return_lse: bool, backend: str):
    return (_gathered if plan == "gather" else _in_a_ring)(q, k, v, ranks, cut, scale, return_lse, backend).whole()


def _gathered(q, k, v, ranks: Ranks, cut: Zigzag, *options) -> _Result:
    """Everything is sent at once, and the kernel begins when all has come."""
    only, mine = cut.gathered(ranks.rank), owned(ranks.rank, ranks.size)
    room = _Rows(k, cut.key_chunks[max(*mine, *only.wanted)][1])
    at = 0
    for chunk in mine:
        start, stop = cut.key_chunks[chunk]
        room.put(start, k[:, :, at : at + stop - start], v[:, :, at : at + stop - start])
        at += stop - start

    def parts(sender: int, receiver: int) -> list[torch.Tensor]:
        return [tensor for chunk in cut.sent(sender, receiver) for tensor in room.part(*cut.key_chunks[chunk])]

    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    sent, received = ({r: parts(ranks.rank, r) for r in others}, {r: parts(r, ranks.rank) for r in others})
    _wait(travel(ranks, sent, received))
    result = _Result(q, only.calls, *options)
    for call in only.calls:
        result.take(result.computed([call], *room.views()))
    return result


def _in_a_ring(q, k, v, ranks: Ranks, cut: Zigzag, *options) -> _Result:
    """Shard by shard, in two buffers by turns.

    Joining stands between the start of a transfer and the next call of the kernel. The kernel takes the whole GPU until
    it ends; a transfer that began after it would wait for it, and keep another rank waiting, which has given up
    multiprocessors to its end of the transfer. What joins is made of short blocks, between which the transfer begins.
    """
    mine = _Rows(k, k.shape[2])
    mine.put(0, k, v)
    early, late = owned(ranks.rank, ranks.size)
    first = length(cut.key_chunks[early])
    places = {early: (0, first), late: (first, k.shape[2])}
    home = cut.at_home(ranks.rank)
    rounds = [cut.arriving(ranks.rank, step) for step in range(1, ranks.size)]
    buffers = [_Rows(k, 2 * length(cut.key_chunks[0])) for _ in rounds[:2]]

    def start(step: int) -> list[dist.Work]:
        to, sender = (ranks.rank + step) % ranks.size, (ranks.rank - step) % ranks.size
        sent = [tensor for chunk in cut.sent(ranks.rank, to) for tensor in mine.part(*places[chunk])]
        received, at = [], 0
        for chunk in rounds[step - 1].wanted:
            received += buffers[step % len(buffers)].part(at, at + length(cut.key_chunks[chunk]))
            at += length(cut.key_chunks[chunk])
        return travel(ranks, {to: sent}, {sender: received})

    moves = start(1)
    result = _Result(q, [*home, *(call for one in rounds for call in one.calls)], *options)
    found = result.computed(home, *mine.views())
    for step, one in enumerate(rounds, start=1):
        _wait(moves)
        moves = start(step + 1) if step < len(rounds) else []
        result.take(found)
        found = result.computed(one.calls, *buffers[step % len(buffers)].views())
    result.take(found)
    return result


def _wait(moves: Sequence[dist.Work]) -> None:
    for move in moves:
        move.wait()
