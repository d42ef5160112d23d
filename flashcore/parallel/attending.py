"""Attention over a sequence cut over ranks: keys and values travel, and each rank calls the kernel for its rows."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flashcore import ops
from flashcore.errors import FlashCoreError, InvalidProblem, UnknownName
from flashcore.library.dense import DTYPES
from flashcore.numerics import ambient, plain, transforms
from flashcore.parallel.joining import join
from flashcore.parallel.plan import PLANS, Call, Round, Zigzag, held, length, owned
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
        ``gather``: each rank holds the keys and values that its queries see, and joins nothing. ``ring``: it holds two
        shards of other ranks at a time, and joins partial results in float32 (see `flashcore.parallel.plan`).
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
        self.joins = any(one[1] > other[0] for one, other in zip(rows, rows[1:], strict=False))
        """Whether rows have more than one call, so that results are joined in float32."""
        self.with_lse = with_lse or self.joins
        self.out = torch.empty_like(q, dtype=torch.float32 if self.joins else q.dtype)
        self.lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if self.with_lse else None
        self.begun: list[tuple[int, int]] = []
        """Rows that hold a result."""
        if sum(map(length, set(rows))) < q.shape[2] or self.joins:  # rows without any key, or that other calls come to
            self.out.zero_()
            if self.lse is not None:
                self.lse.fill_(-torch.inf)

    def take(self, calls: Sequence[Call], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Call the kernel, with keys and values ``[batch, num_heads_kv, rows, head_dim]`` of the buffer."""
        for call in calls:
            rows, seen = slice(*call.rows), slice(*call.keys)
            found = ops.attention(
                self.q[:, :, rows], keys[:, :, seen], values[:, :, seen], causal=call.causal, softmax_scale=self.scale,
                backend=self.backend, return_lse=self.with_lse,
            )  # fmt: skip
            out, lse = found if self.with_lse else (found, None)
            if any(rows.start < stop and start < rows.stop for start, stop in self.begun):
                join(self.out[:, :, rows], self.lse[:, :, rows], out, lse)
            else:
                self.out[:, :, rows] = out
                if lse is not None:
                    self.lse[:, :, rows] = lse
            self.begun.append(call.rows)

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
    if plan == "gather":
        rounds = cut.gathered(ranks.rank)
        result = _Result(q, [call for one in rounds for call in one.calls], scale, return_lse, backend)
        _gather(k, v, ranks, cut, rounds, result)
    else:
        home = cut.at_home(ranks.rank)
        rounds = [cut.arriving(ranks.rank, step) for step in range(1, ranks.size)]
        result = _Result(q, [*home, *(call for one in rounds for call in one.calls)], scale, return_lse, backend)
        _ring(k, v, ranks, cut, home, rounds, result)
    return result.whole()


def _gather(k, v, ranks: Ranks, cut: Zigzag, rounds: Sequence[Round], result: _Result) -> None:
    """Everything is sent at once, first what early queries wait for; their call runs while the rest is on its way."""
    mine = owned(ranks.rank, ranks.size)
    room = _Rows(k, cut.key_chunks[max(*mine, *rounds[0].wanted, *rounds[1].wanted)][1])
    wanted = {rank: cut.wanted(rank) for rank in range(ranks.size) if rank != ranks.rank}
    at = 0
    for chunk in mine:
        start, stop = cut.key_chunks[chunk]
        room.put(start, k[:, :, at : at + stop - start], v[:, :, at : at + stop - start])
        at += stop - start
    under_way = []
    for number, one in enumerate(rounds):
        sent = {rank: _parts(room, cut, [c for c in mine if c in theirs[number]]) for rank, theirs in wanted.items()}
        received: dict[int, list[torch.Tensor]] = {}
        for chunk in one.wanted:
            owner = min(chunk, 2 * ranks.size - 1 - chunk)
            received.setdefault(owner, []).extend(_parts(room, cut, [chunk]))
        under_way.append(travel(ranks, sent, received))
    for one, moves in zip(rounds, under_way, strict=True):
        _wait(moves)
        result.take(one.calls, *room.views())


def _parts(room: _Rows, cut: Zigzag, some: Sequence[int]) -> list[torch.Tensor]:
    return [tensor for chunk in some for tensor in room.part(*cut.key_chunks[chunk])]


def _ring(k, v, ranks: Ranks, cut: Zigzag, home: Sequence[Call], rounds: Sequence[Round], result: _Result) -> None:
    """Shard by shard: one is on its way while the kernel works on the one before, in two buffers by turns."""
    mine = _Rows(k, k.shape[2])
    mine.put(0, k, v)
    first = length(cut.key_chunks[owned(ranks.rank, ranks.size)[0]])
    places = dict(zip(owned(ranks.rank, ranks.size), ((0, first), (first, k.shape[2])), strict=True))
    most = max(map(length, cut.key_chunks))
    buffers = [_Rows(k, 2 * most) for _ in range(min(2, len(rounds)))]

    def start(step: int) -> list[dist.Work]:
        to, sender = (ranks.rank + step) % ranks.size, (ranks.rank - step) % ranks.size
        sent = [t for chunk in cut.sent(ranks.rank, to) for t in mine.part(*places[chunk])]
        received, at = [], 0
        for chunk in rounds[step - 1].wanted:
            received += buffers[step % len(buffers)].part(at, at + length(cut.key_chunks[chunk]))
            at += length(cut.key_chunks[chunk])
        return travel(ranks, {to: sent}, {sender: received})

    moves = start(1)
    result.take(home, *mine.views())
    for step, one in enumerate(rounds, start=1):
        _wait(moves)
        moves = start(step + 1) if step < len(rounds) else []
        result.take(one.calls, *buffers[step % len(buffers)].views())


def _wait(moves: Sequence[dist.Work]) -> None:
    for move in moves:
        move.wait()
