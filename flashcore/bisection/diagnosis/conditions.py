"""Say what the wrong calls have in common that no right call has: a mask, a length, a dtype, a kind of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from flashcore.bisection.diagnosis.screening import Inputs, Screened

TILES = (64, 128, 32, 16)
"""Numbers of keys or rows whose multiples kernels treat in another way than the rest."""
Condition = tuple[str, Callable[[Inputs], bool]]


def condition(screened: Sequence[Screened]) -> str | None:
    """The words of the plainest condition that parts the wrong calls from the right ones; None where none does.

    Ordinary inputs speak first: unusual ones may hide a bug, or show one that needs large numbers, whatever the shape.

    Parameters
    ----------
    screened
        Calls that were not refused.
    """
    ordinary = [s for s in screened if s.inputs.pattern == "normal" and not s.inputs.strided]
    for calls in (ordinary, list(screened)):
        wrong = [s.inputs for s in calls if s.wrong]
        right = [s.inputs for s in calls if not s.wrong]
        if not wrong:
            continue
        if not right:
            return None
        for words, holds in _conditions(wrong, right):
            if all(holds(one) for one in wrong) and not any(holds(one) for one in right):
                return words
        return None
    return None


def _conditions(wrong: list[Inputs], right: list[Inputs]) -> Iterator[Condition]:
    """Conditions that fit the first wrong call, the plainest first; with what bounds the right calls leave."""
    first = wrong[0].problem
    simple = list(_simple(first))
    yield from simple
    yield from _of_inputs(wrong)
    for name, words in (("seqlen_k", "keys"), ("seqlen_q", "rows"), ("batch", "sequences"), ("num_heads_q", "heads")):
        most = max(getattr(one.problem, name) for one in right)
        yield f"with more than {most} {words}", lambda one, n=name, m=most: getattr(one.problem, n) > m
        least = min(getattr(one.problem, name) for one in right)
        yield f"with fewer than {least} {words}", lambda one, n=name, m=least: getattr(one.problem, n) < m
    for i, (words, holds) in enumerate(simple):
        for more, also in simple[i + 1 :]:
            yield f"{words} and {more}", lambda one, a=holds, b=also: a(one) and b(one)


def _simple(first) -> Iterator[Condition]:
    """One look at the problem each: what is true of the first wrong one."""
    group = first.num_heads_q // first.num_heads_kv
    told: tuple[tuple[str, Callable], ...] = (
        ("with a causal mask", lambda p: p.causal),
        ("without a mask", lambda p: not p.causal),
        ("with a softmax_scale below 0", lambda p: (p.softmax_scale or 0.0) < 0),
        ("with a softmax_scale of their own", lambda p: p.softmax_scale is not None),
        ("without a softmax_scale of their own", lambda p: p.softmax_scale is None),
        (f"in {first.dtype}", lambda p: p.dtype == first.dtype),
        (f"with head_dim {first.head_dim}", lambda p: p.head_dim == first.head_dim),
        ("with one row", lambda p: p.seqlen_q == 1),
        ("with more than one row", lambda p: p.seqlen_q > 1),
        ("with as many rows as keys", lambda p: p.seqlen_q == p.seqlen_k),
        ("with fewer rows than keys", lambda p: p.seqlen_q < p.seqlen_k),
        ("with more rows than keys", lambda p: p.seqlen_q > p.seqlen_k),
        ("with unequal numbers of rows and keys", lambda p: p.seqlen_q != p.seqlen_k),
        ("with one sequence", lambda p: p.batch == 1),
        ("with more than one sequence", lambda p: p.batch > 1),
        ("with an odd number of sequences", lambda p: p.batch % 2 == 1),
        ("with a K/V head for each query head", lambda p: p.num_heads_q == p.num_heads_kv),
        ("with grouped heads", lambda p: p.num_heads_q != p.num_heads_kv),
        ("with one K/V head", lambda p: p.num_heads_kv == 1),
        ("with more than one K/V head", lambda p: p.num_heads_kv > 1),
        (f"with {group} query heads a K/V head", lambda p: p.num_heads_q // p.num_heads_kv == group),
        ("with one head", lambda p: p.num_heads_q == 1),
        ("with more than one head", lambda p: p.num_heads_q > 1),
        *((f"whose keys are no multiple of {t}", lambda p, t=t: p.seqlen_k % t > 0) for t in TILES),
        *((f"whose keys are a multiple of {t}", lambda p, t=t: p.seqlen_k % t == 0) for t in TILES),
        *((f"whose rows are no multiple of {t}", lambda p, t=t: p.seqlen_q % t > 0) for t in TILES),
        ("whose head_dim is no power of 2", lambda p: p.head_dim & (p.head_dim - 1) > 0),
        (f"with a head_dim other than {64 if first.head_dim != 64 else 128}",
         lambda p: p.head_dim != (64 if first.head_dim != 64 else 128)),
    )  # fmt: skip
    for words, holds in told:
        if holds(first):
            yield words, lambda one, holds=holds: holds(one.problem)


def _of_inputs(wrong: list[Inputs]) -> Iterator[Condition]:
    """Conditions on the numbers and how they lie in memory."""
    patterns = list(dict.fromkeys(one.pattern for one in wrong))
    names = " or ".join(f"'{name}'" for name in patterns)
    if len(patterns) <= 3:
        yield f"with inputs {names}", lambda one: one.pattern in patterns
    yield "with strided inputs", lambda one: one.strided
    yield "without a softmax_scale in the call", lambda one: one.default_scale
