"""The promises that users of attention count on, each with the cases that it is asked on and the function that asks.

A case is first asked as it is. Where that goes wrong, its plain twin is asked: the same problem from ordinary tensors,
or an ordinary problem. Only where the twin is right does the break belong to the promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from flashcore.bisection.diagnosis.calling import Answer, Candidate, Refusal, same_bits
from flashcore.errors import InvalidProblem, UnknownName
from flashcore.measure import check
from flashcore.numerics import reference
from flashcore.numerics.inputs import make_inputs
from flashcore.numerics.tolerance import compare
from flashcore.paging import PagedKV, paginate
from flashcore.problem import Problem

TILE_LENGTHS = (63, 64, 65, 127, 129, 197, 777)
"""Lengths around the tiles that kernels have."""
GROUPS = (1, 2, 3, 4, 8)
"""Query heads for each K/V head."""
SCALES = (1e-6, 30.0, -0.125, 0.0)
HUGE = ("large", "steep", "sunken", "rising", "falling")
"""Patterns of inputs whose scores run far."""
ROOM_ROWS = 256
"""Rows of NaN before and after a tensor: no kernel reads a larger tile."""
HIDDEN_FROM, HIDDEN_LENGTH = 768, 1024
"""First key that holds NaN where a mask hides it, and all keys; see `masked`."""
WIDEST_TILE = 256
"""Rows or keys of the widest tile that a kernel is expected to have."""
DELAY = 10 * check.DELAY_CYCLES
"""Cycles of a GPU's clock, about 10 ms: so long do inputs arrive after a call on a side stream."""
REPLAYS = 3
REPEATS = 3


@dataclass(frozen=True)
class Asked:
    """One case of a promise."""

    problem: Problem
    home: Problem
    """An ordinary problem that the function takes."""
    key: str = ""
    """Which kind of case it is, for the function that asks."""
    way: str = ""
    """The same in words."""

    def label(self) -> str:
        """In words, as a break names it."""
        return ", ".join(filter(None, (self.problem.label(), self.way)))


Ask = Callable[[Candidate, Asked], str | None]
"""Asks one case: None when the promise is kept, else the break as a clause. Raises `Refusal` and `Broken`."""


@dataclass(frozen=True)
class Promise:
    """What a user of attention counts on, and how a function is asked whether it keeps it."""

    id: str
    name: str
    sentence: str
    """The promise itself."""
    how: str
    """What is done to find out."""
    cases: Callable[[Problem], Iterable[tuple[dict, str, str]]]
    """From an ordinary problem: changes to it, the key and the way of each case, the smallest first."""
    ask: Ask
    plain: Ask | None = None
    """The plain twin of a case; None where there is none."""
    suits: Callable[[Asked], bool] = lambda asked: True
    """Whether a case is one of this promise: what a smaller case still has to be."""
    why_not: Callable[[Candidate], str] = lambda candidate: ""
    """Why it does not apply, as a clause; empty when it does."""
    binding: bool = True
    """Whether not keeping it is a fault; of others the table only says who keeps them."""

    def all_cases(self, candidate: Candidate, home: Problem) -> Iterator[Asked]:
        """The cases that make sense for this function, each once."""
        seen = set()
        for changes, key, way in self.cases(home):
            try:
                problem = home.with_(**changes)
            except InvalidProblem:  # heads that do not divide
                continue
            problem = candidate.backend.suits(problem) if candidate.backend else problem
            if "causal" not in candidate.takes and problem.causal != home.causal:
                continue
            asked = Asked(problem, home, key, way)
            if self.suits(asked) and asked not in seen:
                seen.add(asked)
                yield asked


# --- judging an answer -------------------------------------------------------------------------------------------


def _inputs(candidate: Candidate, problem: Problem, **options) -> tuple[torch.Tensor, ...]:
    return make_inputs(problem, device=candidate.device, **options)


def _case(candidate: Candidate, q, k, v, problem: Problem) -> check.Case:
    return check.expected(q, k, v, problem, round_scores=candidate.rounds_scores)


