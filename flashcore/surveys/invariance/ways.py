"""The ways in which a sequence can be computed, and which of them a backend can do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

from flashcore import backends
from flashcore.paging import PAGE_SIZES
from flashcore.surveys.invariance.cases import Setting, Size, Takes

Kind = Literal["alone", "batch", "chunks", "pages"]
KINDS: tuple[Kind, ...] = ("alone", "batch", "chunks", "pages")
"""What a table calls a way: a call of its own; a call with others; a later chunk or a decode step; K and V in pages."""
OVER_PAGES = {"hopper": ("hopper-paged", "decode")}
"""What reads pages beside a backend, and promises the same bits; a backend that reads pages itself stands for itself.
"""
DTYPES, HEAD_DIMS = ("float16", "bfloat16"), (64, 128)
STEPS = (1, 2, 4)
"""Query tokens of a decode step."""
MOST_STEPS = 3
"""Steps that are taken of a sequence: the last ones."""
WHOLE = 1000
"""Cuts are thousandths of a sequence's rows, so that they hold for sequences of any length."""


@dataclass(frozen=True)
class Implementation:
    """What is asked: a backend, and what reads pages beside it."""

    id: str
    dense: backends.Backend | None
    """None where it reads pages alone."""
    paged: tuple[backends.Backend, ...]

    @property
    def first(self) -> backends.Backend:
        """The backend that the implementation is named for."""
        return self.dense or self.paged[0]

    @property
    def all(self) -> tuple[backends.Backend, ...]:
        return (*([self.dense] if self.dense else ()), *self.paged)

    @property
    def promising(self) -> Implementation | None:
        """What of it promises the same bits where a problem asks for them; None where what it is named for does not."""
        if not self.first.batch_invariant:
            return None
        return replace(self, paged=tuple(one for one in self.paged if one.batch_invariant))

    @property
    def takes(self) -> Takes:
        one = self.first
        dims = HEAD_DIMS if one.head_dims is None else tuple(d for d in HEAD_DIMS if d in one.head_dims)
        masks = self.dense.masks if self.dense else one.paged_masks
        mixed = bool(self.paged) or not {"lengths", "ragged"}.isdisjoint(masks)
        dtypes = tuple(d for d in DTYPES if d in one.dtypes)
        return Takes(dtypes, dims, masks, mixed, empty=one.role == "ours")

    def refuses(self, setting: Setting, *, invariant: bool) -> bool:
        """Whether it takes not even the first sequence of a setting alone."""
        rows, keys = setting.lengths[0]
        if self.dense:
            return self.dense.why_not(setting.problem(1, rows, keys, invariant=invariant)) is not None
        return self.paged[0].why_not_paged(setting.problem(1, rows, keys, invariant=invariant)) is not None


def implementation(backend: str | backends.Backend) -> Implementation:
    """A backend with what reads pages beside it, of those that are there.

    Raises
    ------
    UnknownName
        There is no such backend.
    """
    one = backends.get(backend) if isinstance(backend, str) else backend
    known = {other.id: other for other in backends.all_backends()}
    beside = [known[name] for name in OVER_PAGES.get(one.id, ()) if name in known]
    paged = tuple(beside) or ((one,) if one.paged else ())
    return Implementation(one.id, one if one.dense else None, paged)


@dataclass(frozen=True)
class Way:
    """One way to compute a sequence of a setting."""

    carrier: Literal["alone", "batch", "padded", "ragged", "paged"] = "alone"
    """The call: of this sequence alone, a dense batch, a padded one, a ragged one, or over pages."""
    cuts: tuple[int, ...] = ()
    """Where its queries are cut into calls one after the other, in thousandths of its rows."""
    step: int = 0
    """Query tokens of each of the last few calls, where these are decode steps."""
    together: int = 1
    """Sequences in a call, at most."""
    page_size: int = 0
    shared: bool = False
    """Every second sequence has the first pages of the one before it in place of its own."""
    layout: Literal["bhsd", "bshd", "spare"] = "bhsd"
    """Memory order of dense tensors; under ``spare`` rows lie further apart than they are long."""
    left: bool = False
    """Padding comes before the real rows."""
    others: bool = False
    """Other rows and heads of the sequence get queries that outgrow their reference; those are not compared."""
    by: str = ""
    """The backend that reads the pages."""
    again: int = 0
    """Tells repeats of one way apart."""

    @property
    def kind(self) -> Kind:
        if self.carrier == "paged":
            return "pages"
        if self.cuts or self.step:
            return "chunks"
        return "alone" if self.carrier == "alone" else "batch"

    def line(self) -> str:
        """It as Python."""
        told = [(field.name, getattr(self, field.name)) for field in fields(self)]
        usual = {field.name: field.default for field in fields(self)}
        return f"Way({', '.join(f'{name}={value!r}' for name, value in told if value != usual[name])})"


@dataclass(frozen=True)
class Piece:
    """Rows of a sequence that one call computes: from `first`, `rows` of them, seeing `keys` keys."""

    first: int
    rows: int
    keys: int


