"""Compute sequences in one way: put calls together out of pieces, and take each sequence's rows out of the results."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from flashcore import backends
from flashcore.backends import with_masks
from flashcore.errors import Unsupported
from flashcore.numerics.masking import MaskTensors
from flashcore.paging import PagedKV
from flashcore.problem import Problem
from flashcore.surveys.invariance.cases import Setting
from flashcore.surveys.invariance.values import Values
from flashcore.surveys.invariance.ways import Implementation, Piece, Way, pieces_of

SPARE = 8
"""Numbers between the rows of a tensor whose rows lie apart: 16 bytes, as copies of whole vectors need."""
SPARE_PAGES = 3
"""Pages of a pool that nobody uses."""

Result = tuple[torch.Tensor, torch.Tensor | None]
"""``out`` ``[num_heads_q, rows, head_dim]`` of one sequence, and its ``lse`` ``[num_heads_q, rows]`` or None."""


@dataclass(frozen=True)
class Answer:
    """What a way computed of one sequence: its rows from `first` to the last."""

    first: int
    out: torch.Tensor
    """``[num_heads_q, rows, head_dim]``."""
    lse: torch.Tensor | None
    """float32 ``[num_heads_q, rows]``; None where the backend returns none."""
    kept: torch.Tensor | None = None
    """bool, shaped as `lse`: rows whose query is the sequence's own; None for all."""


@dataclass(frozen=True)
class _Call:
    """One call to be: which rows of which sequences."""

    members: list[int]
    pieces: list[Piece]