def _wrong(
    answer: Answer, case: check.Case, *, truth: tuple | None = None, rows: torch.Tensor | None = None,
    slack: float = 1.0,
) -> str | None:  # fmt: skip
    """What is wrong with an answer, as a clause.

    Parameters
    ----------
    truth
        ``out`` and ``lse`` to compare with in place of the case's, which then gives the bounds alone. Where they are
        NaN a finite output is wrong too, since it hides that there is no answer.
    rows
        ``bool [seqlen_q]``: rows that are judged; None for all.
    slack
        Multiplies the bounds.
    """
    out, lse = truth or (case.out, case.lse)
    parts = [("out", answer.out, out, case.out_atol, case.out_rtol)]
    if answer.lse is not None:
        parts.append(("lse", answer.lse, lse, case.lse_atol, case.lse_rtol))
    for name, got, true, atol, rtol in parts:
        judged = torch.ones_like(true, dtype=torch.bool)
        if rows is not None:
            judged &= rows.view(1, 1, -1, *[1] * (true.dim() - 3))
        undefined = judged & true.isnan()
        hidden = undefined & got.isfinite()
        if name == "out" and bool(hidden.any()):
            place = ", ".join(f"{axis} {int(n)}" for axis, n in zip(
                ("batch", "head", "row", "column"), hidden.nonzero()[0], strict=True))  # fmt: skip
            return f"{int(hidden.sum())} elements are finite where float64 gives NaN; first at {place}"
        judged &= ~undefined
        found = compare(torch.where(judged, got.double(), 0.0), torch.where(judged, true.double(), 0.0),
                        atol=slack * atol, rtol=rtol)  # fmt: skip
        if not found.passed:
            return f"{name}: {found.sentence()}"
    return None


def _rows_that_see(problem: Problem, device) -> torch.Tensor:
    """Rows that see at least one key, ``bool [seqlen_q]``; those that see none have a promise of their own."""
    empty = max(0, problem.seqlen_q - problem.seqlen_k) if problem.causal else 0
    return torch.arange(problem.seqlen_q, device=device) >= empty


def right(candidate: Candidate, asked: Asked) -> str | None:
    """Ordinary tensors, in the pattern that the key names."""
    problem = asked.problem
    return _asked(candidate, problem, _inputs(candidate, problem, pattern=asked.key or "normal"))


def _asked(candidate: Candidate, problem: Problem, given, *, as_given: bool = False) -> str | None:
    """Call it on these tensors and judge the rows that see a key.

    What is expected is computed first, so that a call which writes into its inputs is judged by what it was given.
    """
    case = _case(candidate, *given, problem)
    answer, _ = candidate.ask(*given, problem, as_given=as_given)
    return _wrong(answer, case, rows=_rows_that_see(problem, case.out.device))


def plain(candidate: Candidate, asked: Asked) -> str | None:
    """The same problem, from ordinary tensors and with the usual scale."""
    usual = asked.problem.with_(softmax_scale=asked.home.softmax_scale)
    return right(candidate, Asked(usual, asked.home))


def at_home(candidate: Candidate, asked: Asked) -> str | None:
    """An ordinary problem with the same mask and dtype."""
    usual = asked.home.with_(dtype=asked.problem.dtype, causal=asked.problem.causal)
    return right(candidate, Asked(usual, asked.home))


# --- where it does not apply -------------------------------------------------------------------------------------


def _needs_causal(candidate: Candidate) -> str:
    return "" if "causal" in candidate.takes else "it takes no causal option"


def _needs_scale(candidate: Candidate) -> str:
    return "" if "softmax_scale" in candidate.takes else "it takes no softmax_scale"


def _needs_cuda(candidate: Candidate) -> str:
    return "" if torch.device(candidate.device).type == "cuda" else "a CPU has no streams and no CUDA graphs"


def _needs_pages(candidate: Candidate) -> str:
    return "" if candidate.backend and candidate.backend.paged else "it reads no page table"


# --- masks -------------------------------------------------------------------------------------------------------


def empty_rows(candidate: Candidate, asked: Asked) -> str | None:
    """Rows before the first key: exactly 0, and lse -inf."""
    problem = asked.problem
    answer, _ = candidate.ask(*_inputs(candidate, problem), problem)
    empty = problem.seqlen_q - problem.seqlen_k
    out = answer.out[:, :, :empty]
    bad = (out != 0).nonzero()  # NaN is not 0 either
    if len(bad):
        batch, head, row, column = bad[0].tolist()
        value = float(out[batch, head, row, column])
        return f"row {row} sees no key, and its output is {value:.6g} where 0 is meant (batch {batch}, head {head})"
    if answer.lse is not None:
        lse = answer.lse[:, :, :empty]
        bad = (lse != -math.inf).nonzero()
        if len(bad):
            batch, head, row = bad[0].tolist()
            return f"row {row} sees no key, and its lse is {float(lse[batch, head, row]):.6g} where -inf is meant"
    return None


