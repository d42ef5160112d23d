"""Are two answers the same to the bit? The cases of a setting, and the smallest case of a break."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from flashcore import backends
from flashcore.errors import FlashCoreError, InvalidProblem, Unsupported
from flashcore.numerics import ambient
from flashcore.numerics.outputs import poisoned_outputs
from flashcore.surveys.invariance.cases import Setting
from flashcore.surveys.invariance.computing import Answer, Computer
from flashcore.surveys.invariance.values import Values
from flashcore.surveys.invariance.ways import KINDS, Implementation, Way, implementation

_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Case:
    """One sequence computed in two ways."""

    setting: Setting
    subject: int
    ways: tuple[Way, Way]
    kept: bool
    """Whether all bits of `out` and `lse` are the same."""

    @property
    def pair(self) -> str:
        """What the two ways are, as a table has it."""
        return pair_of(self.ways)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. It is true where all bits are the same; `print` says what is not."""

    kept: bool
    sentence: str

    def __bool__(self) -> bool:
        return self.kept

    def __str__(self) -> str:
        return self.sentence


def pair_of(ways: tuple[Way, Way]) -> str:
    """The kinds of two ways, as in ``alone, pages``."""
    return ", ".join(sorted((way.kind for way in ways), key=KINDS.index))


def device_of(backend: backends.Backend) -> str:
    """Where its tensors have to be; the GPU for one that takes both."""
    return "cpu" if backend.device == "cpu" or not torch.cuda.is_available() else "cuda"


