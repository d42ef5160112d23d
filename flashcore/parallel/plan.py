"""Who holds which part of a sequence, what has to travel to whom, and which calls of a kernel make the result.

A sequence of S keys on n ranks is cut into 2n chunks, and rank r holds chunks r and 2n-1-r. Under a causal mask query
chunk c works on c + 1/2 chunks of keys, so each rank works on (r + 1/2) + (2n-1-r + 1/2) = 2n of them: the same on all.

Plan `gather` fetches all keys that a rank sees, and then calls the kernel once for each query chunk: nothing has to be
joined. Plan `ring` starts with the keys at home, then takes one rank's shard after the other. The next shard travels
while what the kernel gave is joined and while it works. It holds two shards of other ranks, and `gather` holds all.

The arithmetic for H200 cards on NVLink (32 heads on 8, D=128, bfloat16, 32k keys a card, causal): a chunk of L = 16k
keys is 2*8*128*2*L = 67 MB of K and V, or 0.2 ms at 350 GB/s. A query chunk against a whole key chunk is
4*32*128*L^2 = 4.4e12 operations, or 7.3 ms at 600 TFLOPS, and a card does 2n of these: 29 ms for n = 2, and 58 ms for
n = 4. Rank r has to get 2n-2-r chunks (at most 2: 0.4 ms; 6: 1.2 ms), 1.4 % and 2 % of that. Copying the keys and the
result costs 0.2 ms more, so `gather` should reach 97 % of one card. `ring` saves less than it costs: joining takes
torch some 18 bytes an element, 0.6 ms or more for each shard that comes in. And a transfer hides behind joining alone:
our kernel deals its work out to all multiprocessors once and for all, and those that NCCL's kernel has for a while
finish later by as long. So `gather` is the default, whose results are rounded once, as on one card; `ring` is for K and
V too large to stand whole on each card.

A chunk goes from its owner straight to each rank that sees it. An all-gather would bring every rank 2n-2 chunks, of
which a causal mask hides (n-1)/2 on average; and a ring that hands shards on moves as many bytes a card as sending them
straight, but each step of it waits for the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

PLANS = ("gather", "ring")


@dataclass(frozen=True)
class Call:
    """One call of a kernel: some rows of the local queries against some keys of a buffer."""

    rows: tuple[int, int]
    """First row, and one past the last."""
    keys: tuple[int, int]
    """First key of the buffer, and one past the last."""
    causal: bool
    """Whether the last row sees all these keys, the one before it all but the last, and so on; else all see all."""


@dataclass(frozen=True)
class Round:
    """Chunks that arrive, in the order in which they then lie in the buffer, and the calls that wait for them."""

    wanted: tuple[int, ...]
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Zigzag:
    """A sequence of queries and one of keys, cut into two chunks for each rank.

    Parameters
    ----------
    seqlen_q, seqlen_k
        Of the whole sequences.
    ranks
        In the mesh.
    causal
        Query i sees keys ``j <= i + seqlen_k - seqlen_q``.
    """

    seqlen_q: int
    seqlen_k: int
    ranks: int
    causal: bool
    query_chunks: tuple[tuple[int, int], ...] = field(init=False, compare=False)
    key_chunks: tuple[tuple[int, int], ...] = field(init=False, compare=False)
    """First position of each chunk, and one past its last."""

    def __post_init__(self):
        object.__setattr__(self, "query_chunks", chunks(self.seqlen_q, self.ranks))
        object.__setattr__(self, "key_chunks", chunks(self.seqlen_k, self.ranks))

    def seen(self, chunk: int) -> int:
        """How many keys, from the first on, the last query of a chunk sees."""
        if not self.causal:
            return self.seqlen_k
        return max(0, self.query_chunks[chunk][1] + self.seqlen_k - self.seqlen_q)

    def wanted(self, rank: int) -> tuple[int, ...]:
        """Chunks of keys that a rank's queries see and that it does not hold."""
        mine = owned(rank, self.ranks)
        seen = max(map(self.seen, mine))
        return tuple(c for c, (start, _) in enumerate(self.key_chunks) if start < seen and c not in mine)

    def gathered(self, rank: int) -> Round:
        """Plan `gather`: the buffer holds the keys at their positions in the sequence."""
        return Round(self.wanted(rank), self._calls(rank, [((0, self.seqlen_k), 0)]))

    def at_home(self, rank: int) -> tuple[Call, ...]:
        """Plan `ring`: the calls on the keys that the rank holds itself, its shard being the buffer."""
        return self._calls(rank, self._placed(owned(rank, self.ranks)))

    def arriving(self, rank: int, step: int) -> Round:
        """Plan `ring`, step 1 to ranks-1: what comes from the rank that lies `step` before this one, and its calls."""
        sender = (rank - step) % self.ranks
        wanted = self.sent(sender, rank)
        return Round(wanted, self._calls(rank, self._placed(wanted)))

    def sent(self, sender: int, receiver: int) -> tuple[int, ...]:
        """The chunks of one rank that another has to get, in the order of the sequence."""
        wanted = self.wanted(receiver)
        return tuple(chunk for chunk in owned(sender, self.ranks) if chunk in wanted)

    def _placed(self, some: Iterable[int]) -> list[tuple[tuple[int, int], int]]:
        """Chunks of keys one behind the other: positions in the sequence, and where in the buffer each begins."""
        placed, at = [], 0
        for chunk in some:
            placed.append((self.key_chunks[chunk], at))
            at += length(self.key_chunks[chunk])
        return placed

    def _calls(self, rank: int, placed: Sequence[tuple[tuple[int, int], int]]) -> tuple[Call, ...]:
        calls, row = [], 0
        for chunk in owned(rank, self.ranks):
            rows = self.query_chunks[chunk]
            for keys, at in placed:
                for found in self._seen_by(rows, keys):
                    calls.append(Call(moved(found.rows, row - rows[0]), moved(found.keys, at - keys[0]), found.causal))
            row += length(rows)
        return fused(calls)

    def _seen_by(self, rows: tuple[int, int], keys: tuple[int, int]) -> list[Call]:
        """The calls by which some queries see some keys, by positions in the sequences; rows without keys are in none.

        A kernel knows no mask but the whole one and the causal one, whose last row sees the last key. So rows on the
        diagonal make one call, which ends at the key that the last of them sees, and rows below it make another.
        """
        if not self.causal:
            return [Call(rows, keys, False)]
        offset = self.seqlen_k - self.seqlen_q
        first = max(rows[0], keys[0] - offset)
        edge = keys[1] - offset  # the row before this one is the first to see all these keys
        last = min(edge, rows[1])
        calls = []
        if first < last:
            calls.append(Call((first, last), (keys[0], last + offset), True))
        if max(first, edge) < rows[1]:
            calls.append(Call((max(first, edge), rows[1]), keys, False))
        return calls