def masked(candidate: Candidate, asked: Asked) -> str | None:
    """NaN in all keys from `HIDDEN_FROM` on; judged are rows two of the widest tiles before them.

    The tile of rows that such a row lies in ends before the first NaN, and so does every tile of keys that it needs.
    """
    problem = asked.problem
    q, k, v = _inputs(candidate, problem)
    case = _case(candidate, q, k, v, problem)
    given = {"k": k, "v": v}
    given[asked.key] = given[asked.key].clone()
    given[asked.key][:, :, HIDDEN_FROM:] = math.nan
    answer, _ = candidate.ask(q, given["k"], given["v"], problem)
    rows = torch.arange(problem.seqlen_q, device=q.device) < HIDDEN_FROM - 2 * WIDEST_TILE
    return _wrong(answer, case, rows=rows)


# --- what lies in memory -----------------------------------------------------------------------------------------


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


def _from_views(candidate: Candidate, asked: Asked, fill: float, names: str = "qkv") -> str | None:
    """Judge a call on views of larger pieces of memory, and look whether it wrote beside them."""
    problem = asked.problem
    given = dict(zip("qkv", _inputs(candidate, problem), strict=True))
    case = _case(candidate, *given.values(), problem)
    rooms = {}
    kind = "one element late" if asked.key in ("q", "k", "v", "all") else asked.key
    for name in names:
        given[name], rooms[name] = _laid_out(candidate, given[name], kind, fill)
    before = {name: room.clone() for name, room in rooms.items()}
    answer, changed = candidate.ask(*given.values(), problem, as_given=True)
    for name, room in rooms.items():
        if not changed and not same_bits(room, before[name]):
            return f"it writes into memory beside its input {name}"
    return _wrong(answer, case, rows=_rows_that_see(problem, case.q.device))


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
    q, k, v = _inputs(candidate, problem)
    return _asked(candidate, problem, (q, k[:1].expand_as(k), v[:1].expand_as(v)), as_given=True)


def orders(candidate: Candidate, asked: Asked) -> str | None:
    """The same numbers in another order of memory."""
    problem = asked.problem
    layout = asked.key
    if layout == "other":
        layout = "bshd" if candidate.layout == "bhsd" else "bhsd"
    return _asked(candidate, problem, _inputs(candidate, problem, layout=layout), as_given=True)


# --- numbers -----------------------------------------------------------------------------------------------------


def planted(candidate: Candidate, asked: Asked) -> str | None:
    """One infinity or NaN in one tensor, at the middle of the first head; judged by float64 on the same inputs.

    The bounds are twice those of the inputs without it, as one key more or less changes them a little.
    """
    problem = asked.problem
    tensors = dict(zip("qkv", _inputs(candidate, problem), strict=True))
    case = _case(candidate, *tensors.values(), problem)
    name, value = asked.key.split()
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0, tensors[name].shape[2] // 2, 0] = float(value)
    truth = reference.attention(*tensors.values(), problem)
    answer, _ = candidate.ask(*tensors.values(), problem)
    return _wrong(answer, case, truth=truth, slack=2.0)


# --- bits --------------------------------------------------------------------------------------------------------


def _bits(answer: Answer) -> list[torch.Tensor]:
    """Copies, so that a function that fills one buffer again and again is compared with what it gave before."""
    return [t.clone() for t in (answer.out, answer.lse) if t is not None]


def _differ(first: list[torch.Tensor], second: list[torch.Tensor]) -> str | None:
    for name, one, other in zip(("out", "lse"), first, second, strict=False):
        if not same_bits(one.contiguous(), other.contiguous()):
            different = ~((one == other) | (one.isnan() & other.isnan()))
            worst = float((one.double() - other.double()).abs().nan_to_num(nan=math.inf, posinf=math.inf).max())
            return f"{int(different.sum())} of {one.numel()} elements of {name} have other bits, by up to {worst:.3g}"
    return None