def differing(one: Answer, other: Answer) -> torch.Tensor:
    """bool ``[num_heads_q, rows]``, of the rows that both have: whether any bit of a row differs, or is none's, a NaN.

    Rows that are not compared count as the same.
    """
    first = max(one.first, other.first)
    outs = [answer.out[:, first - answer.first :] for answer in (one, other)]
    found = (_bits(outs[0]) != _bits(outs[1])).any(-1) | outs[0].isnan().any(-1)
    if one.lse is not None and other.lse is not None:
        lses = [answer.lse[:, first - answer.first :] for answer in (one, other)]
        found = found | (_bits(lses[0]) != _bits(lses[1])) | lses[0].isnan()
    for answer in (one, other):
        if answer.kept is not None:
            found = found & answer.kept[:, first - answer.first :]
    return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers as whole ones, so that 0 and -0 differ and NaN is like itself."""
    return tensor.contiguous().view(_BITS[tensor.dtype])


@ambient.judging
def cases_of(
    one: Implementation, setting: Setting, ways: Sequence[Way], subjects: Sequence[int], *, invariant: bool,
    refused: Callable[[Way, str], None] = lambda way, reason: None,
) -> list[Case]:  # fmt: skip
    """Compute a setting's subjects in each way, and compare: each way of a subject with two others, drawn by lot.

    The ways of a subject stand in a random ring, and neighbours in it are compared; so each answer is used twice, and
    any two ways meet in some setting.

    Parameters
    ----------
    refused
        Told each way that the backend does not take, with the reason.
    """
    computer = Computer(one, setting, Values(setting, device_of(one.first)), invariant=invariant)
    answers: dict[Way, dict[int, Answer]] = {}
    with poisoned_outputs():
        for way in ways:
            try:
                answers[way] = computer.answers(way, subjects)
            except Unsupported as error:
                refused(way, error.reason)
    asked, differ = [], []
    for subject in subjects:
        ring = [way for way in answers if subject in answers[way]]
        random.Random(f"ring {setting.seed} {subject}").shuffle(ring)
        for ways_ in _neighbours(ring):
            asked.append((subject, ways_))
            differ.append(differing(*(answers[way][subject] for way in ways_)).any())
    found = torch.stack(differ).tolist() if differ else []  # one wait for the GPU, and not one a case
    return [Case(setting, subject, pair, not bad) for (subject, pair), bad in zip(asked, found, strict=True)]


def _neighbours(ring: Sequence[Way]) -> Iterator[tuple[Way, Way]]:
    for at in range(len(ring) if len(ring) > 2 else len(ring) - 1):
        yield ring[at], ring[(at + 1) % len(ring)]


def compare(
    backend: str | backends.Backend, setting: Setting, subject: int, way: Way, other: Way, *, invariant: bool
) -> Comparison:
    """Ask one case.

    Parameters
    ----------
    backend
        A backend, or its id.
    subject
        Which sequence of the setting is compared.
    way, other
        The two ways to compute it.
    invariant
        Whether calls ask for the batch-invariant mode.

    Raises
    ------
    UnknownName, BackendUnavailable
        There is no such backend, or it cannot run here.
    InvalidProblem
        There is no such sequence, or one of the ways does not apply to it.
    Unsupported
        The backend does not take the calls of one of the ways.
    """
    one = implementation(backend)
    for needed in one.all:
        needed.require()
    if not 0 <= subject < len(setting):
        raise InvalidProblem(f"subject is {subject}; the setting has the sequences 0 to {len(setting) - 1}.")
    differ = _differing(one, setting, subject, (way, other), invariant)
    if differ is None:
        raise InvalidProblem(
            f"One of the two ways does not apply to sequence {subject} ({way.line()}, {other.line()})."
        )
    places = differ.nonzero().tolist()
    if not places:
        return Comparison(True, f"kept: {differ.numel():,} rows are the same to the bit")
    rows = setting.lengths[subject][0]
    head, row = places[0]
    at = f"head {head}, query {rows - differ.shape[1] + row}"
    return Comparison(False, f"broken: {len(places):,} of {differ.numel():,} rows differ, the first at {at}")


@ambient.judging
def _differing(
    one: Implementation, setting: Setting, subject: int, ways: tuple[Way, Way], invariant: bool
) -> torch.Tensor | None:
    """`differing` of a case; None where one of the ways does not apply."""
    computer = Computer(one, setting, Values(setting, device_of(one.first)), invariant=invariant)
    with poisoned_outputs():
        answers = [computer.answers(way, [subject]).get(subject) for way in ways]
    return None if None in answers else differing(*answers)


# --- the smallest case -----------------------------------------------------------------------------------------------


def shrunk(one: Implementation, case: Case, *, invariant: bool, seconds: float) -> Case:
    """A smaller case that breaks too, as small as was found in that time; the case itself where none does."""
    until = time.monotonic() + seconds
    better = True
    while better and time.monotonic() < until:
        better = False
        for less in _smaller(case):
            if time.monotonic() > until:
                break
            try:
                differ = _differing(one, less.setting, less.subject, less.ways, invariant)
            except FlashCoreError:  # a call that the backend does not take
                continue
            if differ is not None and bool(differ.any()):
                case, better = less, True
                break
    return case


def line(one: Implementation, case: Case, *, invariant: bool) -> str:
    """A case as one line of Python that asks it again."""
    ways = ", ".join(way.line() for way in case.ways)
    return (
        "from flashcore.surveys.invariance import Setting, Way, compare; "
        f"print(compare({one.id!r}, {case.setting.line()}, {case.subject}, {ways}, invariant={invariant}))"
    )


def _smaller(case: Case) -> Iterator[Case]:
    """Cases with less of something, those that lose most first."""
    setting, subject = case.setting, case.subject
    count = len(setting)
    for keep in sorted({1, 2, count // 4, count // 2, count - 1}):
        if 1 <= keep < count:
            first = min(max(0, subject - keep + 1), count - keep)  # the subject stays, and as many of those before it
            yield replace(case, setting=_only(setting, first, first + keep), subject=subject - first)
    for changes in _plainer(setting):
        yield replace(case, setting=replace(setting, **changes))
    rows, keys = setting.lengths[subject]
    for fewer in {1, rows // 2, rows - 1}:
        if 1 <= fewer < rows:
            yield replace(case, setting=_resized(setting, subject, fewer, keys))
    for fewer in (keys // 4, keys // 2, keys - keys % 64 or keys, keys - 64, keys - 1):
        if max(1, rows if setting.causal else 1) <= fewer < keys:
            yield replace(case, setting=_resized(setting, subject, rows, fewer))
    for at in (0, 1):
        for plain in _plainer_ways(case.ways[at]):
            if plain != case.ways[1 - at]:
                yield replace(case, ways=(plain, case.ways[1]) if at == 0 else (case.ways[0], plain))


def _only(setting: Setting, first: int, end: int) -> Setting:
    """Some of its sequences, with the tensors that they had."""
    kept = {"lengths": setting.lengths[first:end], "patterns": setting.patterns[first:end]}
    return replace(setting, first=setting.first + first, **kept)


def _resized(setting: Setting, subject: int, rows: int, keys: int) -> Setting:
    """With other lengths of the subject; of all sequences where all are alike."""
    if setting.even:
        return replace(setting, lengths=((rows, keys),) * len(setting))
    lengths = list(setting.lengths)
    lengths[subject] = (rows, keys)
    return replace(setting, lengths=tuple(lengths))


def _plainer(setting: Setting) -> Iterator[dict[str, object]]:
    if setting.heads_kv > 1:
        yield {"heads_kv": 1}
    if setting.group > 1:
        yield {"group": 1}
        yield {"group": setting.group // 2}
    if setting.softcap is not None:
        yield {"softcap": None}
    if setting.sink:
        yield {"sink": False}
    if max(setting.window_left, setting.window_right) >= 0:
        yield {"window_left": -1, "window_right": -1}
    if set(setting.patterns) != {"normal"}:
        yield {"patterns": ("normal",) * len(setting)}
    if setting.dtype != "float16":
        yield {"dtype": "float16"}


def _plainer_ways(way: Way) -> Iterator[Way]:
    if way.others:
        yield replace(way, others=False)
    if way.layout != "bhsd":
        yield replace(way, layout="bhsd")
    if len(way.cuts) > 1:
        yield replace(way, cuts=way.cuts[:1])
        yield replace(way, cuts=way.cuts[-1:])
    if way.shared:
        yield replace(way, shared=False)
    if way.together > 1:
        yield replace(way, together=max(2, way.together // 2)) if way.together > 2 else replace(way, together=1)