class Computer:
    """Computes the sequences of a setting by one implementation.

    Parameters
    ----------
    invariant
        Whether calls ask for the batch-invariant mode.
    """

    def __init__(self, one: Implementation, setting: Setting, values: Values, *, invariant: bool):
        self.one, self.setting, self.values, self.invariant = one, setting, values, invariant
        self._backends = {backend.id: backend for backend in one.all}

    def answers(self, way: Way, subjects: Iterable[int]) -> dict[int, Answer]:
        """What the way gives for these sequences; those that it does not apply to are left out.

        Raises
        ------
        Unsupported
            The backend takes no such call.
        """
        wanted = set(subjects)
        if way.others:  # nothing beside a single row of a single head can be another's
            wanted = {n for n in wanted if self.setting.heads_q * self.setting.lengths[n][0] > 1}
        found: dict[int, Answer] = {}
        for part in self._parts(way, wanted):
            found |= self._part(way, part, wanted)
        return found

    def _parts(self, way: Way, wanted: set[int]) -> Iterator[list[int]]:
        """The sequences of each run of calls, in the order in which they stand there."""
        if way.together == 1:
            yield from ([index] for index in sorted(wanted))
            return
        order = list(range(len(self.setting)))
        random.Random(f"{self.setting.seed} {way.line()}").shuffle(order)
        for at in range(0, len(order), way.together):
            part = order[at : at + way.together]
            if wanted.intersection(part):
                yield part

    def _part(self, way: Way, part: list[int], wanted: set[int]) -> dict[int, Answer]:
        pieces = {index: pieces_of(self.setting, way, index) for index in part}
        members = [index for index in part if pieces[index]]
        borrowers = set(members[1::2]) if way.shared else set()
        wanted = wanted.intersection(members) - borrowers
        if not wanted:
            return {}
        if way.carrier == "paged" and not way.step and not way.cuts:
            # One call has as many query tokens of each sequence: the last ones of all but the one with the fewest.
            fewest = min(self.setting.lengths[index][0] for index in members)
            for index in members:
                rows, keys = self.setting.lengths[index]
                pieces[index] = [Piece(rows - fewest, fewest, keys)]
        pool = self._pool(way, members) if way.carrier == "paged" else None
        results: dict[int, list[Result]] = {index: [] for index in wanted}
        firsts: dict[int, int] = {}
        for number in range(max(len(pieces[index]) for index in members)):  # from the last piece to the first
            there = [index for index in members if number < len(pieces[index])]
            for call in self._calls(way, there, [pieces[index][-1 - number] for index in there]):
                if not wanted.intersection(call.members):
                    continue
                for index, piece, result in zip(call.members, call.pieces, self._call(way, call, pool), strict=True):
                    if index in wanted:
                        results[index].append(result)
                        firsts[index] = piece.first
        return {index: self._answer(way, index, firsts[index], results[index][::-1]) for index in wanted}

    def _answer(self, way: Way, index: int, first: int, results: list[Result]) -> Answer:
        out = torch.cat([out for out, _ in results], dim=1)
        lses = [lse for _, lse in results]
        lse = None if any(one is None for one in lses) else torch.cat(lses, dim=1)
        kept = self.values.among_others(index)[1][:, first:] if way.others else None
        return Answer(first, out, lse, kept)

    def _calls(self, way: Way, members: list[int], pieces: list[Piece]) -> list[_Call]:
        """These rows in as few calls as the carrier can: a dense one holds one shape, pages one number of rows."""
        keyed: dict[tuple, _Call] = {}
        for index, piece in zip(members, pieces, strict=True):
            key: tuple = ()
            if way.carrier in ("alone", "batch"):
                key = (piece.rows, piece.keys)
            elif way.carrier == "paged":
                key = (piece.rows,)
            call = keyed.setdefault(key, _Call([], []))
            call.members.append(index)
            call.pieces.append(piece)
        return list(keyed.values())

    # --- one call --------------------------------------------------------------------------------------------------

    def _call(self, way: Way, call: _Call, pool: _Pool | None) -> list[Result]:
        if way.carrier == "paged":
            return self._paged(way, call, pool)
        if way.carrier == "ragged":
            return self._ragged(way, call)
        if way.carrier == "padded":
            return self._padded(way, call)
        return self._dense(way, call)

    def _tensors(self, way: Way, call: _Call) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Q, K and V of each piece."""
        for index, piece in zip(call.members, call.pieces, strict=True):
            mine = self.values.among_others(index)[0] if way.others else self.values.of(index)
            yield (mine.q[:, piece.first : piece.first + piece.rows], mine.k[:, : piece.keys], mine.v[:, : piece.keys])

    def _run(self, q, k, v, problem: Problem, **lengths: torch.Tensor) -> Result:
        backend = self.one.dense
        _refuse(backend, backend.why_not(problem))
        masks = MaskTensors(sink=self.values.sink, **lengths) if self.setting.sink or lengths else None
        return backend.run(q, k, v, problem, **with_masks(masks))

    def _dense(self, way: Way, call: _Call) -> list[Result]:
        q, k, v = (_laid(torch.stack(tensors), way.layout) for tensors in zip(*self._tensors(way, call), strict=True))
        piece = call.pieces[0]
        problem = self.setting.problem(len(call.members), piece.rows, piece.keys, invariant=self.invariant)
        out, lse = self._run(q, k, v, problem)
        return [(out[i].clone(), None if lse is None else lse[i].clone()) for i in range(len(call.members))]

    def _ragged(self, way: Way, call: _Call) -> list[Result]:
        q, k, v = (torch.cat(tensors, dim=1)[None] for tensors in zip(*self._tensors(way, call), strict=True))
        rows, keys = [piece.rows for piece in call.pieces], [piece.keys for piece in call.pieces]
        problem = self.setting.problem(len(rows), max(rows), max(keys), invariant=self.invariant, lengths="ragged")
        places = {"cu_seqlens_q": self._ints(_sums(rows)), "cu_seqlens_k": self._ints(_sums(keys))}
        out, lse = self._run(q, k, v, problem, **places)
        ends = _sums(rows)
        return [(out[0, :, a:b].clone(), None if lse is None else lse[0, :, a:b].clone())
                for a, b in zip(ends, ends[1:], strict=False)]  # fmt: skip

    def _padded(self, way: Way, call: _Call) -> list[Result]:
        rows, keys = [piece.rows for piece in call.pieces], [piece.keys for piece in call.pieces]
        tensors = zip(*self._tensors(way, call), strict=True)
        q, k, v = (_with_padding(real, way.left) for real in tensors)
        problem = self.setting.problem(
            len(rows), max(rows), max(keys), invariant=self.invariant, lengths="left" if way.left else "right"
        )
        out, lse = self._run(q, k, v, problem, seqlens_q=self._ints(rows), seqlens_k=self._ints(keys))
        found = []
        for i, count in enumerate(rows):
            real = slice(max(rows) - count, max(rows)) if way.left else slice(0, count)
            found.append((out[i, :, real].clone(), None if lse is None else lse[i, :, real].clone()))
        return found

    def _paged(self, way: Way, call: _Call, pool: _Pool) -> list[Result]:
        backend = self._backends[way.by]
        q = torch.stack([q for q, _, _ in self._tensors(way, call)])
        rows = [pool.members.index(index) for index in call.members]
        cache = PagedKV(
            pool.k, pool.v, pool.table[rows].contiguous(), self._ints([piece.keys for piece in call.pieces]),
            lengths_fit=True,
        )  # fmt: skip
        room = cache.max_pages * cache.page_size
        problem = self.setting.problem(
            len(rows), call.pieces[0].rows, room, invariant=self.invariant, page_size=way.page_size
        )
        _refuse(backend, backend.why_not_paged(problem))
        masks = MaskTensors(sink=self.values.sink) if self.setting.sink else None
        out, lse = backend.run_paged(q, cache, problem, **with_masks(masks))
        return [(out[i].clone(), None if lse is None else lse[i].clone()) for i in range(len(rows))]

    # --- tensors ---------------------------------------------------------------------------------------------------

    def _ints(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.values.device)

    def _pool(self, way: Way, members: list[int]) -> _Pool:
        """K and V of all members in pages, out of order, NaN where there is no key."""
        size, setting = way.page_size, self.setting
        rng = random.Random(f"pages {setting.seed} {way.line()} {members}")
        used = [-(-setting.lengths[index][1] // size) for index in members]
        pages = list(range(sum(used) + SPARE_PAGES))
        rng.shuffle(pages)
        unused, width = pages[-1], max(used) + rng.randrange(3)
        table = [[unused] * width for _ in members]
        places = []  # of each key, in the pool's rows
        for row, index in enumerate(members):
            own = [pages.pop(0) for _ in range(used[row])]
            table[row][: len(own)] = own
            page = torch.tensor(own).repeat_interleave(size)[: setting.lengths[index][1]]
            places.append(page * size + torch.arange(len(page)) % size)
        if way.shared:  # what a borrower computes is nobody's sequence, and is not compared
            for row in range(1, len(members), 2):
                count = max(1, min(used[row], used[row - 1]) // 2)
                table[row][:count] = table[row - 1][:count]
        at = torch.cat(places).to(self.values.device)
        pools = []
        for name in ("k", "v"):
            dense = torch.cat([getattr(self.values.of(index), name) for index in members], dim=1).transpose(0, 1)
            shape = (sum(used) + SPARE_PAGES, size, setting.heads_kv, setting.head_dim)
            pool = torch.full(shape, float("nan"), dtype=self.values.dtype, device=self.values.device)
            pool.view(-1, *shape[2:]).index_copy_(0, at, dense.contiguous())
            pool = pool.transpose(1, 2)
            pools.append(pool.contiguous() if way.left or setting.seed % 2 else pool)
        return _Pool(members, *pools, self._ints(table))


@dataclass(frozen=True)
class _Pool:
    members: list[int]
    k: torch.Tensor
    """``[pages, num_heads_kv, page_size, head_dim]``, by page and token or by page and head."""
    v: torch.Tensor
    table: torch.Tensor
    """int32 ``[members, pages]``."""


def _refuse(backend: backends.Backend, reason: str | None) -> None:
    if reason is not None:
        raise Unsupported(backend.id, reason)


def _sums(counts: Sequence[int]) -> list[int]:
    found = [0]
    for count in counts:
        found.append(found[-1] + count)
    return found


def _laid(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another memory order."""
    if layout == "bshd":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "spare":
        wide = torch.full((*tensor.shape[:3], tensor.shape[3] + SPARE), float("nan"), dtype=tensor.dtype,
                          device=tensor.device)  # fmt: skip
        return wide[..., : tensor.shape[3]].copy_(tensor)
    return tensor


def _with_padding(tensors: Sequence[torch.Tensor], left: bool) -> torch.Tensor:
    """``[len(tensors), heads, longest, head_dim]``, NaN where a tensor has no row."""
    longest = max(tensor.shape[1] for tensor in tensors)
    missing = [longest - tensor.shape[1] for tensor in tensors]
    return torch.stack([
        torch.nn.functional.pad(tensor, (0, 0, n, 0) if left else (0, 0, 0, n), value=float("nan"))
        for tensor, n in zip(tensors, missing, strict=True)
    ])  # fmt: skip