def repeats(candidate: Candidate, asked: Asked) -> str | None:
    """The same call a few times."""
    problem = asked.problem
    q, k, v = _inputs(candidate, problem)
    # Each call gets copies of its own, so that one which writes into its inputs changes nothing for the next.
    seen = [_bits(candidate.ask(q.clone(), k.clone(), v.clone(), problem)[0]) for _ in range(REPEATS)]
    return next(filter(None, (_differ(seen[0], later) for later in seen[1:])), None)


def steady(candidate: Candidate, asked: Asked) -> str | None:
    """Right, and with the same bits each time: what bits beside other neighbours can be compared for."""
    return plain(candidate, asked) or repeats(candidate, asked)


def neighbours(candidate: Candidate, asked: Asked) -> str | None:
    """Other values in the other batches, or in the other K/V heads; the shape stays."""
    problem, what = asked.problem, asked.key.split()[0]
    group = problem.num_heads_q // problem.num_heads_kv
    first = _inputs(candidate, problem)
    second = []
    for mine, other, heads in zip(first, _inputs(candidate, problem, seed=1), (group, 1, 1), strict=True):
        changed = other.fill_(math.nan) if asked.key.endswith("NaN") else other
        part = (slice(0, 1),) if what == "batch" else (slice(None), slice(0, heads))
        changed[part] = mine[part]
        second.append(changed)
    kept = (slice(0, 1),) if what == "batch" else (slice(None), slice(0, group))
    one, other = (_bits(candidate.ask(*given, problem)[0]) for given in (first, second))
    return _differ([t[kept] for t in one], [t[kept] for t in other])


def alone(candidate: Candidate, asked: Asked) -> str | None:
    """The first batch, or the first K/V head with its query heads, in a call of its own."""
    problem = asked.problem
    group = problem.num_heads_q // problem.num_heads_kv
    given = _inputs(candidate, problem)
    whole = _bits(candidate.ask(*(t.clone() for t in given), problem)[0])
    if asked.key == "batch":
        part, fewer = [t[:1] for t in given], problem.with_(batch=1)
        whole = [t[:1] for t in whole]
    else:
        part = [t[:, :n].contiguous() for t, n in zip(given, (group, 1, 1), strict=True)]
        fewer = problem.with_(num_heads_q=group, num_heads_kv=1)
        whole = [t[:, :group] for t in whole]
    return _differ(whole, _bits(candidate.ask(*part, fewer)[0]))


def inputs_stay(candidate: Candidate, asked: Asked) -> str | None:
    """Q, K and V hold the same bits after the call."""
    problem = asked.problem
    _, changed = candidate.ask(*_inputs(candidate, problem), problem)
    return changed[:1].lower() + changed[1:].rstrip(".") if changed else None


# --- the GPU's order of work -------------------------------------------------------------------------------------


def side_stream(candidate: Candidate, asked: Asked) -> str | None:
    """On a stream of its own, where the inputs hold NaN until some time after the call was made."""
    problem = asked.problem
    clean = _inputs(candidate, problem)
    case = _case(candidate, *clean, problem)
    candidate.ask(*(t.clone() for t in clean), problem)  # what is compiled at the first call is compiled now
    given = [torch.full_like(t, math.nan) for t in clean]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(DELAY)
        for tensor, values in zip(given, clean, strict=True):
            tensor.copy_(values)
        # In its own layout already: a copy made here would be on the right stream, and hide who reads on another.
        answer, _ = candidate.ask(*given, problem, as_given=True)
        answer = Answer(*(None if t is None else t.clone() for t in (answer.out, answer.lse)))
    torch.cuda.synchronize()
    return _wrong(answer, case, rows=_rows_that_see(problem, case.q.device))


def graph_replay(candidate: Candidate, asked: Asked) -> str | None:
    """Captured once in a CUDA graph, replayed on other values at the same addresses, its output erased in between."""
    problem = asked.problem
    values = [_inputs(candidate, problem, seed=seed) for seed in range(REPLAYS)]
    given = tuple(t.clone() for t in values[0])
    passed = candidate.handed(given, as_given=True)
    candidate.ask(*given, problem, as_given=True)  # a problem that it does not take is refused here, in its own words
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            candidate.call(*passed, problem, False)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            result = candidate.call(*passed, problem, False)
    except Exception as error:
        said = " ".join(str(error).split())[:300] or "no message"
        raise Refusal(f"it cannot be captured in a CUDA graph: {type(error).__name__}: {said}") from error
    for number, now in enumerate((*values[1:], values[0]), start=1):
        for tensor, fresh in zip(given, now, strict=True):
            tensor.copy_(fresh)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.detach().fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        answer = candidate.answer(result, given[0])
        wrong = _wrong(answer, _case(candidate, *now, problem), rows=_rows_that_see(problem, given[0].device))
        if wrong:
            return f"at replay {number} of one captured call, {wrong}"
    return None


