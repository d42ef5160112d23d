"""Random settings: a few sequences that share heads, dtype and masks, each of which is the subject of cases."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby

from flashcore.errors import InvalidProblem
from flashcore.problem import Problem

PATTERNS = ("rows apart", "late", "rising", "normal", "huge", "equal")
"""What the numbers of a sequence are like (`values.make`)."""
MASK_KINDS = ("", "", "window", "sink", "window softcap sink")
"""Masks of a setting besides `causal`: few, since each is a compilation of a kernel, and none comes twice as often."""
NEAR = (64, 256, 1024, 2048, 4096)
"""Numbers at whose multiples, and one beside them, tiles and chunks of keys are cut."""
SOFTCAP = 20.0
TRIES = 40
"""Settings that are drawn until a backend takes one."""


@dataclass(frozen=True)
class Size:
    """How large settings are, so that a machine gets through many."""

    sequences: int
    """The most in a setting."""
    numbers: int
    """The most that K of all sequences has, padded to the longest."""
    keys: tuple[tuple[int, int], ...]
    """(weight, longest): how often the keys of a setting are drawn up to which length."""
    rows: int
    """Query tokens of a sequence, at most."""
    heads: int
    """Query heads, at most."""
    subjects: int
    """Sequences of a setting that are compared, at most."""
    ways: int
    """Ways that a setting is computed in, at most."""
    settings: int = 1
    """The fewest that the cases come from, however few these are: a setting of many sequences has a hundred of them,
    and what breaks bits may need long keys and an even batch at once."""


SIZES = {
    "cpu": Size(16, 1 << 19, ((6, 300), (4, 1100), (2, 4200)), 80, 8, 4, 7),
    "cuda": Size(256, 1 << 26, ((6, 300), (6, 2200), (4, 9000), (1, 20_000)), 300, 32, 16, 9, 40),
}
"""By kind of device."""


@dataclass(frozen=True)
class Takes:
    """What a backend takes of all that settings may have."""

    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    masks: tuple[str, ...]
    mixed: bool
    """Whether it takes sequences of several lengths in one call."""
    empty: bool = True
    """Whether it says what a row holds that sees no key; a peer need not, and then is not asked."""


@dataclass(frozen=True)
class Setting:
    """Sequences that are computed together or apart. The same fields give the same tensors on the same machine."""

    seed: int = 0
    head_dim: int = 64
    dtype: str = "float16"
    heads_kv: int = 1
    group: int = 1
    """Query heads of each K/V head."""
    causal: bool = True
    window_left: int = -1
    window_right: int = -1
    softcap: float | None = None
    sink: bool = False
    lengths: tuple[tuple[int, int], ...] = ((1, 64),)
    """(query tokens, keys) of each sequence; the queries are its last tokens."""
    patterns: tuple[str, ...] = ("normal",)
    """One of `PATTERNS` for each sequence."""
    first: int = 0
    """Number of the first sequence: a part of a setting keeps the tensors that it had."""

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.patterns) or not self.lengths:
            raise InvalidProblem(
                f"A setting has {len(self.lengths)} lengths and {len(self.patterns)} patterns; give one each of a "
                "sequence, and at least one sequence."
            )

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self.lengths)

    @property
    def heads_q(self) -> int:
        return self.heads_kv * self.group

    @property
    def even(self) -> bool:
        """Whether all sequences are of one shape, so that a dense batch can hold them."""
        return len(set(self.lengths)) == 1

    def problem(self, batch: int, rows: int, keys: int, *, invariant: bool, **more) -> Problem:
        """The problem of one call."""
        return Problem(
            batch=batch, num_heads_q=self.heads_q, num_heads_kv=self.heads_kv, seqlen_q=rows, seqlen_k=keys,
            head_dim=self.head_dim, dtype=self.dtype, causal=self.causal, window_left=self.window_left,
            window_right=self.window_right, softcap=self.softcap, sink=self.sink, batch_invariant=invariant,
            **more,
        )  # fmt: skip

    def line(self) -> str:
        """It as Python, what is as usual left out and what repeats said once."""
        told = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                told.append(f"{field.name}={_folded(value) if isinstance(value, tuple) else repr(value)}")
        return f"Setting({', '.join(told)})"


def _folded(values: tuple) -> str:
    """A tuple as Python, runs of one value as products."""
    runs = [(value, len(list(alike))) for value, alike in groupby(values)]
    parts = [f"({value!r},)" + (f" * {count}" if count > 1 else "") for value, count in runs]
    return " + ".join(parts)


def draw(rng: random.Random, takes: Takes, size: Size, refused: Callable[[Setting], bool]) -> Setting | None:
    """A setting that a backend takes, or None where none was found.

    Parameters
    ----------
    refused
        Whether the backend takes not one sequence of a setting alone.
    """
    for _ in range(TRIES):
        setting = _drawn(rng, takes, size)
        if not refused(setting):
            return setting
    return None


def _drawn(rng: random.Random, takes: Takes, size: Size) -> Setting:
    head_dim = rng.choice(takes.head_dims)
    heads_kv = rng.choice([n for n in (1, 1, 2, 3, 8) if n <= size.heads])
    group = rng.choice([n for n in (1, 2, 4, 5, 8, 16, 32) if n * heads_kv <= size.heads])
    kinds = [kind for kind in MASK_KINDS if set(kind.split()) <= set(takes.masks)]
    masks = rng.choice(kinds).split()
    longest = rng.choices([most for _, most in size.keys], [weight for weight, _ in size.keys])[0]
    keys = _keys(rng, longest)
    rows = _rows(rng, size.rows)
    causal = rng.random() < 0.75
    if not takes.empty or (causal and rng.random() < 0.97):  # else the first rows may see no key
        rows = min(rows, keys)
    if rng.random() < 0.15 or ("window" not in takes.masks and causal and rng.random() < 0.15):
        rows = keys = min(rows, keys)  # a prompt
    room = max(1, size.numbers // (keys * heads_kv * head_dim))
    most = min(size.sequences, room)
    count = min(most, max(2, round(2 ** rng.uniform(1, size.sequences.bit_length() - 1))))
    lengths = [(rows, keys)] * count
    if takes.mixed and rng.random() < 0.5:
        for index in range(1, count):
            k = _keys(rng, keys)
            q = _rows(rng, size.rows)
            lengths[index] = (min(q, k) if causal else q, k)
        rng.shuffle(lengths)
    window = "window" in masks
    left = rng.choice((0, 15, 63, 64, 100, 500, 1023, 1024, 4000)) if window else -1
    right = rng.choice((0, 7, 64)) if window and not causal and rng.random() < 0.5 else -1
    return Setting(
        seed=rng.randrange(1 << 30), head_dim=head_dim, dtype=rng.choice(takes.dtypes), heads_kv=heads_kv, group=group,
        causal=causal, window_left=left, window_right=right, softcap=SOFTCAP if "softcap" in masks else None,
        sink="sink" in masks, lengths=tuple(lengths), patterns=tuple(_patterns(rng, count)),
    )  # fmt: skip


def _patterns(rng: random.Random, count: int) -> Sequence[str]:
    return rng.choices(PATTERNS, (4, 3, 2, 2, 1, 1), k=count)


def _keys(rng: random.Random, most: int) -> int:
    """A number of keys: often where tiles and chunks end, or one beside; else of any size, small ones more often."""
    kind = rng.random()
    if kind < 0.6:
        near = rng.choice([n for n in NEAR if n <= most] or [most])
        found = near * rng.randint(1, max(1, most // near)) + rng.choice((-1, 0, 1))
    else:
        found = round(most ** rng.random())
    return max(1, min(found, most))


def _rows(rng: random.Random, most: int) -> int:
    """Query tokens: one, few, or about as many as tiles have rows."""
    kind = rng.random()
    if kind < 0.25:
        return 1
    if kind < 0.5:
        return rng.randint(2, 8)
    return max(1, min(most, rng.choice((rng.randint(9, most), 16 * rng.randint(1, max(1, most // 16)) + 1))))