def pieces_of(setting: Setting, way: Way, index: int) -> list[Piece]:
    """The calls that a way makes for a sequence, in order, the last of which ends at its last row; empty for none.

    A call that ends before the last row has fewer keys: queries are the last tokens of what a call knows. That is the
    same attention under a causal mask, and where there is no window every row sees all keys at any place.
    """
    rows, keys = setting.lengths[index]
    before = keys - rows  # keys ahead of the first query's own; below 0 where the first rows see none
    if way.step:
        count = min(MOST_STEPS, rows // way.step)
        bounds = [rows - way.step * n for n in range(count, -1, -1)]
    else:
        bounds = sorted({0, rows, *(rows * cut // WHOLE for cut in way.cuts)})
        if way.cuts and len(bounds) == 2:
            return []  # too few rows to be cut there
    if not setting.causal and max(setting.window_left, setting.window_right) >= 0 and len(bounds) > 2:
        bounds = bounds[-2:] if way.step else []  # a window counts from the end, which the last call alone has
    pieces = []
    for first, end in zip(bounds, bounds[1:], strict=False):
        seen = before + end if setting.causal else keys
        if seen >= 1:
            pieces.append(Piece(first, end - first, seen))
    return pieces


def draw(rng: random.Random, one: Implementation, setting: Setting, size: Size) -> list[Way]:
    """Some ways that an implementation has for a setting, none twice; the plain one is always among them."""
    plain = Way("alone") if one.dense else Way("paged", page_size=rng.choice(PAGE_SIZES), by=one.paged[0].id)
    makers = [maker for maker, able in _makers(one, setting) for _ in range(able)]
    found = dict.fromkeys([plain])
    for _ in range(4 * size.ways):
        if len(found) >= size.ways:
            break
        found.setdefault(rng.choice(makers)(rng, one, setting))
    return list(found)


def _makers(one: Implementation, setting: Setting) -> Iterator[tuple[Callable[..., Way], int]]:
    """What draws ways of each sort, and how often."""
    if one.dense:
        yield _alone, 3
        yield _cut, 3
        if setting.even:
            yield _batch, 4
        if "ragged" in one.dense.masks:
            yield _ragged, 4
        if "lengths" in one.dense.masks:
            yield _padded, 2
    if one.paged:
        yield _paged, 6 if one.dense else 1


def _together(rng: random.Random, setting: Setting) -> int:
    """Sequences in a call: all, or any number of them."""
    return len(setting) if rng.random() < 0.5 else max(2, round(len(setting) ** rng.random()))


def _pieces(rng: random.Random, share: float) -> dict[str, object]:
    """Cuts or steps, for this share of ways."""
    kind = rng.random()
    if kind < share / 2:
        return {"step": rng.choice(STEPS)}
    if kind < share:
        return {"cuts": tuple(sorted({rng.randrange(1, WHOLE) for _ in range(rng.randint(1, 3))}))}
    return {}


def _others(rng: random.Random, share: float = 0.3) -> bool:
    return rng.random() < share


def _layout(rng: random.Random) -> str:
    return rng.choice(("bhsd", "bhsd", "bshd", "spare"))


def _alone(rng: random.Random, one: Implementation, setting: Setting) -> Way:
    return Way("alone", layout=_layout(rng), others=_others(rng, 0.6), again=rng.randrange(2))


def _cut(rng: random.Random, one: Implementation, setting: Setting) -> Way:
    return Way("alone", layout=_layout(rng), others=_others(rng), **_pieces(rng, 1.0))


def _batch(rng: random.Random, one: Implementation, setting: Setting) -> Way:
    together = _together(rng, setting)
    return Way("batch", together=together, layout=_layout(rng), others=_others(rng), **_pieces(rng, 0.3))


def _ragged(rng: random.Random, one: Implementation, setting: Setting) -> Way:
    return Way("ragged", together=_together(rng, setting), others=_others(rng), **_pieces(rng, 0.5))


def _padded(rng: random.Random, one: Implementation, setting: Setting) -> Way:
    left = rng.random() < 0.5
    return Way("padded", together=_together(rng, setting), left=left, others=_others(rng), **_pieces(rng, 0.3))


def _paged(rng: random.Random, one: Implementation, setting: Setting) -> Way:
    together = 1 if rng.random() < 0.3 else _together(rng, setting)
    way = Way(
        "paged", together=together, page_size=rng.choice(PAGE_SIZES), shared=together > 1 and rng.random() < 0.3,
        others=_others(rng), **_pieces(rng, 0.5),
    )  # fmt: skip
    # A decode kernel takes few query tokens: it is asked where the calls have no more.
    longest = max((piece.rows for piece in pieces_of(setting, way, 0)), default=1)
    problem = setting.problem(1, longest, setting.lengths[0][1], invariant=False, page_size=way.page_size)
    able = [backend for backend in one.paged if backend.why_not_paged(problem) is None]
    return replace(way, by=rng.choice(able or one.paged).id)