def stale_pages(candidate: Candidate, asked: Asked) -> str | None:
    """One call, then other pages, table and lengths at the same addresses, a key fewer; NaN in every unused slot."""
    problem, backend = asked.problem, candidate.backend
    reason = backend.why_not(problem) or backend.why_not_paged(problem)
    if reason:
        raise Refusal(reason)
    q, k, v = _inputs(candidate, problem)
    _, k2, v2 = _inputs(candidate, problem, seed=1)
    shorter = problem.with_(seqlen_k=problem.seqlen_k - 1)
    dense = (q, k2[:, :, :-1], v2[:, :, :-1])
    case = _case(candidate, *dense, shorter)
    cache, other = paginate(k, v, problem.page_size), _paged_among_nan(*dense[1:], problem)
    try:
        backend.run_paged(q, cache, problem)
        moved = torch.arange(cache.num_pages, device=q.device).flip(0)
        cache.k_pool.copy_(other.k_pool[moved])
        cache.v_pool.copy_(other.v_pool[moved])
        cache.page_table.copy_(moved[other.page_table.long()])
        cache.lengths.copy_(other.lengths)
        answer = Answer(*backend.run_paged(q, cache, problem))
    except Exception as error:
        raise Refusal(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return _wrong(answer, case, rows=_rows_that_see(shorter, q.device))


def _paged_among_nan(k: torch.Tensor, v: torch.Tensor, problem: Problem) -> PagedKV:
    """Pages for one key more than there are, NaN in the slot of that key."""
    longer = [torch.nn.functional.pad(t, (0, 0, 0, 1), value=math.nan) for t in (k, v)]
    cache = paginate(*longer, problem.page_size)
    cache.lengths.fill_(k.shape[2])
    return cache


# --- the registry ------------------------------------------------------------------------------------------------


def _usual(home: Problem, key: str = "", way: str = "") -> Iterator[tuple[dict, str, str]]:
    for causal in (False, True):
        yield {"causal": causal}, key, way


def _both_masks(*ways: tuple[str, str]) -> Callable[[Problem], Iterator[tuple[dict, str, str]]]:
    """Each way without and with a causal mask."""
    return lambda home: (one for key, way in ways for one in _usual(home, key, way))


def _without_mask(*ways: tuple[str, str]) -> Callable[[Problem], Iterator[tuple[dict, str, str]]]:
    return lambda home: (({"causal": False}, key, way) for key, way in ways)


def _lengths(*pairs: tuple[int, int], causal: bool) -> list[tuple[dict, str, str]]:
    return [({"seqlen_q": rows, "seqlen_k": keys, "causal": causal}, "", "") for rows, keys in pairs]


def _unequal(home: Problem) -> list[tuple[dict, str, str]]:
    some = ((1, 1), (1, 130), (8, 130), (40, 130))
    return [*_lengths(*some, (5, 1), (130, 1), (130, 77), causal=False), *_lengths(*some, (130, 77), causal=True)]


def _around_tiles(home: Problem) -> list[tuple[dict, str, str]]:
    one = {"batch": 1, "num_heads_q": 1, "num_heads_kv": 1}
    return [({**one, "seqlen_q": n, "seqlen_k": n, "causal": causal}, "", "")
            for n in TILE_LENGTHS for causal in (False, True)]  # fmt: skip


def _groups(home: Problem) -> list[tuple[dict, str, str]]:
    return [({"batch": 1, "num_heads_kv": kv, "num_heads_q": kv * group}, "", "")
            for kv in (1, 2) for group in GROUPS]  # fmt: skip


def _empty(home: Problem) -> list[tuple[dict, str, str]]:
    return _lengths((2, 1), (8, 5), (100, 37), (130, 1), (192, 64), causal=True)


def _scales(home: Problem) -> list[tuple[dict, str, str]]:
    return [({"softmax_scale": scale, "causal": causal}, "", "") for scale in SCALES for causal in (False, True)]


def _huge(home: Problem) -> list[tuple[dict, str, str]]:
    dtypes = dict.fromkeys((home.dtype, "float16", "bfloat16"))
    return [({"dtype": dtype}, pattern, f"inputs '{pattern}'") for dtype in dtypes for pattern in HUGE]


def _hidden(home: Problem) -> list[tuple[dict, str, str]]:
    shape = {"batch": 1, "num_heads_q": 1, "num_heads_kv": 1, "seqlen_q": HIDDEN_LENGTH, "seqlen_k": HIDDEN_LENGTH}
    return [({**shape, "causal": True}, key, f"NaN in {key.upper()} from key {HIDDEN_FROM} on") for key in "kv"]


def _beside(home: Problem) -> list[tuple[dict, str, str]]:
    group = home.num_heads_q // home.num_heads_kv
    heads = {"num_heads_kv": 2, "num_heads_q": 2 * group}
    return [({"batch": max(2, home.batch)}, "batch other", "other values in the other batches"),
            ({"batch": max(2, home.batch)}, "batch NaN", "NaN in the other batches"),
            (heads, "head other", "other values in the other K/V heads"),
            (heads, "head NaN", "NaN in the other K/V heads")]  # fmt: skip


CROWD = 24
"""Batches of which one is called alone too."""


def _single(home: Problem) -> list[tuple[dict, str, str]]:
    group = home.num_heads_q // home.num_heads_kv
    # Few rows of many keys: alone they leave a GPU idle, so there a kernel may share out the keys in another way.
    crowd = {"seqlen_q": min(home.seqlen_q, 64), "seqlen_k": 768}
    return [({"batch": max(2, home.batch)}, "batch", "the first batch alone"),
            ({**crowd, "batch": CROWD}, "batch", f"the first of {CROWD} batches alone"),
            ({"num_heads_kv": 2, "num_heads_q": 2 * group}, "head", "the first K/V head alone")]  # fmt: skip


def _paged(home: Problem) -> list[tuple[dict, str, str]]:
    few = {"seqlen_q": min(8, home.seqlen_q), "causal": True}
    return [({**few, "seqlen_k": keys, "page_size": size}, "", "") for keys, size in ((17, 16), (100, 16), (300, 64))]


def _has_neighbours(asked: Asked) -> bool:
    return (asked.problem.batch if asked.key.startswith("batch") else asked.problem.num_heads_kv) > 1


PROMISES: tuple[Promise, ...] = (
    Promise("P1", "ordinary problems", "Ordinary inputs give what float64 gives, within bounds.",
            "every element of `out` and `lse`, with and without a causal mask", _both_masks(("", "")), right),
    Promise("P2", "empty rows", "A row that sees no key gives 0, and lse -inf.",
            "a causal mask with more queries than keys", _empty, empty_rows, at_home,
            lambda a: a.problem.causal and a.problem.seqlen_q > a.problem.seqlen_k, _needs_causal),
    Promise("P3", "unequal lengths", "Any two lengths go together: fewer keys or more, one query, one key.",
            "lengths from 1 to 130, with and without a causal mask", _unequal, right, at_home),
    Promise("P4", "lengths around tiles", "Lengths just below, at and just above a tile are like any other.",
            f"lengths {', '.join(map(str, TILE_LENGTHS))}", _around_tiles, right, at_home),
    Promise("P5", "every group", "Any number of query heads may share a K/V head.",
            f"groups of {', '.join(map(str, GROUPS))} query heads", _groups, right, at_home),
    Promise("P6", "past the end", "Memory that is not part of Q, K or V has no influence, and is not written.",
            "views of larger buffers full of NaN: before and after, between heads, beside rows",
            _both_masks(("around", "NaN before and after each tensor"), ("rows", "NaN before and after each length"),
                        ("columns", "NaN beside each row")), past_the_end, past_the_end_plain),
    Promise("P7", "masked keys not read", "Keys that the mask hides from every row of a tile are not read.",
            f"NaN in the keys from {HIDDEN_FROM} on; rows far before them are judged", _hidden, masked, plain,
            lambda a: a.problem.causal and a.problem.seqlen_q == a.problem.seqlen_k == HIDDEN_LENGTH, _needs_causal,
            binding=False),
    Promise("P8", "infinities", "An infinity in a key or a query does what it does in float64, and nothing elsewhere.",
            "one element +inf or -inf", _without_mask(*((f"{n} {value}", f"{value} in one element of {n.upper()}")
            for n in "kq" for value in ("inf", "-inf"))), planted, plain),
    Promise("P9", "NaN shows, and where it belongs", "A NaN in an input shows in the outputs that depend on it, "
            "and in no other.", "one element NaN",
            _without_mask(*((f"{n} nan", f"NaN in one element of {n.upper()}") for n in "qkv")), planted, plain),
    Promise("P10", "misaligned starts", "A tensor may begin at any element.",
            "each of Q, K and V, and all of them, one element past an aligned address",
            _without_mask(*((name, f"{name if name == 'all' else name.upper()} one element late")
                            for name in ("q", "k", "v", "all"))), misaligned, plain),
    Promise("P11", "odd strides", "Strides of rows, heads and batches are free.",
            "rows head_dim + 3 elements apart, heads an odd number apart, a batch stride of 0",
            _both_masks(("odd rows", "rows head_dim + 3 elements apart"), ("odd heads", "heads an odd number apart"),
                        ("expanded", "K and V of one batch for all, by a stride of 0")), strides, plain),
    Promise("P12", "orders in memory", "Batch, heads and rows may lie in memory in any order, each tensor in its own.",
            "heads and rows swapped in all tensors, and each tensor otherwise",
            _both_masks(("other", "heads and rows swapped in memory"), ("apart", "each tensor in another order")),
            orders, plain),
    Promise("P13", "any scale", "softmax_scale may be tiny, large, negative or 0.",
            f"{', '.join(f'{scale:g}' for scale in SCALES)}", _scales, right, plain, why_not=_needs_scale),
    Promise("P14", "huge logits", "Scores that run far give no overflow: the maximum is subtracted in time.",
            "inputs 64 times normal, rising, falling, steep and far below zero, in 16 bits", _huge, right, plain),
    Promise("P15", "same bits again", "The same inputs give the same bits.", f"{REPEATS} calls", _both_masks(("", "")),
            repeats),
    Promise("P16", "bits do not hang on neighbours", "What other batches and heads hold changes no bit.",
            "other values, and NaN, in the other batches and in the other K/V heads", _beside, neighbours, steady,
            _has_neighbours),
    Promise("P17", "same bits alone", "A batch or a head alone has the bits that it has among others.",
            "the first batch and the first K/V head in a call of their own", _single, alone, steady, _has_neighbours,
            binding=False),
    Promise("P18", "inputs stay", "Q, K and V are as they were after the call.", "their bits before and after",
            _both_masks(("", "")), inputs_stay),
    Promise("P19", "current stream", "All work is on torch's current stream.",
            "on a side stream, with inputs that arrive after the call was made", _both_masks(("", "on a side stream")),
            side_stream, plain, why_not=_needs_cuda),
    Promise("P20", "graph replay", "A captured call computes with what its inputs hold when it is replayed.",
            "captured once, replayed on other values, the output erased before", _both_masks(("", "in a CUDA graph")),
            graph_replay, plain, why_not=_needs_cuda),
    Promise("P21", "stale tables", "Pages, table and lengths count as they are now, not as they were at a call before.",
            "moved pages, other values and a key fewer at the same addresses, NaN in every unused slot", _paged,
            stale_pages, None, lambda a: a.problem.seqlen_k > 1, why_not=_needs_pages),
)  # fmt: skip
"""In the order in which they are asked: the first says whether it makes sense to ask the others."""


def chosen(only: str | Iterable[str] | None) -> tuple[Promise, ...]:
    """The promises with these ids, in the order of the registry; all for None.

    Raises
    ------
    UnknownName
        No promise has such an id; the message lists those that exist.
    """
    if only is None:
        return PROMISES
    wanted = [one.strip().upper() for one in (only.split(",") if isinstance(only, str) else only)]
    known = [promise.id for promise in PROMISES]
    for one in wanted:
        if one not in known:
            raise UnknownName("promise", one, known)
    return tuple(promise for promise in PROMISES if promise.id in wanted)