def chunks(seqlen: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """The 2n chunks of a sequence, start and end of each; where 2n does not divide it, the first are longer by one."""
    size, longer = divmod(seqlen, 2 * ranks)
    ends = [0]
    for chunk in range(2 * ranks):
        ends.append(ends[-1] + size + (chunk < longer))
    return tuple(pairwise(ends))


def owned(rank: int, ranks: int) -> tuple[int, int]:
    """The two chunks that a rank holds, in the order in which they lie in its shard."""
    return rank, 2 * ranks - 1 - rank


def held(seqlen: int, rank: int, ranks: int) -> int:
    """How many rows of a sequence a rank holds."""
    cut = chunks(seqlen, ranks)
    return sum(length(cut[chunk]) for chunk in owned(rank, ranks))


def length(part: tuple[int, int]) -> int:
    return part[1] - part[0]


def moved(part: tuple[int, int], by: int) -> tuple[int, int]:
    return part[0] + by, part[1] + by


def fused(calls: Iterable[Call]) -> tuple[Call, ...]:
    """The same work in as few calls as the two kinds of mask allow."""
    left = list(calls)
    while True:
        pairs = ((i, j) for i in range(len(left)) for j in range(len(left)) if i != j)
        found = next(((i, j, one) for i, j in pairs if (one := _as_one(left[i], left[j])) is not None), None)
        if found is None:
            return tuple(left)
        i, j, one = found
        left[min(i, j)] = one
        del left[max(i, j)]


def _as_one(first: Call, second: Call) -> Call | None:
    """One call that does the work of two, or None where there is none."""
    if first.rows == second.rows and first.keys[1] == second.keys[0] and not first.causal:
        # All these rows see all keys of the first call, so that only the end of the second has a diagonal.
        return Call(first.rows, (first.keys[0], second.keys[1]), second.causal)
    if first.rows[1] == second.rows[0] and first.keys[0] == second.keys[0] and first.causal == second.causal:
        rows, grows = (first.rows[0], second.rows[1]), second.keys[1] - first.keys[1]
        if grows == (length(second.rows) if first.causal else 0):  # the diagonal of the second goes on from the first's
            return Call(rows, second.keys, first.causal)
    return None
